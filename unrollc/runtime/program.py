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

from unrollc.capture.fingerprint import Fingerprint
from unrollc.capture.layout import Manner
from unrollc.capture.loop import known_scalars
from unrollc.capture.problem import (
    PerStep,
    Problem,
    Stock,
    read_again,
)
from unrollc.optimize.congruence import Key
from unrollc.requirements.verdict import Requirements
from unrollc.runtime.bridge import MetaLoop, Run
from unrollc.runtime.executor import Executor
from unrollc.runtime.given import Given, inputs_of, read_batches, read_given
from unrollc.runtime.lowering import Lowered, check, lower
from unrollc.runtime.options import Options
from unrollc.runtime.outcome import last_state, result_of
from unrollc.runtime.result import BatchedResult, Result
from unrollc.runtime.side_by_side import joint_inputs, shares, state_of_each
from unrollc.runtime.spill import Spilled
from unrollc.runtime.store import open_store
from unrollc.runtime.task_plan import Asked, Joint, Joints, TaskPlan, plan_group
from unrollc.runtime.tasks import Share, Task, batch_of_tasks, check_reduction, task_pairs
from unrollc.runtime.tensor_files import digest_of
from unrollc.step import Role


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
        found = self._found_all(task_pairs(tasks))
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
        stock = given[0].read_as(lowered).stock
        read = [replace(each, stock=stock) for each in given]
        inputs = [inputs_of(lowered, each, debug=self._options.debug) for each in read]
        module, wanted = joint.executor.module(), lowered.pieces.wanted
        run = Run(module, joint_inputs(joint, inputs), 0, wanted)

        def finish(losses: Tensor) -> list[Result]:
            states = state_of_each(joint, last_state(lowered, run))
            assert run.inner_losses is not None
            inner = (each.clone() for each in run.inner_losses.unbind(1))
            rows = zip(read, states, zip(losses, inner, strict=True), strict=True)
            return [self._result(lowered, *row) for row in rows]

        return Task(places, run, finish, functools.partial(shares, joint, inputs, separate))

    def _result(
        self,
        lowered: Lowered,
        given: Given,
        state: Mapping[Key, Tensor],
        losses: tuple[Tensor, Tensor],
    ) -> Result:
        debug = self._options.debug
        return result_of(self._problem, lowered, given, state, losses, debug=debug)

    def _found_all(self, pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Given, Executor]]:
        """What each of several calls starts from, and what runs it.

        They start from the same objects, so these are looked at once. Only where the program
        depends on values in the data, or a schedule is run, is each looked up.
        """
        known: dict[Any, tuple[Given, Executor]] = {}
        found = []
        for train, val in pairs:
            batches = read_batches(self._problem, train, val)
            key = tuple(each.signature() for each in batches)
            alike = key in known and self._problem.scheduler is None
            if alike and not known[key][1].lowered.loop.reads_of(*batches):
                given, executor = known[key]
                found.append((replace(given, train=batches[0], val=batches[1]), executor))
            else:
                known[key] = self._found(train, val)
                found.append(known[key])
        return found

    def _found(self, train: Any, val: Any) -> tuple[Given, Executor]:
        """What a call starts from, and what runs it."""
        given = read_given(self._problem, train, val)
        return given, self._lowered(given, torch.is_grad_enabled())

    def _prepare(self, given: Given, executor: Executor) -> Prepared:
        lowered, module = executor.lowered, executor.module()
        given = given.read_as(lowered)
        inputs = inputs_of(lowered, given, debug=self._options.debug)
        noisy = any(graph.inputs_with(Role.NOISE) for graph in lowered.pieces.graphs)
        seed = int(torch.randint(2**62, (), dtype=torch.int64)) if noisy else 0
        spilled = self._spilled(executor, module, inputs, seed)
        return Prepared(lowered, given, Run(module, inputs, seed, lowered.pieces.wanted, spilled))

    def _finished(self, prepared: Prepared, loss: Tensor) -> Result:
        lowered, run = prepared.lowered, prepared.run
        assert run.inner_losses is not None
        losses = loss, run.inner_losses
        return self._result(lowered, prepared.given, last_state(lowered, run), losses)

    def lower(self, train: Any, val: Any) -> Lowered:
        """Capture, check, differentiate, plan and generate; run nothing.

        The same object is returned until shapes, dtypes, devices, T, the structure of state or
        the Python values that the code depends on change.
        """
        return self._lowered(read_given(self._problem, train, val), torch.is_grad_enabled()).lowered

    def finish_compiling(self) -> None:
        """Wait until no code is being compiled in the background, as before measuring times.

        Raises:
            BackendError: If there is some that Inductor cannot compile.
        """
        alone = list(itertools.chain(*self._cache.values()))
        joint = [
            each for one in alone if one in self._joints for each in self._joints[one].executors
        ]
        for executor in (*alone, *joint):
            executor.finish_compiling()

    def inputs(self, train: Any, val: Any) -> dict[str, Any]:
        """The tensors that a saved program takes, by label (detached)."""
        given = read_given(self._problem, train, val)
        lowered = self._lowered(given, torch.is_grad_enabled()).lowered
        inputs = inputs_of(lowered, given.read_as(lowered), debug=False)
        return pytree.tree_map_only(Tensor, Tensor.detach, inputs)  # type: ignore[no-any-return]

    def check(self, train: Any, val: Any) -> Requirements:
        """The requirements alone; raises for no failed one."""
        given = read_given(self._problem, train, val)
        return check(given.problem, self._options, given.stock, given.train, given.val)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles lower again."""
        return {**self.__dict__, "_cache": {}, "_pinned": {}, "_joints": _no_joints()}

    # -- lowering and its cache -----------------------------------------------------------------

    def _lowered(self, given: Given, differentiate: bool) -> Executor:
        train, val = given.train, given.val
        for known in self._variants(given, differentiate):
            lowered = known.lowered
            stock = given.read_as(lowered).stock
            scalars = functools.partial(known_scalars, stock)
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
        steady = self._options.spill is not None  # a resumed run must be the one that was killed
        variants.append(Executor(lowered, self._options.backend, steady=steady))
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
