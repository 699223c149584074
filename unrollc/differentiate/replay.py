"""Running a step graph again, node by node, so that autograd can see it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.autograd import Function

from unrollc.capture.nests import tensors_in
from unrollc.capture.record import Recorder
from unrollc.capture.source import SourceFinder
from unrollc.differentiate import batch_norm
from unrollc.differentiate.guarded import Guards, dropped, is_elementwise
from unrollc.differentiate.pure import PureRecorder
from unrollc.step import ATTACH, Phase, StepGraph

aten = torch.ops.aten


class _Attach(Function):
    """The value of the first argument with the derivative of the second."""

    @staticmethod
    def forward(value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        return None, cotangent


class _Watched(Function):
    """A value that notes its cotangent."""

    @staticmethod
    def forward(value: Tensor, seen: list[Tensor]) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.seen = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(cotangent)
        return cotangent, None


class _Gated(Function):
    """A value whose cotangent passes a gate."""

    @staticmethod
    def forward(value: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.gate = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return ctx.gate(cotangent), None


_watched: Callable[..., Tensor] = _Watched.apply
_gated: Callable[..., Tensor] = _Gated.apply


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """Batch norm by ops that have a derivative; running statistics carry none, as in PyTorch."""
    if not training:
        out = _batch_norm_fixed(x, weight, bias, mean, variance, momentum, eps)
        return (*out, mean, variance)
    out = aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)
    with torch.no_grad():
        updated = aten._native_batch_norm_legit_functional.default(
            x, weight, bias, mean, variance, True, momentum, eps
        )
    return (*out, updated[3], updated[4])


def _batch_norm_fixed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """Batch norm by running statistics, which are constants to autograd."""
    return aten._native_batch_norm_legit_no_training.default(  # type: ignore[no-any-return]
        x, weight, bias, mean.detach(), variance.detach(), momentum, eps
    )


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Weight normalisation by ops whose second derivative is right.

    PyTorch's formula for the fused op forgets the norms' own derivative.
    """
    others = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    norms = v.square().sum(others, keepdim=True).sqrt()
    return v * (g / norms), norms


def _weight_norm_backward(
    grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    others = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    along = (grad * v).sum(others, keepdim=True)
    return g / norms * (grad - v * along / norms.square()), along / norms


def _copy(destination: Tensor, source: Tensor) -> Tensor:
    """The functional ``copy``: the source in the destination's shape and dtype."""
    return source.to(destination.dtype).expand(destination.shape)


#: Ops that are replayed by an equivalent that PyTorch can differentiate.
EQUIVALENTS: dict[Any, Callable[..., Any]] = {
    ATTACH: _Attach.apply,
    aten.copy.default: _copy,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_fixed,
    aten._weight_norm_interface.default: _weight_norm,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
}

#: Ops whose derivative in reverse mode takes fewer passes than PyTorch's formula.
_SHORTER: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm_backward.default: batch_norm.backward,
}


class Replay:
    """Executes nodes of a graph on tensors under a recorder.

    Attributes:
        values: What each node executed so far stands for.
        guards: Singular ops whose dropped entries get no cotangent (`guarded`).
    """

    def __init__(self, recorder: Recorder, guards: Guards | None = None) -> None:
        self.recorder = recorder
        self.values: dict[fx.Node, Any] = {}
        self.guards = guards or {}

    def bind(self, nodes: Iterable[fx.Node], tensors: Iterable[Tensor]) -> None:
        """Give placeholders their tensors."""
        self.values.update(zip(nodes, tensors, strict=True))

    def run(self, nodes: Iterable[fx.Node], phase: Phase | None = None) -> None:
        """Execute `nodes` in order; recorded nodes keep their phase unless one is given."""
        for node in nodes:
            if node.op == "call_function" and node not in self.values:
                self.values[node] = self.execute(node, phase)

    def execute(self, node: fx.Node, phase: Phase | None = None) -> Any:
        args, kwargs = self.arguments(node)
        self.recorder.phase = phase or node.meta["phase"]
        self.recorder.origin = node
        return self.call(node, args, kwargs)

    def arguments(self, node: fx.Node) -> tuple[Any, Any]:
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        return args, kwargs

    def call(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        target: Any = EQUIVALENTS.get(node.target, node.target)
        if torch.is_grad_enabled():
            target = _SHORTER.get(target, target)
        if torch.is_grad_enabled() and is_elementwise(node):
            if node.meta.get("removable"):
                seen: list[Tensor] = []
                operands = _behind_gates(node, args, lambda g: zero_where_zero(g, seen[0]))
                return _watched(target(*operands, **kwargs), seen)
            if selections := self.guards.get(node):
                values = self.values
                args = _behind_gates(
                    node, args, lambda g: g.masked_fill(dropped(selections, values), 0)
                )
        result = target(*args, **kwargs)
        if target in decomposition_table and _has_no_derivative(result):
            return decomposition_table[target](*args, **kwargs)
        return result


def _has_no_derivative(result: Any) -> bool:
    """Whether autograd marks the result of an op as one that has no formula."""
    return any(
        tensor.grad_fn is not None and tensor.grad_fn.name() == _NO_FORMULA
        for tensor in tensors_in(result)
    )


#: What autograd calls the node behind an op without a derivative.
_NO_FORMULA = "torch::autograd::NotImplemented"


def zero_where_zero(slope: Tensor, factor: Tensor) -> Tensor:
    """`slope`, the product of a derivative and `factor` (a cotangent, a tangent), with 0 · ∞ = 0.

    The backward of hardshrink at threshold 0 is one vectorised pass that keeps what is not zero,
    NaN included; a comparison and a ``where`` take ten times as long.
    """
    return aten.hardshrink_backward.default(slope, factor, 0)  # type: ignore[no-any-return]


def _behind_gates(
    node: fx.Node, args: Sequence[Any], gate: Callable[[Tensor], Tensor]
) -> list[Any]:
    """The operands of an elementwise op, each behind a gate in the shape of the result."""
    result = node.meta["val"]

    def gated(operand: Any) -> Any:
        if not isinstance(operand, Tensor) or not operand.requires_grad:
            return operand
        if operand.shape != result.shape:
            # A 0-dim operand of another dtype does not promote; as an expanded one it would.
            operand = operand.to(result.dtype).expand(result.shape)
        return _gated(operand, gate)

    return [gated(operand) for operand in args]


def start(step: StepGraph) -> tuple[Recorder, list[Tensor]]:
    """A fresh recorder with the inputs of `step`."""
    recorder = PureRecorder(SourceFinder({}))
    pairs = zip(step.inputs, step.placeholders, strict=True)
    return recorder, [recorder.input(value.name, node.meta["val"]) for value, node in pairs]


def calls(step: StepGraph, *phases: Phase) -> list[fx.Node]:
    """The op nodes of some phases in order, tuple projections included."""
    return [n for n in step.graph.nodes if n.op == "call_function" and n.meta["phase"] in phases]


def is_projection(node: fx.Node) -> bool:
    """Whether the node picks one result of an op with several."""
    return node.target is operator.getitem
