"""What an op's result is worth: how it may come back in the adjoint, and what that costs.

One table, one row a kind of op. Costs are `plan.cost.Cost` and, where moving bytes is not the
larger part of the work, operations an element besides.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from unrollc.optimize.views import is_view
from unrollc.plan.cost import cost_of_node

aten = torch.ops.aten


class Again(enum.Enum):
    """Whether an op may run a second time, in the adjoint."""

    FREE = "free"
    AT_COST = "at cost"
    NEVER = "never"


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        kind: What the ops are.
        holds: Whether the row is about an op node; the first row that holds counts.
        again: Whether the op may be recomputed.
        keep: Whether its result may be kept.
        per_element: Operations for each element of the result, besides what `Cost` counts; a
            nanosecond of a core is some 100.
        reason: Why.
    """

    kind: str
    holds: Callable[[fx.Node], bool]
    again: Again
    keep: bool
    per_element: int
    reason: str


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _named(*names: str) -> Callable[[fx.Node], bool]:
    """Ops by name, in-place and backward forms not included."""
    known = frozenset(names)
    return lambda node: getattr(_packet(node), "__name__", "") in known


def _tagged(tag: torch.Tag) -> Callable[[fx.Node], bool]:
    return lambda node: tag in getattr(node.target, "tags", ())


RULES: tuple[Rule, ...] = (
    Rule(
        "view",
        is_view,
        Again.FREE,
        False,
        0,
        "lies in the memory of its argument: who keeps a view keeps that, and a view of what is "
        "kept, or of an input, is made without moving a byte",
    ),
    Rule(
        "projection",
        lambda node: node.target is operator.getitem,
        Again.FREE,
        True,
        0,
        "picks one result of an op with several: the op's work is counted with the op",
    ),
    Rule(
        "random",
        _tagged(torch.Tag.nondeterministic_seeded),
        Again.NEVER,
        True,
        0,
        "a second draw is another value; capture makes noise an input, so no captured step has one",
    ),
    Rule(
        "fill",
        _named(
            "arange",
            "empty",
            "full",
            "full_like",
            "new_full",
            "new_ones",
            "new_zeros",
            "ones",
            "ones_like",
            "scalar_tensor",
            "zeros",
            "zeros_like",
        ),
        Again.AT_COST,
        False,
        0,
        "reads no value: to write it again costs what to read it would",
    ),
    Rule(
        "product",
        lambda node: _packet(node) in flop_registry,
        Again.AT_COST,
        True,
        0,
        "matrix products, convolutions and attention: their operations are counted exactly",
    ),
    Rule(
        "transcendental",
        _named(
            "acos",
            "asin",
            "atan",
            "atan2",
            "cos",
            "cosh",
            "digamma",
            "elu",
            "erf",
            "erfc",
            "erfinv",
            "exp",
            "exp2",
            "expm1",
            "gelu",
            "gelu_backward",
            "lgamma",
            "log",
            "log10",
            "log1p",
            "log2",
            "log_sigmoid_forward",
            "logaddexp",
            "mish",
            "sigmoid",
            "silu",
            "silu_backward",
            "sin",
            "sinh",
            "softplus",
            "tan",
            "tanh",
            "_log_softmax",
            "_softmax",
            "logsumexp",
        ),
        Again.AT_COST,
        True,
        100,
        "a series or a table look-up: 0.7 to 1.3 ns an element on one core, tanh 2.6 or more, "
        "against 0.1 ns for what only moves bytes",
    ),
    Rule(
        "elementwise",
        _tagged(torch.Tag.pointwise),
        Again.AT_COST,
        True,
        0,
        "arithmetic hides behind the bytes that are read and written",
    ),
    Rule(
        "sorting",
        _named("argsort", "kthvalue", "median", "mode", "sort", "topk"),
        Again.AT_COST,
        True,
        10_000,
        "compares every element with many others: 70 to 240 ns an element",
    ),
    Rule(
        "addressing",
        _named(
            "cumprod",
            "cumsum",
            "gather",
            "index",
            "index_put",
            "max_pool2d_with_indices",
            "max_pool2d_with_indices_backward",
            "scatter",
            "scatter_add",
            "scatter_reduce",
        ),
        Again.AT_COST,
        True,
        200,
        "element by element, at computed addresses or in an order: 1 to 19 ns an element",
    ),
    Rule(
        "other",
        lambda node: True,
        Again.AT_COST,
        True,
        0,
        "reductions, normalisations, rows of a table, copies in another layout: a pass over the "
        "bytes",
    ),
)


def rule_of(node: fx.Node) -> Rule:
    """The first row that holds for an op."""
    return next(rule for rule in RULES if rule.holds(node))


def recompute_cost(node: fx.Node) -> int | None:
    """The weight of running an op again, in whole operations; None where that is not allowed."""
    rule = rule_of(node)
    if rule.again is Again.NEVER:
        return None
    if rule.again is Again.FREE:
        return 0
    value = node.meta["val"]
    results = [value] if isinstance(value, Tensor) else value
    elements = max((t.numel() for t in results if isinstance(t, Tensor)), default=0)
    return max(1, round(cost_of_node(node).weight + rule.per_element * elements))


@dataclass(frozen=True)
class Equal:
    """Results of one op that another op computes too, bit by bit.

    Attributes:
        op: The op.
        applies: Whether the arguments are such that it holds.
        other: The other op.
        arguments: Positions of the arguments that the other takes.
        results: Which results are the same, at the same positions.
        reason: Why.
    """

    op: Any
    applies: Callable[[tuple[Any, ...]], bool]
    other: Any
    arguments: tuple[int, ...]
    results: frozenset[int]
    reason: str


#: What the adjoint calls otherwise than the step does, because only the other form has a
#: derivative (`differentiate.replay`). Fused weight normalisation, which the adjoint spells out, is
#: equal to rounding only: nothing that comes after it is shared.
EQUALS: tuple[Equal, ...] = (
    Equal(
        aten._native_batch_norm_legit_functional.default,
        lambda args: bool(args[5]),
        aten._native_batch_norm_legit.no_stats,
        (0, 1, 2, 5, 6, 7),
        frozenset({0, 1, 2}),
        "in training, running statistics are written, not read",
    ),
)
