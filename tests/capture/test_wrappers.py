"""What PyTorch wraps around a computation: undone where it changes nothing, refused elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import unrollc
from tests.modules.around import assert_exact, classes, held, mlp, momentum, twin
from tests.oracles.objectives import Objective
from unrollc.capture import wrappers

pytestmark = pytest.mark.usefixtures("float64")

Around = Callable[..., Any]


class Blocks(nn.Module):
    """A layer, a part that may be checkpointed, a head."""

    def __init__(self, around: Around | None = None) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self._around = around

    def block(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return torch.tanh(self.middle(x)) * scale

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        block = self.block
        return self.head(block(hidden) if self._around is None else self._around(block, hidden))


def offloaded(block: Any, hidden: Tensor) -> Tensor:
    with save_on_cpu():
        return block(hidden)


AROUND: dict[str, Around] = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "with keywords": lambda block, hidden: checkpoint(
        block, hidden, scale=2.0, use_reentrant=False, preserve_rng_state=False
    ),
    "selective": lambda block, hidden: checkpoint(
        block,
        hidden,
        use_reentrant=False,
        context_fn=functools.partial(
            create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]
        ),
    ),
    "nested": lambda block, hidden: checkpoint(
        lambda x: checkpoint(block, x, use_reentrant=False), hidden, use_reentrant=False
    ),
    "saved on the CPU": offloaded,
}


@pytest.mark.parametrize("name", AROUND)
def test_checkpointing_changes_nothing(name: str) -> None:
    """The same without it is the oracle: eager recomputation sees other weights than the first
    pass, since ``functional_call`` has ended by then."""
    model = Blocks(AROUND[name])
    assert_exact(model, classes(), plain=twin(model, Blocks))


class Sequence(nn.Module):
    def __init__(self, segments: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)
        self._segments = segments

    def forward(self, x: Tensor) -> Tensor:
        if not self._segments:
            return self.head(self.net(x))
        return self.head(checkpoint_sequential(self.net, self._segments, x, use_reentrant=False))


def test_a_checkpointed_sequence_changes_nothing() -> None:
    model = Sequence(2)
    assert_exact(model, classes(), plain=twin(model, lambda: Sequence(0)))


class Dropped(Blocks):
    def block(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return F.dropout(super().block(x, scale), 0.5)


def test_noise_in_a_checkpointed_block_is_drawn_once() -> None:
    """One draw a step, the same number as without checkpointing, and the same values."""
    losses = []
    for around in (None, functools.partial(checkpoint, use_reentrant=False)):
        torch.manual_seed(0)
        model = Dropped(around)
        opt, _ = held(model, momentum)
        *train, val = classes()
        program = unrollc.compile(model, opt, F.cross_entropy)
        torch.manual_seed(3)
        losses.append(program(train, val).loss)
        step = program.lower(train, val).step
        assert sum(value.noise is not None for value in step.inputs) == 1
    assert torch.equal(*losses)


def scaled(model: nn.Module, batch: Any) -> Tensor:
    return torch.amp.GradScaler("cpu").scale(F.cross_entropy(model(batch[0]), batch[1]))


def scaled_by_one(model: nn.Module, batch: Any) -> Tensor:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return scaler.scale(F.cross_entropy(model(batch[0]), batch[1]))


def run_backward(model: nn.Module, batch: Any) -> Tensor:
    model(batch[0]).sum().backward()
    return F.cross_entropy(model(batch[0]), batch[1])


def packed(model: nn.Module, batch: Any) -> Tensor:
    with saved_tensors_hooks(lambda x: x.half(), lambda x: x.double()):
        return F.cross_entropy(model(batch[0]), batch[1])


def detached(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(checkpoint(model, batch[0], use_reentrant=True), batch[1])


@pytest.mark.parametrize(
    ("loss", "what", "line"),
    [
        (scaled, "GradScaler.scale is called in a loss", "return torch.amp"),
        (run_backward, r"backward\(\) is called while the model or the loss", "model(batch[0])"),
        (packed, "the model opens saved_tensors_hooks", "with saved_tensors"),
        (detached, "is given no tensor that requires grad", "return F.cross_entropy(checkpoint("),
    ],
)
def test_what_cannot_be_undone_is_refused_at_its_line(loss: Any, what: str, line: str) -> None:
    opt, _ = held(model := mlp(), momentum)
    *train, val = classes()
    with pytest.raises(unrollc.CaptureError, match=what) as caught:
        unrollc.compile(model, opt, unrollc.objective(loss)).lower(train, val)
    assert caught.value.where.text.startswith(line)
    assert caught.value.remedy


def test_a_scaler_that_is_disabled_is_harmless() -> None:
    assert_exact(mlp(), classes(), Objective(scaled_by_one))


@pytest.mark.parametrize("loss", [F.cross_entropy, unrollc.objective(run_backward)])
def test_everything_is_put_back(loss: Any) -> None:
    """After a capture, and after one that fails."""
    before = [getattr(owner, name) for owner, name, _ in wrappers._ROWS]
    opt, _ = held(model := mlp(), momentum)
    *train, val = classes()
    program = unrollc.compile(model, opt, loss)
    if isinstance(loss, unrollc.api.Objective):
        with pytest.raises(unrollc.CaptureError):
            program.lower(train, val)
    else:
        program.lower(train, val)
    assert [getattr(owner, name) for owner, name, _ in wrappers._ROWS] == before
    x = torch.ones(2, requires_grad=True)
    checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
