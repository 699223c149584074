"""Measure workloads and write the results: ``python benchmarks/run.py``, or with some names.

Every implementation is first compared with ours in float64, then all are measured, interleaved, in
one run. Results go into ``benchmarks/results.json``, where entries of other workloads stay if they
are from the same machine and versions; ``benchmarks/report.py`` makes the page from it.

What takes minutes to compile (torch.compile over the whole loop) is measured only if it is named:
``--by torch.compile``; else its earlier entries stay.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Annotated, Any

import typer
from machine import QUIET, describe, gemm_rate, load, now
from measure import Settings, measured
from registry import BY_NAME, rows_of
from results import Results
from rich.console import Console
from tables import table_of
from workloads import WORKLOADS

RESULTS = pathlib.Path(__file__).with_name("results.json")


def merged(old: Results | None, new: Results) -> Results:
    """New entries in the place of old ones; old ones stay only beside the same machine."""
    replaced = {_key(entry) for entry in new["entries"]}
    same = old is not None and old["machine"] == new["machine"]
    order = {name: i for i, name in enumerate(WORKLOADS)}
    rank = {name: i for i, name in enumerate(BY_NAME)}
    kept = [
        entry
        for entry in (old["entries"] if old is not None and same else [])
        if _key(entry) not in replaced
        and entry["workload"] in order
        and entry["budget"] in (None, *WORKLOADS[entry["workload"]].budgets)
        and entry["implementation"] in rank
    ]
    entries = [*kept, *new["entries"]]
    runs = (old["runs"] if old is not None and same else {}) | new["runs"]
    used = {entry["run"] for entry in entries}

    def place(entry: dict[str, Any]) -> tuple[int, int]:
        return order[entry["workload"]], rank[entry["implementation"]]

    return {
        "machine": new["machine"],
        "runs": {date: run for date, run in sorted(runs.items()) if date in used},
        "entries": sorted(entries, key=place),
    }


def _key(entry: dict[str, Any]) -> Any:
    return entry["workload"], entry["implementation"], entry["budget"]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Workloads; all by default.")] = None,
    by: Annotated[
        str | None, typer.Option(help="Implementations, comma between; else all but the slowest.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare in float64 first.")] = True,
    rounds: Annotated[int, typer.Option(help="Turns, of one timed call or more.")] = 5,
    steps: Annotated[int, typer.Option(help="T, if not the workload's own.")] = 0,
    limit: Annotated[float, typer.Option(help="Seconds that each may compile.")] = 300,
    output: Annotated[pathlib.Path, typer.Option(help="Where results go.")] = RESULTS,
) -> None:
    """Measure, print a table, write the results."""
    chosen = by.split(",") if by else None
    for given, known in ((names or [], WORKLOADS), (chosen or [], BY_NAME)):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    if steps and output == RESULTS:
        raise typer.BadParameter("another T than the workload's needs an --output of its own")
    console = Console(width=max(Console().width, 130))
    machine, date, busy, rate = describe(), now(), load(), gemm_rate()
    console.print(f"{machine['cpu']}: {rate / 1e9:.0f} G operations/s in products")
    if busy > QUIET:
        console.print(f"The machine is busy: load average {busy}. Numbers will be of little use.")
    run = {date: {"gemm_rate": rate, "load": busy}}
    settings = Settings(rounds, check, steps, limit, lambda line: console.print(f"  {line}"))
    for workload in names or WORKLOADS:
        console.print(workload)
        rows = [each.name for each in rows_of(workload, chosen)]
        entries = [entry | {"run": date} for entry in measured(workload, rows, settings)]
        old = json.loads(output.read_text()) if output.exists() else None
        results = merged(old, {"machine": machine, "runs": run, "entries": entries})
        output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        console.print(table_of(results, workload))


if __name__ == "__main__":
    sys.exit(typer.run(main))
