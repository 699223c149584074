"""The face of unrollc."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from unrollc.backends.cache import clear_cache, set_cache_directory
from unrollc.capture.averaging import check_average
from unrollc.capture.batches import repeat
from unrollc.capture.problem import Loss, Objective, PerStep, Problem, Transform, objective
from unrollc.capture.schedule import check_scheduler
from unrollc.errors import (
    BackendError,
    BudgetError,
    CaptureError,
    InputError,
    NonFiniteError,
    RequirementError,
    SpillError,
    UnrollcError,
)
from unrollc.requirements.verdict import Requirements
from unrollc.runtime.lowering import Lowered
from unrollc.runtime.options import FirstOrder, Gradient, Truncated, read_options
from unrollc.runtime.program import Program
from unrollc.runtime.result import BatchedResult, Result
from unrollc.runtime.spill import Progress

__all__ = [
    "BackendError",
    "BatchedResult",
    "BudgetError",
    "CaptureError",
    "FirstOrder",
    "InputError",
    "Lowered",
    "NonFiniteError",
    "PerStep",
    "Program",
    "RequirementError",
    "Requirements",
    "Result",
    "SpillError",
    "Truncated",
    "UnrollcError",
    "check",
    "clear_cache",
    "compile",
    "objective",
    "repeat",
    "set_cache_directory",
]


def compile(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    loss: Loss,
    *,
    val_loss: Loss | None = None,
    grad_transform: Transform | None = None,
    scheduler: LRScheduler | None = None,
    average: AveragedModel | None = None,
    meta: Sequence[Tensor | PerStep | str] | None = None,
    gradient: Gradient = "exact",
    memory: int | str | None = None,
    spill: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    backend: str = "auto",
    debug: bool = False,
) -> Program:
    """Compile T steps of training, followed by a validation loss, into a differentiable program.

    Compilation is lazy: the program is lowered at its first call, and again for new shapes.

    Args:
        model: Any module; left untouched. Its parameters in `opt` are θ_0, the others belong to
            φ_loss.
        opt: Any ``torch.optim.Optimizer`` over (some of) the model's parameters; left untouched.
            A float hyperparameter becomes a meta-parameter where ``param_groups[i][key]`` is a
            tensor that requires grad, or a `PerStep`.
        loss: ``loss(prediction, target) -> scalar``, a module, or an `objective`.
        val_loss: Likewise, for the validation batch; by default the same as `loss`.
        grad_transform: Called between backward pass and optimizer step with the list of the
            optimizer's parameters whose ``.grad`` is set; it changes or rebinds ``.grad``, as
            ``lambda params: torch.nn.utils.clip_grad_norm_(params, 1.0)`` does. Its return value
            is ignored; the update is differentiated through it. Parameters of a module count as
            meta-parameters.
        scheduler: A scheduler of `torch.optim.lr_scheduler` over `opt`; left untouched. It steps
            once after each inner step, from the state it has now. Where the learning rate is a
            tensor, that is the schedule's present rate, and its base rate follows.
        average: A `torch.optim.swa_utils.AveragedModel` over `model`; left untouched. Its
            ``update_parameters`` runs after each inner step, starting from what it holds now, and
            the validation loss is that of the averaged weights.
        meta: Meta-parameters, as tensors or labels; by default everything that requires grad.
        gradient: "exact", `FirstOrder` or `Truncated`.
        memory: Bytes that a run may hold beyond its inputs, as a number or as text like "64MiB";
            None for the fastest schedule. A smaller budget repeats more steps.
        spill: A directory. States that the backward pass needs are written there, one every √T
            steps or as often as `memory` asks for, and each inner step runs twice, at any T. The
            files go with the backward pass, with the result, or with an exception. They stay where
            the process is killed: the next run of the same program with the same inputs goes on
            from them, with identical numbers.
        progress: ``progress(done, total)``, called after each segment of a spilled run with inner
            steps, forward and backward.
        backend: What runs the program. "aten" calls PyTorch's ops from the generated Python;
            "inductor" compiles each distinct step, adjoint and the validation loss to machine code
            once (seconds to minutes, kept in a cache on the disk), whatever T is; what runs once
            in a call is compiled while the program already runs. "tiered" is "aten" until there
            is something to go on with. "auto" is "aten".
        debug: Look for NaN and infinity in data, losses and parameters at every call.

    Returns:
        A `Program`: ``result = program(train, val); result.loss.backward()``.

    Raises:
        InputError: If an argument has the wrong kind. A call of the program raises `BackendError`
            where ``backend="inductor"`` cannot compile it, or finds no C++ compiler.
    """
    val_loss = loss if val_loss is None else val_loss
    problem = Problem(model, opt, loss, val_loss, grad_transform, scheduler, average)
    _check_kinds(problem)
    options = read_options(meta, gradient, memory, backend, debug, spill, progress)
    return Program(problem, options)


def _check_kinds(problem: Problem) -> None:
    model, opt, transform = problem.model, problem.opt, problem.grad_transform
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}, not an nn.Module")
    if not isinstance(opt, torch.optim.Optimizer):
        raise InputError(
            f"opt is {type(opt).__name__}, not a torch.optim.Optimizer",
            remedy="pass an optimizer instance over the model's parameters",
        )
    for name, given in (("loss", problem.loss), ("val_loss", problem.val_loss)):
        if not isinstance(given, Objective) and not callable(given):
            raise InputError(
                f"{name} is {type(given).__name__}, not a callable",
                remedy="pass loss(prediction, target) -> scalar, or unrollc.objective(fn)",
            )
    if transform is not None and not callable(transform):
        raise InputError(
            f"grad_transform is {type(transform).__name__}, not a callable",
            remedy="pass a function of a list of parameters, e.g. "
            "lambda params: torch.nn.utils.clip_grad_norm_(params, 1.0)",
        )
    if problem.scheduler is not None:
        check_scheduler(problem.scheduler, opt)
    if problem.average is not None:
        check_average(problem.average, model)


def check(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    loss: Loss,
    train: Any,
    val: Any,
    **options: Any,
) -> Requirements:
    """Decide whether the meta-gradients exist, without running anything (GIMLI, §2.4).

    Requirement I: Lval is differentiable in θ_T. II: the update is differentiable in θ, in G and
    in its state. III: (a) the update, or (b) the inner gradient, is differentiable in the
    meta-parameter.

    Args:
        model, opt, loss: As for `compile`.
        train, val: As for a call of the program.
        options: Further keyword arguments of `compile`.

    Returns:
        `Requirements`: ``.ok``, a `Verdict` a meta-parameter, ``.derivations``; ``str()`` is a
        table. A failed verdict raises nothing.

    Raises:
        InputError: If an argument has the wrong form.
        CaptureError: If the program cannot be captured or differentiated as a graph.
    """
    return compile(model, opt, loss, **options).check(train, val)
