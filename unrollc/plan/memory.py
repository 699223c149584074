"""The memory plan: bytes over program time, known before the program runs."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from unrollc.plan.buffers import BufferPlan, plan_buffers
from unrollc.plan.calibration import current_rates
from unrollc.plan.choice import choose
from unrollc.plan.cost import Cost, human_bytes
from unrollc.plan.horizon import extended
from unrollc.plan.pieces import Pieces
from unrollc.plan.predict import predict
from unrollc.plan.run_cost import RunCost, run_cost
from unrollc.plan.schedule import Schedule
from unrollc.plan.simulate import Moment, Part, simulate
from unrollc.plan.work import total_cost

#: So many parts of the peak are printed.
_MOST_PARTS = 8


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will hold, beyond its inputs.

    Attributes:
        peak: The moment of the peak.
        budget: What the user allows, in bytes; None without a budget.
        schedule: Which states are kept and which recomputed.
        composition: What is held at the peak, by role and by source line, the largest first.
        modes: How the adjoints were made, with the reason.
        forward: Whether forward mode was taken instead of a backward pass, and why.
        cost: Work of the whole run.
        pieces: The graphs of the program in the order of its schedule.
    """

    peak: Moment
    budget: int | None
    schedule: Schedule
    composition: tuple[Part, ...] = field(repr=False)
    modes: tuple[tuple[str, str], ...]
    forward: str
    cost: Cost
    pieces: Pieces = field(repr=False, compare=False)
    _given: Pieces = field(repr=False, compare=False)

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once."""
        return self.peak.bytes

    @functools.cached_property
    def timeline(self) -> tuple[Moment, ...]:
        """One `Moment` an action that computes: bytes over program time.

        It is made when it is first asked for, in time proportional to the steps that run.
        """
        return simulate(self.pieces).timeline

    @property
    def work(self) -> RunCost:
        """`cost` as polynomials in the number of steps T and of repeated steps R."""
        return run_cost(self.pieces, self.schedule.recomputed)

    @functools.cached_property
    def buffers(self) -> dict[str, BufferPlan]:
        """For each graph that runs, where its values would live in one slab of memory.

        ``slab_bytes`` beside ``lower_bound`` tells what placing them costs. The `aten` backend
        leaves the placing to PyTorch's allocator.
        """
        return {name: plan_buffers(graph) for name, graph in self.pieces.named_graphs}

    def for_steps(self, steps: int) -> MemoryPlan:
        """The plan of the same program for another number of inner steps, without lowering.

        The steps after the last distinct one count as equal to it. The budget, if there is one,
        is kept, so that the schedule may be another. What an optimizer does only after more steps
        than were captured is not foreseen, nor is forward mode, if the captured loop is too short
        for it.

        Args:
            steps: T.

        Raises:
            InputError: If the captured loop is too short to tell what its steady step is.
            BudgetError: If no schedule of so many steps fits into the budget.
        """
        spill = self.schedule.segment is not None
        return plan_program(extended(self._given, steps), self.budget, spill=spill)

    def __str__(self) -> str:
        table = Table(title="Memory plan", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        peak = self.peak
        table.add_row("peak", f"{human_bytes(self.peak_bytes)} at {peak.action} (aten backend)")
        if self.budget is not None:
            table.add_row("budget", human_bytes(self.budget))
        table.add_row("kept states", human_bytes(peak.kept))
        table.add_row("inside the step", human_bytes(peak.local))
        for part in self.composition[:_MOST_PARTS]:
            where = f"  {part.where.short}" if part.where is not None else ""
            table.add_row("at the peak", f"{human_bytes(part.bytes)} {part.what}{where}")
        if rest := sum(part.bytes for part in self.composition[_MOST_PARTS:]):
            table.add_row("at the peak", f"{human_bytes(rest)} others")
        table.add_row("schedule", str(self.schedule))
        for line in self.pieces.packed.splitlines():
            table.add_row("packed", line)
        if self.pieces.hoisted:
            table.add_row("before the loop", self.pieces.hoisted)
        for mode, reason in self.modes:
            table.add_row("adjoint", f"{mode} mode: {reason}" if reason else f"{mode} mode")
        if self.forward:
            table.add_row("forward mode", self.forward)
        table.add_row("products", f"{self.cost.operations / 1e9:.3g} G operations")
        for line in str(self.work).splitlines():
            table.add_row("work", line)
        table.add_row("rates", str(current_rates()))
        out = io.StringIO()
        Console(file=out, width=100, color_system=None).print(table)
        return out.getvalue().rstrip()


def plan_program(pieces: Pieces, budget: int | None, *, spill: bool = False) -> MemoryPlan:
    """``pieces, budget --> plan``: choose the program that will run, and plan its memory.

    Args:
        pieces: A program that keeps every state.
        budget: Bytes that a run may hold beyond its inputs; None for the fastest program.
        spill: Whether states go to the disk.

    Raises:
        BudgetError: If nothing fits.
    """
    chosen, forward = choose(pieces, budget, spill=spill)
    return replace(plan_memory(chosen), budget=budget, forward=forward, _given=pieces)


def plan_memory(pieces: Pieces) -> MemoryPlan:
    """``pieces --> plan``: what the program holds under its own schedule."""
    found = predict(pieces)
    return MemoryPlan(
        peak=found.moment,
        budget=None,
        schedule=pieces.schedule,
        composition=found.composition,
        modes=tuple(dict.fromkeys((a.mode, a.reason) for a in pieces.adjoints)),
        forward="",
        cost=total_cost(pieces),
        pieces=pieces,
        _given=pieces,
    )
