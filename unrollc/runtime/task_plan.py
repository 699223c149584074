"""How the tasks of a batch run: one by one, side by side, or some of each."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from unrollc.capture.batches import Batches
from unrollc.capture.problem import Stock
from unrollc.errors import BudgetError, CaptureError, InputError
from unrollc.optimize.vectorize import NotVectorizableError, TaskLoop
from unrollc.plan.calibration import current_rates
from unrollc.plan.cost import human_bytes
from unrollc.plan.memory import MemoryPlan
from unrollc.runtime.executor import Executor
from unrollc.runtime.lowering import Lowered, lower_tasks
from unrollc.runtime.options import Options
from unrollc.step import STARTS, STATE_ROLES, Role

#: Tasks run side by side where that is predicted to take less than this part of the time.
_CLEARLY_FASTER = 0.9


@dataclass(frozen=True)
class Joint:
    """A program of several tasks side by side.

    Attributes:
        executor: What runs it.
        tasks: What of it each task has of its own.
        copied: Bytes of what the tasks have in a row besides the plan: their data, and θ_0 for
            each.
    """

    executor: Executor
    tasks: TaskLoop
    copied: int


@dataclass(frozen=True)
class TaskGroup:
    """Tasks with equal shapes.

    Attributes:
        tasks: Their places in the batch.
        at_once: How many run side by side; 1 means one by one, as do those that are left over.
        reason: Why.
        lowered: The program of one task.
        joint: The program of `at_once` tasks; None where that is 1.
    """

    tasks: tuple[int, ...]
    at_once: int
    reason: str
    lowered: Lowered = field(repr=False)
    joint: Joint | None = field(repr=False, default=None)

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan of a task, or of `at_once` tasks."""
        return (self.joint.executor.lowered if self.joint else self.lowered).plan

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once beyond the user's own tensors and the results."""
        return self.plan.peak_bytes + (self.joint.copied if self.joint else 0)

    @property
    def runs(self) -> list[tuple[tuple[int, ...], Joint | None]]:
        """What runs together, and by which program; None for that of one task."""
        full = len(self.tasks) - len(self.tasks) % self.at_once
        starts = range(0, full, self.at_once)
        chunks = [(self.tasks[at : at + self.at_once], self.joint) for at in starts]
        return [*chunks, *(((place,), None) for place in self.tasks[full:])]


@dataclass(frozen=True)
class TaskPlan:
    """How the tasks of a batch run.

    Attributes:
        groups: Tasks of equal shapes, in order of the first.
    """

    groups: tuple[TaskGroup, ...]

    @property
    def runs(self) -> list[tuple[tuple[int, ...], Joint | None]]:
        """The runs of all groups, in order of their first task."""
        return sorted((run for group in self.groups for run in group.runs), key=_first_place)

    def __str__(self) -> str:
        table = Table(title="Task plan", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for group in self.groups:
            table.add_row(f"{len(group.tasks)} tasks", f"{_manner(group)}: {group.reason}")
            table.add_row("peak", f"{human_bytes(group.peak_bytes)}; {group.plan.schedule}")
        table.add_row("rates", str(current_rates()))
        out = io.StringIO()
        Console(file=out, width=100, color_system=None).print(table)
        return out.getvalue().rstrip()


def _first_place(run: tuple[tuple[int, ...], Joint | None]) -> int:
    place: int = run[0][0]
    return place


def _manner(group: TaskGroup) -> str:
    if group.at_once == 1:
        return "one by one"
    left = len(group.tasks) % group.at_once
    return f"{group.at_once} side by side" + (f", the last {left} one by one" if left else "")


@dataclass
class Joints:
    """The programs of several tasks that the program of a single one has led to.

    Attributes:
        by_count: The programs by number of tasks, or why there is none.
        choices: What was chosen, by number of tasks and by what was asked for.
    """

    by_count: dict[int, Joint | NotVectorizableError | BudgetError] = field(default_factory=dict)
    choices: dict[tuple[int, bool, bool | None], tuple[int, str]] = field(default_factory=dict)

    @property
    def executors(self) -> list[Executor]:
        """What runs the programs."""
        return [each.executor for each in self.by_count.values() if isinstance(each, Joint)]


@dataclass(frozen=True)
class Asked:
    """What a call asks for.

    Attributes:
        options: The options of the program.
        separate: Whether each task's gradient is kept by itself.
        vectorize: Whether tasks run side by side; None for what is predicted to be faster.
    """

    options: Options
    separate: bool
    vectorize: bool | None


def plan_group(
    places: Sequence[int],
    executor: Executor,
    joints: Joints,
    stock: Stock,
    train: Batches,
    asked: Asked,
) -> TaskGroup:
    """Decide how tasks of equal shapes run.

    Args:
        places: Their places in the batch.
        executor: The program of a single task.
        joints: What is known of programs of several; added to.
        stock, train: What the program was lowered with.
        asked: What the call asks for.

    Raises:
        InputError: If they are to run side by side and cannot.
    """
    lowered, count = executor.lowered, len(places)

    def joint_of(number: int) -> Joint:
        if number not in joints.by_count:
            try:
                made = _joint(lowered, asked.options, stock, train, number, executor.backend)
            except (NotVectorizableError, BudgetError) as error:
                joints.by_count[number] = error
            else:
                joints.by_count[number] = made
        found = joints.by_count[number]
        if isinstance(found, Exception):
            raise found
        return found

    key = (count, asked.separate, asked.vectorize)
    if key not in joints.choices:
        joints.choices[key] = _choice(lowered, joint_of, count, asked)
    at_once, reason = joints.choices[key]
    joint = joint_of(at_once) if at_once > 1 else None
    return TaskGroup(tuple(places), at_once, reason, lowered, joint)


def _joint(
    lowered: Lowered, options: Options, stock: Stock, train: Batches, count: int, backend: str
) -> Joint:
    copied = _copied(lowered, count, train)
    if options.memory is not None:
        options = replace(options, memory=max(options.memory - copied, 1))
    try:
        made, tasks = lower_tasks(lowered, options, stock, train, count)
    except BudgetError as error:
        error.smallest += copied
        raise
    except CaptureError as error:
        raise NotVectorizableError(str(error).splitlines()[0]) from error
    return Joint(Executor(made, backend), tasks, copied)


def _copied(lowered: Lowered, count: int, train: Batches) -> int:
    per_step = train.labels if train.form != "repeat" else ()
    sizes: dict[str, int] = {
        value.label: node.meta["val"].nbytes * (train.steps if value.label in per_step else 1)
        for graph in (*lowered.loop.steps, lowered.val)
        for value, node in zip(graph.inputs, graph.placeholders, strict=True)
        if value.role in (*STATE_ROLES, Role.BATCH)
    }
    return count * sum(sizes.values())


def _choice(
    lowered: Lowered, joint_of: Callable[[int], Joint], count: int, asked: Asked
) -> tuple[int, str]:
    """How many tasks run side by side, and why."""
    if asked.vectorize is False:
        return 1, "asked for"
    obstacle = _obstacle(lowered, count, asked)
    if obstacle is None:
        if asked.vectorize is None and (slow := _hardly_faster(lowered, count)):
            return 1, slow
        try:
            return _fastest(lowered, _fitting(joint_of, count, asked.options.memory), count, asked)
        except (NotVectorizableError, BudgetError) as error:
            obstacle = str(error).splitlines()[0]
    if asked.vectorize and count > 1:
        raise InputError(
            "the tasks cannot run side by side, as vectorize=True asks",
            why=obstacle,
            remedy="leave vectorize out, and they run one by one",
        )
    return 1, obstacle


_INSEPARABLE = "each task's gradient is kept by itself, and all share a meta-parameter besides θ_0"


def _obstacle(lowered: Lowered, count: int, asked: Asked) -> str | None:
    """Why tasks cannot run side by side, as far as that is known before trying."""
    if count == 1:
        return "no other task has its shapes"
    if asked.options.spill is not None:
        return "states are spilled to the disk"
    own = (*STARTS, Role.BATCH)
    if asked.separate and any(meta.role not in own for meta in lowered.meta):
        return _INSEPARABLE
    return None


def _hardly_faster(lowered: Lowered, count: int) -> str:
    """Why it cannot pay off, where products and bytes take the time: they stay what they are."""
    cost = lowered.plan.cost
    alone = replace(cost, operations=0, bytes_moved=0).weight
    least = 1 - alone / cost.weight * (1 - 1 / count)
    if least < _CLEARLY_FASTER:
        return ""
    return f"only {alone / cost.weight:.0%} of a task's predicted time goes into launching ops"


def _fitting(joint_of: Callable[[int], Joint], count: int, budget: int | None) -> dict[int, Joint]:
    """Programs by the number of tasks: as many as fit into the budget, in chunks of equal size.

    Where the largest repeats steps for it, smaller ones that repeat fewer.
    """
    found: dict[int, Joint] = {}
    size = count
    while size > 1:
        size = count // -(-count // size)
        try:
            found[size] = joint_of(size)
        except BudgetError as error:
            assert budget is not None
            allowed = budget // max(error.smallest // size, 1)
            size = min(size - 1, max(allowed, 1))
            continue
        if found[size].executor.lowered.plan.schedule.recomputed == 0:
            break
        size //= 2
    if not found:
        raise NotVectorizableError("two at once do not fit into the budget")
    return found


def _fastest(
    single: Lowered, joints: Mapping[int, Joint], count: int, asked: Asked
) -> tuple[int, str]:
    """How many tasks run side by side, and why."""
    if asked.separate and not all(
        set(joint.executor.lowered.pieces.wanted) <= joint.tasks.own for joint in joints.values()
    ):
        raise NotVectorizableError(_INSEPARABLE)
    alone = single.plan.cost.seconds

    def seconds(size: int) -> float:
        chunks, left = divmod(count, size)
        return chunks * joints[size].executor.lowered.plan.cost.seconds + left * alone

    at_once = min(joints, key=seconds)
    part = seconds(at_once) / (count * alone)
    ratio = f"{part:.2f} of the time that it takes one by one"
    if asked.vectorize:
        return at_once, f"asked for; predicted to take {ratio}"
    if part > _CLEARLY_FASTER:
        return 1, f"side by side is predicted to take {ratio}"
    return at_once, f"predicted to take {ratio}"
