"""Runs that keep their states on the disk: forward and backward by segments, and taken up again.

The forward pass stores the state that each segment starts from, except state 0, which the inputs
give. The backward pass reads one state at a time and reverses its segment in memory. Whatever was
stored when the process died is where the next run of the same program with the same inputs goes on;
its numbers are those of the run that was not cut off, bit by bit.

A generated module offers, for inputs and a seed::

    STEPS, STOP, SEGMENT, LOSS_DTYPE
    start(inputs) -> state                                     # state 0
    forward(inputs, seed, state, losses, kept, keep, first, last) -> state
    finish(inputs, seed, state) -> loss, cotangents, totals
    reverse(inputs, seed, kept, first, last, cotangents, totals) -> cotangents
    gradients(cotangents, totals) -> {label: gradient}

where a state that is handed over is no longer the caller's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from unrollc.runtime.store import Store
from unrollc.runtime.tensor_files import DamagedFileError

#: Called after each segment with the number of steps done, forward and backward, and of all.
Progress = Callable[[int, int], object]

#: What is stored besides the states: what the forward pass returns, B_T with the totals, and the
#: same for the newest segment that is reversed.
_OUTCOME, _TURN, _PROGRESS = "outcome", "turn", "progress"


@dataclass(frozen=True)
class Spilled:
    """A run whose states are on the disk.

    Attributes:
        module: The generated module.
        store: The run's files.
        progress: Told after each segment how far the run is; None tells nobody.
    """

    module: ModuleType
    store: Store
    progress: Progress | None = None

    def report(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, 2 * self.module.STEPS - self.module.STOP)

    def boundaries(self) -> list[int]:
        """State 0, the states that segments start from, and T.

        The steps before STOP, which are not reversed, are cut like the others: so a run that is
        taken up there need not start again.
        """
        steps, stop, segment = self.module.STEPS, self.module.STOP, self.module.SEGMENT
        return [*range(0, stop, segment), *range(stop, steps, segment), steps]


def spilled_adapt(run: Spilled, inputs: Mapping[str, Any]) -> tuple[Tensor, list[Tensor], Tensor]:
    """The forward pass, or what is left of it.

    Args:
        run: The run.
        inputs: Tensors by label.

    Returns:
        The validation loss, the state after the last step, and the inner losses of shape [T].

    Raises:
        SpillError: If the disk is full or cannot be written; like any other exception, it leaves
            no file behind.
    """
    with run.store.removed_on_failure():
        outcome = _read(run.store, _OUTCOME) or _adapted(run, inputs)
        return outcome["loss"], outcome["state"], outcome["losses"]


def spilled_backward(
    run: Spilled, inputs: Mapping[str, Any], *, again: bool = False
) -> dict[str, Any]:
    """The backward pass, or what is left of it.

    Args:
        run: The run, after `spilled_adapt`.
        inputs: As given to `spilled_adapt`.
        again: Whether another backward pass is to follow: then the states stay on the disk.

    Returns:
        Meta-gradients by label.

    Raises:
        SpillError: If the states are gone.
    """
    module, store = run.module, run.store
    with store.removed_on_failure():
        reached = _reached(run, inputs)
        last, cotangents, totals = reached["last"], reached["cotangents"], reached["totals"]
        del reached
        boundaries = run.boundaries()
        for first in reversed([b for b in boundaries if module.STOP <= b < last]):
            state = _state(run, inputs, first)
            kept = {first: state}
            del state
            cotangents = module.reverse(inputs, store.seed, kept, first, last, cotangents, totals)
            last = first
            progress = {"last": last, "cotangents": cotangents, "totals": totals}
            # The state goes with the manifest that knows the progress, never before.
            store.update({_PROGRESS: progress}, dropped=() if again else [_name(first)])
            run.report(2 * module.STEPS - first)
        gradients: dict[str, Any] = module.gradients(cotangents, totals)
        if again:
            store.update({}, dropped=[_PROGRESS])
        else:
            store.close()
        return gradients


def _read(store: Store, name: str) -> dict[str, Any] | None:
    """What is stored under a name; None, and forgotten, if it is damaged."""
    if name not in store:
        return None
    try:
        found: dict[str, Any] = store.read(name)
    except DamagedFileError as error:
        warnings.warn(
            f"a spilled file is damaged, and what was in it is computed again: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        store.update({}, dropped=[name])
        return None
    return found


# --- the forward pass -------------------------------------------------------------------------


def _adapted(run: Spilled, inputs: Mapping[str, Any]) -> dict[str, Any]:
    module, store = run.module, run.store
    first, state, losses = _resumed(run, inputs)
    boundaries = run.boundaries()
    for last in boundaries[boundaries.index(first) + 1 :]:
        state = module.forward(inputs, store.seed, state, losses, {}, (), first, last)
        if last < module.STEPS:
            # Of the states up to STOP the newest one is enough.
            old = [_name(first)] if last <= module.STOP else []
            since = 0 if last <= module.STOP else first
            store.update({_name(last): {"state": state, "losses": losses[since:last]}}, old)
            run.report(last)
        first = last
    loss, cotangents, totals = module.finish(inputs, store.seed, list(state))
    outcome = {"loss": loss, "state": state, "losses": losses}
    turn = {"last": module.STEPS, "cotangents": cotangents, "totals": totals}
    store.update({_OUTCOME: outcome, _TURN: turn})
    run.report(module.STEPS)
    return outcome


def _resumed(run: Spilled, inputs: Mapping[str, Any]) -> tuple[int, list[Tensor], Tensor]:
    """The newest state that is stored, its number, and the inner losses before it."""
    module, store = run.module, run.store
    state: list[Tensor] = module.start(inputs)
    losses = state[0].new_empty(module.STEPS, dtype=module.LOSS_DTYPE)
    newest = 0
    stored = [b for b in run.boundaries() if _name(b) in store]
    for number in stored:
        found = _read(store, _name(number))
        if found is None or number - len(found["losses"]) > newest:
            # Losses before it are gone, so neither it nor what lies behind is of use.
            store.update({}, dropped=[_name(b) for b in stored if b >= number])
            break
        state, part = found["state"], found["losses"]
        losses[number - len(part) : number] = part
        newest = number
    return newest, state, losses


# --- the backward pass ------------------------------------------------------------------------


def _reached(run: Spilled, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """How far the backward pass came: B_last, last, and the totals of the steps behind."""
    found = _read(run.store, _PROGRESS) or _read(run.store, _TURN)
    if found is None:
        _adapted(run, inputs)
        found = run.store.read(_TURN)
    return found


def _state(run: Spilled, inputs: Mapping[str, Any], number: int) -> list[Tensor]:
    """A state from the disk, or from the newest one before it that can be read."""
    module, store = run.module, run.store
    first = 0
    state: list[Tensor] = module.start(inputs)
    for earlier in reversed([b for b in run.boundaries() if 0 < b <= number]):
        if (found := _read(store, _name(earlier))) is not None:
            first, state = earlier, found["state"]
            break
    if first < number:
        losses = state[0].new_empty(module.STEPS, dtype=module.LOSS_DTYPE)
        state = module.forward(inputs, store.seed, state, losses, {}, (), first, number)
    return state


def _name(state: int) -> str:
    return f"state {state}"
