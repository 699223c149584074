"""Slices of a step's update: what computes some of its results, and which slices are alike.

Twenty parameters under one optimizer have twenty copies of one update. A slice's `signature`
numbers its nodes locally and forgets whose tensors they are, so that copies compare equal and
are analysed once.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from unrollc.step import Phase, Role, StepGraph, Value

_STATE = re.compile(r'state\["(?P<owner>.*?)"\](?P<path>\[.*)', re.DOTALL)
_GROUP = re.compile(r"param_groups\[\d+\](?P<path>\[.*)", re.DOTALL)


@dataclass(frozen=True)
class Leaf:
    """An input of the update: a graph input, or an inner gradient.

    Attributes:
        role: Its role; `Role.GRADIENT` for an inner gradient.
        owner: Label of the parameter that it belongs to, or "".
        key: Its name without the owner: ``["exp_avg"]``, ``["betas"][1]``.
        label: Its whole label.
    """

    role: Role
    owner: str
    key: str
    label: str


@dataclass(frozen=True)
class UpdateSlice:
    """The part of the update that computes some results.

    Attributes:
        nodes: Ops of the update phase, in order of execution.
        leaves: What they read from outside.
        results: The results, with their values.
        constants: The graph's constants, by name.
    """

    nodes: tuple[fx.Node, ...]
    leaves: dict[fx.Node, Leaf]
    results: tuple[tuple[Value, fx.Node], ...]
    constants: dict[str, Tensor]

    @functools.cached_property
    def numbers(self) -> dict[fx.Node, int]:
        """The nodes, numbered by how the results lead to them; order of execution is no matter."""
        number: dict[fx.Node, int] = {}
        stack = [node for _, node in reversed(self.results)]
        while stack:
            node = stack[-1]
            sources = [] if node in self.leaves else node.all_input_nodes
            waiting = [source for source in sources if source not in number]
            if waiting and node not in number:
                stack.extend(reversed(waiting))
            else:
                number.setdefault(stack.pop(), len(number))
        return number

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """Equal for slices that differ in whose tensors they compute with."""
        number = self.numbers
        owners: dict[str, int] = {}
        rows: list[Any] = []
        local: Any = lambda n: _Local(number[n])  # noqa: E731
        for node in number:
            leaf = self.leaves.get(node)
            if leaf is None:
                arguments = fx.map_arg((node.args, node.kwargs), local)
                rows.append((node.target, repr(arguments), _kind(node)))
            else:
                owner = owners.setdefault(leaf.owner, len(owners))
                constant = self.constants.get(node.name)
                fixed = "" if constant is None else repr(constant.tolist())
                rows.append((leaf.role, owner, leaf.key, is_counter(node), fixed, _kind(node)))
        ends = tuple((v.role, owner_and_key(v)[1], number[node]) for v, node in self.results)
        return (tuple(rows), ends)


@dataclass(frozen=True)
class _Local:
    index: int

    def __repr__(self) -> str:
        return f"%{self.index}"


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """What of a tensor's form decides how ops treat it: 0-dim tensors broadcast."""
    value = node.meta.get("val")
    return (value.dim() == 0, value.dtype) if isinstance(value, Tensor) else ()


def is_counter(node: fx.Node) -> bool:
    """Whether an input is a scalar that is known at every step."""
    return bool(node.meta.get("counter"))


def owner_and_key(value: Value) -> tuple[str, str]:
    """The parameter that a value belongs to, and what it is called there.

    A hyperparameter belongs to no parameter; those of several groups are called the same. A
    constant is known by its value.
    """
    if value.role is Role.CONSTANT:
        return "", ""
    if value.role is Role.OPT_STATE and (found := _STATE.fullmatch(value.label)):
        return found["owner"], found["path"]
    if value.role in (Role.THETA, Role.GRADIENT):
        return value.label, ""
    if value.role is Role.HYPER and (found := _GROUP.fullmatch(value.label)):
        return "", found["path"]
    return "", value.label


def op_name(node: fx.Node) -> str:
    """``mul`` for ``aten.mul.Tensor``."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).split("::")[-1]


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an op reads; of some it reads the shape only."""
    nodes = node.all_input_nodes
    name = op_name(node)
    if name in ("zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones"):
        return []
    return nodes[1:] if name in ("full_like", "fill", "new_full") else nodes


def settled_nodes(part: UpdateSlice) -> set[fx.Node]:
    """What hyperparameters and step counts alone decide."""
    settled = set(fixed_leaves(part))
    for node in part.nodes:
        if all(source in settled for source in value_inputs(node)):
            settled.add(node)
    return settled


def fixed_leaves(part: UpdateSlice) -> frozenset[fx.Node]:
    """Inputs that no gradient reaches during a run.

    These are hyperparameters, constants, and scalar state that changes by such inputs alone: a
    step count, a product of decay rates.
    """
    ends = {(value.role, value.label): node for value, node in part.results}
    fixed = {
        node
        for node, leaf in part.leaves.items()
        if leaf.role in (Role.HYPER, Role.CONSTANT)
        or (leaf.role is Role.OPT_STATE and _is_scalar(node) and (leaf.role, leaf.label) in ends)
        or is_counter(node)
    }
    while True:
        settled = set(fixed)
        for node in part.nodes:
            if all(source in settled for source in value_inputs(node)):
                settled.add(node)
        moved = {
            node
            for node in fixed
            if (key := (part.leaves[node].role, part.leaves[node].label)) in ends
            and ends[key] not in settled
        }
        if not moved:
            return frozenset(fixed)
        fixed -= moved


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0


def leaf_of(value: Value) -> Leaf:
    owner, key = owner_and_key(value)
    return Leaf(value.role, owner, key, value.label)


@dataclass(frozen=True)
class Update:
    """The update phase of a step, ready to be sliced.

    Attributes:
        step: The step.
        leaves: What the update may read, with what it is to the update.
        order: Position of every node.
    """

    step: StepGraph
    leaves: dict[fx.Node, Leaf]
    order: dict[fx.Node, int]

    def slice(self, results: Iterable[tuple[Value, fx.Node]]) -> UpdateSlice:
        """What computes `results`."""
        results = tuple(results)
        nodes: set[fx.Node] = set()
        leaves: set[fx.Node] = set()
        stack = [node for _, node in results]
        while stack:
            node = stack.pop()
            if node in nodes or node in leaves:
                continue
            if node in self.leaves or node.meta.get("phase") is not Phase.UPDATE:
                leaves.add(node)
            else:
                nodes.add(node)
                stack.extend(node.all_input_nodes)
        unknown = Leaf(Role.CONTEXT, "", "", "")
        return UpdateSlice(
            tuple(sorted(nodes, key=self.order.__getitem__)),
            {n: self.leaves.get(n, unknown) for n in sorted(leaves, key=self.order.__getitem__)},
            results,
            self.step.constants,
        )

    def per_parameter(self) -> list[tuple[str, UpdateSlice]]:
        """For each parameter, what computes its new value and its new state."""
        grouped: dict[str, list[tuple[Value, fx.Node]]] = {}
        for value, node in self.step.outputs_with(Role.THETA, Role.OPT_STATE):
            if node is not None:
                grouped.setdefault(owner_and_key(value)[0], []).append((value, node))
        return [(owner, self.slice(results)) for owner, results in grouped.items()]


def update_of(step: StepGraph) -> Update:
    """The update phase of `step`."""
    leaves = {
        node: leaf_of(value) for value, node in zip(step.inputs, step.placeholders, strict=True)
    }
    for value, node in step.outputs_with(Role.GRADIENT):
        if node is not None and value.of is Role.THETA:
            leaves[node] = leaf_of(value)
    return Update(step, leaves, {node: index for index, node in enumerate(step.graph.nodes)})
