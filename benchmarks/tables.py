"""Results as rows of text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from results import Entry, Results, arithmetic_floor, best_peer, entries_of, median, quartiles
from results import label as label_of
from rich.table import Table

HEADS = (
    "run by",
    "ms a call",
    "middle half",
    "calls",
    "× best peer",
    "memory MiB",
    "planned MiB",
    "cold s",
    "warm s",
    "products ms",
    "apart",
)


def rows_of(results: Results, workload: str) -> list[list[str]]:
    """One row an entry, as `HEADS` says; ``no`` where there is no number."""
    peer = best_peer(results, workload)
    return [_row(results, entry, peer) for entry in entries_of(results, workload)]


def reasons(results: Results, workload: str) -> list[str]:
    """Why there is no number, for each row without one."""
    return [
        f"{label_of(entry)}: no: {entry['failed']}"
        for entry in entries_of(results, workload)
        if "failed" in entry
    ]


def _row(results: Results, entry: Entry, peer: Entry | None) -> list[str]:
    if "failed" in entry:
        return [label_of(entry), "no", *[""] * (len(HEADS) - 2)]
    floor = arithmetic_floor(results, entry)
    predicted = entry.get("predicted")
    low, high = quartiles(entry)
    return [
        label_of(entry),
        milliseconds(median(entry)),
        f"{milliseconds(low)} – {milliseconds(high)}",
        str(len(entry["seconds"])),
        "" if peer is None else f"{median(entry) / median(peer):.2f}",
        mebibytes(entry["resident"]),
        "" if predicted is None else mebibytes(predicted),
        f"{entry['cold']:.1f}",
        f"{entry['warm']:.1f}",
        "" if floor is None else milliseconds(floor),
        _apart(entry),
    ]


def _apart(entry: Entry) -> str:
    """The error, with T if another than what is measured."""
    agreement = entry.get("agreement")
    if agreement is None:
        return "not compared"
    shorter = "" if agreement["steps"] == entry["steps"] else f" (T = {agreement['steps']})"
    return f"{agreement['worst']:.0e}{shorter}"


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f}"


def table_of(results: Results, workload: str) -> Table:
    """For the terminal; the reasons stand below it."""
    caption = "\n".join(reasons(results, workload))
    table = Table(title=workload, title_justify="left", caption=caption, caption_justify="left")
    table.add_column(HEADS[0], no_wrap=True)
    for head in HEADS[1:]:
        table.add_column(head, justify="right")
    for row in rows_of(results, workload):
        table.add_row(*row)
    return table


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a page; the first column is text, the others are numbers."""
    line = [
        "| " + " | ".join(heads) + " |",
        "|---|" + "---:|" * (len(heads) - 1),
    ]
    return "\n".join([*line, *("| " + " | ".join(row) + " |" for row in rows)])
