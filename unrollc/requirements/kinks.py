"""Where ops have kinks: points at which a derivative jumps or does not exist.

They have measure zero, so a requirement still holds almost everywhere; they are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from unrollc.errors import Source
from unrollc.requirements.dependence import Dependence, op_name, reached_from, sources_of
from unrollc.requirements.edges import is_projection
from unrollc.step import Phase, Role


@dataclass(frozen=True)
class Kink:
    """Where a derivative on the way jumps or is infinite.

    Attributes:
        op: The op's name.
        at: Its points, in words.
        where: The user's line.
    """

    op: str
    at: str
    where: Source | None

    def __str__(self) -> str:
        if self.where is None:
            return f"{self.op} at {self.at}"
        place = self.where.short if self.where.file else f"module {self.where.module!r}"
        return f"{self.op} at {self.at} ({place})"


_TIES = "ties"
_WINDOW = "ties within a window"
_BOUNDS = "its bounds"
_JUMPS = "its jumps"
_CONDITION = "the boundary of its condition"

#: Kinks by op name: one row an op. Where the slope is infinite at a point, the row says so.
KINKS: dict[str, str] = {
    "abs": "0",
    "relu": "0",
    "leaky_relu": "0",
    "_prelu_kernel": "0",
    "rrelu_with_noise_functional": "0",
    "elu": "0",
    "threshold": "the threshold",
    "hardtanh": _BOUNDS,
    "hardsigmoid": _BOUNDS,
    "hardswish": _BOUNDS,
    "hardshrink": _BOUNDS,
    "softshrink": _BOUNDS,
    "clamp": _BOUNDS,
    "clamp_min": _BOUNDS,
    "clamp_max": _BOUNDS,
    "smooth_l1_loss": "the change from square to absolute error",
    "huber_loss": "the change from square to absolute error",
    "multi_margin_loss": "the margin",
    "multilabel_margin_loss_forward": "the margin",
    "maximum": _TIES,
    "minimum": _TIES,
    "max": _TIES,
    "min": _TIES,
    "amax": _TIES,
    "amin": _TIES,
    "aminmax": _TIES,
    "median": _TIES,
    "kthvalue": _TIES,
    "topk": _TIES,
    "sort": _TIES,
    "cummax": _TIES,
    "cummin": _TIES,
    "max_pool2d_with_indices": _WINDOW,
    "max_pool3d_with_indices": _WINDOW,
    "adaptive_max_pool2d": _WINDOW,
    "adaptive_max_pool3d": _WINDOW,
    "fractional_max_pool2d": _WINDOW,
    "fractional_max_pool3d": _WINDOW,
    "where": _CONDITION,
    "masked_fill": _CONDITION,
    "remainder": _JUMPS,
    "fmod": _JUMPS,
    "frac": _JUMPS,
    "round": _JUMPS,
    "floor": _JUMPS,
    "ceil": _JUMPS,
    "trunc": _JUMPS,
    "sign": "0",
    "sgn": "0",
    "heaviside": "0",
    "norm": "0",
    "linalg_vector_norm": "0",
    "sqrt": "0, where its slope is infinite",
}

#: Position of the operand that decides which branch a selection takes.
_SELECTIONS = {"where": 0, "masked_fill": 1}


#: Roles of what is known as a number.
_NUMBERS = (Role.HYPER, Role.CONSTANT)


def kinks_between(
    graph: Dependence,
    starts: Sequence[fx.Node],
    ends: Sequence[fx.Node],
    phases: Sequence[Phase],
) -> tuple[Kink, ...]:
    """The kinks of what depends on `starts` and acts on `ends`, one for each op and line.

    Args:
        graph: The dependence graph.
        starts, ends: Nodes.
        phases: Where to look. Singular ops whose limit exists (``removable``) are no kinks.
    """
    moving = reached_from(graph.edges, starts)
    between = moving & sources_of(graph.edges, ends)
    found: dict[Kink, None] = {}
    for node in graph.step.graph.nodes:
        if node not in between or node.op != "call_function" or "removable" in node.meta:
            continue
        origin: Any = node.args[0] if is_projection(node) else node
        if origin.meta["phase"] in phases and (at := _kink(graph, origin, moving)) is not None:
            found[Kink(op_name(origin), at, origin.meta.get("source"))] = None
    return tuple(found)


def _kink(graph: Dependence, node: fx.Node, moving: set[fx.Node]) -> str | None:
    name = op_name(node)
    if name in _SELECTIONS and node.args[_SELECTIONS[name]] not in moving:
        return None
    if name == "pow" and not (isinstance(node.args[1], float) and 0 < node.args[1] < 1):
        return None
    if name in ("sqrt", "pow") and _bounded_away(graph, node.args[0]):
        return None
    return KINKS["sqrt" if name == "pow" else name] if name in (*KINKS, "pow") else None


def _bounded_away(graph: Dependence, operand: Any) -> bool:
    """Whether a root's operand stays away from zero.

    It does as a sum with a positive number, as in ``sqrt(x + eps)``. What depends on
    hyperparameters and counters alone is judged at their present values (see `present`).
    """
    inputs = {n for n in sources_of(graph.edges, [operand]) if n.op == "placeholder"}
    of_data = {node for (role, _), node in graph.inputs.items() if role not in _NUMBERS}
    if not any(node in of_data and not node.meta.get("counter") for node in inputs):
        return True
    return (
        isinstance(operand, fx.Node)
        and operand.op == "call_function"
        and not is_projection(operand)
        and op_name(operand) == "add"
        and any(isinstance(arg, int | float) and arg > 0 for arg in operand.args)
    )
