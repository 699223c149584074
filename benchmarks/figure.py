"""The figure of the results: run time and memory of each peer beside ours, by workload."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import matplotlib
from registry import IMPLEMENTATIONS, OURS
from results import Entry, Results, best, best_peer, median, ours, workloads_of

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

#: One colour a peer, in the order of the legend; these eight are told apart by the colour-blind
#: as well (Okabe & Ito 2008).
_COLOURS = ("#000000", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def draw(results: Results, path: pathlib.Path) -> None:
    """Two rows of bars, relative to the best peer: run time above, memory below."""
    workloads = [name for name in workloads_of(results) if best_peer(results, name) is not None]
    peers = [
        peer
        for peer in dict.fromkeys(each.peer for each in IMPLEMENTATIONS)
        if any(_fastest(results, name, peer) for name in workloads)
    ]
    figure, axes = plt.subplots(2, 1, figsize=(11, 6.5), sharex=True, layout="constrained")
    rows = (("run time", median), ("memory", lambda entry: float(entry["resident"])))
    for axis, (what, number) in zip(axes, rows, strict=True):
        _bars(axis, results, workloads, peers, number)
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_ylabel(f"{what} ÷ the fastest peer's")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    axes[1].set_xticks(range(len(workloads)), workloads)
    if peers:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(peers), frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _bars(
    axis: plt.Axes,
    results: Results,
    workloads: list[str],
    peers: list[str],
    number: Callable[[Entry], float],
) -> None:
    width = 0.85 / len(peers)
    for rank, peer in enumerate(peers):
        places, heights = [], []
        for position, workload in enumerate(workloads):
            fastest = best_peer(results, workload)
            row = _fastest(results, workload, peer)
            if row is not None and fastest is not None:
                places.append(position + (rank - (len(peers) - 1) / 2) * width)
                heights.append(number(row) / number(fastest))
        axis.bar(places, heights, width, label=peer, color=_COLOURS[rank])


def _fastest(results: Results, workload: str, peer: str) -> Entry | None:
    """A peer's row that counts; of ours the fastest over all budgets."""
    if peer == OURS:
        return min(ours(results, workload), key=median, default=None)
    return best(results, workload, peer)
