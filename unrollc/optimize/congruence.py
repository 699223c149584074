"""State that is equal at every step: one value stands for all of them.

An optimizer with one step counter a parameter makes all of them in its first step and adds one to
each ever after. They are equal by induction over the loop: what the first step returns is equal op
by op, and equal state in makes equal state out.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import fx

from unrollc.step import STATE_ROLES, Role, StepGraph, Value, build, placeholder

#: A value of the state, by role and label.
Key = tuple[Role, str]


def key_of(value: Value) -> Key:
    return (value.role, value.label)


def equal_state(steps: Sequence[StepGraph], sequence: Sequence[int]) -> dict[Key, Key]:
    """For each 0-dim value of the optimizer's state the first one that is equal to it after each
    step.

    Args:
        steps: The distinct steps.
        sequence: For each inner step an index into `steps`.
    """
    scalars = {
        key_of(value)
        for value, node in steps[sequence[-1]].outputs_with(Role.OPT_STATE)
        if node is not None and node.meta["val"].dim() == 0
    }
    first = steps[sequence[0]]
    classes = _returned(first, numbered(first, {}), scalars)
    later = [steps[index] for index in dict.fromkeys(sequence[1:])]
    while True:
        same = _representatives(classes)
        refined: dict[Key, Hashable] = dict(classes)
        for step in later:
            found = _returned(step, numbered(step, same), scalars)
            refined = {key: (refined[key], found.get(key)) for key in refined}
        merged = _representatives(refined)
        if merged == same:
            return same
        classes = refined


def merged(graph: StepGraph, same: Mapping[Key, Key], *, first: bool = False) -> StepGraph:
    """``a, b (equal state) --> a``, on the way in and on the way out.

    Args:
        graph: An inner step, or a graph that reads the last state.
        same: What stands for each value of the state (`equal_state`).
        first: Whether the state comes in as the user has it.
    """
    gone = {key for key, stands in same.items() if stands != key}
    if not gone:
        return graph
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: dict[Key, Value] = {}
    late = []
    for value, node in zip(graph.inputs, graph.placeholders, strict=True):
        if key_of(value) in gone and not first:
            late.append((node, same[key_of(value)]))
            continue
        copies[node] = placeholder(new, value.name)
        copies[node].meta = dict(node.meta)
        inputs[key_of(value)] = value
    names = {node.name: node for node in new.nodes}
    copies.update((node, names[inputs[stands].name]) for node, stands in late)
    for node in graph.graph.nodes:
        if node.op == "call_function":
            copies[node] = new.node_copy(node, copies.__getitem__)
    pairs = zip(graph.outputs, graph.results, strict=True)
    kept = [(v, n) for v, n in pairs if v.role not in STATE_ROLES or key_of(v) not in gone]
    new.output(tuple(None if node is None else copies[node] for _, node in kept))
    return build(new, tuple(inputs.values()), tuple(v for v, _ in kept), graph.constants)


def numbered(
    step: StepGraph, same: Mapping[Key, Key], numbers: dict[Hashable, int] | None = None
) -> dict[fx.Node, int]:
    """A number for each node, the same for nodes that compute the same by the same ops.

    Args:
        step: The graph.
        same: Of state that is known to be equal, what stands for it.
        numbers: The numbers of other graphs, to which those of this one are added.
    """
    numbers = {} if numbers is None else numbers
    found: dict[fx.Node, int] = {}
    for value, node in zip(step.inputs, step.placeholders, strict=True):
        identity: Hashable = same.get(key_of(value), value.key)
        if value.role is Role.CONSTANT:
            tensor = step.constants[value.name]
            identity = (tensor.dtype, tensor.device, tuple(tensor.shape), repr(tensor.tolist()))
        found[node] = numbers.setdefault(("input", identity), len(numbers))
    for node in step.graph.nodes:
        if node.op == "call_function":
            kwargs = sorted(node.kwargs.items())
            operands = _described((node.args, kwargs), found)
            found[node] = numbers.setdefault((node.target, operands), len(numbers))
    return found


def _described(value: Any, found: Mapping[fx.Node, int]) -> Hashable:
    """A hashable stand-in for arguments; numbers of different types or signs of zero stay apart."""
    if isinstance(value, fx.Node):
        return ("node", found[value])
    if isinstance(value, tuple | list):
        return tuple(_described(item, found) for item in value)
    return (type(value), repr(value))


def _returned(
    step: StepGraph, numbers: Mapping[fx.Node, int], keys: set[Key]
) -> dict[Key, Hashable]:
    return {
        key_of(value): (numbers[node], node.meta["val"].dtype)
        for value, node in step.outputs_with(Role.OPT_STATE)
        if node is not None and key_of(value) in keys
    }


def _representatives(classes: Mapping[Key, Hashable]) -> dict[Key, Key]:
    first: dict[Hashable, Key] = {}
    return {key: first.setdefault(number, key) for key, number in classes.items()}
