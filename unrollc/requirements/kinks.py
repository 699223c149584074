"""Where ops have kinks: points at which a derivative jumps or does not exist.

They have measure zero, so a requirement still holds almost everywhere; they are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from unrollc.errors import Source
from unrollc.requirements.dependence import Dependence, op_name
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
        return f"{self.op} at {self.at}" + (f" ({self.where.short})" if self.where else "")


_TIES = "ties"
_WINDOW = "ties within a window"
_BOUNDS = "its bounds"
_JUMPS = "its jumps"
_CONDITION = "the boundary of its condition"
_BOUNDARY = "equality, where it jumps"

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
    "fmax": _TIES,
    "fmin": _TIES,
    "nanmedian": _TIES,
    "argmax": _TIES,
    "argmin": _TIES,
    "scatter_reduce": _TIES,
    "celu": "0",
    "copysign": "0",
    "hypot": "0",
    "atan2": "0",
    "gt": _BOUNDARY,
    "ge": _BOUNDARY,
    "lt": _BOUNDARY,
    "le": _BOUNDARY,
    "eq": _BOUNDARY,
    "ne": _BOUNDARY,
    "norm": "0",
    "linalg_vector_norm": "0",
    "sqrt": "0, where its slope is infinite",
}

#: Position of the operand that decides which branch a selection takes.
_SELECTIONS = {"where": 0, "masked_fill": 1}

#: What makes truth values of truth values.
_LOGIC = frozenset(
    ["logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"]
)

#: Roles of what is known as a number.
_NUMBERS = (Role.HYPER, Role.CONSTANT)


def kinks_between(
    graph: Dependence, starts: Sequence[fx.Node], within: set[fx.Node], phases: Sequence[Phase]
) -> tuple[Kink, ...]:
    """The kinks of what depends on `starts`, one for each op and line.

    Args:
        graph: The dependence graph.
        starts: Inputs of it.
        within: Where to look: what acts on the results of interest.
        phases: Likewise. Roots that are known to be smooth there are no kinks.
    """
    moving = 0
    for start in starts:
        moving |= graph.influence[start]
    found: dict[Kink, None] = {}
    for node in graph.step.graph.nodes:
        if node.op != "call_function" or not graph.influence[node] & moving:
            continue
        if node not in within or node.meta["phase"] not in phases:
            continue
        if "removable" in node.meta or "nonsingular" in node.meta:
            continue
        origin: Any = node.args[0] if is_projection(node) else node
        if (at := _kink(graph, origin, moving)) is not None:
            found[Kink(op_name(origin), at, origin.meta.get("source"))] = None
    return tuple(found)


def _kink(graph: Dependence, node: fx.Node, moving: int) -> str | None:
    name = op_name(node)
    if name not in KINKS and name != "pow":
        return None
    if name in _SELECTIONS:
        condition: Any = node.args[_SELECTIONS[name]]
        return KINKS[name] if graph.influence[condition] & moving else None
    if KINKS.get(name) == _BOUNDARY and _only_selects(node):
        return None
    if name == "pow" and not (isinstance(node.args[1], float) and 0 < node.args[1] < 1):
        return None
    if name in ("sqrt", "pow"):
        return None if _bounded_away(graph, node.args[0]) else KINKS["sqrt"]
    return KINKS[name]


def _only_selects(condition: fx.Node) -> bool:
    """Whether a truth value does nothing but choose branches, which are listed themselves."""
    return all(
        _only_selects(user)
        if op_name(user) in _LOGIC
        else op_name(user) in _SELECTIONS and user.args[_SELECTIONS[op_name(user)]] is condition
        for user in condition.users
        if user.op == "call_function"
    )


def _bounded_away(graph: Dependence, operand: Any) -> bool:
    """Whether a root's operand stays away from zero.

    It does as a sum with a positive number, as in ``sqrt(x + eps)``. What depends on
    hyperparameters and counters alone is judged at their present values (see `present`).
    """
    of_data = 0
    for (role, _), node in graph.inputs.items():
        if role not in _NUMBERS and not node.meta.get("counter"):
            of_data |= graph.influence[node]
    if not graph.influence[operand] & of_data:
        return True
    return (
        isinstance(operand, fx.Node)
        and operand.op == "call_function"
        and not is_projection(operand)
        and op_name(operand) == "add"
        and any(isinstance(arg, int | float) and arg > 0 for arg in operand.args)
    )
