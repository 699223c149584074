"""Where the networks of a learned optimizer are found, what they are called, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrollc
from tests.gradients import learned
from tests.gradients.learned import Setting

pytestmark = pytest.mark.usefixtures("float64")

GLOBAL = learned.Mlp()


class Scattered(torch.optim.Optimizer):
    """Networks in a list, in a closure and in a global variable; one of them is frozen."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.rules = {"first": learned.Mlp(), "count": 3}

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                features = torch.stack([p.grad, p, p.grad * p], -1).flatten(0, -2)
                update = self.rules["first"](features) + self.total(features)
                p.add_(update.view_as(p))

    def total(self, features: Tensor) -> Tensor:
        return GLOBAL(features)


def test_networks_in_containers_and_variables() -> None:
    enclosed = learned.Mlp()

    class Enclosing(Scattered):
        def total(self, features: Tensor) -> Tensor:
            return enclosed(features) + super().total(features)

    model = nn.Linear(4, 3)
    model.opt = nn.Linear(1, 1).requires_grad_(False)  # its labels begin with the same word
    enclosed.requires_grad_(False)
    setting = Setting(lambda params: Enclosing([model.weight, model.bias]))
    setting.model = model
    requirements = setting.program().lower(setting.train, setting.val).requirements
    labels = {verdict.label for verdict in requirements}
    names = [name for name, _ in learned.Mlp().named_parameters()]
    nets = ("opt_.rules.first", "opt_.GLOBAL")
    assert labels == {"weight", "bias", *(f"{net}.{name}" for net in nets for name in names)}
    enclosed.requires_grad_()
    requirements = setting.program().lower(setting.train, setting.val).requirements
    assert requirements[enclosed.out.bias].label == "opt_.enclosed.out.bias"


class Remembering(learned.Mlp):
    memory: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        self.memory = super().forward(features)
        return self.memory


def test_a_memory_in_an_attribute_of_the_network_is_refused() -> None:
    setting = Setting(lambda params: learned.PerParameter(params, Remembering()))
    with pytest.raises(unrollc.CaptureError, match=r"opt\.net keeps a tensor .* 'memory'"):
        setting.program().lower(setting.train, setting.val)


def test_a_network_that_nothing_runs_is_reported() -> None:
    setting = Setting(lambda params: learned.PerParameter(params, learned.Mlp()))
    setting.opt.other = nn.Linear(2, 2)
    with pytest.raises(unrollc.RequirementError, match=r"opt\.other\.weight: it is zero"):
        setting.program().lower(setting.train, setting.val)
