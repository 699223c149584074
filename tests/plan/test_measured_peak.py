"""Predicted peaks against measured ones: workloads at a reduced size, a fresh process each.

What is measured is the allocator's own record of a run, scratch memory of kernels included.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from memory import measured  # noqa: E402

#: Of the plan's peak; a run may also exceed a budget by this many bytes.
TOLERANCE, OVER = 0.05, 2 * 2**20

#: Name, number of inner steps, budget.
RUNS = [
    ("mlp", 80, None),
    ("learned-opt", 18, None),
    ("distill", 4, None),
    ("mlp", 80, "24MiB"),
]


def holds(found: dict[str, Any], budget: int | None) -> bool:
    predicted, allocated = found["predicted"], found["allocator"]
    if budget is not None and allocated > budget + OVER:
        return False
    return abs(allocated - predicted) <= TOLERANCE * predicted


@pytest.mark.parametrize(("name", "steps", "memory"), RUNS)
def test_the_predicted_peak_is_the_measured_one(name: str, steps: int, memory: str | None) -> None:
    budget = None if memory is None else int(memory.removesuffix("MiB")) * 2**20
    found = measured(name, "unrollc", memory, steps)
    assert budget is None or found["predicted"] <= budget
    assert holds(found, budget), found
    # The broken twins: a plan of another run, and a budget that was not kept.
    assert not holds(found | {"predicted": int(found["predicted"] * 1.1)}, budget)
    assert not holds(found, found["allocator"] - OVER - 1)
