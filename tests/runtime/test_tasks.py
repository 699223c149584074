"""Batches of tasks one by one: the gradients of separate calls, in the memory of one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unrollc
from tests.oracles import cases
from tests.oracles.compare import assert_close
from tests.oracles.memory import measure
from tests.oracles.models import MLP, DropoutMLP
from unrollc.runtime import tasks as tasks_module

pytestmark = pytest.mark.usefixtures("float64")

T, TASKS = 4, 3


class Setting:
    """A model, a learned learning rate, and tasks whose training inputs may be learned as well."""

    def __init__(self, model: Any = MLP, *, learned_data: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = model().double()
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.5)
        self.rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        self.opt.param_groups[0]["lr"] = self.rate
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy, **options)
        self.tasks = []
        for n in range(TASKS):
            inputs, target = cases.batches((5, 4), T, seed=n)
            val_inputs, val_target = cases.batches((6, 4), 1, seed=100 + n)
            inputs.requires_grad_(learned_data)
            self.tasks.append(((inputs, target), (val_inputs[0], val_target[0])))
        self.leaves = [*self.model.parameters(), self.rate]
        self.leaves += [train[0] for train, _ in self.tasks] if learned_data else []

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.leaves))

    def separately(self) -> list[unrollc.Result]:
        return [self.program(train, val) for train, val in self.tasks]


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    named = [{f"leaf {n}": t for n, t in enumerate(tensors)} for tensors in (actual, expected)]
    assert_close(*named, rtol=1e-12)


@pytest.mark.parametrize("learned_data", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_has_the_gradient_of_separate_calls(reduction: str, learned_data: bool) -> None:
    setting = Setting(learned_data=learned_data)
    apart = torch.stack([result.loss for result in setting.separately()])
    expected = getattr(apart, reduction)()
    batch = setting.program.batched(setting.tasks, reduction, vectorize=False)
    assert torch.equal(batch.losses, apart.detach())
    assert_all_close([batch.loss], [expected])
    assert_all_close(setting.gradients(3 * batch.loss), setting.gradients(3 * expected))


@pytest.mark.parametrize("learned_data", [False, True])
def test_each_loss_has_its_own_gradient(learned_data: bool) -> None:
    setting = Setting(learned_data=learned_data)
    apart = setting.separately()
    batch = setting.program.batched(setting.tasks, "none", vectorize=False)
    weights = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    expected = sum(w * result.loss for w, result in zip(weights, apart, strict=True))
    assert batch.loss.shape == (TASKS,)
    assert_all_close(
        setting.gradients((weights * batch.loss).sum()),
        setting.gradients(torch.as_tensor(expected)),
    )


def test_a_gradient_in_the_wrong_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(learned_data=True)
    expected = setting.gradients(sum(r.loss for r in setting.separately()))  # type: ignore[arg-type]
    monkeypatch.setattr(
        tasks_module,
        "pulled_back",
        lambda run, inputs, again: [torch.zeros_like(t) for t in run.meta],
    )
    wrong = setting.gradients(setting.program.batched(setting.tasks, "sum", vectorize=False).loss)
    with pytest.raises(AssertionError):
        assert_all_close(wrong, expected)


def test_results_are_those_of_separate_calls() -> None:
    setting = Setting()
    batch = setting.program.batched(setting.tasks, vectorize=False)
    for one, other in zip(batch.tasks, setting.separately(), strict=True):
        assert torch.equal(one.inner_losses, other.inner_losses)
        assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)
        assert not one.loss.requires_grad


def test_each_task_draws_its_own_noise() -> None:
    setting = Setting(DropoutMLP)
    setting.tasks = [setting.tasks[0]] * 2
    torch.manual_seed(5)
    apart = setting.separately()
    torch.manual_seed(5)
    batch = setting.program.batched(setting.tasks, "sum")
    assert batch.losses[0] != batch.losses[1]
    expected = apart[0].loss + apart[1].loss
    assert_all_close(setting.gradients(batch.loss), setting.gradients(expected))


def test_memory_does_not_grow_with_the_number_of_tasks() -> None:
    setting = Setting()
    lowered = setting.program.lower(*setting.tasks[0])
    state = sum(p.numel() * p.element_size() for p in setting.model.parameters()) * 2
    one = measure(
        lambda: setting.program.batched(setting.tasks[:1], vectorize=False).loss.detach()
    ).peak
    many = measure(
        lambda: setting.program.batched(setting.tasks * 4, vectorize=False).loss.detach()
    ).peak
    assert many - one <= (4 * TASKS + 2) * (state + 1024)
    assert one >= lowered.plan.peak_bytes / 2


def test_under_no_grad_tasks_only_adapt() -> None:
    setting = Setting()
    with torch.no_grad():
        batch = setting.program.batched(setting.tasks, vectorize=False)
    assert not batch.loss.requires_grad
    assert torch.equal(batch.losses, torch.stack([r.loss for r in setting.separately()]).detach())


def test_equal_shapes_are_lowered_once() -> None:
    setting = Setting()
    setting.program.batched(setting.tasks, vectorize=False)
    assert len(setting.program._cache) == 1


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([], "tasks is empty"),
        (3, "tasks is int"),
        ([(1, 2, 3)], r"tasks\[0\] is tuple of 3"),
        ([7], r"tasks\[0\] is 7"),
    ],
)
def test_other_forms_are_refused(tasks: Any, said: str) -> None:
    with pytest.raises(unrollc.InputError, match=said):
        Setting().program.batched(tasks)


def test_other_reductions_are_refused() -> None:
    setting = Setting()
    with pytest.raises(unrollc.InputError, match="reduction='max'"):
        setting.program.batched(setting.tasks, "max")
