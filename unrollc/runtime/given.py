"""What a call of a program starts from: the user's objects, their tensors, and data."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from unrollc.capture.batches import Batches, read_train, read_val
from unrollc.capture.home import at_home
from unrollc.capture.nests import is_continuous
from unrollc.capture.problem import Objective, PerStep, Problem, Stock, read_again, take_stock
from unrollc.capture.schedule import Schedule, run_schedule
from unrollc.errors import NonFiniteError
from unrollc.runtime.lowering import Lowered


@dataclass(frozen=True)
class Given:
    """What one call of a program starts from.

    Attributes:
        problem: The user's objects; the optimizer holds the schedule of a scheduler.
        stock: Their tensors.
        train, val: The data.
        schedule: The schedule, where there is a scheduler.
    """

    problem: Problem
    stock: Stock
    train: Batches
    val: Batches
    schedule: Schedule | None = None

    def read_as(self, lowered: Lowered) -> Given:
        """With the optimizer's state in the manner in which `lowered` takes it."""
        return replace(self, stock=read_again(self.problem, self.stock, lowered.loop.manner))


def read_batches(problem: Problem, train: Any, val: Any) -> tuple[Batches, Batches]:
    """The data of a call.

    Raises:
        InputError: If they have another form.
    """
    paired = not isinstance(problem.loss, Objective)
    paired_val = not isinstance(problem.val_loss, Objective)
    return read_train(train, paired=paired), read_val(val, paired=paired_val)


def read_given(problem: Problem, train: Any, val: Any) -> Given:
    """What a call on these data starts from."""
    train_batches, val_batches = read_batches(problem, train, val)
    scheduler = problem.scheduler
    if scheduler is None:
        return Given(problem, take_stock(problem), train_batches, val_batches)
    schedule = run_schedule(problem.opt, scheduler, train_batches.steps)
    problem = replace(problem, opt=schedule.opt)
    stock = replace(take_stock(problem), behind=schedule.behind)
    return Given(problem, stock, train_batches, val_batches, schedule)


def inputs_of(lowered: Lowered, given: Given, *, debug: bool) -> dict[str, Any]:
    """What the generated module reads, by label.

    Raises:
        NonFiniteError: If `debug` asks to look for NaN and infinity, and there is some.
    """
    stock = given.stock
    hyper = {
        label: value.per_step if isinstance(value, PerStep) else value
        for label, value in stock.hyper.items()
    }
    everything: dict[str, Any] = {
        **stock.theta,
        **stock.opt_state,
        **stock.buffers,
        **stock.average,
        **stock.context,
        **hyper,
        **lowered.loop.lifted,
    }
    for batches in (given.train, given.val):
        for label, leaf in zip(batches.labels, batches.leaves, strict=True):
            everything[label] = list(leaf) if isinstance(leaf, tuple) else leaf
    labels = dict.fromkeys((*lowered.generated.labels, *lowered.pieces.wanted))
    settled = functools.partial(at_home, home=stock.home)
    inputs = {label: pytree.tree_map(settled, everything[label]) for label in labels}
    if debug:
        _check_finite(inputs, lowered.pieces.per_step)
    return inputs


def _check_finite(inputs: dict[str, Any], per_step: frozenset[str]) -> None:
    for label, value in inputs.items():
        for step, tensor in enumerate(value if label in per_step else [value]):
            if is_continuous(tensor) and not bool(torch.isfinite(tensor).all()):
                where = f" at step {step}" if label in per_step else ""
                raise NonFiniteError(
                    f"{label} holds NaN or infinity{where}",
                    why="found before the run, because debug=True",
                    remedy="clean the data; every later number would be NaN",
                )
