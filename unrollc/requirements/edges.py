"""Whether an op hands a derivative from one operand on to one of its results.

No table of op names decides this: the op is differentiated by autograd on stand-ins of its
operands, and the cotangent that comes back is followed symbolically (see `zeros`). What comes
back as nothing or as a structural zero is a cut. Ops of one kind are differentiated once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from unrollc.capture.nests import is_continuous
from unrollc.requirements.zeros import ZeroTracker
from unrollc.step import ATTACH

aten = torch.ops.aten

#: Why ops that make a tensor like another one carry no derivative.
SHAPE_ONLY = "only the shape is used"

#: Why BatchNorm's statistics carry none.
RUNNING_STATISTICS = "running statistics are constants to autograd"

#: Why the derivative of an op is zero, where the op has a name for it. The others say so plainly.
_REASONS: dict[str, str] = {
    "detach": "detach() or no_grad stops the gradient",
    "attach": "a custom autograd.Function declares another derivative",
    **{
        name: SHAPE_ONLY
        for name in (
            "zeros_like",
            "ones_like",
            "full_like",
            "empty_like",
            "new_zeros",
            "new_ones",
            "new_full",
            "new_empty",
            "rand_like",
            "randn_like",
        )
    },
}


def _batch_norm(x: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Any, ...]:
    """Batch norm in training mode; the running statistics are constants to autograd."""
    mean, variance, training, momentum, eps = rest
    if not training:
        out = _batch_norm_fixed(x, weight, bias, mean, variance, momentum, eps)
        return (*out, mean, variance)
    out = aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)
    return (*out, mean.detach().clone(), variance.detach().clone())


def _batch_norm_fixed(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Any, ...]:
    return aten._native_batch_norm_legit_no_training.default(  # type: ignore[no-any-return]
        x, weight, bias, mean.detach(), variance.detach(), momentum, eps
    )


#: Ops without a derivative of their own, by ops that have the right one.
_STAND_INS: dict[Any, Callable[..., Any]] = {
    ATTACH: lambda value, carrier: carrier.clone(),
    aten.copy.default: lambda target, source: source.to(target.dtype).expand(target.shape).clone(),
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_fixed,
}

#: (operand's position, result's position) pairs that carry a derivative, by kind of op. What an
#: op's derivative looks like depends on nothing else, so it is kept for the process.
_KNOWN: dict[Any, frozenset[tuple[int, int]]] = {}


def carried(node: fx.Node, zeros: set[fx.Node]) -> frozenset[tuple[int, int]]:
    """Which operands reach which results of an op.

    Args:
        node: A call of an ATen op.
        zeros: Nodes whose values are zero by structure.

    Returns:
        Pairs of an index into ``node.all_input_nodes`` and an index among its results.
    """
    operands = node.all_input_nodes
    key = _kind(node, operands, zeros)
    if key not in _KNOWN:
        _KNOWN[key] = _differentiate(node, operands, zeros)
    return _KNOWN[key]


#: Derivatives that are declared to be zero although the value depends on the operand.
DECLARED = frozenset([_REASONS["detach"], _REASONS["attach"], RUNNING_STATISTICS])


def cut_reason(node: fx.Node, operand: fx.Node, result: Any) -> str:
    """Why no derivative passes from `operand` to `result`, a fake tensor."""
    target: Any = node.target
    name = target._schema.name.split("::")[-1]
    if name in _REASONS:
        return _REASONS[name]
    if "batch_norm" in name and operand in node.args[3:5]:
        return RUNNING_STATISTICS
    if not is_continuous(result):
        return f"{name} yields integers or truth values, which have no derivative"
    if not is_continuous(operand.meta.get("val")):
        return f"{name} reads integers or truth values, which have no derivative"
    if _is_one(node):
        return "a value divided by itself is 1"
    if name == "div":
        return "the derivative of a rounded quotient is zero everywhere it exists"
    return f"the derivative of {name} is zero everywhere it exists"


def _kind(node: fx.Node, operands: list[fx.Node], zeros: set[fx.Node]) -> Any:
    position = {operand: index for index, operand in enumerate(operands)}

    def described(value: Any) -> Any:
        if isinstance(value, fx.Node):
            fake = value.meta["val"]
            return (position[value], fake.dtype, fake.dim(), value in zeros)
        if isinstance(value, tuple | list):
            if value and all(type(item) is int for item in value):
                return len(value)  # sizes and axes; truth values say which results are asked for
            return tuple(described(item) for item in value)
        return repr(value)

    kwargs = tuple((key, described(value)) for key, value in sorted(node.kwargs.items()))
    return (node.target, tuple(described(arg) for arg in node.args), kwargs)


def _differentiate(
    node: fx.Node, operands: list[fx.Node], zeros: set[fx.Node]
) -> frozenset[tuple[int, int]]:
    smooth = [i for i, operand in enumerate(operands) if is_continuous(operand.meta.get("val"))]
    try:
        return _carried_by(node, operands, zeros, smooth)
    except RuntimeError as error:
        if _UNDIFFERENTIABLE not in str(error):
            raise
    found: set[tuple[int, int]] = set()
    for index in smooth:
        try:
            found |= _carried_by(node, operands, zeros, [index])
        except RuntimeError as error:
            if _UNDIFFERENTIABLE not in str(error):
                raise
    return frozenset(found)


#: How autograd refuses an operand that an op is not differentiable in.
_UNDIFFERENTIABLE = "is not differentiable with respect to argument"


def _carried_by(
    node: fx.Node, operands: list[fx.Node], zeros: set[fx.Node], moving: list[int]
) -> frozenset[tuple[int, int]]:
    """The pairs of `carried` for the operands `moving`, the others held constant."""
    if _is_one(node):
        return frozenset()  # autograd adds two slopes that cancel
    tracker = ZeroTracker()
    with FakeTensorMode(), torch.enable_grad():
        leaves = [_like(operand.meta["val"]) for operand in operands]
        for operand, leaf in zip(operands, leaves, strict=True):
            if operand in zeros:
                tracker.zeros[id(leaf)] = leaf
        for index in moving:
            leaves[index].requires_grad_()
        replaced = dict(zip(operands, leaves, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), replaced.__getitem__)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        target: Any = _STAND_INS.get(node.target, node.target)
        with tracker:
            results = target(*args, **kwargs)
            results = [results] if isinstance(results, Tensor) else list(results)
            return frozenset(
                (index, position)
                for position, result in enumerate(results)
                if is_continuous(result)
                and result.requires_grad
                and id(result) not in tracker.zeros
                for index in _reached(result, leaves, moving, tracker)
            )


def _reached(
    result: Tensor, leaves: list[Tensor], moving: list[int], tracker: ZeroTracker
) -> list[int]:
    try:
        found = torch.autograd.grad(
            result,
            [leaves[index] for index in moving],
            torch.empty_like(result),
            allow_unused=True,
            retain_graph=True,
        )
    except (NotImplementedError, RuntimeError):
        return moving  # no formula: differentiation itself will say so where it is needed
    return [
        index
        for index, gradient in zip(moving, found, strict=True)
        if gradient is not None and not tracker.is_zero(gradient)
    ]


def _like(fake: Tensor) -> Tensor:
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="cpu")


def _is_one(node: fx.Node) -> bool:
    """Whether the node is x / x."""
    return node.target is aten.div.Tensor and node.args[0] is node.args[1]


def is_projection(node: fx.Node) -> bool:
    """Whether the node picks one result of an op with several."""
    return node.target is operator.getitem
