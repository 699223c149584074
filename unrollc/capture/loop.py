"""The inner loop as its distinct steps.

The first step often differs from later ones (optimizer state is created lazily), and code that
branches on a step counter differs from step to step. Counters are known numbers, so for every
step a captured graph is reused where its layout is the same and the guards hold; otherwise the
step is captured anew. Steps whose graphs agree share one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from unrollc.capture import refusals
from unrollc.capture.assemble import Concretes, assemble_graph, closure_label, same_graph
from unrollc.capture.attributes import Attributes, read_attributes
from unrollc.capture.batches import Batches
from unrollc.capture.garbage import collection_paused
from unrollc.capture.kind import Kind, Shared, Start
from unrollc.capture.layout import Layout, Manner, changed_numbers
from unrollc.capture.model import captured
from unrollc.capture.naming import Names
from unrollc.capture.one_step import StepRecording
from unrollc.capture.problem import PerStep, Problem, Stock, read_again
from unrollc.capture.record import memory_of
from unrollc.capture.zero_branch import same_start, through_zero_branch
from unrollc.errors import CaptureError, InputError
from unrollc.step import Role, StepGraph


@dataclass(frozen=True)
class Loop:
    """The captured inner loop.

    Attributes:
        steps: The distinct step graphs.
        sequence: For each of the T inner steps, an index into `steps`.
        kinds: What was captured, in order of first use.
        kind_sequence: For each step, an index into `kinds`.
        layout: The optimizer's layout after the last step.
        lifted: Tensors that the user's code brought in from outside, by label.
        attributes: Python attributes of the modules after the last step.
        known: Known scalars after the last step.
        ending: What the validation loss took from them, once it has been captured.
        manner: How the optimizer was captured.
    """

    steps: tuple[StepGraph, ...]
    sequence: tuple[int, ...]
    kinds: tuple[Kind, ...]
    kind_sequence: tuple[int, ...]
    layout: Layout
    lifted: dict[str, Tensor]
    manner: Manner
    attributes: Attributes
    known: dict[str, Tensor]
    ending: Concretes | None = None

    @property
    def _guarded(self) -> list[Concretes]:
        every = [*(kind.concretes for kind in self.kinds), self.ending]
        return [concretes for concretes in every if concretes and concretes.guards]

    def reads_of(self, *data: Batches) -> bool:
        """Whether guards depend on values in these data."""
        read = {label for each in self._guarded for label in each.reads}
        return any(not read.isdisjoint(batches.labels) for batches in data)

    def holds(self, scalars: Callable[[], Mapping[str, Any]], train: Batches, val: Batches) -> bool:
        """Whether the guards hold for the current scalars and data.

        Args:
            scalars: Reads the hyperparameters and counters (`known_scalars`); not called where
                there are no guards, because the host waits for a device that holds them.
            train: The batches of all steps.
            val: That of the validation loss.
        """
        guarded = self._guarded
        read = {label for concretes in guarded for label in concretes.guarded.inputs}
        if not read:
            return True
        concrete = scalars()
        known = {label: value for label, value in concrete.items() if not _is_per_step(value)}
        known |= closures_read(read, self.lifted)
        counted = {label for kind in self.kinds for label in kind.concretes.counters}
        if read <= set(known) - counted:
            return all(concretes.accept(known) for concretes in guarded)
        for step, index in enumerate(self.kind_sequence):
            here = _at_step(concrete, step) | known | data_read(read, train, step)
            if not self.kinds[index].concretes.accept(here):
                return False
            known = {**known, **self.kinds[index].concretes.advance(here)}
        return self.ending is None or self.ending.accept({**known, **data_read(read, val)})


def data_read(read: set[str], batches: Batches, step: int = 0) -> dict[str, Tensor]:
    """The leaves of a step's batch whose values guards depend on, by label."""
    if read.isdisjoint(batches.labels):
        return {}
    pairs = zip(batches.labels, batches.at(step), strict=True)
    return {label: leaf.detach().cpu() for label, leaf in pairs if label in read}


def closures_read(read: set[str], lifted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors from outside whose values guards depend on, by label."""
    return {label: tensor.detach().cpu() for label, tensor in lifted.items() if label in read}


def _is_per_step(value: Any) -> bool:
    return isinstance(value, PerStep)


def _at_step(concrete: Mapping[str, Any], step: int) -> dict[str, Tensor]:
    return {
        label: value.per_step[step].detach().cpu() if isinstance(value, PerStep) else value
        for label, value in concrete.items()
    }


def known_scalars(stock: Stock) -> dict[str, Any]:
    """Scalars whose values capture may look at: hyperparameters, counters and positions.

    A position in a ring of memories is often an integer buffer of shape [1].
    """
    counters = {
        label: tensor.detach().cpu()
        for label, tensor in {**stock.opt_state, **stock.buffers, **_counts(stock)}.items()
        if tensor.device.type != "meta"
        and (tensor.dim() == 0 or (tensor.numel() == 1 and not tensor.is_floating_point()))
    }
    hyper = {
        label: value if isinstance(value, PerStep) else value.detach().cpu()
        for label, value in stock.hyper.items()
    }
    return {**counters, **hyper}


def _counts(stock: Stock) -> dict[str, Tensor]:
    """How many models an average is of; averaged weights are no known numbers."""
    return {k: t for k, t in stock.average.items() if not t.is_floating_point()}


@collection_paused()
def capture_loop(
    problem: Problem,
    stock: Stock,
    train: Batches,
    extra: tuple[str, ...],
    requested: frozenset[str],
    names: Names,
) -> Loop:
    """Capture every distinct step of the inner loop.

    Args:
        problem: The user's objects.
        stock: Their tensors.
        train: The batches of all T steps.
        extra: Labels of tensors besides θ whose inner-loss gradient is recorded as well.
        requested: Labels of the hyperparameters whose gradient is asked for.
        names: Identifiers for labels.

    Raises:
        CaptureError: If the code cannot be expressed as a graph; it names the user's line.
        InputError: If a `PerStep` has another length than T.
    """
    _check_per_step(stock, train.steps)
    try:
        return _capture_in(Manner(), problem, stock, train, extra, requested, names)
    except CaptureError as error:
        manner = Manner(foreach=True)
        chooses = read_again(problem, stock, manner).layout != stock.layout
        if error.in_update and chooses:
            with contextlib.suppress(CaptureError):  # the plain path's error is the one to read
                return _capture_in(manner, problem, stock, train, extra, requested, names)
        raise


def _capture_in(
    manner: Manner,
    problem: Problem,
    stock: Stock,
    train: Batches,
    extra: tuple[str, ...],
    requested: frozenset[str],
    names: Names,
) -> Loop:
    """The loop with the optimizer captured in this manner and, where its steps change plain
    numbers, with these as tensors."""
    plain: StepGraph | None = None
    while True:
        stock = read_again(problem, stock, manner)
        found = _capture_with(problem, stock, train, requested, Shared(extra, names, [], manner))
        if isinstance(found, Loop):
            if plain is not None:
                _check_same_start(plain, found, stock, train)
            return found
        plain = plain or found.first
        manner = replace(manner, moving=manner.moving | found.labels)


@dataclass(frozen=True)
class Moving:
    """Plain numbers that turned out to change from step to step.

    Attributes:
        labels: Their labels.
        first: The first step, captured with them as numbers.
    """

    labels: frozenset[str]
    first: StepGraph


def _check_same_start(plain: StepGraph, loop: Loop, stock: Stock, train: Batches) -> None:
    """Refuse code that does something else where a number has become a tensor."""
    if not same_start(plain, loop.steps[loop.sequence[0]], stock, train.at(0)):
        names = ", ".join(sorted(loop.manner.moving))
        raise CaptureError(
            f"the optimizer computes something else where its number is a tensor: {names}",
            why="a number that changes from step to step is a tensor while the step is captured, "
            "and code that asks for its type (isinstance(x, int)) takes another branch",
            remedy="keep the number as a tensor in optimizer.state",
        )


def _capture_with(
    problem: Problem,
    stock: Stock,
    train: Batches,
    requested: frozenset[str],
    shared: Shared,
) -> Loop | Moving:
    """The loop, or the plain numbers that turned out to change from step to step.

    With each value of such a number a step would be another one, so capture starts again with
    these numbers as tensors.
    """
    raw: list[StepGraph] = []
    kinds: list[Kind] = []
    sequence: list[int] = []
    layout, state = stock.layout, dict(stock.opt_state)
    tuned: dict[str, tuple[str, ...]] = {}
    attributes = read_attributes(problem)
    scalars = known_scalars(stock)
    known: dict[str, Tensor] = {k: v for k, v in scalars.items() if not _is_per_step(v)}
    while len(sequence) < train.steps:
        step = len(sequence)
        concrete = {
            **known,
            **{k: v for k, v in _at_step(scalars, step).items() if k in stock.hyper},
        }
        batch = _batch_signature(train, step)
        given = {**concrete, **_given(kinds, shared, train, step)}
        chosen = _reusable(kinds, layout, batch, given, attributes.description)
        if chosen is None:
            start = Start(layout, state, tuned, attributes)
            recording = functools.partial(StepRecording, problem, stock, start, shared)
            record = functools.partial(_record, recording, train, step, concrete)
            graph, kind = through_zero_branch(record, requested, stock, train.at(step), step)
            if found := changed_numbers(kind.before, kind.after):
                return Moving(found, raw[kinds[0].graph] if kinds else graph)
            kinds.append(replace(kind, graph=_numbered(raw, graph), batch=batch))
            chosen = len(kinds) - 1
        kind = kinds[chosen]
        sequence.append(chosen)
        if kind.settled and train.form != "list":
            sequence.extend([chosen] * (train.steps - len(sequence)))
        layout, state, tuned = kind.after, kind.state, kind.tuned
        attributes = kind.attributes.after
        # Only the validation loss reads counters after the loop, and only those of buffers.
        last = len(sequence) if set(kind.concretes.counters) & set(stock.buffers) else step + 1
        for later in range(step, last):
            seen = {**_at_step(scalars, later), **known, **_given([kind], shared, train, later)}
            known = {k: known[k] for k in stock.hyper if k in known} | kind.concretes.advance(seen)
    steps = _with_settled_state(raw, stock)
    _check_views(steps, stock, shared.lifted)
    return Loop(
        steps=steps,
        sequence=tuple(kinds[index].graph for index in sequence),
        kinds=tuple(kinds),
        kind_sequence=tuple(sequence),
        layout=layout,
        lifted=_labelled(shared.lifted),
        attributes=attributes,
        known=known,
        manner=shared.manner,
    )


def _check_views(steps: tuple[StepGraph, ...], stock: Stock, lifted: list[Tensor]) -> None:
    """Refuse tensors from outside that lie in the memory of a buffer that steps change."""
    changing = {value.label for value, _ in steps[0].outputs_with(Role.BUFFER)}
    memories = {memory_of(stock.buffers[label]): label for label in changing & set(stock.buffers)}
    memories.pop(None, None)
    for tensor in lifted:
        if (label := memories.get(memory_of(tensor))) is not None:
            raise refusals.behind_the_back(label, None)


def _numbered(known: list[StepGraph], graph: StepGraph) -> int:
    """The index of a graph among those known, to which it is added if it is new."""
    index = next((i for i, old in enumerate(known) if same_graph(old, graph)), len(known))
    if index == len(known):
        known.append(graph)
    return index


def _given(kinds: list[Kind], shared: Shared, train: Batches, step: int) -> dict[str, Tensor]:
    """What kinds read of the data and of tensors from outside."""
    read = {label for kind in kinds for label in kind.concretes.reads}
    return closures_read(read, _labelled(shared.lifted)) | data_read(read, train, step)


def _labelled(lifted: list[Tensor]) -> dict[str, Tensor]:
    return {closure_label(index): tensor for index, tensor in enumerate(lifted)}


def _record(
    recording: Callable[[], StepRecording],
    train: Batches,
    step: int,
    concrete: Mapping[str, Tensor],
    nonzero: frozenset[str],
) -> tuple[StepGraph, Kind]:
    def capture(compiling: bool) -> tuple[StepGraph, Kind]:
        made = recording()
        made.recorder.compiling = compiling
        return made.capture(train, step, concrete, nonzero)

    return captured(capture)


def _check_per_step(stock: Stock, steps: int) -> None:
    for label, value in stock.hyper.items():
        if isinstance(value, PerStep) and value.per_step.shape[0] != steps:
            raise InputError(
                f"{label} is PerStep with {value.per_step.shape[0]} values, train has T = {steps}",
                remedy=f"pass a tensor of shape [{steps}]",
            )


def _batch_signature(train: Batches, step: int) -> tuple[Any, ...]:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in train.at(step))


def _reusable(
    kinds: list[Kind],
    layout: Layout,
    batch: tuple[Any, ...],
    concrete: Mapping[str, Tensor],
    attributes: Any,
) -> int | None:
    for index, kind in enumerate(kinds):
        alike = (kind.before, kind.batch) == (layout, batch)
        alike = alike and kind.attributes.before.description == attributes
        if alike and kind.concretes.accept(concrete):
            return index
    return None


def _with_settled_state(raw: list[StepGraph], stock: Stock) -> tuple[StepGraph, ...]:
    """The step graphs with buffers and optimizer state that no step changes as context.

    State that requires grad keeps its role: its gradient is that of the state the loop starts from.
    """
    settled = {label for label, t in stock.opt_state.items() if not t.requires_grad}
    settled |= set(stock.buffers)
    for graph in raw:
        by_label = {value.label: node for value, node in graph.inputs_with(*_SETTLING)}
        for value, node in graph.outputs_with(*_SETTLING):
            if node is not by_label.get(value.label):
                settled.discard(value.label)
    return tuple(_retyped(graph, settled) for graph in raw)


_SETTLING = (Role.BUFFER, Role.OPT_STATE)


def _retyped(graph: StepGraph, settled: set[str]) -> StepGraph:
    if not any(value.label in settled for value, _ in graph.inputs_with(*_SETTLING)):
        return graph
    inputs = tuple(
        replace(value, role=Role.CONTEXT)
        if value.role in _SETTLING and value.label in settled
        else value
        for value in graph.inputs
    )
    outputs = tuple(
        (value, node)
        for value, node in zip(graph.outputs, graph.results, strict=True)
        if value.role not in _SETTLING or value.label not in settled
    )
    return assemble_graph(graph, zip(inputs, graph.placeholders, strict=True), outputs)
