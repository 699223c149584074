"""What deciding the requirements adds to lowering, on the conv4 problem of few-shot learning.

Run: ``python benchmarks/checking.py``. For SGD and Adam, each in a process of its own: the first
lowering, for which every kind of op is differentiated and sympy is imported, and the median of
later ones.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

import unrollc
from unrollc.runtime import lowering

WAYS, QUERIES, STEPS, REPEATS = 5, 75, 5, 5


def conv4(width: int = 64) -> nn.Module:
    """Four blocks of convolution, BatchNorm in training mode, ReLU and max-pooling."""
    layers: list[nn.Module] = []
    for channels in (1, width, width, width):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, WAYS))


def measure(optimizer: str) -> tuple[float, float]:
    """Seconds of one lowering, and of the requirements within it."""
    model = conv4()
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    support = (torch.randn(WAYS, 1, 28, 28), torch.arange(WAYS))
    query = (torch.randn(QUERIES, 1, 28, 28), torch.arange(QUERIES) % WAYS)
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent += time.perf_counter() - start
            return result

        return run

    with (
        mock.patch.object(lowering, "check_requirements", timed(lowering.check_requirements)),
        mock.patch.object(lowering, "settle_singularities", timed(lowering.settle_singularities)),
    ):
        start = time.perf_counter()
        program = unrollc.compile(model, opt, nn.CrossEntropyLoss())
        program.lower([support] * STEPS, query)
        return time.perf_counter() - start, spent


def report(optimizer: str) -> None:
    measured = [measure(optimizer) for _ in range(1 + REPEATS)]
    later = (statistics.median(column) for column in zip(*measured[1:], strict=True))
    for name, (total, spent) in (("first", measured[0]), ("later", tuple(later))):
        share = spent / (total - spent)
        print(
            f"{optimizer:5} {name}: lowering {total:.2f} s, of which requirements {spent:.3f} s: "
            f"they add {share:.1%}"
        )


def main() -> None:
    if len(sys.argv) > 1:
        report(sys.argv[1])
        return
    for optimizer in ("SGD", "Adam"):
        subprocess.run([sys.executable, __file__, optimizer], check=True)


if __name__ == "__main__":
    main()
