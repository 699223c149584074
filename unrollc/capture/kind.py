"""What a captured step is: the conditions under which it holds, and what its code decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from unrollc.capture.assemble import Concretes
from unrollc.capture.attributes import Attributes, Carried
from unrollc.capture.layout import Layout, Manner
from unrollc.capture.naming import Names
from unrollc.capture.record import Recorder
from unrollc.errors import Source


@dataclass(frozen=True)
class Cut:
    """A meta-parameter whose value Python read, so that its gradient is lost.

    Attributes:
        labels: Labels of the hyperparameters and closure tensors that the value depends on.
        source: The line that read it.
        reason: How it lost the gradient.
        remedy: What to do about it.
    """

    labels: tuple[str, ...]
    source: Source | None
    reason: str = "its value is turned into a Python number, which cuts its gradient"
    remedy: str = "keep it a tensor (x ** 0.5 for math.sqrt(x), no float() or .item()), away from 0"


@dataclass(frozen=True)
class Branch:
    """A test of a hyperparameter that decided which code was captured.

    Attributes:
        labels: Labels of the hyperparameters that the test depends on.
        source: Its line.
        outcome: What it came to.
        assumed: Whether it came to that for a hyperparameter that is exactly zero, where both
            branches compute the same (see `zero_branch`).
    """

    labels: tuple[str, ...]
    source: Source | None
    outcome: bool
    assumed: bool


@dataclass(frozen=True)
class Kind:
    """One captured step and the conditions under which it stands for another.

    Attributes:
        graph: Index into `Loop.steps`.
        before, after: The optimizer's layout.
        batch: Shapes and dtypes of the batch.
        state: Example tensors of the optimizer state after the step.
        concretes: Guards and counters as functions of known scalars.
        cuts: Gradients that the captured Python code lost.
        tuned: Known scalars after the step that tensor hyperparameters had a part in, with the
            labels of these.
        zero_tests: Hyperparameters that are exactly zero where the code asks whether they are.
        branches: Tests of hyperparameters, with their outcome.
        attributes: Python attributes of the modules before and after.
    """

    graph: int
    before: Layout
    after: Layout
    batch: tuple[Any, ...]
    state: dict[str, Tensor]
    concretes: Concretes
    cuts: tuple[Cut, ...]
    tuned: dict[str, tuple[str, ...]]
    zero_tests: tuple[tuple[str, Source | None], ...]
    branches: tuple[Branch, ...]
    attributes: Carried

    @property
    def settled(self) -> bool:
        """Whether the next step starts as this one did."""
        unchanged = self.attributes.before.description == self.attributes.after.description
        return self.before == self.after and not self.concretes.guards and unchanged


@dataclass(frozen=True)
class Start:
    """Where a step starts from.

    Attributes:
        layout: The optimizer's layout.
        state: Example tensors of its state.
        tuned: Known scalars of the state that hyperparameters had a part in (`Kind.tuned`).
        attributes: Python attributes of the modules.
    """

    layout: Layout
    state: Mapping[str, Tensor]
    tuned: Mapping[str, tuple[str, ...]]
    attributes: Attributes


@dataclass(frozen=True)
class Shared:
    """What all captures of a loop share.

    Attributes:
        extra: Labels of tensors besides θ whose inner-loss gradient is recorded as well.
        names: Identifiers for labels.
        lifted: Tensors from outside found so far; captures append to it.
        manner: How the optimizer is captured.
    """

    extra: tuple[str, ...]
    names: Names
    lifted: list[Tensor]
    manner: Manner


def cuts_of(recorder: Recorder) -> tuple[Cut, ...]:
    """The numbers that Python took from tensors, and tests at whose boundary one lies."""
    numbers = [Cut(tuned_by(g.node), g.source) for g in recorder.guards if not g.truth]
    boundaries = [
        Cut(
            tuned_by(guard.node),
            guard.source,
            "it lies exactly on the boundary of this test, and the code is another one beyond it",
            "start it away from the boundary, or leave it out: pass meta=[...]",
        )
        for guard in recorder.guards
        if guard.boundary and _compares_with_fixed(guard.node)
    ]
    return (*numbers, *boundaries)


def _compares_with_fixed(test: fx.Node) -> bool:
    """Whether a side of a test moves with no hyperparameter; ``max(lr, largest)`` moves both."""
    sides = [tuned_by(side) if isinstance(side, fx.Node) else () for side in test.args]
    return not all(sides)


def branches_of(recorder: Recorder) -> tuple[Branch, ...]:
    """The truth values that Python took from hyperparameters, each line once."""
    assumed = [Branch(tuned_by(g.node), g.source, bool(g.value), True) for g in recorder.assumed]
    lines = {branch.source for branch in assumed}
    found = [
        Branch(tuned_by(guard.node), guard.source, bool(guard.value), False)
        for guard in recorder.guards
        if guard.truth and guard.source not in lines
    ]
    return tuple(dict.fromkeys(branch for branch in (*assumed, *found) if branch.labels))


def tuned_by(node: fx.Node) -> tuple[str, ...]:
    """Labels of the tensor hyperparameters that a known scalar depends on."""
    stack, seen, labels = [node], set(), set()
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            labels.update(current.meta.get("hyper", ()))
            stack.extend(current.all_input_nodes)
    return tuple(sorted(labels))
