"""Reading results: the entries of a workload, and which of a peer's rows counts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from registry import FLOOR, OURS

Entry = dict[str, Any]
Results = dict[str, Any]


def entries_of(results: Results, workload: str) -> list[Entry]:
    """The entries of a workload, in the order of the registry."""
    return [entry for entry in results["entries"] if entry["workload"] == workload]


def workloads_of(results: Results) -> list[str]:
    """The workloads that have entries."""
    return list(dict.fromkeys(entry["workload"] for entry in results["entries"]))


def median(entry: Entry) -> float:
    """Seconds of a call."""
    return statistics.median(entry["seconds"])


def quartiles(entry: Entry) -> tuple[float, float]:
    """Between which the middle half of the calls lies; one call is both."""
    if len(entry["seconds"]) == 1:
        return entry["seconds"][0], entry["seconds"][0]
    low, _, high = statistics.quantiles(entry["seconds"], n=4, method="inclusive")
    return low, high


def best(results: Results, workload: str, peer: str, budget: str | None = None) -> Entry | None:
    """A peer's fastest row; for ours, that of a budget."""
    rows = [
        entry
        for entry in entries_of(results, workload)
        if entry["peer"] == peer and entry["budget"] == budget and "failed" not in entry
    ]
    return min(rows, key=median, default=None)


def best_peer(results: Results, workload: str) -> Entry | None:
    """The fastest row of all that compute the meta-gradient and are not ours."""
    peers = {entry["peer"] for entry in entries_of(results, workload)} - {OURS, FLOOR}
    rows = [row for peer in peers if (row := best(results, workload, peer)) is not None]
    return min(rows, key=median, default=None)


def ours(results: Results, workload: str) -> Iterator[Entry]:
    """Our entries that were measured."""
    for entry in entries_of(results, workload):
        if entry["peer"] == OURS and "failed" not in entry:
            yield entry


def label(entry: Entry) -> str:
    """Implementation and budget."""
    budget = entry["budget"]
    return entry["implementation"] if budget is None else f"{entry['implementation']}, {budget}"


def arithmetic_floor(results: Results, entry: Entry) -> float | None:
    """Seconds that the products of our plan take at the measured rate of a large one."""
    operations = entry.get("operations")
    rate = results["runs"][entry["run"]]["gemm_rate"]
    return None if operations is None else operations / rate
