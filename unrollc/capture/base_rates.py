"""Base rates of schedulers where the learning rate is a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from unrollc.capture.copies import twin_of
from unrollc.errors import InputError


def move_bases(
    opt: torch.optim.Optimizer,
    scheduler: LRScheduler,
    twin: torch.optim.Optimizer,
    schedulers: list[LRScheduler],
) -> dict[str, tuple[Tensor, ...]]:
    """Let base rates follow a learning rate that is a tensor.

    A scheduler took its base rate as a number when it was built; the rate in the group is the
    schedule's present value, an affine function f of it. For a present rate φ the base rate is
    f⁻¹(φ) then: where φ is what the scheduler has left, the number itself. Where f is flat, as in
    a warm-up from zero, or unknown, as in a chain of schedulers, the number stays.

    Returns:
        Tensors of the user's that stood for a base rate and no longer do, by the label of the
        rate.
    """
    moved: dict[str, tuple[Tensor, ...]] = {}
    for index, group in enumerate(opt.param_groups):
        rate, initial = group.get("lr"), group.get("initial_lr")
        if not isinstance(rate, Tensor) or initial is None:
            continue
        last = _number(scheduler.get_last_lr()[index])
        start = _number(initial)
        found = _present_form(opt, scheduler, index, start, last)
        if found is None or found[1] == 0:
            continue
        form, slope = found
        base = start + (twin.param_groups[index]["lr"] - last) / slope
        reached = _number(form.at(base.detach().to(torch.float64))[0])
        if not _close(reached, _number(rate)):
            raise InputError(
                f'param_groups[{index}]["lr"] is a tensor, but the schedule is no affine '
                "function of its base rate",
                why=f"no base rate is known for which the present rate is {_number(rate):.6g}",
                remedy="put unrollc.PerStep(rates) into the param group instead",
            )
        _place(twin, schedulers, index, start, base)
        if isinstance(initial, Tensor) and initial.requires_grad:
            moved[f'param_groups[{index}]["lr"]'] = (initial,)
    return moved


def _place(
    twin: torch.optim.Optimizer,
    schedulers: list[LRScheduler],
    index: int,
    start: float,
    base: Tensor,
) -> None:
    twin.param_groups[index]["initial_lr"] = base
    for each in schedulers:
        bases = getattr(each, "base_lrs", None)
        if bases is not None and _number(bases[index]) == start:
            each.base_lrs = [base if i == index else b for i, b in enumerate(bases)]


@dataclass(frozen=True)
class _Form:
    """A formula of a scheduler for the rate of a group.

    Attributes:
        opt, scheduler: The user's.
        index: The param group.
        start: Its base rate.
        number: Which of the schedulers that `scheduler` consists of.
        name: The method that computes the rates.
    """

    opt: torch.optim.Optimizer
    scheduler: LRScheduler
    index: int
    start: float
    number: int
    name: str

    def at(self, base: Tensor) -> tuple[Any, Tensor]:
        """The rate for a base rate, and the present rate in case that the formula reads it."""
        twin, copier = twin_of(self.opt, self.scheduler)
        _place(twin, copier.schedulers, self.index, self.start, base)
        group = twin.param_groups[self.index]
        present = group["lr"] = group["lr"].detach().clone().requires_grad_()
        each = copier.schedulers[self.number]
        each._get_lr_called_within_step = True
        return getattr(each, self.name)()[self.index], present


def _present_form(
    opt: torch.optim.Optimizer, scheduler: LRScheduler, index: int, start: float, last: float
) -> tuple[_Form, float] | None:
    """The formula that yields the rate which the scheduler has left from the base rate alone.

    Returns:
        The formula and its slope, or None where there is none.
    """
    base = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    _, copier = twin_of(opt, scheduler)
    for number, each in enumerate(copier.schedulers):
        for name in ("_get_closed_form_lr", "get_lr"):
            if not hasattr(each, "base_lrs") or not hasattr(each, name):
                continue
            form = _Form(opt, scheduler, index, start, number, name)
            value, present = form.at(base)
            if not isinstance(value, Tensor) or not value.requires_grad:
                continue
            slope, other = torch.autograd.grad(value, [base, present], allow_unused=True)
            if slope is not None and other is None and _close(_number(value), last):
                return form, slope.item()
    return None


def _number(rate: Any) -> float:
    return float(rate.detach() if isinstance(rate, Tensor) else rate)


def _close(first: float, second: float) -> bool:
    """Whether two rates agree up to the rounding of a recursion in float32."""
    return abs(first - second) <= 1e-5 * max(abs(first), abs(second))
