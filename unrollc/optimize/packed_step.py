"""A graph over packed state: ``n updates of n tensors --> one update of a vector``.

The graph is written anew. State that belongs to a pack comes in as one vector, which is split where
single members are read; the chains of the update that `lanes` finds side by side become one chain;
gradients are concatenated once. This happens before differentiation, so adjoints are those of the
packed step: the derivative of a split is a concatenation, that of a concatenation its slices.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import fx

from unrollc.capture.faking import asked
from unrollc.optimize.congruence import Key, numbered
from unrollc.optimize.lanes import Kind, Lane, Lanes, Tuple
from unrollc.step import Phase, Role, StepGraph, Value, build, placeholder

aten = torch.ops.aten

#: What is written: an op of its own, or a vector for corresponding nodes.
Unit = fx.Node | Tuple


class UnpackableError(Exception):
    """The update of one member reads what that of another computes."""


@dataclass(frozen=True)
class Pack:
    """Values of the state that travel as one vector.

    Attributes:
        value: The vector.
        members: What is in it, in order.
        shapes: Of the members; () each where they are numbers.
    """

    value: Value
    members: tuple[Key, ...]
    shapes: tuple[torch.Size, ...]

    @cached_property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]


@dataclass(frozen=True)
class Group:
    """Parameters that an optimizer updates alike.

    Attributes:
        packs: θ first, then the optimizer's state; members of one parameter have one position.
    """

    packs: tuple[Pack, ...]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        return self.packs[0].shapes


def packed(graph: StepGraph, group: Group, *, first: bool = False) -> StepGraph:
    """``graph over single tensors --> graph over packed state``, the same function.

    Args:
        graph: An inner step as captured, or a graph that reads the last state.
        group: What travels as vectors.
        first: Whether the state comes in as the user has it, as in the first step of a loop.

    Raises:
        UnpackableError: If an update of one member reads what that of another computes.
    """
    return _Writer(graph, group, packed_in=not first).written()


class _Writer:
    """Writes a graph anew, unit by unit.

    Attributes:
        singles: The new node of an old one.
        vectors: The new node of corresponding old ones.
        given: For members of packed state their tuple and position in it.
        homes: Likewise, and for all that the update reads as part of a vector.
    """

    def __init__(self, old: StepGraph, group: Group, *, packed_in: bool) -> None:
        self.old, self.group, self.packed_in = old, group, packed_in
        self.order = {node: index for index, node in enumerate(old.graph.nodes)}
        updates = (n for n in self.order if n.meta.get("phase") is Phase.UPDATE)
        self.first_update = min((self.order[node] for node in updates), default=0)
        self.fake_mode = old.placeholders[0].meta["val"].fake_mode
        self.graph = fx.Graph()
        self.singles: dict[fx.Node, fx.Node] = {}
        self.vectors: dict[Tuple, fx.Node] = {}
        self.given: dict[fx.Node, tuple[Tuple, int]] = {}
        self.homes: dict[fx.Node, tuple[Tuple, int]] = {}
        self.phases: dict[Tuple, Phase] = {}
        self.split: dict[tuple[Tuple, bool], dict[int, fx.Node]] = {}
        self.spread: dict[tuple[Tuple, torch.dtype], fx.Node] = {}
        self.lanes = Lanes(group.shapes, numbered(old, {}), set())

    def written(self) -> StepGraph:
        inputs = self._inputs()
        outputs = self._outputs()
        self._write_all([unit for _, unit in outputs if unit is not None])
        results = [None if unit is None else self._result(unit) for _, unit in outputs]
        self.graph.output(tuple(results))
        values = tuple(value for value, _ in outputs)
        return build(self.graph, inputs, values, dict(self.old.constants))

    # -- inputs and outputs ---------------------------------------------------------------------

    def _inputs(self) -> tuple[Value, ...]:
        pairs = list(zip(self.old.inputs, self.old.placeholders, strict=True))
        nodes = {(value.role, value.label): node for value, node in pairs}
        mine = {}
        if self.packed_in:
            packs = [p for p in self.group.packs if all(member in nodes for member in p.members)]
            mine = {member: pack for pack in packs for member in pack.members}
        inputs: list[Value] = []
        for value, node in pairs:
            pack = mine.get((value.role, value.label))
            if pack is None:
                self.singles[node] = self._placeholder(value, node.meta)
                inputs.append(value)
            elif pack.value not in inputs:
                self._packed_input(pack, tuple(nodes[member] for member in pack.members))
                inputs.append(pack.value)
        return tuple(inputs)

    def _placeholder(self, value: Value, meta: dict[str, Any]) -> fx.Node:
        made = placeholder(self.graph, value.name)
        made.meta = dict(meta)
        return made

    def _packed_input(self, pack: Pack, nodes: Tuple) -> None:
        meta = dict(nodes[0].meta)
        with self.fake_mode:
            like = meta["val"]
            meta["val"] = torch.empty(sum(pack.sizes), dtype=like.dtype, device=like.device)
        meta["counter"] = all(bool(node.meta.get("counter")) for node in nodes)
        self.vectors[nodes] = self._placeholder(pack.value, meta)
        self.lanes.sources.add(nodes)
        for index, node in enumerate(nodes):
            self.given[node] = self.homes[node] = (nodes, index)

    def _outputs(self) -> list[tuple[Value, Unit | None]]:
        """What is returned; vectors stand where the first of their members stood."""
        results = {value.key: node for value, node in self._pairs()}
        packs = {member: pack for pack in self.group.packs for member in pack.members}
        outputs: list[tuple[Value, Unit | None]] = []
        done: set[Value] = set()
        for value, node in self._pairs():
            of_state = value.role in (Role.GRADIENT, Role.COTANGENT)
            pack = packs.get((value.of if of_state else value.role, value.label))  # type: ignore[arg-type]
            if pack is None or (value.role is Role.GRADIENT and not self.packed_in):
                outputs.append((value, node))
                continue
            name = ("adj_" if value.role is Role.COTANGENT else "") + pack.value.name
            new = Value(value.role, pack.value.label, name, value.of)
            if new in done:
                continue
            done.add(new)
            keys = [(value.role, label, value.of, None) for _, label in pack.members]
            members = [results[key] for key in keys]
            assert all(node is not None for node in members), f"a part of {pack} is missing"
            outputs.append((new, self._vector(value.role, tuple(members))))  # type: ignore[arg-type]
        return outputs

    def _pairs(self) -> list[tuple[Value, fx.Node | None]]:
        return list(zip(self.old.outputs, self.old.results, strict=True))

    def _vector(self, role: Role, nodes: Tuple) -> Tuple:
        """Find what computes a vector that is returned."""
        if role is Role.GRADIENT:
            self.phases[nodes] = Phase.GRADIENT
            self.lanes.sources.add(nodes)
            self.lanes.gathered[nodes] = Kind.FULL
            for index, node in enumerate(nodes):
                self.homes.setdefault(node, (nodes, index))
        elif role is Role.COTANGENT:
            self.phases[nodes] = Phase.ADJOINT
            self.lanes.gathered.setdefault(nodes, Kind.FULL)
        return nodes

    # -- order ------------------------------------------------------------------------------------

    def _write_all(self, roots: Sequence[Unit]) -> None:
        """Write what `roots` need, as far as possible in the old order."""
        for unit in roots:
            if isinstance(unit, tuple) and unit not in self.lanes.gathered:
                followed = self.lanes.follow(unit)
                assert followed, f"{unit} has other shapes than the members"
        for nodes in self.lanes.found:
            for index, node in enumerate(nodes):
                self.homes.setdefault(node, (nodes, index))
        needed: dict[Unit, None] = {}
        stack = [self._unit(root) for root in roots]
        while stack:
            unit = stack.pop()
            if unit not in needed and not self._is_written(unit):
                needed[unit] = None
                stack.extend(self._needs(unit))
        for unit in sorted(needed, key=self._position):
            self._write_after_its_needs(unit)

    def _write_after_its_needs(self, unit: Unit) -> None:
        stack, open_units = [unit], set()
        while stack:
            current = stack[-1]
            missing = [each for each in self._needs(current) if not self._is_written(each)]
            if self._is_written(current) or not missing:
                stack.pop()
                open_units.discard(current)
                if not self._is_written(current):
                    self._write(current)
                continue
            if current in open_units:
                raise UnpackableError(f"{current} depends on itself")
            open_units.add(current)
            stack.extend(missing)

    def _position(self, unit: Unit) -> int:
        """Where a unit stands; no part of the update comes before the inner gradient."""
        if not isinstance(unit, tuple):
            return self.order[unit]
        last = max(self.order[node] for node in unit)
        return last if unit in self.phases else max(last, self.first_update)

    def _is_written(self, unit: Unit) -> bool:
        return unit in (self.vectors if isinstance(unit, tuple) else self.singles)

    def _unit(self, root: Unit) -> Unit:
        return root if isinstance(root, tuple) else self._read(root, inner=False)

    def _needs(self, unit: Unit) -> list[Unit]:
        if not isinstance(unit, tuple):
            inner = self._is_inner(unit)
            return [self._read(node, inner=inner) for node in unit.all_input_nodes]
        if unit in self.lanes.gathered:
            inner = self.phases.get(unit) is Phase.GRADIENT
            return [self._read(node, inner=inner) for node in unit]
        return [self._unit(operand) for operand in self.lanes.found[unit].operands]

    def _is_inner(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.meta["phase"] is not Phase.UPDATE

    def _read(self, node: fx.Node, *, inner: bool) -> Unit:
        """What has to be written before `node` can be read, inside the gradient or behind it."""
        homes = self.given if inner else self.homes
        return homes[node][0] if node in homes else node

    # -- writing ----------------------------------------------------------------------------------

    def _write(self, unit: Unit) -> None:
        if not isinstance(unit, tuple):
            inner = self._is_inner(unit)
            self.singles[unit] = self.graph.node_copy(
                unit, lambda node: self._single(node, inner=inner)
            )
        elif (kind := self.lanes.gathered.get(unit)) is not None:
            self.vectors[unit] = self._gathered(unit, kind)
        else:
            self.vectors[unit] = self._computed(unit, self.lanes.found[unit])

    def _single(self, node: fx.Node, *, inner: bool) -> fx.Node:
        homes = self.given if inner else self.homes
        return self._part(*homes[node], inner=inner) if node in homes else self.singles[node]

    def _result(self, unit: Unit) -> fx.Node:
        return self.vectors[unit] if isinstance(unit, tuple) else self._single(unit, inner=False)

    def _part(self, nodes: Tuple, index: int, *, inner: bool) -> fx.Node:
        """One member of a vector, in its own shape."""
        parts = self.split.setdefault((nodes, inner), {})
        vector = self.vectors[nodes]
        phase = Phase.FORWARD if inner else Phase.UPDATE
        shape = nodes[index].meta["val"].shape
        if not parts:
            full = nodes[0].meta["val"].dim() > 0
            sizes = [math.prod(node.meta["val"].shape) for node in nodes]
            split = (
                self._call(phase, aten.split_with_sizes.default, vector, sizes)
                if full
                else self._call(phase, aten.unbind.int, vector)
            )
            for i in range(len(nodes)):
                parts[i] = self._call(phase, operator.getitem, split, i)
        if len(shape) > 1 and parts[index].meta["val"].shape != shape:
            parts[index] = self._call(phase, aten.reshape.default, parts[index], list(shape))
        if nodes[index] in self.given:
            parts[index].meta["called"] = nodes[index].name
        return parts[index]

    def _gathered(self, nodes: Tuple, kind: Kind) -> fx.Node:
        phase = self.phases.get(nodes, Phase.UPDATE)
        members = [self._single(node, inner=phase is Phase.GRADIENT) for node in nodes]
        if kind is Kind.SCALAR:
            return self._call(phase, aten.stack.default, members)
        flat = [
            member
            if member.meta["val"].dim() == 1
            else self._call(phase, aten.reshape.default, member, [-1])
            for member in members
        ]
        return self._call(phase, aten.cat.default, flat)

    def _computed(self, nodes: Tuple, lane: Lane) -> fx.Node:
        if lane.target is None:
            return self.vectors[lane.args[0]]
        adapt = _adapted_dtype(lane)

        def operand(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return self._single(arg, inner=False)
            if not isinstance(arg, tuple):
                return arg
            dtype = adapt(arg)
            if lane.kind is Kind.FULL and arg[0].meta["val"].dim() == 0:
                return self._spread(arg, dtype)
            return self._cast(self.vectors[arg], dtype)

        args = [operand(arg) for arg in lane.args]
        kwargs = {key: operand(arg) for key, arg in lane.kwargs.items()}
        made = self._call(Phase.UPDATE, lane.target, *args, **kwargs)
        first = nodes[0].meta
        kept = ("source", "removable", "nonsingular")
        made.meta.update({key: first[key] for key in kept if key in first})
        assert made.meta["val"].dtype == first["val"].dtype, (made, nodes[0])
        return made

    def _spread(self, nodes: Tuple, dtype: torch.dtype) -> fx.Node:
        """Numbers, each repeated for every element of its parameter."""
        if (nodes, dtype) not in self.spread:
            vector = self._cast(self.vectors[nodes], dtype)
            numbers = self._call(Phase.UPDATE, aten.unbind.int, vector)
            parts = []
            for index, size in enumerate(self.group.packs[0].sizes):
                number = self._call(Phase.UPDATE, operator.getitem, numbers, index)
                parts.append(self._call(Phase.UPDATE, aten.expand.default, number, [size]))
            self.spread[nodes, dtype] = self._call(Phase.UPDATE, aten.cat.default, parts)
        return self.spread[nodes, dtype]

    def _cast(self, vector: fx.Node, dtype: torch.dtype) -> fx.Node:
        if vector.meta["val"].dtype == dtype:
            return vector
        return self._call(Phase.UPDATE, aten._to_copy.default, vector, dtype=dtype)

    def _call(self, phase: Phase, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with torch.no_grad(), self.fake_mode:
            node.meta["val"] = asked(target, values, named)
        node.meta.update(phase=phase, source=None)
        return node


def _adapted_dtype(lane: Lane) -> Any:
    """For each packed operand the dtype in which the op on single members takes it.

    A 0-dim operand promotes others of its kind only if they are 0-dim too; packed, it is no longer
    one.
    """
    values = [(o[0] if isinstance(o, tuple) else o).meta["val"] for o in lane.operands]
    wide = [v.dtype for v in values if v.dim() > 0 and v.dtype is not torch.bool]
    numbers = [v.dtype for v in values if v.dim() == 0 and v.dtype is not torch.bool]

    def adapt(operand: Tuple) -> torch.dtype:
        value = operand[0].meta["val"]
        own: torch.dtype = value.dtype
        if own is torch.bool:
            return own
        if lane.kind is Kind.SCALAR:
            promoted: torch.dtype = reduce(torch.promote_types, numbers)
            return promoted
        if value.dim() > 0 or not wide:
            return own
        found: torch.dtype = torch.result_type(
            torch.empty(1, dtype=reduce(torch.promote_types, wide), device="meta"),
            torch.empty((), dtype=own, device="meta"),
        )
        return found

    return adapt
