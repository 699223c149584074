"""A compiled program: lowering on first use, a cache, and calls."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unrollc.capture.averaging import averaged_labels
from unrollc.capture.batches import Batches, read_train, read_val
from unrollc.capture.fingerprint import Fingerprint
from unrollc.capture.layout import Layout, Manner, filler, plain_number, write_back
from unrollc.capture.loop import known_scalars
from unrollc.capture.nests import is_continuous
from unrollc.capture.problem import (
    Objective,
    PerStep,
    Problem,
    Stock,
    read_again,
    take_stock,
)
from unrollc.capture.schedule import Schedule, put_back, run_schedule
from unrollc.capture.trees import rebuild
from unrollc.errors import NonFiniteError
from unrollc.optimize.congruence import Key
from unrollc.requirements.verdict import Requirements
from unrollc.runtime.bridge import MetaLoop, Run
from unrollc.runtime.executor import Executor
from unrollc.runtime.lowering import Lowered, check, lower
from unrollc.runtime.options import Options
from unrollc.runtime.result import BatchedResult, Result
from unrollc.runtime.side_by_side import joint_inputs, shares, state_of_each
from unrollc.runtime.spill import Spilled
from unrollc.runtime.store import open_store
from unrollc.runtime.task_plan import Asked, Joint, Joints, TaskPlan, plan_group
from unrollc.runtime.tasks import Share, Task, batch_of_tasks, check_reduction, task_pairs
from unrollc.runtime.tensor_files import digest_of
from unrollc.step import STATE_ROLES, Role


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


@dataclass(frozen=True)
class Prepared:
    """One call of a program, ready to run.

    Attributes:
        lowered: The program.
        given: What the call starts from, as `lowered` reads it.
        run: The run.
    """

    lowered: Lowered
    given: Given
    run: Run


class Program:
    """T inner steps and a validation loss as one differentiable function; see `unrollc.compile`."""

    def __init__(self, problem: Problem, options: Options) -> None:
        self._problem = problem
        self._options = options
        self._cache: dict[Any, list[Executor]] = {}
        self._pinned: dict[Any, list[Any]] = {}
        self._joints = _no_joints()
        self._moving: frozenset[str] = frozenset()

    def __call__(self, train: Any, val: Any) -> Result:
        """Adapt on `train`, evaluate on `val`.

        Args:
            train: A list of T batches, a tuple ``(inputs, target)`` of tensors with a leading T,
                or ``unrollc.repeat(batch, T)``.
            val: One batch ``(inputs, target)``.

        Returns:
            A `Result`; under ``torch.no_grad()`` its loss carries no gradient and nothing is
            kept for a backward pass.

        Raises:
            InputError: If an argument has the wrong form.
            CaptureError: If the model, a loss or the optimizer cannot be captured.
            RequirementError: If a requested meta-gradient does not exist.
            NonFiniteError: With ``debug=True``, at the first NaN or infinity.
        """
        prepared = self._prepare(*self._found(train, val))
        run, meta = prepared.run, prepared.run.meta
        if meta:
            loss: Tensor = MetaLoop.apply(run, *meta)  # type: ignore[no-untyped-call]
        else:
            loss = run.adapt()
            run.forget()
        return self._finished(prepared, loss)

    def batched(
        self,
        tasks: Sequence[tuple[Any, Any]],
        reduction: str = "mean",
        vectorize: bool | None = None,
    ) -> BatchedResult:
        """Adapt on many tasks, each from the same θ_0, and average their validation losses.

        Tasks of equal shapes run side by side, as one loop over batched tensors, where that is
        predicted to be faster and fits into ``memory=``; otherwise one by one, in the memory of
        one task. The backward pass of what runs together comes right after its forward pass, so
        that ``loss.backward()`` only scales what is there, and a value that is changed between the
        two does not matter.

        Args:
            tasks: For each task ``(train, val)`` as the program takes them. Shapes may differ;
                equal shapes are lowered once.
            reduction: "mean" or "sum" of the losses, or "none" for each, shape ``[tasks]``; then
                each task's gradient is held until the backward pass.
            vectorize: True for side by side, False for one by one; None for what is predicted to
                be faster. Numbers differ by rounding.

        Returns:
            A `BatchedResult`; its plan says how the tasks ran, and why.

        Raises:
            InputError: If `tasks` or `reduction` has the wrong form, or if tasks cannot run side by
                side and should; otherwise as for a call.
        """
        found, plan = self._task_plan(tasks, reduction, vectorize)
        runs = self._tasks(found, plan, separate=reduction == "none")
        losses, results = batch_of_tasks(runs, len(found), reduction)
        return BatchedResult(losses, tuple(results), plan)

    def lower_batched(
        self,
        tasks: Sequence[tuple[Any, Any]],
        reduction: str = "mean",
        vectorize: bool | None = None,
    ) -> TaskPlan:
        """How `batched` would run these tasks, and why; run nothing."""
        return self._task_plan(tasks, reduction, vectorize)[1]

    def _task_plan(
        self, tasks: Sequence[tuple[Any, Any]], reduction: str, vectorize: bool | None
    ) -> tuple[list[tuple[Given, Executor]], TaskPlan]:
        check_reduction(reduction)
        found = [self._found(train, val) for train, val in task_pairs(tasks)]
        asked = Asked(self._options, reduction == "none", vectorize)
        places: dict[Executor, list[int]] = {}
        for place, (_, executor) in enumerate(found):
            places.setdefault(executor, []).append(place)
        groups = []
        for executor, mine in places.items():
            given = found[mine[0]][0]
            joints = self._joints.setdefault(executor, Joints())
            groups.append(plan_group(mine, executor, joints, given.stock, given.train, asked))
        return found, TaskPlan(tuple(groups))

    def _tasks(
        self, found: Sequence[tuple[Given, Executor]], plan: TaskPlan, *, separate: bool
    ) -> Iterator[Task]:
        """What runs together, run by run, so that what one needs is gone before the next."""
        for places, joint in plan.runs:
            if joint is None:
                yield self._single(places, self._prepare(*found[places[0]]))
            else:
                yield self._several(places, [found[n][0] for n in places], joint, separate)

    def _single(self, places: tuple[int, ...], prepared: Prepared) -> Task:
        run = prepared.run

        def share(gradients: Iterable[Tensor | None]) -> Iterator[Share]:
            yield from zip(itertools.repeat(0), run.meta, gradients)

        return Task(places, run, lambda loss: [self._finished(prepared, loss)], share)

    def _several(
        self, places: tuple[int, ...], given: Sequence[Given], joint: Joint, separate: bool
    ) -> Task:
        lowered = joint.executor.lowered
        read = [each.read_as(lowered) for each in given]
        inputs = [self._inputs(lowered, each) for each in read]
        module, wanted = joint.executor.module(), lowered.pieces.wanted
        run = Run(module, joint_inputs(joint, inputs), 0, wanted)

        def finish(losses: Tensor) -> list[Result]:
            states = state_of_each(joint, self._state(lowered, run))
            assert run.inner_losses is not None
            rows = zip(read, states, run.inner_losses.unbind(1), losses, strict=True)
            return [
                self._result(lowered, each, state, inner.clone(), loss)
                for each, state, inner, loss in rows
            ]

        return Task(places, run, finish, functools.partial(shares, joint, inputs, separate))

    def _found(self, train: Any, val: Any) -> tuple[Given, Executor]:
        """What a call starts from, and what runs it."""
        given = self._read(train, val)
        return given, self._lowered(given, torch.is_grad_enabled())

    def _prepare(self, given: Given, executor: Executor) -> Prepared:
        lowered, module = executor.lowered, executor.module()
        given = given.read_as(lowered)
        inputs = self._inputs(lowered, given)
        noisy = any(graph.inputs_with(Role.NOISE) for graph in lowered.pieces.graphs)
        seed = int(torch.randint(2**62, (), dtype=torch.int64)) if noisy else 0
        spilled = self._spilled(executor, module, inputs, seed)
        return Prepared(lowered, given, Run(module, inputs, seed, lowered.pieces.wanted, spilled))

    def _inputs(self, lowered: Lowered, given: Given) -> dict[str, Any]:
        inputs = _inputs(lowered, given)
        if self._options.debug:
            _check_finite(inputs, lowered.pieces.per_step)
        return inputs

    def _finished(self, prepared: Prepared, loss: Tensor) -> Result:
        lowered, run = prepared.lowered, prepared.run
        assert run.inner_losses is not None
        state = self._state(lowered, run)
        return self._result(lowered, prepared.given, state, run.inner_losses, loss)

    def lower(self, train: Any, val: Any) -> Lowered:
        """Capture, check, differentiate, plan and generate; run nothing.

        The same object is returned until shapes, dtypes, devices, T, the structure of state or
        the Python values that the code depends on change.
        """
        return self._lowered(self._read(train, val), torch.is_grad_enabled()).lowered

    def inputs(self, train: Any, val: Any) -> dict[str, Any]:
        """The tensors that a saved program takes, by label (detached)."""
        given = self._read(train, val)
        lowered = self._lowered(given, torch.is_grad_enabled()).lowered
        inputs = _inputs(lowered, given.read_as(lowered))
        return pytree.tree_map_only(Tensor, Tensor.detach, inputs)  # type: ignore[no-any-return]

    def check(self, train: Any, val: Any) -> Requirements:
        """The requirements alone; raises for no failed one."""
        given = self._read(train, val)
        return check(given.problem, self._options, given.stock, given.train, given.val)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles lower again."""
        return {**self.__dict__, "_cache": {}, "_pinned": {}, "_joints": _no_joints()}

    # -- lowering and its cache -----------------------------------------------------------------

    def _read(self, train: Any, val: Any) -> Given:
        paired = not isinstance(self._problem.loss, Objective)
        paired_val = not isinstance(self._problem.val_loss, Objective)
        train_batches = read_train(train, paired=paired)
        val_batches = read_val(val, paired=paired_val)
        problem, scheduler = self._problem, self._problem.scheduler
        if scheduler is None:
            return Given(problem, take_stock(problem), train_batches, val_batches)
        schedule = run_schedule(problem.opt, scheduler, train_batches.steps)
        problem = replace(problem, opt=schedule.opt)
        stock = replace(take_stock(problem), behind=schedule.behind)
        return Given(problem, stock, train_batches, val_batches, schedule)

    def _lowered(self, given: Given, differentiate: bool) -> Executor:
        train, val = given.train, given.val
        for known in self._variants(given, differentiate):
            lowered = known.lowered
            scalars = known_scalars(given.read_as(lowered).stock)
            lifted = lowered.loop.lifted.values()
            same = lowered.lifted_require == tuple(t.requires_grad for t in lifted)
            if same and lowered.loop.holds(scalars, train, val):
                return known
        with torch.inference_mode(False):
            lowered = lower(
                given.problem, self._options, given.stock, train, val, differentiate=differentiate
            )
        self._moving |= lowered.loop.manner.moving  # from now on no part of the key
        variants = self._variants(given, differentiate)
        variants.append(Executor(lowered, self._options.backend))
        del variants[:-_MOST_VARIANTS]
        return variants[-1]

    def _variants(self, given: Given, differentiate: bool) -> list[Executor]:
        """The programs under the key of a call, which becomes the most recently used."""
        fingerprint = Fingerprint()
        stock = read_again(given.problem, given.stock, Manner(self._moving))
        key = (
            differentiate,
            fingerprint.of_problem(given.problem, self._moving),
            _signature(stock),
            given.train.signature(),
            given.val.signature(),
            torch.get_default_dtype(),
            _autocast(stock),
        )
        variants = self._cache.pop(key, [])
        self._pinned.setdefault(key, fingerprint.pinned)
        self._cache[key] = variants
        while len(self._cache) > _MOST_CACHED:
            oldest = next(iter(self._cache))
            del self._cache[oldest], self._pinned[oldest]
        return variants

    def _spilled(
        self, executor: Executor, module: ModuleType, inputs: dict[str, Any], seed: int
    ) -> Spilled | None:
        """The files of a call whose schedule spills; those of a killed one where there are any."""
        options, lowered = self._options, executor.lowered
        if options.spill is None or lowered.plan.schedule.segment is None:
            return None
        digest = digest_of(lowered.code + executor.identity(module), inputs)
        store = open_store(options.spill, digest, seed)
        return Spilled(module, store, options.progress)

    # -- results ----------------------------------------------------------------------------------

    def _state(self, lowered: Lowered, run: Run) -> dict[Key, Tensor]:
        """The last state as the user knows it; nothing of it is a tensor of the user's."""
        last = lowered.pieces.steps[lowered.pieces.sequence[-1]]
        owned = {id(t) for t in pytree.tree_leaves(dict(run.inputs)) if isinstance(t, Tensor)}
        values = [value for value, _ in last.outputs_with(*STATE_ROLES)]
        own = [t.detach().clone() if id(t) in owned else t for t in run.state]
        return lowered.packing.unpacked(values, own)

    def _result(
        self,
        lowered: Lowered,
        given: Given,
        state: Mapping[Key, Tensor],
        inner_losses: Tensor,
        loss: Tensor,
    ) -> Result:
        stock = given.stock
        after: dict[Role, dict[str, Tensor]] = {role: {} for role in STATE_ROLES}
        for (role, label), tensor in state.items():
            after[role][label] = tensor
        buffers = {
            k: after[Role.BUFFER][k] if k in after[Role.BUFFER] else t.detach().clone()
            for k, t in stock.buffers.items()
        }
        own_buffers = {name for name, _ in self._problem.model.named_buffers()}
        layout = lowered.loop.layout
        start = {**stock.theta, **stock.context, **stock.opt_state}
        held: dict[str, Any] = {**start, **after[Role.OPT_STATE]}
        held |= {label: plain_number(held[label]) for label in layout.traced}
        made: dict[Any, Any] = {"self": self._problem.opt}
        kept = {owner: rebuild(tree, filler(held), made) for owner, tree in layout.state}
        result = Result(
            loss=loss,
            params={
                name: after[Role.THETA].get(name, parameter.detach())
                for name, parameter in self._problem.model.named_parameters()
            },
            buffers={k: t for k, t in buffers.items() if k in own_buffers},
            other_buffers={k: t for k, t in buffers.items() if k not in own_buffers},
            opt_state=kept,
            inner_losses=inner_losses,
            average=_average(given.problem, after[Role.AVERAGE]),
            scheduler=None if given.schedule is None else given.schedule.state,
            _write=functools.partial(self._apply, given, layout, after),
        )
        if self._options.debug:
            _check_result(result)
        return result

    def _apply(
        self,
        given: Given,
        layout: Layout,
        after: Mapping[Role, dict[str, Tensor]],
        result: Result,
    ) -> None:
        stock = take_stock(self._problem)
        by_label: dict[Any, Any] = {**stock.theta, **stock.context}
        with torch.no_grad():
            for label in stock.theta:
                by_label[label].copy_(result.params[label])
            for label, tensor in {**result.buffers, **result.other_buffers}.items():
                stock.buffers[label].copy_(tensor)
            for label, tensor in after[Role.AVERAGE].items():
                stock.average[label].copy_(tensor)
        own = {label: tensor.detach().clone() for label, tensor in after[Role.OPT_STATE].items()}
        write_back(self._problem.opt, layout, {**given.stock.opt_state, **own}, by_label)
        if given.schedule is not None:
            assert self._problem.scheduler is not None
            put_back(given.schedule, self._problem.opt, self._problem.scheduler)


#: Keys under which lowered programs are kept, and programs under each (they differ in guards); the
#: least recently used key and the oldest program go first.
_MOST_CACHED = 64
_MOST_VARIANTS = 16


def _no_joints() -> weakref.WeakKeyDictionary[Executor, Joints]:
    """Programs of several tasks go with the program of one that they belong to."""
    return weakref.WeakKeyDictionary()


def _autocast(stock: Stock) -> tuple[Any, ...]:
    """Autocast changes what user code computes, so it is part of a program's key."""
    kind = next(iter(stock.theta.values())).device.type
    if not torch.is_autocast_enabled(kind):
        return (False,)
    return (True, torch.get_autocast_dtype(kind))


def _signature(stock: Stock) -> Any:
    def described(tensors: dict[str, Any]) -> tuple[Any, ...]:
        rows = []
        for label, value in tensors.items():
            t = value.per_step if isinstance(value, PerStep) else value
            row = (label, tuple(t.shape), t.dtype, t.device, t.requires_grad)
            rows.append((*row, isinstance(value, PerStep)))
        return tuple(rows)

    groups = (
        stock.theta,
        stock.context,
        stock.buffers,
        stock.hyper,
        stock.opt_state,
        stock.average,
    )
    return (tuple(described(group) for group in groups), repr(stock.layout))


def _average(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The averaged tensors by the names that they have in the model."""
    if problem.average is None:
        return None
    return {label: tensors[its] for label, its in averaged_labels(problem).items()}


def _inputs(lowered: Lowered, given: Given) -> dict[str, Any]:
    """What the generated module reads, by label."""
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
    return {label: everything[label] for label in labels}


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


def _check_result(result: Result) -> None:
    bad = (~torch.isfinite(result.inner_losses)).nonzero()
    if len(bad):
        raise NonFiniteError(
            f"the inner loss of step {int(bad[0])} is {result.inner_losses[bad[0]].item()}",
            remedy="lower the learning rate, or look at the step's batch",
        )
    for label, tensor in result.params.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"the adapted parameter {label} holds NaN or infinity",
                remedy="lower the learning rate",
            )
    if not bool(torch.isfinite(result.loss)):
        raise NonFiniteError(f"the validation loss is {result.loss.item()}")
