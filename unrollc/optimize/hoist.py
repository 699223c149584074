"""Hoisting: what no inner step changes is computed once, before the first.

Where all steps see one batch, what a frozen part of the model makes of it is the same in every
step: the features of a fixed backbone, masks, a batch that is scaled or laid out anew. A step takes
such values from outside then, like the parameters they are computed from, and so does its adjoint:
the cotangents add up over the steps and are pulled back to the meta-parameters once.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.capture.assemble import assemble_graph
from unrollc.capture.naming import origin_of
from unrollc.capture.nests import is_continuous
from unrollc.optimize.congruence import Key, key_of, numbered
from unrollc.optimize.packed_loop import PackedLoop
from unrollc.optimize.statistics import split_statistics
from unrollc.optimize.views import is_view
from unrollc.step import Role, StepGraph, Value, build, copy, placeholder, tensors_of

aten = torch.ops.aten

#: Roles of what no step changes, unless it has an entry a step.
_FIXED = (Role.HYPER, Role.CONTEXT, Role.CONSTANT, Role.BATCH)

#: Ops that move values and compute none.
_MOVING = frozenset(
    aten_op
    for packet in (
        *(aten.cat, aten.stack, aten.clone, aten._to_copy, aten.copy, aten.repeat),
        *(aten.reshape, aten.expand, aten.unbind, aten.split_with_sizes),
    )
    for aten_op in (getattr(packet, name) for name in packet.overloads())
)


def hoist(
    loop: PackedLoop, per_step: frozenset[str], wanted: frozenset[Key], *, deep: bool
) -> PackedLoop:
    """``steps of (θ, φ, x) --> h = prologue(φ, x); steps of (θ, φ, x, h)``.

    Args:
        loop: The loop.
        per_step: Labels of inputs with one entry a step.
        wanted: Meta-parameters besides where the loop starts.
        deep: Whether values that depend on them are hoisted as well. The captured gradients with
            respect to the meta-parameters, which mixed mode needs, are gone then.
    """
    counts = Counter(loop.sequence)
    most = max(counts, key=lambda index: counts[index])
    if counts[most] < 2:
        return loop
    still = frozenset() if deep else wanted
    steps = [
        split_statistics(
            _without_gradients(step) if deep else step,
            frozenset(node.name for node in _fixed(step, per_step, still)),
        )
        for step in loop.steps
    ]
    numbers: dict[Hashable, int] = {}
    numberings = [numbered(step, {}, numbers) for step in steps]
    chosen = _chosen(steps[most], _invariant(steps[most], per_step, still))
    if not chosen:
        return loop
    distinct = {numberings[most][node]: node for node in reversed(chosen)}
    values = _values(steps, [node for node in chosen if node in distinct.values()])
    by_number = {numberings[most][node]: value for node, value in values.items()}
    return replace(
        loop,
        steps=tuple(
            _reading(step, numbering, by_number)
            for step, numbering in zip(steps, numberings, strict=True)
        ),
        prologue=_prologue(steps[most], values),
    )


def moved_by(prologue: StepGraph | None, wanted: frozenset[Key]) -> frozenset[Key]:
    """The results of a prologue that meta-parameters move."""
    if prologue is None:
        return frozenset()
    moving = {
        node
        for value, node in zip(prologue.inputs, prologue.placeholders, strict=True)
        if key_of(value) in wanted
    }
    for node in prologue.graph.nodes:
        if node.op != "call_function" or node.target is aten.detach.default:
            continue
        if not moving.isdisjoint(node.all_input_nodes):
            moving.add(node)
    return frozenset(
        key_of(value)
        for value, node in zip(prologue.outputs, prologue.results, strict=True)
        if node in moving and is_continuous(node.meta["val"])
    )


def _without_gradients(step: StepGraph) -> StepGraph:
    """The step without gradients besides those of θ: they run through what is hoisted."""
    pairs = zip(step.outputs, step.results, strict=True)
    outputs = [(v, n) for v, n in pairs if v.role is not Role.GRADIENT or v.of is Role.THETA]
    if len(outputs) == len(step.outputs):
        return step
    return assemble_graph(step, zip(step.inputs, step.placeholders, strict=True), outputs)


# -- what is hoisted ----------------------------------------------------------------------------


def _invariant(step: StepGraph, per_step: frozenset[str], still: frozenset[Key]) -> set[fx.Node]:
    """The nodes that are the same in every step, inputs among them.

    An inner gradient is none even where it is, nor what is computed from it: to a first-order
    gradient it is a constant, which a prologue would not know.
    """
    found = _fixed(step, per_step, still)
    gradients = {node for _, node in step.outputs_with(Role.GRADIENT)}
    for node in step.graph.nodes:
        if node.op != "call_function" or node in gradients:
            continue
        if found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _fixed(step: StepGraph, per_step: frozenset[str], still: frozenset[Key]) -> set[fx.Node]:
    """The inputs that are."""
    return {
        node
        for value, node in zip(step.inputs, step.placeholders, strict=True)
        if value.role in _FIXED and value.label not in per_step and key_of(value) not in still
    }


def _chosen(step: StepGraph, invariant: set[fx.Node]) -> list[fx.Node]:
    """The values that are worth being handed to every step, in order.

    They are what the rest of the step reads. Views are made anew: what they view is handed over;
    and what a step returns is computed by the step.
    """
    stays = _viewed(node for node in step.results if node is not None)
    stack = [node for node in invariant if not invariant.issuperset(node.users) or node in stays]
    chosen: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_view(node) or node in stays:
            stack += node.all_input_nodes
        elif isinstance(node.meta["val"], Tensor) and _is_worth_it(node):
            chosen.add(node)
    return [node for node in step.graph.nodes if node in chosen]


def _viewed(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Some nodes and those whose memory they lie in: what a step returns is its own."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        found.add(node)
        if node.op == "call_function" and is_view(node):
            stack += node.all_input_nodes
    return found


def _is_worth_it(node: fx.Node) -> bool:
    """Whether computing a value takes more than reading it.

    Numbers that are computed from numbers are not, nor are numbers that are spread over a vector:
    kernels do both on the way.
    """
    cone = _cone([node])
    for each in cone:
        operands = [t for source in each.all_input_nodes for t in tensors_of(source)]
        computes = each.target is not operator.getitem and each.target not in _MOVING
        if computes and not is_view(each) and any(t.numel() > 1 for t in operands):
            return True
    size: int = node.meta["val"].numel()
    sources = {n for each in cone for n in each.all_input_nodes if n.op == "placeholder"}
    return size > 1 and 2 * sum(n.meta["val"].numel() for n in sources) >= size


def _cone(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The ops that some values are computed by, their own included."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


# -- the graphs ---------------------------------------------------------------------------------


def _values(steps: Sequence[StepGraph], chosen: Sequence[fx.Node]) -> dict[fx.Node, Value]:
    """The values with names that no value of the steps has."""
    taken = {v.name for step in steps for v in (*step.inputs, *step.outputs)}
    found = {}
    for node in chosen:
        name = base = origin_of(node)
        number = 1
        while f"fixed_{name}" in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(f"fixed_{name}")
        found[node] = Value(Role.INVARIANT, f"fixed {name}", f"fixed_{name}")
    return found


def _prologue(step: StepGraph, values: Mapping[fx.Node, Value]) -> StepGraph:
    cone = _cone(values)
    read = {source for node in cone for source in node.all_input_nodes}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = []
    for value, node in zip(step.inputs, step.placeholders, strict=True):
        if node in read:
            copies[node] = placeholder(graph, value.name)
            copies[node].meta = dict(node.meta)
            inputs.append(value)
    for node in step.graph.nodes:
        if node in cone:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in values))
    constants = {v.name: step.constants[v.name] for v in inputs if v.role is Role.CONSTANT}
    return build(graph, tuple(inputs), tuple(values.values()), constants)


def _reading(
    step: StepGraph, numbers: Mapping[fx.Node, int], values: Mapping[int, Value]
) -> StepGraph:
    """The step with the hoisted values among its inputs."""
    result = copy(step)
    copies = dict(zip(step.graph.nodes, result.graph.nodes, strict=True))
    taken: dict[Value, fx.Node] = {}
    stays = _viewed(node for node in step.results if node is not None)
    for node in step.graph.nodes:
        if node.op != "call_function" or numbers[node] not in values or node in stays:
            continue
        value, old = values[numbers[node]], copies[node]
        if value not in taken:
            with result.graph.inserting_before(old):
                taken[value] = placeholder(result.graph, value.name)
            taken[value].meta = {"val": node.meta["val"]}
        old.replace_all_uses_with(taken[value])
    inputs: list[tuple[Value, Any]] = [
        *zip(step.inputs, (copies[node] for node in step.placeholders), strict=True),
        *taken.items(),
    ]
    return assemble_graph(result, inputs, list(zip(result.outputs, result.results, strict=True)))
