"""Where an update is not smooth: kinks, jumps, roots and poles, with the lines that make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from unrollc.errors import Source
from unrollc.requirements.calculus.domain import Domain, Range
from unrollc.requirements.calculus.singular import RootVerdict
from unrollc.requirements.calculus.slices import UpdateSlice, op_name, settled_nodes


@dataclass(frozen=True)
class Rough:
    """A set of points at which an op is not smooth.

    Attributes:
        node: The op.
        kind: "kink" (continuous, one-sided derivatives differ), "jump" (the value jumps, the
            derivative is that of the pieces), "root" (infinite slope) or "pole" (infinite value).
        first, second: The op's arguments that are equal there, zero where there is one.
        reason: Of a root, why its singularity is removable or not.
        removable: Of a root, whether it is.
    """

    node: fx.Node
    kind: str
    first: Any
    second: Any = 0
    reason: str = ""
    removable: bool = False

    @property
    def source(self) -> Source | None:
        """The optimizer's line."""
        source: Source | None = self.node.meta.get("source")
        return source


def rough_points(
    part: UpdateSlice, domain: Domain, verdicts: Mapping[fx.Node, RootVerdict]
) -> tuple[Rough, ...]:
    """Everything in a slice that is not smooth on the domain, in order of execution.

    What hyperparameters and step counts alone decide is left out: it does not vary in a run.
    """
    settled = settled_nodes(part)
    found: list[Rough] = []
    for node in part.nodes:
        if node in settled:
            continue
        if node in verdicts:
            verdict = verdicts[node]
            if not verdict.never:
                found.append(
                    Rough(node, "root", node.args[0], 0, verdict.reason, verdict.removable)
                )
            continue
        rule = _ROUGH.get(op_name(node))
        if rule is not None:
            found.extend(rule(node, domain))
    return tuple(found)


def _kink_at_zero(node: fx.Node, domain: Domain) -> list[Rough]:
    span = domain.of(node.args[0])
    return [] if span.nonnegative or span.high <= 0 else [Rough(node, "kink", node.args[0])]


def _jump_at_zero(node: fx.Node, domain: Domain) -> list[Rough]:
    return [] if domain.of(node.args[0]).nonzero else [Rough(node, "jump", node.args[0])]


def _tie(node: fx.Node, domain: Domain) -> list[Rough]:
    bounds = [*node.args[1:], *(node.kwargs.get(key) for key in ("min", "max"))]
    return [
        Rough(node, "kink", node.args[0], bound)
        for bound in bounds
        if bound is not None and not _ordered(domain.of(node.args[0]), domain.of(bound))
    ]


def _ordered(a: Range, b: Range) -> bool:
    """Whether one of two values is always the larger one, or equal."""
    return a.low >= b.high or b.low >= a.high


def _apart(a: Range, b: Range) -> bool:
    return a.low > b.high or b.low > a.high


def _comparison(node: fx.Node, domain: Domain) -> list[Rough]:
    first, second = node.args[:2]
    if _apart(domain.of(first), domain.of(second)):
        return []
    return [Rough(node, "jump", first, second)]


def _pole(place: int) -> Callable[[fx.Node, Domain], list[Rough]]:
    def rule(node: fx.Node, domain: Domain) -> list[Rough]:
        argument = node.args[place]
        return [] if domain.of(argument).nonzero else [Rough(node, "pole", argument)]

    return rule


def _negative_power(node: fx.Node, domain: Domain) -> list[Rough]:
    exponent = domain.of(node.args[1])
    return [] if exponent.nonnegative else _pole(0)(node, domain)


#: Where an op is not smooth: one row an op.
_ROUGH: dict[str, Callable[[fx.Node, Domain], list[Rough]]] = {
    "abs": _kink_at_zero,
    "relu": _kink_at_zero,
    "linalg_vector_norm": lambda node, domain: [Rough(node, "kink", node.args[0])],
    "sign": _jump_at_zero,
    "sgn": _jump_at_zero,
    "maximum": _tie,
    "minimum": _tie,
    "clamp": _tie,
    "clamp_min": _tie,
    "clamp_max": _tie,
    "gt": _comparison,
    "ge": _comparison,
    "lt": _comparison,
    "le": _comparison,
    "eq": _comparison,
    "ne": _comparison,
    "div": _pole(1),
    "addcdiv": _pole(2),
    "reciprocal": _pole(0),
    "log": _pole(0),
    "pow": _negative_power,
}
