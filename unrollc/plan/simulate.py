"""Memory over program time: the schedule executed on storages instead of tensors.

Every call allocates its frame, a storage lives as long as something refers to it. The user's own
tensors do not count. This follows the generated program line by line: lists that a function takes
over die inside it, value by value.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from unrollc.errors import Source
from unrollc.plan.actions import (
    Action,
    Advance,
    Drop,
    Fetch,
    Keep,
    Record,
    Restore,
    Reverse,
    Spill,
    Validate,
)
from unrollc.plan.ledger import Held, Ledger, Storage
from unrollc.plan.liveness import Frame, Owned, draws_noise, frame_of, storage_bytes
from unrollc.plan.pieces import Pieces
from unrollc.step import CARRIED, STATE_ROLES, Role, StepGraph


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
class Peak:
    """The worst moment of a kind of action.

    Attributes:
        kind: The action without its number, e.g. ``adjoint of step``.
        moment: The moment.
        composition: What is held then, the largest first; the bytes add up to it.
    """

    kind: str
    moment: Moment
    composition: tuple[Part, ...]


@dataclass(frozen=True)
class Simulation:
    """What a run holds.

    Attributes:
        timeline: One `Moment` an action that computes.
        peaks: The worst moment of each kind of action.
    """

    timeline: tuple[Moment, ...]
    peaks: tuple[Peak, ...]

    @property
    def peak(self) -> Peak:
        return max(self.peaks, key=lambda peak: peak.moment.bytes)


def simulate(pieces: Pieces, steps: int | None = None) -> Simulation:
    """Execute the schedule of `pieces` on storages.

    Args:
        pieces: The program.
        steps: For how many steps what has an entry a step counts; by default for those that run.
    """
    run = _Run(pieces, steps or len(pieces.sequence))
    run.begin()
    for action in pieces.schedule:
        run.execute(action)
    run.finish()
    return Simulation(tuple(run.timeline), run.peaks())


#: Roles of values that reports call by several.
_PLURAL = (Role.COTANGENT, Role.TANGENT)


class _Signature:
    """What a call of a graph takes and returns, and its frames.

    Graphs are slow to walk, and planning simulates the same ones many times: a signature is kept as
    long as its graph is, to which it refers by names alone.
    """

    def __init__(self, graph: StepGraph) -> None:
        self.noise = [
            storage_bytes(node.meta["val"])
            for _, node in graph.inputs_with(Role.NOISE)
            if draws_noise(graph)
        ]
        lists = (
            (*CARRIED, Role.RESIDUAL),
            (Role.COTANGENT,),
            (Role.NOISE,) if self.noise else (),
        )
        self.names = [[v.name for v, _ in graph.inputs_with(*roles)] for roles in lists]
        pairs = zip(graph.outputs, graph.results, strict=True)
        self.outputs = tuple((value, node is not None) for value, node in pairs)
        self.kinds = [
            f"{value.role.value}s" if value.role in _PLURAL else value.role.value
            for value in graph.outputs
        ]
        self.residuals = [n for n, v in enumerate(graph.outputs) if v.role is Role.RESIDUAL]
        self.state = [
            n for n, (value, given) in enumerate(self.outputs) if value.role in CARRIED and given
        ]
        self.frames: dict[tuple[object, ...], Frame] = {}

    @staticmethod
    def of(graph: StepGraph) -> _Signature:
        if graph.graph not in _SIGNATURES:
            _SIGNATURES[graph.graph] = _Signature(graph)
        return _SIGNATURES[graph.graph]

    def frame(self, graph: StepGraph, owned: Sequence[Owned]) -> Frame:
        key = tuple((each.name, each.storage, each.bytes) for each in owned)
        if key not in self.frames:
            self.frames[key] = frame_of(graph, owned)
        return self.frames[key]


_SIGNATURES: weakref.WeakKeyDictionary[fx.Graph, _Signature] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Worst:
    """The worst moment of a kind, with what `_Run._composition` needs."""

    moment: Moment
    by_kind: Mapping[str, int]
    graph: StepGraph | None
    frame: Frame | None
    freed: Counter[str]


class _Run:
    """Storages that the program holds while the schedule is executed."""

    def __init__(self, pieces: Pieces, steps: int) -> None:
        self.pieces = pieces
        self.steps = steps
        self.timeline: list[Moment] = []
        self.held = Ledger()
        self.waiting = Ledger()
        self.worst: dict[str, _Worst] = {}
        first = pieces.steps[pieces.sequence[0]]
        self.state: list[Held] = [None] * len(first.inputs_with(*STATE_ROLES))
        self.kept: dict[int, list[Held]] = {}
        self.cotangents: list[Held] = []
        self.totals: dict[str, list[Held]] = {}
        ((_, loss),) = first.outputs_with(Role.LOSS)
        assert loss is not None
        size = steps * loss.meta["val"].nbytes
        self.held.hold([Storage(size, "inner losses")])

    def begin(self) -> None:
        """What no step changes stays until the backward pass is through."""
        if self.pieces.prologue is not None:
            self.held.hold(self._call("before the loop", self.pieces.prologue, ()))

    def execute(self, action: Action) -> None:
        match action:
            case Keep(state):
                self._keep(state, self.state)
            case Spill():  # the disk is no memory
                pass
            case Fetch(state):
                self._keep(state, self._fetched(state))
                self.held.release(self.kept[state])  # the list that was read is the kept one
            case Restore(state):
                self._replace_state(list(self.kept[state]))
            case Drop(state):
                dropped = self.kept.pop(state)
                self.held.release(dropped)
                self.waiting.release(dropped)
            case Advance(step) | Record(step):
                graph = self.pieces.steps[self.pieces.sequence[step]]
                results = self._call(f"step {step}", graph, self.state)
                signature = _Signature.of(graph)
                if isinstance(action, Record):
                    residuals = [results[n] for n in signature.residuals]
                    self.kept[step] += residuals
                    self.held.hold(residuals)
                    self.waiting.hold(residuals)
                self._replace_state([results[n] for n in signature.state])
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

    def _keep(self, number: int, state: list[Held]) -> None:
        self.kept[number] = list(state)
        self.held.hold(state)
        self.waiting.hold(state)

    def _fetched(self, number: int) -> list[Held]:
        """A state as it comes from the disk; state 0 is the user's own."""
        taken = self.pieces.steps[self.pieces.sequence[number]].inputs_with(*STATE_ROLES)
        if number == 0:
            return [None] * len(taken)
        fresh: list[Held] = [
            Storage(storage_bytes(node.meta["val"]), value.role.value) for value, node in taken
        ]
        self.held.hold(fresh)
        return fresh

    def _replace_state(self, state: list[Held]) -> None:
        self.held.hold(state)
        self.held.release(self.state)
        self.state = state

    def _validate(self) -> None:
        pieces = self.pieces
        graph = pieces.val_gradient or pieces.val
        for label in pieces.totalled:
            self.totals[label] = [Storage(pieces.bytes_of(label, self.steps), "meta-gradients")]
            self.held.hold(self.totals[label])
        pairs = list(zip(pieces.carried, self.state, strict=True))
        read = [storage for value, storage in pairs if value.role in pieces.validated_roles]
        self.held.hold(read)
        results = self._call("validation", graph, read)
        self.held.release(read)
        self.held.hold(_of(graph, results, Role.LOSS))
        if pieces.differentiates:
            self._collect(graph, results)
        own = [storage for value, storage in pairs if value.role is not Role.TANGENT]
        self.held.hold(own)  # the result's own reference
        self._replace_state([])
        if pieces.directions:  # multiplied with the tangents already
            self.held.release(self.cotangents)
            self.cotangents = []

    def _collect(self, graph: StepGraph, results: Sequence[Held]) -> None:
        cotangents: list[Held] = []
        for (value, given), storage in zip(_Signature.of(graph).outputs, results, strict=True):
            if not given or value.role is not Role.COTANGENT:
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
        self._conclude()
        for label in self.pieces.wanted:
            size = self.pieces.bytes_of(label, self.steps)
            scaled = [Storage(size, "meta-gradients")]
            self.held.hold(scaled)
            self._note(f"scale the gradient of {label}", size)
            self.held.release(self.totals.pop(label, []))

    def _conclude(self) -> None:
        """The cotangents of what was computed before the loop, pulled back."""
        graph = self.pieces.epilogue
        if graph is None:
            return
        given = [self.totals.pop(v.label)[0] for v, _ in graph.inputs_with(Role.COTANGENT)]
        self._call("behind the loop", graph, (), given)
        self.held.release(given)

    def _call(
        self,
        name: str,
        graph: StepGraph,
        state: Sequence[Held],
        cotangents: Sequence[Held] = (),
    ) -> list[Held]:
        signature = _Signature.of(graph)
        noise: list[Held] = [Storage(size, "noise") for size in signature.noise]
        self.held.hold(noise)
        given: dict[str, Held] = {}
        for names, storages in zip(signature.names, (state, cotangents, noise), strict=True):
            given.update(zip(names, storages, strict=True))
        passed = Counter(storage for storage in given.values() if storage is not None)
        numbers = {storage: number for number, storage in enumerate(passed)}
        counts = self.held.counts
        owned = [
            Owned(each, numbers[storage], storage.bytes)
            for each, storage in given.items()
            if storage is not None and counts[storage] == passed[storage]
        ]
        frame = signature.frame(graph, owned)
        kinds = {number: storage.what for storage, number in numbers.items()}
        freed = Counter({kinds[n]: 0 for n, _ in frame.freed})
        for number, size in frame.freed:
            freed[kinds[number]] += size
        self._note(name, sum(size for _, size in frame.held), graph, frame, freed)
        self.held.release(noise)
        return self._results(graph, frame, given)

    def _results(self, graph: StepGraph, frame: Frame, given: Mapping[str, Held]) -> list[Held]:
        fresh: dict[int, Storage] = {}
        results: list[Held] = []
        for kind, result in zip(_Signature.of(graph).kinds, frame.results, strict=True):
            if isinstance(result, int):
                if result not in fresh:
                    fresh[result] = Storage(frame.sizes[result], kind)
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
        moment = Moment(action, total, self.waiting.total, local)
        self.timeline.append(moment)
        kind = action.rstrip("0123456789").rstrip()
        if kind not in self.worst or total > self.worst[kind].moment.bytes:
            by_kind = dict(self.held.by_kind)
            self.worst[kind] = _Worst(moment, by_kind, graph, frame, freed or Counter())

    def peaks(self) -> tuple[Peak, ...]:
        return tuple(
            Peak(kind, worst.moment, _composition(worst)) for kind, worst in self.worst.items()
        )


def _composition(worst: _Worst) -> tuple[Part, ...]:
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


def _of(graph: StepGraph, results: Sequence[Held], *roles: Role) -> list[Held]:
    pairs = zip(graph.outputs, results, strict=True)
    return [storage for value, storage in pairs if value.role in roles]
