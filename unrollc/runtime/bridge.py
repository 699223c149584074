"""The autograd bridge: a whole program run as one autograd node."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from unrollc.errors import InputError
from unrollc.runtime.spill import Spilled, spilled_adapt, spilled_backward


@dataclass
class Run:
    """One call of a program.

    Attributes:
        module: The generated module.
        inputs: Tensors by label; lists of tensors for batches in list form.
        prepared: The inputs and what no step changes, which is computed when the run begins.
        seed: Where the run's noise comes from.
        wanted: Labels of the meta-parameters in the order of their tensors.
        spilled: The run's states on the disk; None if they are in memory.
        loss, state, inner_losses: What ``adapt`` returned.
        kept, cotangents, totals: What ``backward`` needs; dropped after the last backward pass.
    """

    module: ModuleType
    inputs: Mapping[str, Any]
    seed: int
    wanted: tuple[str, ...]
    spilled: Spilled | None = None
    state: tuple[Tensor, ...] = ()
    inner_losses: Tensor | None = None
    kept: dict[int, Any] = field(default_factory=dict)
    cotangents: list[Tensor] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    prepared: Mapping[str, Any] = field(default_factory=dict)

    @property
    def meta(self) -> list[Tensor]:
        """The meta-parameters' tensors: for each wanted label one, or one an inner step."""
        return [t for label in self.wanted for t in pytree.tree_leaves(self.inputs[label])]

    def adapt(self) -> Tensor:
        with torch.autocast(self.device, enabled=False):
            return self._adapt()

    @property
    def device(self) -> str:
        """Type of the device that the run uses."""
        first: Tensor = pytree.tree_leaves(dict(self.inputs))[0]
        return first.device.type

    def _adapt(self) -> Tensor:
        module = self.module
        self.prepared = module.prepare(self.inputs) if hasattr(module, "prepare") else self.inputs
        if self.spilled is not None:
            loss, state, self.inner_losses = spilled_adapt(self.spilled, self.prepared)
            self.state = tuple(state)
            return loss
        loss, self.state, self.inner_losses, self.kept, cotangents, self.totals = module.adapt(
            self.prepared, self.seed
        )
        self.cotangents = list(cotangents)
        return loss  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Drop what only a backward pass needs."""
        self.kept, self.cotangents, self.totals, self.spilled = {}, [], {}, None
        self.prepared = {}


class MetaLoop(torch.autograd.Function):
    """``(meta-parameters) -> validation loss``."""

    @staticmethod
    def forward(ctx: Any, run: Run, *meta: Tensor) -> Tensor:
        loss = run.adapt()
        tensors, spec = pytree.tree_flatten(dict(run.prepared))
        ctx.save_for_backward(*tensors)
        ctx.spec, ctx.module, ctx.seed, ctx.wanted = spec, run.module, run.seed, run.wanted
        ctx.device = run.device
        ctx.kept, ctx.cotangents, ctx.totals = run.kept, run.cotangents, run.totals
        ctx.spilled = run.spilled
        ctx.watched = _watched(run)
        run.forget()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        inputs = pytree.tree_unflatten(ctx.saved_tensors, ctx.spec)
        _check_unchanged(ctx.watched)
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        with torch.autocast(ctx.device, enabled=False):
            found = pulled_back(ctx, inputs, again)
        scaled = (None if each is None else each * cotangent.to(each.dtype) for each in found)
        return (None, *scaled)


def pulled_back(ctx: Any, inputs: Mapping[str, Any], again: bool) -> Iterator[Tensor | None]:
    """The meta-gradients, in the order of `Run.meta`; None where nothing flows.

    What only a backward pass needs goes, unless another follows.

    Args:
        ctx: Has the fields of a `Run` that a backward pass needs.
        inputs: The run's inputs, prepared.
        again: Whether another backward pass may follow.
    """
    gradients = _gradients(ctx, inputs, again)
    for label in ctx.wanted:
        value = gradients.pop(label, None)
        count = len(inputs[label]) if isinstance(inputs[label], list) else None
        yield from [value] if count is None else (value or [None] * count)


def _gradients(ctx: Any, inputs: Mapping[str, Any], again: bool) -> dict[str, Any]:
    found = _pulled_through(ctx, inputs, again)
    if hasattr(ctx.module, "conclude"):
        found = ctx.module.conclude(inputs, found)
    return found


def _pulled_through(ctx: Any, inputs: Mapping[str, Any], again: bool) -> dict[str, Any]:
    """The gradients once the loop is reversed."""
    if ctx.spilled is not None:
        found = spilled_backward(ctx.spilled, inputs, again=again)
        if not again:
            ctx.spilled, ctx.kept = None, None
        return found
    if ctx.kept is None:
        raise InputError(
            "the states of this run are gone",
            why="a backward pass without retain_graph=True has used them, or was cut off by an "
            "exception",
            remedy="call the program again",
        )
    if again:
        kept, cotangents = {j: s.copy() for j, s in ctx.kept.items()}, list(ctx.cotangents)
        handed = kept, cotangents, pytree.tree_map(_copied, ctx.totals)
    else:  # the generated program takes over what it gets
        handed = ctx.kept, ctx.cotangents, ctx.totals
        ctx.kept = ctx.cotangents = ctx.totals = None
    gradients: dict[str, Any] = ctx.module.backward(inputs, ctx.seed, *handed)
    return gradients


def _watched(run: Run) -> list[tuple[Tensor, int]]:
    """What the result shows of the tensors that the backward pass reads, with their versions.

    Addresses are compared, not storages: asking thousands of tensors for their storage would take
    as long as a small program's run.
    """
    kept = itertools.chain.from_iterable(run.kept.values())
    totals = filter(_is_tensor, run.totals.values())
    needed = sorted({t.data_ptr() for t in itertools.chain(kept, run.cotangents, totals)})
    return [(t, t._version) for t in run.state if _reads(needed, t)]


def _reads(addresses: list[int], tensor: Tensor) -> bool:
    """Whether one of the sorted addresses lies in a tensor's memory."""
    storage = tensor.untyped_storage()
    first = storage.data_ptr()
    at = bisect.bisect_left(addresses, first)
    return at < len(addresses) and addresses[at] < first + storage.nbytes()


def _check_unchanged(watched: list[tuple[Tensor, int]]) -> None:
    """As autograd does for tensors that it has saved."""
    for tensor, version in watched:
        if tensor._version != version:
            raise InputError(
                f"a tensor of the result (shape {list(tensor.shape)}) was changed in place before "
                "the backward pass",
                why="the backward pass reads it: no inner step has changed it, or the validation "
                "loss has it as its gradient",
                remedy="call backward() first, or change a clone",
            )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _copied(value: Any) -> Any:
    """Gradients add up in place, so a second backward pass needs its own start."""
    return value.clone() if isinstance(value, Tensor) else value
