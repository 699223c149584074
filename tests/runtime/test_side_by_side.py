"""Tasks side by side: what they compute one by one, and when they do not run side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import unrollc
from tests.oracles.memory import measure
from unrollc.optimize import batching_rules, vectorize

pytestmark = pytest.mark.usefixtures("float64")

TASKS = 3


def leaf(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def convolutional(*, statistics: bool) -> nn.Module:
    norm = nn.BatchNorm2d(2, track_running_stats=statistics)
    last = nn.Linear(8, 3)
    return nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), last)


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def tasks_of(
    form: str, steps: int, *, count: int = TASKS, shape: tuple[int, ...] = (4,), data: bool = False
) -> tuple[list[Any], list[Tensor]]:
    """Tasks in one of the three forms, and what of their data is learned."""
    tasks: list[Any] = []
    learned = []
    for seed in range(count):
        made = torch.Generator().manual_seed(seed)

        def batch(*lead: int, made: Any = made) -> tuple[Tensor, Tensor]:
            inputs = torch.randn(*lead, 5, *shape, generator=made).requires_grad_(data)
            learned.extend([inputs] * data)
            return inputs, torch.randint(3, (*lead, 5), generator=made)

        val = (torch.randn(6, *shape, generator=made), torch.randint(3, (6,), generator=made))
        if form == "list":
            tasks.append(([batch() for _ in range(steps)], val))
        elif form == "stacked":
            tasks.append((batch(steps), val))
        else:
            tasks.append((unrollc.repeat(batch(), steps), val))
    return tasks, learned


@dataclass(frozen=True)
class Case:
    """A program and its tasks.

    Attributes:
        model: Makes the model.
        opt: Makes the optimizer out of parameters and a learned rate.
        form, steps, shape, data: See `tasks_of`.
        reduction: See `Program.batched`.
        options: Of ``compile``.
    """

    model: Callable[[], nn.Module]
    opt: Callable[[Any, Tensor], torch.optim.Optimizer]
    form: str
    steps: int
    shape: tuple[int, ...] = (4,)
    data: bool = False
    reduction: str = "mean"
    options: Any = None


def sgd(parameters: Any, rate: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate)


def plain_sgd(parameters: Any, rate: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters: Any, rate: Tensor) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=rate)


CASES = {
    "SGD, a batch a step": Case(mlp, sgd, "list", 5, data=True),
    "SGD, stacked batches": Case(mlp, sgd, "stacked", 2, data=True),
    "SGD, one step": Case(mlp, sgd, "repeat", 1, data=True, reduction="sum"),
    "gradients apart": Case(mlp, plain_sgd, "stacked", 2, data=True, reduction="none"),
    "Adam": Case(mlp, adam, "repeat", 5),
    "first order": Case(mlp, sgd, "repeat", 5, options={"gradient": unrollc.FirstOrder()}),
    "under a budget": Case(mlp, sgd, "repeat", 5, options={"memory": "24KiB"}),
    "batch norm": Case(lambda: convolutional(statistics=True), sgd, "repeat", 2, (1, 6, 6)),
    "batch statistics": Case(lambda: convolutional(statistics=False), sgd, "list", 2, (1, 6, 6)),
    "layer norm": Case(normalized, sgd, "repeat", 2),
}


class Both:
    """The results of a case, and its gradients, one by one and side by side."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        model, rate = case.model(), leaf(0.1)
        opt = case.opt(model.parameters(), rate)
        self.tasks, data = tasks_of(case.form, case.steps, shape=case.shape, data=case.data)
        self.program = unrollc.compile(model, opt, F.cross_entropy, **(case.options or {}))
        leaves = [*model.parameters(), *([] if case.opt is plain_sgd else [rate]), *data]
        self.batches = []
        self.gradients = []
        for together in (False, True):
            batch = self.program.batched(self.tasks, case.reduction, vectorize=together)
            weights = torch.linspace(1.0, 2.0, batch.loss.numel()).view_as(batch.loss)
            total = (weights * batch.loss).sum()
            self.batches.append(batch)
            self.gradients.append(torch.autograd.grad(total, leaves, allow_unused=True))


def numbers_of(result: unrollc.Result) -> list[Tensor]:
    held = (result.params, result.buffers, dict(result.opt_state), result.inner_losses, result.loss)
    leaves = pytree.tree_leaves(pytree.tree_map(lambda x: x, tuple(map(_plain, held))))
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor)]


def _plain(held: Any) -> Any:
    return dict(held) if not isinstance(held, Tensor) else held


def largest_error(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The largest difference, relative to the largest number."""
    pairs = [(a, b) for a, b in zip(actual, expected, strict=True) if b is not None]
    assert all(a is not None for a, _ in pairs)
    errors = [float((a - b).abs().max()) for a, b in pairs if a is not None]
    return max(errors) / max(float(b.abs().max()) for _, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_side_by_side_is_one_by_one(name: str) -> None:
    both = Both(CASES[name])
    apart, together = both.batches
    assert apart.plan.groups[0].at_once == 1
    assert together.plan.groups[0].at_once > 1
    assert largest_error(both.gradients[1], both.gradients[0]) < 1e-11
    for one, other in zip(together.tasks, apart.tasks, strict=True):
        assert len(numbers_of(other)) > 2
        for a, b in zip(numbers_of(one), numbers_of(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(given: Any, target: Any, kwargs: Any) -> Any:
        bias = given.spread(0).unsqueeze(1)
        return torch.ops.aten.baddbmm.default(bias, given.args[1].flip(0), given.args[2])

    monkeypatch.setitem(batching_rules.RULES, torch.ops.aten.addmm.default, wrong)
    both = Both(CASES["SGD, stacked batches"])
    assert largest_error(both.gradients[1], both.gradients[0]) > 1e-3


def test_a_rule_that_loses_a_second_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = torch.ops.aten.native_layer_norm_backward.default
    monkeypatch.delitem(batching_rules.RULES, backward)
    with pytest.raises(unrollc.InputError, match="would read what has no derivative"):
        Both(CASES["layer norm"])
    monkeypatch.setattr(vectorize, "_readers_of_saved", lambda step: set())
    both = Both(CASES["layer norm"])
    assert largest_error(both.gradients[1], both.gradients[0]) > 1e-5


class Setting:
    """A program of small or of large tasks."""

    def __init__(self, width: int = 8, **options: Any) -> None:
        torch.manual_seed(0)
        model = mlp(width)
        opt = torch.optim.SGD(model.parameters(), lr=leaf(0.1))
        self.program = unrollc.compile(model, opt, F.cross_entropy, **options)

    def plan(self, tasks: Any, *rest: Any, **options: Any) -> str:
        text = str(self.program.lower_batched(tasks, *rest, **options))
        return " ".join(text.replace("│", " ").split())


def test_the_plan_says_what_is_chosen_and_why() -> None:
    small = Setting()
    tasks, _ = tasks_of("repeat", 2)
    others, _ = tasks_of("repeat", 1, count=1)
    plan = small.program.lower_batched([others[0], *tasks])
    assert [(group.tasks, group.at_once) for group in plan.groups] == [((0,), 1), ((1, 2, 3), 3)]
    assert "no other task has its shapes" in str(plan)
    assert "3 side by side: predicted to take 0." in str(plan)
    batch = small.program.batched([others[0], *tasks])
    assert batch.plan == plan
    expected = [small.program(train, val).loss for train, val in [others[0], *tasks]]
    torch.testing.assert_close(batch.losses, torch.stack(expected).detach())
    assert "gradient is kept by itself" in small.plan(tasks, "none")
    assert "asked for" in small.plan(tasks, vectorize=False)
    assert "one by one: side by side is predicted to take 0.99" in Setting(4096).plan(tasks)
    assert "goes into launching ops" in Setting(65536).plan(tasks)


def test_tasks_that_draw_noise_run_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    tasks, _ = tasks_of("repeat", 1, count=2)
    assert "random numbers are drawn" in str(program.lower_batched(tasks))
    with pytest.raises(unrollc.InputError, match="cannot run side by side"):
        program.batched(tasks, vectorize=True)


def test_a_budget_holds_for_tasks_side_by_side() -> None:
    tasks, _ = tasks_of("repeat", 5, count=5)
    budget = 20 * 2**10
    setting = Setting(memory=budget)
    plan = setting.program.lower_batched(tasks, vectorize=True)
    (group,) = plan.groups
    assert group.at_once == 2  # 2, 2, and the last one alone
    assert [len(places) for places, _ in plan.runs] == [2, 2, 1]
    assert group.peak_bytes <= budget
    free = Setting().program.lower_batched(tasks, vectorize=True).groups[0]
    assert free.peak_bytes > budget

    def run() -> Tensor:
        return setting.program.batched(tasks, vectorize=True).loss.detach()

    run()
    gradients_and_results = 5 * 2 * 8 * (4 * 8 + 8 + 8 * 3 + 3) + 4096
    assert measure(run).peak <= budget + gradients_and_results


def test_more_tasks_than_memory_holds_run_one_by_one() -> None:
    tasks, _ = tasks_of("repeat", 5, count=2)
    assert "one by one: two at once do not fit into the budget" in Setting(memory=5000).plan(tasks)
