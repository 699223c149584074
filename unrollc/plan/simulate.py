"""Memory over program time: the schedule executed on storages instead of tensors.

Every call allocates its frame, a storage lives as long as something refers to it. The user's own
tensors do not count. This follows the generated program line by line: lists that a function takes
over die inside it, value by value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from unrollc.errors import Source
from unrollc.plan.actions import (
    Action,
    Advance,
    Drop,
    Fetch,
    Keep,
    Restore,
    Reverse,
    Spill,
    Validate,
)
from unrollc.plan.liveness import Frame, Owned, draws_noise, frame_of, storage_bytes
from unrollc.plan.pieces import Pieces
from unrollc.step import STATE_ROLES, Role, StepGraph


@dataclass(frozen=True, slots=True)
class Moment:
    """Memory at one action of the schedule.

    Attributes:
        action: What runs, e.g. ``step 3``.
        bytes: Most bytes held while it runs.
        kept: Of these, bytes of states that wait for the backward pass.
        local: Of these, bytes that the running graph has allocated.
    """

    action: str
    bytes: int
    kept: int
    local: int


@dataclass(frozen=True)
class Part:
    """A part of what is held at the peak.

    Attributes:
        what: A role ("theta", "opt_state", …), or the op's phase for values inside the step.
        where: The user's line that values inside the step come from.
        bytes: Their bytes.
    """

    what: str
    where: Source | None
    bytes: int


@dataclass(frozen=True)
class Simulation:
    """What a run holds.

    Attributes:
        timeline: One `Moment` an action that computes.
        composition: What is held at the peak; the bytes add up to it.
    """

    timeline: tuple[Moment, ...]
    composition: tuple[Part, ...]

    @property
    def peak(self) -> Moment:
        return max(self.timeline, key=lambda moment: moment.bytes)


def simulate(pieces: Pieces) -> Simulation:
    """Execute the schedule of `pieces` on storages."""
    run = _Run(pieces)
    for action in pieces.schedule:
        run.execute(action)
    run.finish()
    return Simulation(tuple(run.timeline), run.composition())


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """Memory that the run allocated, by what it holds."""

    bytes: int
    what: str


#: What stands for a tensor in lists; None is one of the user's.
_Held = _Storage | None


class _Ledger:
    """Counts how often each storage is held."""

    def __init__(self) -> None:
        self.total = 0
        self.counts: Counter[_Storage] = Counter()
        self.by_kind: Counter[str] = Counter()

    def hold(self, storages: Iterable[_Held]) -> None:
        for storage in storages:
            if storage is not None:
                count = self.counts.get(storage, 0)
                self.counts[storage] = count + 1
                if not count:
                    self.total += storage.bytes
                    self.by_kind[storage.what] += storage.bytes

    def release(self, storages: Iterable[_Held]) -> None:
        for storage in storages:
            if storage is not None:
                count = self.counts[storage] - 1
                if count:
                    self.counts[storage] = count
                else:
                    del self.counts[storage]
                    self.total -= storage.bytes
                    self.by_kind[storage.what] -= storage.bytes


@dataclass(frozen=True)
class _Worst:
    """The moment of the peak, with what `_Run.composition` needs."""

    bytes: int
    by_kind: Mapping[str, int]
    graph: StepGraph | None
    frame: Frame | None
    freed: Counter[str]


class _Run:
    """Storages that the program holds while the schedule is executed."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.frames: dict[tuple[int, tuple[Owned, ...]], Frame] = {}
        self.timeline: list[Moment] = []
        self.held = _Ledger()
        self.waiting = _Ledger()
        self.worst = _Worst(-1, {}, None, None, Counter())
        first = pieces.steps[pieces.sequence[0]]
        self.start = first.inputs_with(*STATE_ROLES)
        self.state: list[_Held] = [None] * len(self.start)
        self.kept: dict[int, list[_Held]] = {}
        self.cotangents: list[_Held] = []
        self.totals: dict[str, list[_Held]] = {}
        ((_, loss),) = first.outputs_with(Role.LOSS)
        assert loss is not None
        size = len(pieces.sequence) * loss.meta["val"].element_size()
        self.held.hold([_Storage(size, "inner losses")])

    def execute(self, action: Action) -> None:
        match action:
            case Keep(state):
                self._keep(state, self.state)
            case Spill():
                self.spilled = True
            case Fetch(state):
                self._keep(state, self._fetched(state))
                self.held.release(self.kept[state])  # the list that was read is the kept one
            case Restore(state):
                self._replace_state(list(self.kept[state]))
            case Drop(state):
                dropped = self.kept.pop(state)
                self.held.release(dropped)
                self.waiting.release(dropped)
            case Advance(step):
                graph = self.pieces.steps[self.pieces.sequence[step]]
                results = self._call(f"step {step}", graph, self.state)
                self._replace_state(_of(graph, results, *STATE_ROLES))
            case Validate():
                self._validate()
            case Reverse(step):
                index = self.pieces.adjoint_sequence[step]
                assert index is not None
                graph = self.pieces.adjoints[index].graph
                results = self._call(f"adjoint of step {step}", graph, self.state, self.cotangents)
                self._collect(graph, results)
                self._replace_state([])
            case _:
                raise AssertionError(f"the memory plan does not know {action}")

    def _keep(self, number: int, state: list[_Held]) -> None:
        self.kept[number] = list(state)
        self.held.hold(state)
        self.waiting.hold(state)

    def _fetched(self, number: int) -> list[_Held]:
        """A state as it comes from the disk; state 0 is the user's own."""
        if number == 0:
            return [None] * len(self.start)
        fresh: list[_Held] = [
            _Storage(storage_bytes(node.meta["val"]), value.role.value)
            for value, node in self.start
        ]
        self.held.hold(fresh)
        return fresh

    def _replace_state(self, state: list[_Held]) -> None:
        self.held.hold(state)
        self.held.release(self.state)
        self.state = state

    def _validate(self) -> None:
        pieces = self.pieces
        graph = pieces.val_gradient or pieces.val
        for label in pieces.totalled:
            self.totals[label] = [_Storage(pieces.bytes_of(label), "meta-gradients")]
            self.held.hold(self.totals[label])
        last = pieces.steps[pieces.sequence[-1]]
        roles = [value.role for value, _ in last.outputs_with(*STATE_ROLES)]
        pairs = zip(roles, self.state, strict=True)
        read = [storage for role, storage in pairs if role in pieces.validated_roles]
        self.held.hold(read)
        results = self._call("validation", graph, read)
        self.held.release(read)
        self.held.hold(_of(graph, results, Role.LOSS))
        if pieces.differentiates:
            self._collect(graph, results)
        self.held.hold(self.state)  # the result's own reference
        self._replace_state([])

    def _collect(self, graph: StepGraph, results: Sequence[_Held]) -> None:
        cotangents: list[_Held] = []
        for value, storage, node in zip(graph.outputs, results, graph.results, strict=True):
            if node is None or value.role is not Role.COTANGENT:
                continue
            if value.of in STATE_ROLES:
                cotangents.append(storage)
            elif value.label in self.pieces.per_step and value.label not in self.pieces.stacked:
                self.totals.setdefault(value.label, []).append(storage)
                self.held.hold([storage])
        self.held.hold(cotangents)
        self.held.release(self.cotangents)
        self.cotangents = cotangents

    def finish(self) -> None:
        """What the autograd bridge does with the meta-gradients: it scales them one by one."""
        for label in self.pieces.wanted:
            size = self.pieces.bytes_of(label)
            scaled = [_Storage(size, "meta-gradients")]
            self.held.hold(scaled)
            self._note(f"scale the gradient of {label}", size)
            self.held.release(self.totals.pop(label, []))

    def _call(
        self,
        name: str,
        graph: StepGraph,
        state: Sequence[_Held],
        cotangents: Sequence[_Held] = (),
    ) -> list[_Held]:
        drawn = draws_noise(graph)
        given: list[tuple[str, _Held]] = []
        states, seeds = iter(state), iter(cotangents)
        noise: list[_Held] = []
        for value, node in zip(graph.inputs, graph.placeholders, strict=True):
            if value.role in STATE_ROLES:
                given.append((value.name, next(states)))
            elif value.role is Role.COTANGENT:
                given.append((value.name, next(seeds)))
            elif value.role is Role.NOISE and drawn:
                noise.append(_Storage(storage_bytes(node.meta["val"]), "noise"))
                given.append((value.name, noise[-1]))
        self.held.hold(noise)
        passed = Counter(storage for _, storage in given if storage is not None)
        numbers = {storage: number for number, storage in enumerate(passed)}
        owned = tuple(
            Owned(each, numbers[storage], storage.bytes)
            for each, storage in given
            if storage is not None and self.held.counts[storage] == passed[storage]
        )
        key = (id(graph), owned)
        if key not in self.frames:
            self.frames[key] = frame_of(graph, owned)
        frame = self.frames[key]
        kinds = {number: storage.what for storage, number in numbers.items()}
        freed = Counter({kinds[n]: 0 for n, _ in frame.freed})
        for number, size in frame.freed:
            freed[kinds[number]] += size
        self._note(name, sum(size for _, size in frame.held), graph, frame, freed)
        self.held.release(noise)
        return self._results(graph, frame, dict(given))

    def _results(
        self, graph: StepGraph, frame: Frame, given: Mapping[str, _Held]
    ) -> list[_Held]:
        fresh: dict[int, _Storage] = {}
        results: list[_Held] = []
        for value, result in zip(graph.outputs, frame.results, strict=True):
            if isinstance(result, int):
                if result not in fresh:
                    kind = "cotangents" if value.role is Role.COTANGENT else value.role.value
                    fresh[result] = _Storage(frame.sizes[result], kind)
                results.append(fresh[result])
            else:
                results.append(None if result is None else given.get(result))
        return results

    def _note(
        self,
        action: str,
        local: int,
        graph: StepGraph | None = None,
        frame: Frame | None = None,
        freed: Counter[str] | None = None,
    ) -> None:
        total = self.held.total + (max(frame.peak, 0) if frame is not None else 0)
        self.timeline.append(Moment(action, total, self.waiting.total, local))
        if total > self.worst.bytes:
            kinds = dict(self.held.by_kind)
            self.worst = _Worst(total, kinds, graph, frame, freed or Counter())

    def composition(self) -> tuple[Part, ...]:
        worst = self.worst
        parts: Counter[tuple[str, Source | None]] = Counter()
        for kind, size in worst.by_kind.items():
            parts[kind, None] += size - worst.freed[kind]
        if worst.frame is not None and worst.graph is not None:
            nodes: dict[str, fx.Node] = {node.name: node for node in worst.graph.graph.nodes}
            for name, size in worst.frame.held:
                node = nodes[name]
                parts[f"{node.meta['phase'].value} values", node.meta.get("source")] += size
        found = [Part(what, where, size) for (what, where), size in parts.items() if size]
        return tuple(sorted(found, key=lambda part: (-part.bytes, part.what, str(part.where))))


def _of(graph: StepGraph, results: Sequence[_Held], *roles: Role) -> list[_Held]:
    pairs = zip(graph.outputs, results, strict=True)
    return [storage for value, storage in pairs if value.role in roles]
