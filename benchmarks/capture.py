"""What capturing an inner step costs: a few-shot network, and a language model of 12 layers.

Run: ``python benchmarks/capture.py``, or with ``lower`` behind it for whole lowerings as well. For
each model with SGD and with Adam, in a process of its own: the first capture, which imports and
compiles what PyTorch needs for tracing, and the median of later ones. A capture is one thread of
Python, so what counts is the CPU time; the clock's, beside it, grows with what else is running.

The models are conv4 of the examples (5 ways) and GPT-2 as `transformers` configures it by default:
12 layers, width 768, 12 heads, 50257 words. Everything is captured on fake tensors, so batch size
and length of the texts do not matter. Ends with an error if a later capture exceeds its bound.
"""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import unrollc
from unrollc.capture.batches import read_train
from unrollc.capture.loop import Loop, capture_loop
from unrollc.capture.naming import Names
from unrollc.capture.problem import Objective, Problem, take_stock

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

STEPS, REPEATS = 5, 5

#: Seconds of CPU that a capture may take.
BOUNDS = {"conv4": 3.0, "gpt2": 10.0}


def conv4() -> tuple[nn.Module, Any, list[Any], Any]:
    """Model, loss, training batches, validation batch."""
    from conv4 import Conv4

    def images(number: int) -> tuple[Tensor, Tensor]:
        return torch.randn(number, 1, 28, 28), torch.arange(number) % 5

    return Conv4(5), nn.CrossEntropyLoss(), [images(5)] * STEPS, images(75)


def gpt2() -> tuple[nn.Module, Any, list[Any], Any]:
    """A causal language model with its own loss."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    config = GPT2Config()
    texts = {"ids": torch.randint(config.vocab_size, (2, 16))}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch["ids"], labels=batch["ids"]).loss

    return GPT2LMHeadModel(config), unrollc.objective(loss), [texts] * STEPS, texts


MODELS = {"conv4": conv4, "gpt2": gpt2}


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of the CPU and of the clock, and what `run` returned."""
    start, clock = time.process_time(), time.perf_counter()
    result = run()
    return time.process_time() - start, time.perf_counter() - clock, result


def report(name: str, optimizer: str, whole: bool) -> bool:
    """Print what one combination costs; whether a later capture stays within its bound."""
    model, loss, train, val = MODELS[name]()
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)

    def captured() -> Loop:
        problem = Problem(model, opt, loss, loss)
        batches = read_train(train, paired=not isinstance(loss, Objective))
        return capture_loop(problem, take_stock(problem), batches, (), frozenset(), Names())

    measured = [timed(captured) for _ in range(1 + REPEATS)]
    loop = measured[-1][2]
    nodes = " and ".join(str(len(step.graph.nodes)) for step in loop.steps)
    later = [statistics.median(row[column] for row in measured[1:]) for column in (0, 1)]
    for when, (cpu, clock) in (("first", measured[0][:2]), ("later", later)):
        print(
            f"{name:5} {optimizer:4} {when} capture: {cpu:.2f} s of CPU, {clock:.2f} s "
            f"(graphs of {nodes} nodes; at most {BOUNDS[name]:.0f} s)",
            flush=True,
        )
    if whole:
        cpu, clock, _ = timed(lambda: unrollc.compile(model, opt, loss).lower(train, val))
        print(
            f"{name:5} {optimizer:4} whole lowering: {cpu:.1f} s of CPU, {clock:.1f} s", flush=True
        )
    return later[1] <= BOUNDS[name]


def main() -> None:
    whole = "lower" in sys.argv[1:]
    chosen = [argument for argument in sys.argv[1:] if argument != "lower"]
    if len(chosen) == 2:
        sys.exit(not report(*chosen, whole))
    failed = 0
    for name in MODELS:
        for optimizer in ("SGD", "Adam"):
            command = [sys.executable, __file__, name, optimizer, *(["lower"] if whole else [])]
            failed += subprocess.run(command, check=False).returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
