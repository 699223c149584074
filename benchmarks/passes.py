"""What each optimisation is worth: ``python benchmarks/passes.py [WORKLOAD ...]``.

Each program runs on the `aten` backend with everything, and with one pass left out. They take
turns, and a pass is worth the median of the calls without it over that with all of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from implementations import Call, compiled
from rich.console import Console
from rich.table import Table
from workloads import Problem, build

from unrollc.optimize import packing, simplify
from unrollc.optimize.fuse import FUSIONS
from unrollc.optimize.scaled_products import share_scaled_products
from unrollc.plan import choice, pieces
from unrollc.runtime import adjoints, lowering

ROUNDS = 11

#: Workloads that show them, and one whose convolutions no inner step adapts.
SHOWING = ("mlp-small", "maml-conv4", "learned-opt", "anil")


def _as_it_is(graph: Any, *args: Any, **kwargs: Any) -> Any:
    return graph


#: By what is left out, the names that are replaced: module, name, value.
LEFT_OUT: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    name: ((module, "PASSES", tuple(each for each in module.PASSES if each not in passes)),)
    for name, module, passes in (
        ("symbolic zeros", simplify, (simplify.propagate_zeros,)),
        ("common subexpressions", simplify, (simplify.merge_common,)),
        ("fused ops", simplify, FUSIONS),
        ("products of a scaled matrix", simplify, (share_scaled_products,)),
        ("channels_last", packing, (packing.lay_out_images,)),
        ("pooling before relu", packing, (packing.pool_before_relu,)),
        ("packed state", packing, (packing.share_equal_state, packing.pack_alike)),
    )
} | {
    "hoisting": ((adjoints, "hoist", _as_it_is), (lowering, "hoist", _as_it_is)),
    "narrow products as one": ((pieces, "merge_narrow_products", _as_it_is),),
    "writing in place": ((pieces, "write_in_place", _as_it_is),),
    "residuals": ((choice, "_PRICES", ()),),
}


def anil(steps: int, dtype: torch.dtype = torch.float32) -> Problem:
    """`maml-conv4` with an inner loop over its last layer alone (Raghu et al. 2020)."""
    given = build("maml-conv4", steps, dtype)
    *_, last = given.model.children()
    opt = torch.optim.SGD(last.parameters(), lr=0.1)
    return replace(given, opt=opt, tasks=given.tasks[:1])


@contextmanager
def without(name: str | None) -> Iterator[None]:
    """Lower programs without one optimisation."""
    with ExitStack() as stack:
        for module, attribute, value in LEFT_OUT[name] if name else ():
            stack.enter_context(patch.object(module, attribute, value))
        yield


def ready(workload: str, name: str | None) -> Call:
    """A program that was lowered without one optimisation."""
    problem = anil(steps=10) if workload == "anil" else build(workload)
    _, call = compiled(problem, backend="aten")
    with without(name):
        call()
    return call


def measured(calls: dict[str | None, Call]) -> dict[str | None, float]:
    """Median seconds of each, all taking turns."""
    seconds: dict[str | None, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def main(workloads: list[str]) -> None:
    table = Table(title="Time without a pass, over the time with all of them")
    table.add_column("left out")
    found = {}
    for workload in workloads:
        table.add_column(workload, justify="right")
        found[workload] = measured({n: ready(workload, n) for n in (None, *LEFT_OUT)})
    for name in LEFT_OUT:
        table.add_row(name, *(f"{found[w][name] / found[w][None]:.2f}" for w in workloads))
    table.add_row("nothing, ms", *(f"{found[w][None] * 1e3:.1f}" for w in workloads))
    Console(width=120).print(table)


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHOWING))
