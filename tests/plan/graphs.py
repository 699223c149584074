"""Small graphs made by hand, and random ones."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from unrollc.optimize.in_place import called_op, out_name
from unrollc.step import Phase, Role, StepGraph, Value, build, placeholder

aten = torch.ops.aten


class Sketch:
    """A graph that is written down op by op; the metadata comes from fake tensors."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.inputs: list[Value] = []

    def input(
        self,
        name: str,
        *shape: int,
        role: Role = Role.BATCH,
        dtype: torch.dtype = torch.float64,
    ) -> fx.Node:
        node = placeholder(self.graph, name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        self.inputs.append(Value(role, name, name))
        return node

    def call(
        self,
        op: Any,
        *args: Any,
        phase: Phase = Phase.FORWARD,
        meta: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """One op; of an op with several results the results are taken with `part`."""
        node = self.graph.call_function(op, args, kwargs)
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = op(*fake_args, **fake_kwargs)
        node.meta.update(phase=phase, source=None, **(meta or {}))
        return node

    def part(self, node: fx.Node, index: int) -> fx.Node:
        made = self.graph.call_function(operator.getitem, (node, index))
        made.meta.update(node.meta)
        made.meta["val"] = node.meta["val"][index]
        return made

    def returning(
        self, *nodes: fx.Node | None, roles: Sequence[Role] | None = None, of: Role | None = None
    ) -> StepGraph:
        roles = roles or [Role.LOSS] * len(nodes)
        self.graph.output(tuple(nodes))
        values = [Value(role, f"out{i}", f"out{i}", of) for i, role in enumerate(roles)]
        return build(self.graph, tuple(self.inputs), tuple(values), {})


def targets(step: StepGraph) -> list[Any]:
    """The ops of a graph, in order."""
    return [node.target for node in step.graph.nodes if node.op == "call_function"]


N = 3  # every tensor of a random graph is N by N, so that all ops fit together

_UNARY = (
    aten.tanh.default,
    aten.neg.default,
    aten.t.default,
    aten.detach.default,
    aten.clone.default,
    aten.alias.default,
)
_BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mm.default)
_KINDS = ("unary", "binary", "binary", "view", "expand", "copy", "zero", "scalar", "pair")


@st.composite
def random_graphs(draw: st.DrawFn) -> StepGraph:
    """Graphs of up to 14 ops over two inputs: views, no-ops, zeros, doubles, dead ends."""
    sketch = Sketch()
    known = [sketch.input("x", N, N), sketch.input("y", N, N)]
    for _ in range(draw(st.integers(1, 14))):
        phase = draw(st.sampled_from([Phase.FORWARD, Phase.ADJOINT]))
        kind = draw(st.sampled_from(_KINDS))
        first, second = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        known.append(_random_op(draw, sketch, kind, phase, first, second))
    count = draw(st.integers(1, 3))
    return sketch.returning(*(draw(st.sampled_from(known)) for _ in range(count)))


def _random_op(
    draw: st.DrawFn, sketch: Sketch, kind: str, phase: Phase, first: fx.Node, second: fx.Node
) -> fx.Node:
    if kind == "unary":
        return sketch.call(draw(st.sampled_from(_UNARY)), first, phase=phase)
    if kind == "binary":
        return sketch.call(draw(st.sampled_from(_BINARY)), first, second, phase=phase)
    if kind == "view":
        flat = sketch.call(aten.reshape.default, first, [N * N], phase=phase)
        return sketch.call(aten.view.default, flat, [N, N], phase=phase)
    if kind == "expand":
        row = sketch.call(aten.sum.dim_IntList, first, [0], True, phase=phase)
        return sketch.call(aten.expand.default, row, [N, N], phase=phase)
    if kind == "copy":
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        narrow = sketch.call(aten._to_copy.default, first, dtype=dtype, phase=phase)
        return sketch.call(aten._to_copy.default, narrow, dtype=torch.float64, phase=phase)
    if kind == "zero":
        return sketch.call(aten.zeros_like.default, first, phase=phase)
    if kind == "scalar":
        number = draw(st.sampled_from([0.0, -0.0, 1.0, 0.5]))
        return sketch.call(aten.mul.Scalar, first, number, phase=phase)
    both = sketch.call(aten.var_mean.correction, first, [0], correction=1, keepdim=True)
    part = sketch.part(both, draw(st.integers(0, 1)))
    return sketch.call(aten.add.Tensor, second, part, phase=phase)


def values_for(step: StepGraph, seed: int = 0) -> list[Tensor]:
    """Random tensors for the inputs of a graph."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(node.meta["val"].shape, generator=generator, dtype=torch.float64)
        for node in step.placeholders
    ]


def arguments_for(step: StepGraph, seed: int = 0) -> list[Tensor]:
    """Tensors of the placeholders' own shapes, strides and dtypes: numbers in [0, 1), zeros."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for node in step.placeholders:
        fake = node.meta["val"]
        real = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
        floating = fake.dtype.is_floating_point
        made.append(real.uniform_(generator=generator) if floating else real.zero_())
    return made


def misplaced(step: StepGraph) -> list[str]:
    """Values that share memory in a run but not by their metadata, or the other way round."""
    planned_of: dict[int, int] = {}
    run_of: dict[int, int] = {}
    found = []

    def compare(node: fx.Node, real: Any, fake: Any) -> None:
        if isinstance(real, tuple | list):
            for one, other in zip(real, fake, strict=True):
                compare(node, one, other)
        elif isinstance(real, Tensor):
            run, planned = real.untyped_storage()._cdata, fake.untyped_storage()._cdata
            if planned_of.setdefault(run, planned) != planned:
                found.append(f"{node} shares memory that it does not share by its metadata")
            elif run_of.setdefault(planned, run) != run:
                found.append(f"{node} has memory of its own, but not by its metadata")

    space = dict(zip(step.placeholders, arguments_for(step), strict=True))
    for node in step.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), space.__getitem__)
            if "into" in node.meta:
                kwargs = {**kwargs, out_name(called_op(node)): args[node.meta["into"]]}
            space[node] = called_op(node)(*args, **kwargs)
        if node.op != "output":
            compare(node, space[node], node.meta["val"])
    return found
