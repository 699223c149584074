"""Elementwise ATen ops as sympy expressions: one table, one row an op."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from unrollc.requirements.calculus.slices import op_name


class NotElementwiseError(Exception):
    """An op that mixes elements, or that the table does not know.

    Args:
        node: The op.
        reason: Why there is no expression for it.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


def number(value: float) -> Any:
    """An exact sympy number: the short decimal that `value` is up to rounding.

    Python computes 1 - 0.9 as 0.09999999999999998; here that is 1/10.
    """
    sympy = _sympy()
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if not math.isfinite(value):
        return sympy.Float(value)
    short = float(f"{value:.12g}")
    near = abs(short - value) <= 1e-15 * max(1.0, abs(value))
    return sympy.Rational(repr(short if near else value))


def _sympy() -> Any:
    import sympy

    return sympy


def _where(condition: Any, yes: Any, no: Any) -> Any:
    sympy = _sympy()
    return sympy.Piecewise((yes, condition), (no, True))


def _clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    sympy = _sympy()
    x = x if low is None else sympy.Max(x, low)
    return x if high is None else sympy.Min(x, high)


def _nonzero(condition: Any) -> Any:
    sympy = _sympy()
    return condition if condition.is_Boolean or condition.is_Relational else sympy.Ne(condition, 0)


def _power(base: Any, exponent: Any) -> Any:
    return base**exponent


def _not(condition: Any) -> Any:
    return _sympy().Not(_nonzero(condition))


#: What an op computes at one element: one row an op. Arguments are expressions or numbers.
EXPRESSIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, alpha=1: x + alpha * y,
    "sub": lambda x, y, alpha=1: x - alpha * y,
    "rsub": lambda x, y, alpha=1: y - alpha * x,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x: -x,
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x**2,
    "sqrt": lambda x: _sympy().sqrt(x),
    "rsqrt": lambda x: 1 / _sympy().sqrt(x),
    "pow": _power,
    "exp": lambda x: _sympy().exp(x),
    "expm1": lambda x: _sympy().exp(x) - 1,
    "log": lambda x: _sympy().log(x),
    "log1p": lambda x: _sympy().log(1 + x),
    "tanh": lambda x: _sympy().tanh(x),
    "sigmoid": lambda x: 1 / (1 + _sympy().exp(-x)),
    "sin": lambda x: _sympy().sin(x),
    "cos": lambda x: _sympy().cos(x),
    "atan": lambda x: _sympy().atan(x),
    "atan2": lambda y, x: _sympy().atan2(y, x),
    "abs": lambda x: _sympy().Abs(x),
    "sign": lambda x: _sympy().sign(x),
    "sgn": lambda x: _sympy().sign(x),
    "maximum": lambda x, y: _sympy().Max(x, y),
    "minimum": lambda x, y: _sympy().Min(x, y),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "relu": lambda x: _sympy().Max(x, 0),
    "lerp": lambda x, y, weight: (1 - weight) * x + weight * y,
    "addcmul": lambda x, y, z, value=1: x + value * y * z,
    "addcdiv": lambda x, y, z, value=1: x + value * y / z,
    "where": lambda condition, x, y: _where(_nonzero(condition), x, y),
    "masked_fill": lambda x, mask, value: _where(_nonzero(mask), value, x),
    "gt": lambda x, y: _sympy().Gt(x, y),
    "ge": lambda x, y: _sympy().Ge(x, y),
    "lt": lambda x, y: _sympy().Lt(x, y),
    "le": lambda x, y: _sympy().Le(x, y),
    "eq": lambda x, y: _sympy().Eq(x, y),
    "ne": lambda x, y: _sympy().Ne(x, y),
    "logical_and": lambda x, y: _sympy().And(_nonzero(x), _nonzero(y)),
    "logical_or": lambda x, y: _sympy().Or(_nonzero(x), _nonzero(y)),
    "logical_not": _not,
    "bitwise_and": lambda x, y: _sympy().And(_nonzero(x), _nonzero(y)),
    "bitwise_or": lambda x, y: _sympy().Or(_nonzero(x), _nonzero(y)),
    "bitwise_not": _not,
    "fill": lambda x, value: value,
    "full_like": lambda x, value: value,
    "full": lambda size, value: value,
    "scalar_tensor": lambda value: value,
    "zeros_like": lambda x: _sympy().Integer(0),
    "ones_like": lambda x: _sympy().Integer(1),
    "zeros": lambda size: _sympy().Integer(0),
    "ones": lambda size: _sympy().Integer(1),
    "new_zeros": lambda x, size: _sympy().Integer(0),
    "new_ones": lambda x, size: _sympy().Integer(1),
}

#: Ops that hand on their argument, element for element.
TRANSPARENT = frozenset(
    {"clone", "copy", "_to_copy", "alias", "detach", "lift_fresh_copy", "contiguous", "positive"}
)

#: Ops that hand on their argument where it is a scalar, and move elements where it is not.
MOVING = frozenset(
    {"expand", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "permute", "t"}
)

#: Keyword arguments that say something about the result's value.
_MEANINGFUL = {"alpha": "alpha", "value": "value", "min": "low", "max": "high"}


def expression(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """What `node` computes at one element.

    Args:
        node: An op.
        known: Expressions of the nodes that it reads.

    Raises:
        NotElementwiseError: If it mixes elements or is not in the table.
    """
    name = op_name(node)

    def read(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return known[argument]
        if isinstance(argument, bool | int | float):
            return number(argument)
        return argument

    if name in TRANSPARENT or (name in MOVING and _is_scalar(node.args[0])):
        return read(node.args[1] if name == "copy" else node.args[0])
    if name == "expand" and _same_elements(node):
        return read(node.args[0])
    if name in ("view", "reshape", "_unsafe_view") and _same_elements(node):
        return read(node.args[0])
    if name == "index_put":
        return _masked_put(node, read)
    rule = EXPRESSIONS.get(name)
    if rule is None or node.kwargs.get("rounding_mode") is not None:
        raise NotElementwiseError(node, f"{name or node.target} is not elementwise")
    if _mixes(node):
        raise NotElementwiseError(node, f"{name} pairs tensors of different shapes")
    kwargs = {_MEANINGFUL[k]: read(v) for k, v in node.kwargs.items() if k in _MEANINGFUL}
    return rule(*(read(argument) for argument in node.args), **kwargs)


def _masked_put(node: fx.Node, read: Callable[[Any], Any]) -> Any:
    """``x[mask] = value`` with a mask of x's shape and a scalar value."""
    target, indices, value = node.args[:3]
    accumulate = len(node.args) > 3 and node.args[3]
    mask = indices[0] if isinstance(indices, list | tuple) and len(indices) == 1 else None
    if not isinstance(mask, fx.Node) or not _is_scalar(value) or accumulate:
        raise NotElementwiseError(node, "index_put moves elements")
    if _shape(mask) != _shape(target) or not _is_mask(mask):
        raise NotElementwiseError(node, "index_put moves elements")
    return _where(_nonzero(read(mask)), read(value), read(target))


def _shape(argument: Any) -> tuple[int, ...]:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return tuple(value.shape) if value is not None else ()


def _is_scalar(argument: Any) -> bool:
    return all(size == 1 for size in _shape(argument))


def _is_mask(node: fx.Node) -> bool:
    return str(node.meta["val"].dtype) == "torch.bool"


def _same_elements(node: fx.Node) -> bool:
    return _shape(node) == _shape(node.args[0])


def _mixes(node: fx.Node) -> bool:
    """Whether tensors of different shapes meet: a row of one then acts on a matrix."""
    if op_name(node) in ("zeros", "ones", "full", "new_zeros", "new_ones"):
        return False
    shapes = {_shape(source) for source in node.all_input_nodes if not _is_scalar(source)}
    return bool(shapes - {_shape(node)})
