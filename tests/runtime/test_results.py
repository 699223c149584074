"""Results belong to the user: what is done to them before the backward pass changes no gradient."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack
from unrollc.plan.memory import plan_memory

pytestmark = pytest.mark.usefixtures("float64")

T = 5


class First(torch.optim.SGD):
    """Keeps the first gradient for good."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if "first" not in state:
                    state["first"] = param.grad.clone()
                param.sub_(group["lr"] * param.grad * state["first"].square())


def rms(params: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params, lr=0.01, centered=True, momentum=0.9)


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


OPTIMIZERS = {"adam": torch.optim.Adam, "rms": rms, "sgd": momentum}


class Setting:
    def __init__(self, optimizer: Any, budget: str = "none", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = MLP()
        self.opt = optimizer(self.model.parameters())
        self.train = cases.batches((5, 4), T, seed=1)
        self.val = unstack(self.train)[0]
        program = unrollc.compile(self.model, self.opt, F.cross_entropy, **options)
        plan = program.lower(self.train, self.val).plan
        every = plan_memory(plan._given).peak_bytes
        memory = {"none": None, "states": every, "few": int(every * 0.95)}[budget]
        options["memory"] = memory
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy, **options)

    def run(self) -> Any:
        return self.program(self.train, self.val)

    def gradients(self, result: Any) -> list[torch.Tensor]:
        return list(torch.autograd.grad(result.loss, list(self.model.parameters())))


def spoiled(result: Any) -> None:
    with torch.no_grad():
        for state in result.opt_state.values():
            for value in state.values():
                value.mul_(3).add_(1)
        for group in (result.params, result.buffers, result.average or {}):
            for value in group.values():
                value.zero_()
        result.inner_losses.zero_()


@pytest.mark.parametrize("budget", ["none", "states", "few"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_result_that_is_changed_changes_no_gradient(name: str, budget: str) -> None:
    average = torch.optim.swa_utils.AveragedModel
    for averaged in (False, True) if name == "sgd" else (False,):
        setting = Setting(OPTIMIZERS[name], budget)
        if averaged:
            setting = Setting(OPTIMIZERS[name], budget, average=average(setting.model))
        expected = setting.gradients(setting.run())
        spoil = setting.run()
        spoiled(spoil)
        for found, wanted in zip(setting.gradients(spoil), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("budget", ["none", "states", "few"])
def test_what_the_backward_pass_reads_is_watched(budget: str) -> None:
    """State that no step changes is one tensor in every state, the last one included."""
    setting = Setting(lambda params: First(params, lr=0.1), budget)
    result = setting.run()
    setting.gradients(result)
    result = setting.run()
    spoiled(result)
    with pytest.raises(unrollc.InputError, match="was changed in place before the backward pass"):
        setting.gradients(result)


def test_a_backward_pass_that_was_cut_off_says_so(tmp_path: Any) -> None:
    model = nn.Linear(4, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train = cases.batches((5, 4), 9, seed=1)

    def progress(done: int, total: int) -> None:
        if done > 9:
            raise KeyboardInterrupt

    program = unrollc.compile(model, opt, F.cross_entropy, spill=tmp_path, progress=progress)
    result = program(train, unstack(train)[0])
    with pytest.raises(KeyboardInterrupt):
        result.loss.backward(retain_graph=True)
    with pytest.raises(unrollc.UnrollcError, match="are gone"):
        result.loss.backward()
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_is_none(tmp_path: Any) -> None:
    model = nn.Linear(4, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(unrollc.InputError, match="spill is empty"):
        unrollc.compile(model, opt, F.cross_entropy, spill="")


class Remembering(nn.Module):
    """Keeps the last batch in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("last", torch.zeros(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last.copy_(x)
        return self.linear(x)


def test_a_batch_that_ends_in_a_buffer_stays_the_users() -> None:
    torch.manual_seed(0)
    model = Remembering()
    inputs, target = torch.randn(T, 3, 4), torch.randn(T, 3, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, F.mse_loss)
    before = inputs.clone()
    result = program((inputs, target), (inputs[0], target[0]))
    assert torch.equal(result.buffers["last"], inputs[-1])
    result.buffers["last"].zero_()
    assert torch.equal(inputs, before)
