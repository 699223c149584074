"""Measure workloads and write the results: ``python benchmarks/run.py``, or with some names.

Every implementation is first compared with ours in float64, then all are measured, interleaved, in
one run. Results go into ``benchmarks/results.json``, where entries of other workloads stay if they
are from the same machine and versions; ``benchmarks/report.py`` makes the page from it.

What takes minutes to compile (torch.compile over the whole loop) is measured only if it is named:
``--by torch.compile --by "unrollc aten"``; its earlier entries stay.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Annotated, Any

import typer
from machine import describe, gemm_rate, load
from measure import Settings, measured
from registry import BY_NAME, rows_of
from rich.console import Console
from tables import table_of
from workloads import WORKLOADS

RESULTS = pathlib.Path(__file__).with_name("results.json")


def merged(
    old: dict[str, Any] | None, machine: dict[str, Any], entries: list[dict[str, Any]]
) -> dict[str, Any]:
    """New entries in the place of old ones; old ones stay only beside the same machine."""
    new = {(e["workload"], e["implementation"], e["budget"]) for e in entries}
    kept = []
    if old is not None and _identity(old["machine"]) == _identity(machine):
        kept = [
            e for e in old["entries"] if (e["workload"], e["implementation"], e["budget"]) not in new
        ]
    order = {name: i for i, name in enumerate(WORKLOADS)}
    rank = {name: i for i, name in enumerate(BY_NAME)}

    def place(entry: dict[str, Any]) -> tuple[int, int]:
        return order[entry["workload"]], rank[entry["implementation"]]

    known = [e for e in kept if e["workload"] in order and e["implementation"] in rank]
    return {"machine": machine, "entries": sorted([*known, *entries], key=place)}


def _identity(machine: dict[str, Any]) -> Any:
    return machine["cpu"], machine["cores"], machine["threads"], machine["versions"]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Workloads; all by default.")] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Implementations; by default all but the slowest.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare in float64 first.")] = True,
    rounds: Annotated[int, typer.Option(help="Turns, of one timed call or more.")] = 5,
    steps: Annotated[int, typer.Option(help="T, if not the workload's own.")] = 0,
    limit: Annotated[float, typer.Option(help="Seconds to compile, in a pass of its own.")] = 300,
    output: Annotated[pathlib.Path, typer.Option(help="Where results go.")] = RESULTS,
) -> None:
    """Measure, print a table, write the results."""
    for given, known in ((names or [], WORKLOADS), (by or [], BY_NAME)):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    if steps and output == RESULTS:
        raise typer.BadParameter("another T than the workload's needs an --output of its own")
    console = Console(width=max(Console().width, 110))
    machine = describe() | {"gemm_rate": gemm_rate(), "load": load()}
    console.print(f"{machine['cpu']}: {machine['gemm_rate'] / 1e9:.0f} G operations/s in products")
    settings = Settings(rounds, check, steps, limit, lambda line: console.print(f"  {line}"))
    for workload in names or WORKLOADS:
        console.print(workload)
        chosen = [each.name for each in rows_of(workload, by)]
        entries = [
            entry | {"run": machine["date"]} for entry in measured(workload, chosen, settings)
        ]
        old = json.loads(output.read_text()) if output.exists() else None
        results = merged(old, machine, entries)
        output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        console.print(table_of(results, [workload]))


if __name__ == "__main__":
    sys.exit(typer.run(main))
