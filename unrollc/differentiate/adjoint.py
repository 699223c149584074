"""The typed result of differentiation and what both modes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from unrollc.capture.assemble import assemble
from unrollc.capture.naming import Names
from unrollc.capture.nests import is_continuous
from unrollc.capture.record import Recorder
from unrollc.step import STATE_ROLES, Role, StepGraph, Value

#: A value of a step, by what identifies it.
Key = tuple[Role, str]


@dataclass(frozen=True)
class StepAdjoint:
    """The vector-Jacobian product of one step.

    Attributes:
        graph: Inputs are those of the step and the cotangents B_{j+1} of what it returns (those
            that are not structurally zero); outputs are the cotangents B_j and the contributions
            to the meta-gradient, None for structural zeros.
        mode: "reverse" (reverse-over-reverse) or "mixed" (forward-over-reverse, Kemaev et al.
            2025).
        reason: Why this mode was taken.
    """

    graph: StepGraph
    mode: str
    reason: str

    @property
    def live(self) -> frozenset[Key]:
        """Inputs of the step that receive a cotangent."""
        pairs = zip(self.graph.outputs, self.graph.results, strict=True)
        return frozenset((v.of, v.label) for v, node in pairs if node is not None and v.of)


def differentiable_inputs(step: StepGraph, wanted: frozenset[Key]) -> list[tuple[Value, fx.Node]]:
    """Inputs whose cotangent is computed: continuous state, and the meta-parameters.

    Step counters are known numbers that no meta-parameter reaches, so they carry none.
    """
    return [
        (value, node)
        for value, node in zip(step.inputs, step.placeholders, strict=True)
        if is_continuous(node.meta["val"])
        and (
            (value.role in STATE_ROLES and not is_counter(node))
            or (value.role, value.label) in wanted
        )
    ]


def is_counter(node: fx.Node) -> bool:
    """Whether a state tensor is a known number, a step counter (marked at capture)."""
    return bool(node.meta.get("counter"))


def cotangent_inputs(
    step: StepGraph, live: frozenset[Key], recorder: Recorder
) -> tuple[list[Value], list[Tensor], list[fx.Node]]:
    """Fresh inputs for the cotangents of the state outputs that are live, or of what a prologue
    returns.

    Returns:
        Their types, their tensors, and the nodes of `step` that they belong to.
    """
    values: list[Value] = []
    tensors: list[Tensor] = []
    nodes: list[fx.Node] = []
    for value, node in step.outputs_with(*STATE_ROLES, Role.INVARIANT):
        if node is None or (value.role, value.label) not in live:
            continue
        typed = Value(Role.COTANGENT, value.label, f"adj_new_{value.name}", value.role)
        example = node.meta["val"]
        with recorder.fake_mode:
            like = torch.empty(example.shape, dtype=example.dtype, device=example.device)
        values.append(typed)
        tensors.append(recorder.input(typed.name, like))
        nodes.append(node)
    return values, tensors, nodes


def finish(
    step: StepGraph,
    recorder: Recorder,
    inputs: Sequence[Value],
    contributions: Sequence[tuple[Value, Tensor | None]],
    extra: Sequence[tuple[Value, Tensor]] = (),
) -> StepGraph:
    """The adjoint graph out of a recording."""
    outputs: list[tuple[Value, Tensor | None]] = list(extra)
    for value, tensor in contributions:
        typed = Value(Role.COTANGENT, value.label, f"adj_{value.name}", value.role)
        outputs.append((typed, tensor))
    return assembled(step, recorder, inputs, outputs)


def assembled(
    step: StepGraph,
    recorder: Recorder,
    inputs: Sequence[Value],
    outputs: Sequence[tuple[Value, Tensor | None]],
) -> StepGraph:
    """A derivative of `step` out of a recording; None for structural zeros."""
    nodes: list[tuple[Value, fx.Node | None]] = []
    for value, tensor in outputs:
        node = None if tensor is None else recorder.node_of(tensor)
        assert tensor is None or node is not None, f"the result for {value.label} is unknown"
        nodes.append((value, node))
    return assemble(recorder, inputs, nodes, Names(), [], step.constants)
