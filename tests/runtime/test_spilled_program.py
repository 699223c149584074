"""``compile(..., spill=)``: the gradients of a run in memory, from states on the disk."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, memory
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack
from unrollc.errors import BudgetError
from unrollc.runtime.store import Store

pytestmark = pytest.mark.usefixtures("float64")

T = 11


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power cuts are not tested here; waiting for the disk takes most of a run."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Setting:
    """Dropout, batch statistics, an optimizer with state, a learning rate a step."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))
        self.model = nn.Sequential(*layers)
        self.lr = torch.linspace(0.01, 0.05, T).requires_grad_()
        self.opt = optimizer(self.model.parameters(), lr=0.1, **options)
        self.opt.param_groups[0]["lr"] = unrollc.PerStep(self.lr)
        inputs, target = cases.batches((5, 4), T, seed=1)
        self.images = inputs.requires_grad_()
        self.train: Any = (self.images, target)
        self.val = unstack(cases.batches((5, 4), 1, seed=2))[0]

    @property
    def meta(self) -> list[Tensor]:
        return [self.lr, self.images, *self.model.parameters()]

    def call(self, seed: int = 3, **options: Any) -> unrollc.Result:
        program = unrollc.compile(self.model, self.opt, F.cross_entropy, **options)
        torch.manual_seed(seed)
        return program(self.train, self.val)

    def run(self, seed: int = 3, **options: Any) -> list[Tensor]:
        """Everything that a call gives."""
        result = self.call(seed, **options)
        found = torch.autograd.grad(result.loss, self.meta, allow_unused=True)
        gradients = [torch.zeros(()) if each is None else each for each in found]
        buffers = list(result.buffers.values())
        return [result.loss.detach(), *result.params.values(), *buffers, *gradients]


def momentum() -> Setting:
    return Setting(torch.optim.SGD, momentum=0.9)


SETTINGS: dict[str, Callable[[], Setting]] = {
    "momentum": momentum,
    "adam": lambda: Setting(torch.optim.Adam),
}


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("gradient", ["exact", unrollc.Truncated(6)], ids=str)
def test_the_same_bits_as_in_memory(name: str, gradient: Any, tmp_path: Path) -> None:
    setting = SETTINGS[name]()
    expected = setting.run(gradient=gradient)
    assert equal(setting.run(gradient=gradient, spill=tmp_path), expected)
    assert list(tmp_path.iterdir()) == []


def test_batches_in_a_list(tmp_path: Path) -> None:
    setting = momentum()
    setting.train = [(x.detach().requires_grad_(), y) for x, y in unstack(setting.train)]
    images = [x for x, _ in setting.train]
    found = torch.autograd.grad(setting.call(spill=str(tmp_path)).loss, images)
    expected = torch.autograd.grad(setting.call().loss, images)
    assert equal(list(found), list(expected))


class Cut(BaseException):
    """Ends a run like a kill: nothing that runs afterwards changes the disk."""


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[Store]:
    """The stores of a test, the newest last."""
    found: list[Store] = []
    initialize = Store.__init__

    def noted(self: Store, *args: Any) -> None:
        found.append(self)
        initialize(self, *args)

    monkeypatch.setattr(Store, "__init__", noted)
    return found


def cut_off(setting: Setting, home: Path, stores: list[Store], moment: int) -> None:
    def end(done: int, _: int) -> None:
        if done >= moment:
            stores[-1]._remove.detach()
            stores[-1]._run.release()
            raise Cut

    with pytest.raises(Cut):
        setting.run(spill=home, progress=end)


@pytest.mark.parametrize("moment", [4, 11, 15, 22])
def test_a_run_is_taken_up(moment: int, tmp_path: Path, stores: list[Store]) -> None:
    """By another program, with the noise of the run that was cut off, and no segment twice."""
    expected = momentum().run(seed=3)
    cut_off(momentum(), tmp_path, stores, moment)
    calls: list[int] = []
    again = momentum().run(seed=99, spill=tmp_path, progress=lambda done, of: calls.append(done))
    assert equal(again, expected)
    assert all(done > moment for done in calls)
    assert list(tmp_path.iterdir()) == []


def test_other_inputs_take_nothing_up(tmp_path: Path, stores: list[Store]) -> None:
    cut_off(momentum(), tmp_path, stores, 8)
    changed = momentum()
    with torch.no_grad():
        changed.images[-1, 0, 0] += 1e-14
    calls: list[int] = []
    found = changed.run(spill=tmp_path, progress=lambda done, of: calls.append(done))
    assert calls == [4, 8, 11, 14, 18, 22]
    assert equal(found, changed.run())
    assert list(tmp_path.iterdir()) == []


def test_several_backward_passes(tmp_path: Path) -> None:
    setting = momentum()
    expected = torch.autograd.grad(setting.call().loss, setting.lr)[0]
    loss = setting.call(spill=tmp_path).loss
    for retain in (True, True, False):
        assert torch.equal(torch.autograd.grad(loss, setting.lr, retain_graph=retain)[0], expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert list(tmp_path.iterdir()) == []


def test_files_go_with_the_result(tmp_path: Path) -> None:
    result = momentum().call(spill=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    del result
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_two_results_at_once(tmp_path: Path) -> None:
    """Two calls with equal inputs have files of their own."""
    setting = momentum()
    first, second = setting.call(3, spill=tmp_path), setting.call(4, spill=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    for result, seed in ((second, 4), (first, 3)):
        expected = torch.autograd.grad(setting.call(seed).loss, setting.lr)[0]
        assert torch.equal(torch.autograd.grad(result.loss, setting.lr)[0], expected)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_without_gradients(tmp_path: Path) -> None:
    with torch.no_grad():
        momentum().call(spill=tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_the_plan(tmp_path: Path) -> None:
    """√T steps a segment, fewer where the budget asks for it, and a peak that is measured."""
    model = MLP(hidden=64)
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    train = cases.batches((16, 4), 50, seed=1)
    val = unstack(train)[0]

    def compiled(budget: int | None) -> unrollc.Program:
        return unrollc.compile(model, opt, F.cross_entropy, spill=tmp_path, memory=budget)

    plan = compiled(None).lower(train, val).plan
    assert plan.schedule.segment == 8 and "spill every 8 steps" in str(plan)
    assert plan.for_steps(10_000).schedule.segment == 100
    budget = plan.peak_bytes * 2 // 3
    program = compiled(budget)
    plan = program.lower(train, val).plan
    assert plan.schedule.segment in range(2, 8) and plan.peak_bytes <= budget
    program(train, val).loss.backward()
    for param in model.parameters():
        param.grad = None

    def run() -> None:
        result = program(train, val)
        result.loss.backward()

    measured = memory.measure(run).peak
    assert abs(measured - plan.peak_bytes) <= 0.02 * measured + 256
    with pytest.raises(BudgetError, match="the smallest budget that works"):
        compiled(1000).lower(train, val)


def test_options_are_checked() -> None:
    setting = momentum()
    bad: dict[str, Any] = {
        "spill is int, not a directory": {"spill": 3},
        "progress is int, not a callable": {"spill": "states", "progress": 3},
        "progress= is given without spill=": {"progress": print},
    }
    for message, options in bad.items():
        with pytest.raises(unrollc.InputError, match=message):
            unrollc.compile(setting.model, setting.opt, F.cross_entropy, **options)
