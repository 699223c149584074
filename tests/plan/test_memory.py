"""The plan's peak against the meter, and plans from graphs that lie about their storages."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, memory
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack
from unrollc.plan.memory import MemoryPlan, plan_memory
from unrollc.step import Role, copy

pytestmark = pytest.mark.usefixtures("float64")

T = 6
# Scalars that are not the plan's: the cotangent 1 of autograd, the learning rate's gradient.
SCALARS = 64


def momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


class Setting:
    """A program on data, with what it takes to run it."""

    def __init__(
        self,
        optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer] = momentum,
        *,
        listed: bool = False,
        learned_data: bool = False,
        **options: Any,
    ) -> None:
        self.model = MLP(hidden=64)
        self.opt = optimizer(self.model)
        rate = torch.tensor(0.1, requires_grad=True)
        self.opt.param_groups[0]["lr"] = rate
        inputs, target = cases.batches((16, 4), T, seed=1)
        self.val = (inputs[0].clone(), target[0])
        self.train: Any = unstack((inputs, target)) if listed else (inputs, target)
        self.leaves = [x for x, _ in self.train] if listed else [inputs]
        if learned_data:
            self.leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
            targets = [y for _, y in self.train] if listed else [target]
            self.train = list(zip(self.leaves, targets, strict=True))
            self.train = self.train if listed else self.train[0]
        self.leaves.append(rate)
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy, **options)

    @property
    def lowered(self) -> Any:
        return self.program.lower(self.train, self.val)

    def measured(self) -> int:
        """Bytes at the worst moment of a run; the leaves' gradients are made in it."""

        def run() -> None:
            result = self.program(self.train, self.val)
            if torch.is_grad_enabled():
                result.loss.backward()

        run()
        for tensor in [*self.model.parameters(), *self.leaves]:
            tensor.grad = None
        return memory.measure(run).peak


def agrees(plan: MemoryPlan, measured: int) -> bool:
    return abs(plan.peak_bytes - measured) <= SCALARS


SETTINGS: dict[str, Callable[[], Setting]] = {
    "sgd": lambda: Setting(plain),
    "sgd with momentum": Setting,
    "truncated": lambda: Setting(gradient=unrollc.Truncated(2)),
    "first order": lambda: Setting(gradient=unrollc.FirstOrder()),
    "a list of batches": lambda: Setting(listed=True),
    "a list of batches that require grad": lambda: Setting(listed=True, learned_data=True),
    "stacked batches that require grad": lambda: Setting(learned_data=True),
    "truncated, batches that require grad": lambda: Setting(
        listed=True, learned_data=True, gradient=unrollc.Truncated(2)
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_peak_is_the_measured_one(name: str) -> None:
    setting = SETTINGS[name]()
    plan = setting.lowered.plan
    measured = setting.measured()
    assert agrees(plan, measured), f"predicted {plan.peak_bytes}, measured {measured}"


@pytest.mark.parametrize("name", ["sgd with momentum", "a list of batches"])
def test_without_grad_less_is_held(name: str) -> None:
    setting = SETTINGS[name]()
    full = setting.lowered.plan
    with torch.no_grad():
        plan, measured = setting.lowered.plan, setting.measured()
    assert plan.peak_bytes < full.peak_bytes
    assert plan.schedule.name == "forward only"
    assert agrees(plan, measured), f"predicted {plan.peak_bytes}, measured {measured}"


def test_truncation_keeps_less() -> None:
    full, short = Setting(), Setting(gradient=unrollc.Truncated(2))
    assert short.lowered.plan.peak_bytes < full.lowered.plan.peak_bytes


@pytest.mark.parametrize("name", SETTINGS)
def test_the_timeline_reaches_the_peak(name: str) -> None:
    plan = SETTINGS[name]().lowered.plan
    assert max(moment.bytes for moment in plan.timeline) == plan.peak_bytes == plan.peak.bytes
    for moment in plan.timeline:
        assert moment.bytes >= moment.local >= 0
        assert moment.bytes >= moment.kept >= 0
    actions = [moment.action for moment in plan.timeline]
    steps = [f"step {j}" for j in range(T)]
    assert [action for action in actions if action in steps] == steps
    back = [f"adjoint of step {j}" for j in reversed(range(plan.schedule.stop, T))]
    assert [action for action in actions if action in back] == back


def test_kept_states_grow_by_a_state_a_step() -> None:
    """State 0 is the user's; each later one is θ and momentum. State j is kept before step j."""
    setting = Setting()
    plan = plan_memory(setting.lowered.plan._given)  # without residuals
    theta = sum(p.numel() * 8 for p in setting.model.parameters())
    kept = [moment.kept for moment in plan.timeline if moment.action.startswith("step ")]
    assert kept == [2 * theta * j for j in range(T)]


def test_the_table_tells_the_peak() -> None:
    plan = Setting().lowered.plan
    text = str(plan)
    assert plan.peak.action in text
    assert "keep every state and residuals: 6 steps, 0 recomputed" in text
    assert max(len(line) for line in text.splitlines()) <= 100


# --- broken twins -----------------------------------------------------------------------------


def tampered(setting: Setting, factor: int) -> MemoryPlan:
    """The plan from graphs in which the storages of new weights are `factor` times as large."""
    pieces = setting.lowered.pieces
    steps = []
    for step in map(copy, pieces.steps):
        for value, node in step.outputs_with(Role.THETA):
            assert node is not None
            if value.label.startswith("hidden.weight"):  # the first of the packed ones
                node.meta["val"] = enlarged(node.meta["val"], factor)
        steps.append(step)
    return plan_memory(replace(pieces, steps=tuple(steps)))


def enlarged(fake: Tensor, factor: int) -> Tensor:
    with fake.fake_mode:  # type: ignore[attr-defined]
        return torch.empty((factor, *fake.shape), dtype=fake.dtype)


def test_a_storage_of_another_size_is_caught() -> None:
    setting = Setting()
    measured = setting.measured()
    assert agrees(tampered(setting, 1), measured)
    assert not agrees(tampered(setting, 2), measured)


def test_a_plan_of_another_length_is_caught() -> None:
    setting = Setting()
    measured = setting.measured()
    shorter = unrollc.compile(setting.model, setting.opt, F.cross_entropy).lower(
        tuple(part[:-1] for part in setting.train), setting.val
    )
    assert not agrees(shorter.plan, measured)
