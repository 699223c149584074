"""Predicted memory against measured memory, for every workload and beside plain PyTorch.

Run: ``python benchmarks/memory.py``, or with names of workloads. Each measurement is one run of the
workload in a process of its own (`resident.py` says how, and what each column counts). The ratio
is that of the allocator's record to the plan's peak; what the resident size has beyond it is
malloc's: with its default settings the mmap threshold rises to the size of what was freed, so that
large tensors come from heaps whose holes stay resident. ``MALLOC_MMAP_THRESHOLD_=131072`` in the
environment takes that away (and time with it). *Slots* is the largest ratio of a graph's slab to
its lower bound.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS

ROOT = pathlib.Path(__file__).parents[1]
_COLUMNS = (
    *("budget", "predicted", "allocator", "ratio"),
    *("slots", "tensors", "resident", "seconds"),
)
RESIDENT = pathlib.Path(__file__).with_name("resident.py")


def measured(
    name: str, implementation: str = "unrollc", memory: str | None = None, steps: int = 0
) -> dict[str, Any]:
    """One run in a fresh process: bytes by meter, seconds, and the plan's peak.

    Raises:
        RuntimeError: If the process fails; its last line of output is the message.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        RESIDENT,
        name,
        implementation,
        memory or "",
        str(steps),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it was killed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def table_of() -> Table:
    table = Table(title="Memory of one call beyond its inputs, MiB", title_justify="left")
    table.add_column("workload")
    table.add_column("run by")
    for column in (
        "budget",
        "predicted",
        "allocator",
        "ratio",
        "slots",
        "tensors",
        "resident",
        "seconds",
    ):
        table.add_column(column, justify="right")
    return table


def cells(found: dict[str, Any]) -> list[str]:
    """The columns after the budget."""
    predicted, allocator = found["predicted"], found["allocator"]
    return [
        mib(predicted) if predicted else "",
        mib(allocator),
        f"{allocator / predicted:.3f}" if predicted else "",
        f"{found['slots']:.3f}" if predicted else "",
        mib(found["tensors"]),
        mib(found["resident"]),
        f"{found['seconds']:.2f}",
    ]


def mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Workloads; all by default.")] = None,
    steps: Annotated[int, typer.Option(help="T, if not the workload's own.")] = 0,
    peers: Annotated[bool, typer.Option(help="Measure torch.func and higher as well.")] = True,
) -> None:
    """Print a table of what each workload takes."""
    table, failures = table_of(), list[str]()
    for name in names or WORKLOADS:
        runs = [("unrollc", budget) for budget in WORKLOADS[name].budgets]
        runs += [("torch.func", None), ("higher", None)] if peers else []
        for implementation, budget in runs:
            try:
                row = cells(measured(name, implementation, budget, steps))
            except RuntimeError as error:
                failures.append(f"{name} by {implementation}: {error}")
                continue
            table.add_row(name, implementation, budget or "", *row)
    Console(width=max(Console().width, 110)).print(table, *failures, sep="\n")


if __name__ == "__main__":
    typer.run(main)
