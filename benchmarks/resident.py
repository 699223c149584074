"""One workload run once in this process: what memory it took, as JSON on the last line.

Three meters, none of which counts what was there before the run:

- *resident*: the process's high-water mark, set back before the run through
  ``/proc/self/clear_refs``, less the resident size at that moment. It has everything: scratch
  memory of kernels, Python objects, what malloc keeps between uses.
- *allocator*: PyTorch's own record of its CPU allocations, which has scratch memory that kernels
  take as tensors but not what oneDNN and MKL take themselves. It is of a run of its own, since
  keeping the record takes memory.
- *tensors*: live storages, seen from the dispatcher; no scratch memory. A run of its own too.

malloc runs with its default settings: an mmap threshold that rises, up to 32 MiB, with what is
freed, and arenas of threads. Three things keep its resident size comparable. Before the run
``malloc_trim(0)`` gives the free pages of every arena back, so that no page left over from
lowering serves the run unseen. Kernels and their libraries are loaded, and their threads started,
by a small run of other tensors. And there is one call of the workload, not several, whose holes
would add up. What remains is fragmentation, which is real: the process does hold those pages.
"""

from __future__ import annotations

import ctypes
import gc
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from implementations import Call, compiled, data_of, unrolled
from torch import nn
from workloads import Problem, build

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tests.oracles.memory import allocator_peak, measure
from unrollc.plan.memory import MemoryPlan


def status(key: str) -> int:
    """Bytes of an entry of ``/proc/self/status``."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def resident_peak(run: Callable[[], Any]) -> tuple[int, float]:
    """Bytes of the high-water mark over the start, and seconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return status("VmHWM") - before, seconds


def load_kernels() -> None:
    """Load the code that a first convolution, product and backward pass load."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(2),
        nn.LayerNorm(2),
        nn.Tanh(),
    )
    loss = F.cross_entropy(net(torch.randn(2, 1, 8, 8)), torch.tensor([0, 1]))
    grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    sum(g.square().sum() for g in grads).backward()


def prepared(
    problem: Problem, implementation: str, memory: str | None
) -> tuple[Call, MemoryPlan | None]:
    """The call, with everything before the run done, and the plan of its memory."""
    if implementation == "higher":
        from higher_loop import higher_loop

        return higher_loop(problem), None
    if implementation == "torch.func":
        return unrolled(problem), None
    program, call = compiled(problem, memory)
    train, val = problem.tasks[0]
    lowered = program.lower(data_of(problem, train), val)
    return call, lowered.plan


def main(name: str, implementation: str, memory: str, steps: str) -> None:
    problem = build(name, int(steps) or None)
    call, plan = prepared(problem, implementation, memory or None)
    load_kernels()

    def fresh() -> None:
        for leaf in problem.leaves.values():
            leaf.grad = None
        call()

    resident, seconds = resident_peak(fresh)
    for leaf in problem.leaves.values():
        leaf.grad = None
    found = {
        "predicted": plan and plan.peak_bytes,
        "slots": plan and max(b.slab_bytes / max(b.lower_bound, 1) for b in plan.buffers.values()),
        "resident": resident,
        "allocator": allocator_peak(call),
        "seconds": seconds,
    }
    for leaf in problem.leaves.values():
        leaf.grad = None
    found["tensors"] = measure(call).peak
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
