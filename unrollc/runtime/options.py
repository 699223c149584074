"""The options of ``compile`` and which meta-parameters they ask for."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unrollc.capture.batches import Batches
from unrollc.capture.nests import is_continuous
from unrollc.capture.problem import PerStep, Stock
from unrollc.errors import InputError, RequirementError
from unrollc.requirements.judge import MetaParameter
from unrollc.runtime.spill import Progress
from unrollc.step import STARTS, Role


@dataclass(frozen=True)
class FirstOrder:
    """Take the inner gradient as a constant: first-order MAML (Finn et al. 2017, §5.2).

    The update is still differentiated in θ, in its state and in its hyperparameters; whatever
    acts through the inner gradient alone has no gradient.
    """


@dataclass(frozen=True)
class Truncated:
    """Go back through the last `steps` inner steps only (Shaban et al. 2019, K-RMD).

    θ_{T-k} and the optimizer state there count as constants, so θ_0 gets no gradient if k < T.

    Attributes:
        steps: k, at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise InputError(
                f"Truncated(k): k is {self.steps!r}", remedy="pass a positive number of steps"
            )


Gradient = str | FirstOrder | Truncated

#: What ``backend=`` may be.
BACKENDS = ("auto", "aten", "inductor", "tiered")


@dataclass(frozen=True)
class Options:
    """Keyword arguments of ``compile``, checked.

    Attributes:
        meta: What the user asked for, or None for every tensor that requires grad.
        gradient: "exact", `FirstOrder` or `Truncated`.
        debug: Whether every run looks for NaN and infinity.
        memory: Bytes that a run may hold beyond its inputs; None for the fastest schedule.
        spill: The directory in which states are kept on the disk; None keeps them in memory.
        progress: Told after each segment of a spilled run how far it is.
        backend: What runs the program; one of `BACKENDS`.
    """

    meta: tuple[Any, ...] | None
    gradient: Gradient
    debug: bool
    memory: int | None = None
    spill: pathlib.Path | None = None
    progress: Progress | None = None
    backend: str = "auto"

    @property
    def first_order(self) -> bool:
        return isinstance(self.gradient, FirstOrder)

    def steps_back(self, steps: int) -> int:
        """How many of T steps the backward pass goes back."""
        if isinstance(self.gradient, Truncated):
            return min(self.gradient.steps, steps)
        return steps


def read_options(
    meta: Any,
    gradient: Any,
    memory: Any,
    backend: Any,
    debug: Any,
    spill: Any = None,
    progress: Any = None,
) -> Options:
    """Check the keyword arguments of ``compile``.

    Raises:
        InputError: For a value of the wrong kind.
    """
    if not isinstance(gradient, FirstOrder | Truncated) and gradient != "exact":
        raise InputError(
            f"gradient={gradient!r}",
            remedy='pass "exact", unrollc.FirstOrder() or unrollc.Truncated(k)',
        )
    budget = read_budget(memory)
    if not isinstance(backend, str) or backend not in BACKENDS:
        names = ", ".join(f'"{name}"' for name in BACKENDS)
        raise InputError(f"backend={backend!r}", remedy=f"pass one of {names}")
    if not isinstance(debug, bool):
        raise InputError(f"debug={debug!r}", remedy="pass True or False")
    if meta is not None and (isinstance(meta, str | Tensor) or not isinstance(meta, Sequence)):
        raise InputError(
            f"meta is {type(meta).__name__}, not a list",
            remedy="pass a list of tensors or labels, e.g. meta=[lr] or meta=['fc.weight']",
        )
    listed = None if meta is None else tuple(meta)
    return Options(listed, gradient, debug, budget, *_read_spill(spill, progress), backend)


def _read_spill(spill: Any, progress: Any) -> tuple[pathlib.Path | None, Progress | None]:
    if spill is not None and (not isinstance(spill, str | os.PathLike) or not os.fspath(spill)):
        what = "empty" if spill == "" else type(spill).__name__
        raise InputError(
            f"spill is {what}, not a directory",
            remedy='pass the path of a directory, e.g. spill="states"',
        )
    if progress is not None and not callable(progress):
        raise InputError(
            f"progress is {type(progress).__name__}, not a callable",
            remedy="pass a function progress(done, total) of two numbers of inner steps",
        )
    if progress is not None and spill is None:
        raise InputError(
            "progress= is given without spill=",
            why="it is called after each segment of a run whose states are on the disk",
            remedy="pass spill= a directory too",
        )
    return None if spill is None else pathlib.Path(os.fsdecode(spill)), progress


_UNITS = {
    "": 1,
    "K": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "Ki": 1024,
    "Mi": 1024**2,
    "Gi": 1024**3,
    "Ti": 1024**4,
}


def read_budget(memory: Any) -> int | None:
    """Bytes of a budget like ``64 * 2**20`` or ``"64MiB"``; None without one.

    Raises:
        InputError: For anything else.
    """
    if memory is None:
        return None
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    if isinstance(memory, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?|)B", memory.strip())
        if match and (count := int(float(match[1]) * _UNITS[match[2]])) > 0:
            return count
    raise InputError(
        f"memory={memory!r} is not a budget",
        remedy='pass None, a positive number of bytes, or text like "64MiB"',
    )


def candidates(
    stock: Stock, train: Batches, val: Batches, lifted: Mapping[str, Tensor]
) -> dict[tuple[Role, str], tuple[Tensor, ...]]:
    """Every tensor that may be a meta-parameter, by role and label (several for list batches)."""
    found: dict[tuple[Role, str], tuple[Tensor, ...]] = {}
    for label, tensor in stock.theta.items():
        found[Role.THETA, label] = (tensor,)
    for label, tensor in stock.opt_state.items():
        found[Role.OPT_STATE, label] = (tensor,)
    for label, value in stock.hyper.items():
        tensor = value.per_step if isinstance(value, PerStep) else value
        found[Role.HYPER, label] = (tensor, *stock.behind.get(label, ()))
    for label, tensor in {**stock.context, **lifted}.items():
        found[Role.CONTEXT, label] = (tensor,)
    for batches in (train, val):
        for label, leaf in zip(batches.labels, batches.leaves, strict=True):
            found[Role.BATCH, label] = leaf if isinstance(leaf, tuple) else (leaf,)
    return found


def labels_by_tensor(
    known: Mapping[tuple[Role, str], tuple[Tensor, ...]],
) -> dict[int, tuple[str, ...]]:
    """Every label of a tensor, by its id; one tensor may stand in several places."""
    found: dict[int, tuple[str, ...]] = {}
    for (_, label), tensors in known.items():
        for tensor in tensors:
            found[id(tensor)] = (*found.get(id(tensor), ()), label)
    return found


def resolve_meta(
    options: Options,
    known: Mapping[tuple[Role, str], tuple[Tensor, ...]],
    steps: int,
    *,
    complete: bool,
) -> list[MetaParameter]:
    """The meta-parameters: those that require grad, or those that the user lists.

    Args:
        options: The user's options.
        known: Candidates by role and label.
        steps: T.
        complete: Whether `known` holds closure tensors already; until then an unknown tensor is
            no error.
    """
    truncated = options.steps_back(steps) < steps
    if options.meta is None:
        found = []
        for (role, label), tensors in known.items():
            if any(tensor.requires_grad for tensor in tensors):
                waived = role in STARTS and truncated
                start = "θ_0" if role is Role.THETA else "the first state"
                waiver = f"Truncated({options.steps_back(steps)}) does not go back to {start}"
                found.append(MetaParameter(role, label, not waived, waiver if waived else ""))
        return found
    return _listed(options.meta, known, complete)


def refuse_averages(options: Options, stock: Stock) -> None:
    """Say of averaged weights in ``meta=`` that they are none of what may stand there.

    Raises:
        InputError: Where one is listed.
    """
    labels = {id(tensor): label for label, tensor in stock.average.items()}
    for position, item in enumerate(options.meta or ()):
        label = item if isinstance(item, str) else labels.get(id(item))
        if label in stock.average:
            raise InputError(
                f"meta[{position}] ({label}) belongs to the average",
                why="where an average starts is state of the inner loop, no meta-parameter",
                remedy="list θ_0, hyperparameters, or tensors that the averaging function reads",
            )


def _listed(
    meta: Sequence[Any], known: Mapping[tuple[Role, str], tuple[Tensor, ...]], complete: bool
) -> list[MetaParameter]:
    by_label = {label: key for key in known for label in (key[1],)}
    by_id: dict[int, list[tuple[Role, str]]] = {}
    for each, tensors in known.items():
        for tensor in tensors:
            by_id.setdefault(id(tensor), []).append(each)
    found: dict[tuple[Role, str], MetaParameter] = {}
    for position, item in enumerate(meta):
        item = item.per_step if isinstance(item, PerStep) else item
        if isinstance(item, str):
            key = by_label.get(item)
            if key is None and complete:
                raise InputError(
                    f"meta[{position}] = {item!r} names nothing that the program knows",
                    remedy=f"known labels: {', '.join(sorted(by_label))}",
                )
        elif isinstance(item, Tensor):
            key = next(iter(by_id.get(id(item), ())), None)
            if key is None and complete:
                raise RequirementError(
                    f"nothing depends on meta[{position}] (shape {list(item.shape)})",
                    why="the tensor is neither a parameter, a hyperparameter, a batch nor read by "
                    "the model or a loss",
                    remedy="pass the tensor object that the program uses",
                )
        else:
            raise InputError(
                f"meta[{position}] is {type(item).__name__}",
                remedy="list tensors or labels",
            )
        if key is None:
            continue
        if key in found and complete:
            raise InputError(
                f"meta lists {key[1]} twice (again at meta[{position}])",
                remedy="list every meta-parameter once",
            )
        if not all(is_continuous(tensor) for tensor in known[key]):
            dtype = str(known[key][0].dtype).removeprefix("torch.")
            obstacle = f"it is {dtype}: integers and truth values have no derivative"
            found[key] = MetaParameter(*key, obstacle=obstacle)
            continue
        if not any(tensor.requires_grad for tensor in known[key]):
            raise InputError(
                f"meta[{position}] ({key[1]}) does not require grad",
                remedy="call .requires_grad_() on it before the call",
            )
        found[key] = MetaParameter(*key)
    # A tensor in several places has one gradient, the sum over all of them.
    places = {
        other: MetaParameter(*other)
        for key in found
        for tensor in known[key]
        for other in by_id[id(tensor)]
    }
    return list({**places, **found}.values())
