"""Where the values of an update lie: ranges by interval arithmetic, and invariants of its state.

Nothing goes by names. A state tensor is taken to be nonnegative if the update keeps it so (an
inductive invariant: second moments, maxima of absolute values, step counts); what optimizers
start from, zero or a positive number, satisfies it. A scalar that no gradient reaches (a product
of decay rates) is taken to lie in [0, 1] if the update keeps it there.

What is assumed of hyperparameters that are tensors: they are positive, and a mixing weight c,
which takes part both as c and as 1 - c, lies in (0, 1). Numbers are what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.requirements.calculus.slices import UpdateSlice, fixed_leaves, op_name
from unrollc.step import Role


@dataclass(frozen=True)
class Range:
    """An interval of real numbers; an open end is not attained."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    @property
    def positive(self) -> bool:
        return self.low > 0 or (self.low == 0 and self.low_open)

    @property
    def negative(self) -> bool:
        return self.high < 0 or (self.high == 0 and self.high_open)

    @property
    def nonnegative(self) -> bool:
        return self.low >= 0

    @property
    def nonzero(self) -> bool:
        return self.positive or self.negative

    def within(self, other: Range) -> bool:
        low = self.low > other.low or (
            self.low == other.low and (self.low_open or not other.low_open)
        )
        high = self.high < other.high or (
            self.high == other.high and (self.high_open or not other.high_open)
        )
        return low and high


REALS = Range()
NONNEGATIVE = Range(0.0)
POSITIVE = Range(0.0, low_open=True)
FRACTION = Range(0.0, 1.0, low_open=True, high_open=True)
UNIT = Range(0.0, 1.0)
ONE = Range(1.0, 1.0)

_End = tuple[float, bool]


def _times(a: _End, b: _End) -> _End:
    """The product of two ends; an attained zero stays attained whatever it meets."""
    if (a[0] == 0 and not a[1]) or (b[0] == 0 and not b[1]):
        return (0.0, False)
    if a[0] == 0 or b[0] == 0:
        return (0.0, True)
    return (a[0] * b[0], a[1] or b[1])


def _hull(ends: Sequence[_End]) -> Range:
    low = min(ends, key=lambda end: (end[0], end[1]))
    high = max(ends, key=lambda end: (end[0], not end[1]))
    return Range(low[0], high[0], low[1], high[1])


def _ends(x: Range) -> tuple[_End, _End]:
    return (x.low, x.low_open), (x.high, x.high_open)


def add(a: Range, b: Range) -> Range:
    return Range(
        a.low + b.low, a.high + b.high, a.low_open or b.low_open, a.high_open or b.high_open
    )


def neg(a: Range) -> Range:
    return Range(-a.high, -a.low, a.high_open, a.low_open)


def mul(a: Range, b: Range) -> Range:
    return _hull([_times(x, y) for x in _ends(a) for y in _ends(b)])


def reciprocal(a: Range) -> Range:
    if not a.nonzero:
        return REALS
    if a.negative:
        return neg(reciprocal(neg(a)))
    low = 0.0 if math.isinf(a.high) else 1 / a.high
    high = math.inf if a.low == 0 else 1 / a.low
    return Range(low, high, a.high_open or math.isinf(a.high), a.low_open)


def absolute(a: Range) -> Range:
    if a.nonnegative:
        return a
    if a.high <= 0:
        return neg(a)
    return _hull([(0.0, False), (-a.low, a.low_open), (a.high, a.high_open)])


def maximum(a: Range, b: Range) -> Range:
    low = max(_ends(a)[0], _ends(b)[0])
    high = max(_ends(a)[1], _ends(b)[1], key=lambda end: (end[0], not end[1]))
    return Range(low[0], high[0], low[1], high[1])


def minimum(a: Range, b: Range) -> Range:
    return neg(maximum(neg(a), neg(b)))


def union(a: Range, b: Range) -> Range:
    return _hull([*_ends(a), *_ends(b)])


def monotone(function: Callable[[float], float], a: Range) -> Range:
    return Range(function(a.low), function(a.high), a.low_open, a.high_open)


def power(base: Range, exponent: Range) -> Range:
    if exponent.low == exponent.high:
        p = exponent.low
        if p == 0:
            return ONE
        if p < 0:
            return reciprocal(power(base, Range(-p, -p)))
        if p == int(p) and int(p) % 2 == 0:
            base = absolute(base)
        if base.nonnegative:
            return monotone(lambda x: _power(x, p), base)
        return REALS
    if base.positive and base.within(UNIT) and exponent.nonnegative:
        strict = exponent.positive and (base.high < 1 or base.high_open)
        return Range(0.0, 1.0, True, strict)
    return POSITIVE if base.positive else REALS


def _power(x: float, exponent: float) -> float:
    try:
        return float(x**exponent)
    except OverflowError:
        return math.inf


def lerp(a: Range, b: Range, weight: Range) -> Range:
    if weight.within(UNIT):
        return union(a, b)
    return add(a, mul(weight, add(b, neg(a))))


def _clamp(x: Range, low: Range | None = None, high: Range | None = None) -> Range:
    x = x if low is None else maximum(x, low)
    return x if high is None else minimum(x, high)


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _above_zero(function: Callable[[float], float]) -> Callable[[Range], Range]:
    """A monotone function that is defined from zero on: its argument is taken to lie there."""
    return lambda a: monotone(function, maximum(a, Range(0.0, 0.0)))


def _linear(x: Range, y: Range, alpha: Range = ONE) -> Range:
    return add(x, mul(alpha, y))


#: Ranges of results by ranges of arguments: one row an op. Products are treated apart, since
#: ``x * x`` is nonnegative whatever x is.
_RANGES: dict[str, Callable[..., Range]] = {
    "add": _linear,
    "sub": lambda x, y, alpha=ONE: add(x, neg(mul(alpha, y))),
    "rsub": lambda x, y, alpha=ONE: add(y, neg(mul(alpha, x))),
    "neg": neg,
    "reciprocal": reciprocal,
    "sqrt": _above_zero(math.sqrt),
    "rsqrt": lambda x: reciprocal(_above_zero(math.sqrt)(x)),
    "pow": power,
    "square": lambda x: power(x, Range(2.0, 2.0)),
    "abs": absolute,
    "maximum": maximum,
    "minimum": minimum,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "lerp": lerp,
    "where": lambda condition, a, b: union(a, b),
    "masked_fill": lambda x, mask, value: union(x, value),
    "index_put": lambda x, mask, value: union(x, value),
    "exp": lambda x: Range(_exp(x.low), _exp(x.high), True, x.high_open),
    "log1p": lambda a: monotone(math.log1p, a) if a.nonnegative else REALS,
    "tanh": lambda x: Range(-1.0, 1.0, True, True),
    "sigmoid": lambda x: FRACTION,
    "sign": lambda x: Range(-1.0, 1.0),
    "sgn": lambda x: Range(-1.0, 1.0),
    "fill": lambda x, value: value,
    "full_like": lambda x, value: value,
    "full": lambda size, value: value,
    "scalar_tensor": lambda value: value,
    "zeros_like": lambda x: Range(0.0, 0.0),
    "ones_like": lambda x: ONE,
    "zeros": lambda size: Range(0.0, 0.0),
    "ones": lambda size: ONE,
}

#: Ops that hand on their first argument.
SAME = frozenset(
    {
        "clone", "copy", "_to_copy", "alias", "detach", "lift_fresh_copy", "expand", "view",
        "_unsafe_view", "reshape", "unsqueeze", "squeeze", "contiguous", "positive",
        "permute", "t", "transpose", "slice", "select", "diagonal", "as_strided",
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Inverse:
    node: Any


class Domain:
    """Ranges of all values of a slice, under the invariants of its state.

    Args:
        part: The slice.
        assumed: Range of each state leaf; what `invariants` found.
    """

    def __init__(self, part: UpdateSlice, assumed: dict[fx.Node, Range]) -> None:
        self._part = part
        self._assumed = assumed
        self._mixing = mixing_weights(part)
        self.ranges: dict[fx.Node, Range] = {node: self._leaf(node) for node in part.leaves}
        for node in part.nodes:
            self.ranges[node] = self._range(node)

    def __getitem__(self, node: fx.Node) -> Range:
        return self.ranges[node]

    def is_leaf(self, node: fx.Node) -> bool:
        """Whether a node is an input of the slice."""
        return node in self._part.leaves

    def _leaf(self, node: fx.Node) -> Range:
        leaf = self._part.leaves[node]
        if leaf.role is Role.HYPER:
            return FRACTION if node in self._mixing else POSITIVE
        if leaf.role is Role.CONSTANT:
            constant = self._part.constants[node.name]
            if constant.numel() and not constant.is_complex():
                return Range(float(constant.min()), float(constant.max()))
        return self._assumed.get(node, REALS)

    def of(self, argument: Any) -> Range:
        """The range of an op's argument."""
        if isinstance(argument, fx.Node):
            return self.ranges.get(argument, REALS)
        if isinstance(argument, bool | int | float):
            return Range(float(argument), float(argument))
        return REALS

    def _range(self, node: fx.Node) -> Range:
        name = op_name(node)
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.is_complex():
            return REALS
        if name in SAME:
            return self.of(node.args[0])
        if name in ("mul", "div", "addcmul", "addcdiv"):
            return self._product(name, node)
        rule = _RANGES.get(name)
        if rule is None or node.kwargs.get("rounding_mode") is not None:
            return UNIT if value.dtype is torch.bool else REALS
        kwargs = {k: self.of(v) for k, v in node.kwargs.items() if k in ("alpha", "min", "max")}
        kwargs = {{"min": "low", "max": "high"}.get(k, k): v for k, v in kwargs.items()}
        args = [None if a is None else self.of(a) for a in node.args]
        return rule(*args, **kwargs)

    def _product(self, name: str, node: fx.Node) -> Range:
        if name in ("mul", "div"):
            return self._of_factors(self._factors(node))
        start, first, second = node.args
        scale = node.kwargs.get("value", 1)
        if name == "addcmul":
            term = self._of_factors([scale, *self._factors(first), *self._factors(second)])
        else:
            term = self._of_factors([scale, *self._factors(first), _Inverse(second)])
        return add(self.of(start), term)

    def _factors(self, value: Any) -> list[Any]:
        """The factors of a product: nodes, numbers, and divisors."""
        if not isinstance(value, fx.Node) or self.is_leaf(value):
            return [value]
        name = op_name(value)
        if name == "mul":
            return [*self._factors(value.args[0]), *self._factors(value.args[1])]
        if name == "div" and value.kwargs.get("rounding_mode") is None:
            return [*self._factors(value.args[0]), _Inverse(value.args[1])]
        if name == "neg":
            return [-1.0, *self._factors(value.args[0])]
        if name in ("clone", "_to_copy", "alias", "detach"):
            return self._factors(value.args[0])
        return [value]

    def _of_factors(self, found: list[Any]) -> Range:
        """The range of a product; a factor that occurs twice is squared."""
        result = ONE
        counted: dict[fx.Node, int] = {}
        for factor in found:
            if isinstance(factor, fx.Node):
                counted[factor] = counted.get(factor, 0) + 1
            elif isinstance(factor, _Inverse):
                result = mul(result, reciprocal(self.of(factor.node)))
            else:
                result = mul(result, self.of(factor))
        for factor, times in counted.items():
            result = mul(result, power(self.ranges.get(factor, REALS), Range(times, times)))
        return result


def mixing_weights(part: UpdateSlice) -> set[fx.Node]:
    """Hyperparameters c that take part as c and as 1 - c, or as the weight of a mean."""
    complements = {
        node: node.args[0]
        for node in part.nodes
        if op_name(node) == "rsub" and node.args[1] == 1 and node.kwargs.get("alpha", 1) == 1
    }
    hyper = {n for n in part.leaves if part.leaves[n].role is Role.HYPER}
    found: set[Any] = set()
    for node in part.nodes:
        name = op_name(node)
        if name == "lerp":
            weight = _origin(node.args[2])
            found.add(complements.get(weight, weight))
        used = node.args if name == "mul" else node.args[:1] if name == "pow" else ()
        found.update({_origin(a) for a in used} & {_origin(c) for c in complements.values()})
    return found & hyper


def _origin(value: Any) -> Any:
    while isinstance(value, fx.Node) and op_name(value) in SAME:
        value = value.args[0]
    return value


def domain_of(part: UpdateSlice) -> Domain:
    """Ranges under the strongest invariants of the state that the update keeps."""
    ends = {(v.role, v.label): node for v, node in part.results}
    state = {
        node: ends[leaf.role, leaf.label]
        for node, leaf in part.leaves.items()
        if leaf.role is Role.OPT_STATE and (leaf.role, leaf.label) in ends
    }
    fixed = fixed_leaves(part)
    assumed = {node: UNIT if node in fixed else NONNEGATIVE for node in state}
    while True:
        domain = Domain(part, assumed)
        broken = [n for n, end in state.items() if not domain[end].within(assumed[n])]
        if not broken:
            return domain
        for node in broken:
            assumed[node] = NONNEGATIVE if assumed[node] == UNIT else REALS
