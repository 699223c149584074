"""A hyperparameter that changes sides of a test, and other changes after lowering.

Each change is made after the program was lowered, and undone: what the program then computes must
be what training by hand computes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import gradients
from tests.oracles import cases, eager
from tests.oracles.compare import assert_close
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5, bias=False)  # batch normalisation would undo a bias
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


class Setting:
    def __init__(self, kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        self.model = Net()
        parts = [self.model.body, self.model.norm]
        self.opt = kind([p for part in parts for p in part.parameters()], lr=0.05)
        self.train = cases.batches((6, 4), T, seed=1)
        self.val = unstack(cases.batches((6, 4), 1, seed=2))[0]
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy)

    def data(self) -> tuple[Any, Any]:
        dtype = self.model.body.weight.dtype
        x, y = self.train
        return (x.to(dtype), y), (self.val[0].to(dtype), self.val[1])

    def check(self) -> None:
        """The program's result is that of training by hand on one autograd graph."""
        train, val = self.data()
        expected = eager.unroll(self.model, self.opt, F.cross_entropy, unstack(train), val)
        result = self.program(train, val)
        meta = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        hyper = self.opt.param_groups[0].items()
        meta |= {k: v for k, v in hyper if isinstance(v, Tensor) and v.requires_grad}
        exact = self.model.body.weight.dtype is torch.float64
        rtol = 1e-10 if exact else 1e-4  # float32: rounding, over three steps and their derivative
        assert_close(result.params, expected.params, rtol=rtol)
        assert_close(result.buffers, expected.buffers, rtol=rtol)
        assert_close(gradients(result.loss, meta), gradients(expected.loss, meta), rtol=rtol)


def _set(key: str, value: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        setting.opt.param_groups[0][key] = value

    return change


def _loaded_state(setting: Setting) -> None:
    """The state dict that a user loads is where the inner loop starts."""
    other = Setting(type(setting.opt))
    other.opt.param_groups[0].update(
        {k: v for k, v in setting.opt.param_groups[0].items() if k != "params"}
    )
    other.program(*other.data()).apply()
    setting.opt.load_state_dict(other.opt.state_dict())
    assert setting.opt.state


def _into_the_next_group(setting: Setting) -> None:
    """All parameters keep their order."""
    first, second = (group["params"] for group in setting.opt.param_groups)
    second.insert(0, first.pop())


CHANGES: dict[str, list[Callable[[Setting], None]]] = {
    "momentum from 0 to 0.9": [_set("momentum", 0.9), _set("momentum", 0)],
    "a tensor momentum from 0 to 0.9": [
        _set("momentum", torch.tensor(0.0)),
        _set("momentum", torch.tensor(0.9)),
        _set("momentum", torch.tensor(0.0)),
    ],
    "dtype": [lambda s: s.model.float(), lambda s: s.model.double()],
    "evaluation mode": [lambda s: s.model.eval(), lambda s: s.model.train()],
    "evaluation mode of one module": [lambda s: s.model.norm.eval(), lambda s: s.model.train()],
    "requires_grad of a fast weight": [
        lambda s: s.model.norm.bias.requires_grad_(False),
        lambda s: s.model.norm.bias.requires_grad_(True),
    ],
    "requires_grad of another parameter": [
        lambda s: s.model.head.weight.requires_grad_(False),
        lambda s: s.model.head.weight.requires_grad_(True),
    ],
    "another param group": [
        lambda s: s.opt.add_param_group({"params": list(s.model.head.parameters()), "lr": 0.3}),
        lambda s: s.opt.param_groups.pop(),
    ],
    "a parameter in another group": [
        lambda s: s.opt.add_param_group({"params": list(s.model.head.parameters()), "lr": 0.3}),
        _into_the_next_group,
    ],
    "loaded state": [_set("momentum", 0.9), _loaded_state, lambda s: s.opt.state.clear()],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_lowering_is_never_stale(name: str) -> None:
    setting = Setting()
    setting.check()
    for change in CHANGES[name]:
        change(setting)
        setting.check()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_requested_momentum_that_leaves_zero(kind: type[torch.optim.Optimizer]) -> None:
    """The branch is captured at zero for its gradient; it must not serve where it is not taken."""
    setting = Setting(kind)
    momentum = torch.tensor(0.0, requires_grad=True)
    setting.opt.param_groups[0]["momentum"] = momentum
    for value in (0.0, 0.9, -0.1, 0.0):
        with torch.no_grad():
            momentum.fill_(value)
        if kind is torch.optim.RMSprop and value < 0:  # `if momentum > 0` is not taken
            with pytest.raises(unrollc.RequirementError, match="momentum"):
                setting.program(*setting.data())
            with torch.no_grad():
                assert not torch.equal(
                    setting.program(*setting.data()).params["body.weight"],
                    setting.model.body.weight,
                )
        else:
            setting.check()


@pytest.mark.parametrize("values", [(0.1, 0.0, 0.2), (0.0, 0.1, 0.0), (0.0, 0.0, 0.0)])
def test_values_a_step_that_are_zero_at_some(values: tuple[float, ...]) -> None:
    """Where a step's value is zero, that step's branch is looked at, at its own value."""
    setting = Setting()
    decays = torch.tensor(values, requires_grad=True)
    setting.opt.param_groups[0]["weight_decay"] = unrollc.PerStep(decays)
    result = setting.program(*setting.data())
    train, val = setting.data()
    per_step = {(0, "weight_decay"): decays}
    setting.opt.param_groups[0]["weight_decay"] = decays[0]
    expected = eager.unroll(
        setting.model, setting.opt, F.cross_entropy, unstack(train), val, per_step=per_step
    )
    meta = {"decays": decays}
    assert_close(gradients(result.loss, meta), gradients(expected.loss, meta))


def test_the_report_says_which_branch_was_taken() -> None:
    setting = Setting()
    momentum = torch.tensor(0.9, requires_grad=True)
    setting.opt.param_groups[0]["momentum"] = momentum
    text = str(setting.program.lower(*setting.data()).requirements)
    assert "branch: param_groups[0][\"momentum\"]: 'if momentum != 0:' (sgd.py" in text
    assert text.count("'if momentum != 0:'") == 1 and text.rstrip().endswith("is true")
    with torch.no_grad():
        momentum.zero_()
    text = str(setting.program.lower(*setting.data()).requirements)
    assert "is taken as true" in text and "is true" not in text
    setting.opt.param_groups[0]["weight_decay"] = torch.tensor(0.0)
    assert "'if weight_decay != 0:'" in str(setting.program.lower(*setting.data()).requirements)
    assert "is false" in str(setting.program.lower(*setting.data()).requirements)
