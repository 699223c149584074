"""The memory plan: bytes over program time, known before the program runs.

The plan executes the schedule on storages instead of tensors: every call allocates its frame, a
state's storages live as long as something refers to them. Inputs are the user's and do not count.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from unrollc.plan.cost import Cost, cost_of, human_bytes
from unrollc.plan.liveness import Frame, frame_of
from unrollc.plan.pieces import Pieces
from unrollc.plan.schedule import Advance, Drop, Keep, Restore, Reverse, Schedule, Validate
from unrollc.step import STATE_ROLES, Role, StepGraph


@dataclass(frozen=True)
class Moment:
    """Memory at one action of the schedule.

    Attributes:
        action: What runs, e.g. ``step 3``.
        bytes: Most bytes held while it runs.
        kept: Of these, bytes of states that wait for the backward pass.
        local: Of these, bytes that the running graph allocates.
    """

    action: str
    bytes: int
    kept: int
    local: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will hold, beyond its inputs.

    Attributes:
        peak_bytes: Most bytes held at once.
        schedule: Which states are kept and which recomputed.
        timeline: One `Moment` an action that computes.
        modes: How the adjoints were made, with the reason.
        cost: Work of the whole run.
    """

    peak_bytes: int
    schedule: Schedule
    timeline: tuple[Moment, ...]
    modes: tuple[tuple[str, str], ...]
    cost: Cost

    @property
    def peak(self) -> Moment:
        """The moment of the peak."""
        return max(self.timeline, key=lambda moment: moment.bytes)

    def __str__(self) -> str:
        table = Table(title="Memory plan", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        peak = self.peak
        other = peak.bytes - peak.kept - peak.local
        table.add_row("peak", f"{human_bytes(self.peak_bytes)} at {peak.action}")
        table.add_row("kept states", human_bytes(peak.kept))
        table.add_row("inside the step", human_bytes(peak.local))
        table.add_row("state, cotangents, results", human_bytes(other))
        table.add_row("schedule", str(self.schedule))
        for mode, reason in self.modes:
            table.add_row("adjoint", f"{mode} mode: {reason}" if reason else f"{mode} mode")
        table.add_row("products", f"{self.cost.operations / 1e9:.3g} G operations")
        out = io.StringIO()
        Console(file=out, width=100, color_system=None).print(table)
        return out.getvalue().rstrip()


def plan_memory(pieces: Pieces) -> MemoryPlan:
    """``pieces --> plan``: execute the schedule on storages."""
    run = _Run(pieces)
    for action in pieces.schedule:
        run.execute(action)
    run.finish()
    modes = tuple(dict.fromkeys((a.mode, a.reason) for a in pieces.adjoints))
    peak = max(moment.bytes for moment in run.timeline)
    return MemoryPlan(peak, pieces.schedule, tuple(run.timeline), modes, _total_cost(pieces))


def _total_cost(pieces: Pieces) -> Cost:
    steps = [cost_of(step) for step in pieces.steps]
    adjoints = [cost_of(adjoint.graph) for adjoint in pieces.adjoints]
    parts = [cost_of(pieces.val_gradient or pieces.val)]
    for action in pieces.schedule:
        if isinstance(action, Advance):
            parts.append(steps[pieces.sequence[action.step]])
        elif isinstance(action, Reverse):
            index = pieces.adjoint_sequence[action.step]
            assert index is not None
            parts.append(adjoints[index])
    return Cost(
        sum(part.operations for part in parts),
        sum(part.bytes_moved for part in parts),
        sum(part.calls for part in parts),
    )


#: A storage: its identity within the run and its bytes. None stands for one of the user's.
_Storage = tuple[int, int] | None


class _Ledger:
    """Counts how often each storage is held."""

    def __init__(self) -> None:
        self.total = 0
        self._held: Counter[tuple[int, int]] = Counter()

    def hold(self, storages: Iterable[_Storage]) -> None:
        for storage in storages:
            if storage is not None:
                self.total += 0 if self._held[storage] else storage[1]
                self._held[storage] += 1

    def release(self, storages: Iterable[_Storage]) -> None:
        for storage in storages:
            if storage is not None:
                self._held[storage] -= 1
                self.total -= 0 if self._held[storage] else storage[1]


class _Run:
    """Storages that the program holds while the schedule is executed."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.frames: dict[int, Frame] = {}
        self.timeline: list[Moment] = []
        self.serial = 0
        self.held = _Ledger()
        self.waiting = _Ledger()
        first = pieces.steps[pieces.sequence[0]]
        self.state: list[_Storage] = [None for _ in first.inputs_with(*STATE_ROLES)]
        self.kept: dict[int, list[_Storage]] = {}
        self.cotangents: list[_Storage] = []
        self.losses: list[_Storage] = []
        self.totals: dict[str, list[_Storage]] = {}
        self.validated = False

    def execute(self, action: object) -> None:
        match action:
            case Keep(state):
                self.kept[state] = list(self.state)
                self.held.hold(self.state)
                self.waiting.hold(self.state)
            case Restore(state):
                self._replace_state(list(self.kept[state]))
            case Drop(state):
                dropped = self.kept.pop(state)
                self.held.release(dropped)
                self.waiting.release(dropped)
            case Advance(step):
                graph = self.pieces.steps[self.pieces.sequence[step]]
                results = self._call(f"step {step}", graph, self.state)
                if not self.validated:  # a step that runs again hands out its loss to nobody
                    losses = self._of(graph, results, Role.LOSS)
                    self.held.hold(losses)
                    self.losses += losses
                self._replace_state(self._of(graph, results, *STATE_ROLES))
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

    def _replace_state(self, state: list[_Storage]) -> None:
        self.held.hold(state)
        self.held.release(self.state)
        self.state = state

    def _validate(self) -> None:
        self.validated = True
        pieces = self.pieces
        graph = pieces.val_gradient or pieces.val
        total = sum(size for _, size in filter(None, self.losses))
        self._note("stack the inner losses", total)
        self.held.release(self.losses)
        self.losses = [(self._new(), total)]
        self.held.hold(self.losses)
        last = pieces.steps[pieces.sequence[-1]]
        roles = [value.role for value, _ in last.outputs_with(*STATE_ROLES)]
        pairs = zip(roles, self.state, strict=True)
        read = [storage for role, storage in pairs if role in pieces.validated_roles]
        results = self._call("validation", graph, read)
        self.held.hold(self._of(graph, results, Role.LOSS))
        if pieces.differentiates:
            self._collect(graph, results)
        self.held.hold(self.state)  # the result's own reference
        self._replace_state([])

    def _collect(self, graph: StepGraph, results: Sequence[_Storage]) -> None:
        cotangents: list[_Storage] = []
        terms: list[tuple[str, _Storage]] = []
        for value, storage, node in zip(graph.outputs, results, graph.results, strict=True):
            if node is None or value.role is not Role.COTANGENT:
                continue
            if value.of in STATE_ROLES:
                cotangents.append(storage)
            else:
                terms.append((value.label, storage))
        self.held.hold([*cotangents, *(storage for _, storage in terms)])
        self.held.release(self.cotangents)
        self.cotangents = cotangents
        for label, storage in terms:
            self._add_term(label, storage)
        self.held.release(storage for _, storage in terms)

    def _add_term(self, label: str, storage: _Storage) -> None:
        held = self.totals.setdefault(label, [])
        if held and label not in self.pieces.per_step:
            size = max(filter(None, (*held, storage)), key=lambda s: s[1], default=(0, 0))[1]
            self._note(f"add to the gradient of {label}", size)
            self.held.release(held)
            held.clear()
            storage = (self._new(), size)
        held.append(storage)
        self.held.hold([storage])

    def finish(self) -> None:
        for label in self.pieces.stacked & set(self.totals):
            total = sum(size for _, size in filter(None, self.totals[label]))
            self._note(f"stack the gradient of {label}", total)

    def _new(self) -> int:
        self.serial += 1
        return self.serial

    def _call(
        self,
        name: str,
        graph: StepGraph,
        state: Sequence[_Storage],
        cotangents: Sequence[_Storage] = (),
    ) -> list[_Storage]:
        if id(graph) not in self.frames:
            self.frames[id(graph)] = frame_of(graph)
        frame = self.frames[id(graph)]
        given: dict[str, _Storage] = {}
        states, seeds = iter(state), iter(cotangents)
        noise = 0
        for value, node in zip(graph.inputs, graph.placeholders, strict=True):
            if value.role in STATE_ROLES:
                given[value.name] = next(states)
            elif value.role is Role.COTANGENT:
                given[value.name] = next(seeds)
            elif value.role is Role.NOISE:
                noise += node.meta["val"].numel() * node.meta["val"].element_size()
        self._note(name, frame.peak + noise)
        fresh: dict[int, _Storage] = {n: (self._new(), size) for n, size in frame.sizes.items()}
        return [
            given.get(result)
            if isinstance(result, str)
            else (None if result is None else fresh[result])
            for result in frame.results
        ]

    def _of(self, graph: StepGraph, results: Sequence[_Storage], *roles: Role) -> list[_Storage]:
        pairs = zip(graph.outputs, results, strict=True)
        return [storage for value, storage in pairs if value.role in roles]

    def _note(self, action: str, local: int) -> None:
        moment = Moment(action, self.held.total + local, self.waiting.total, local)
        self.timeline.append(moment)
