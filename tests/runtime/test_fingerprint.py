"""What captured code depends on besides tensors: no change is answered by a stale program."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

FACTOR = 1.0


class Settings:
    factor = 1.0


class Record:
    shift = 0.0


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.config = {"factor": 1.0}
        self.widths = [1.0, 2.0]
        self.settings = Settings()
        self.options = SimpleNamespace(factor=1.0)
        self.record = Record()
        self.shift = torch.tensor(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.act(self.linear(x))
            * self.config["factor"]
            * self.widths[0]
            * self.settings.factor
            * self.options.factor
            + self.record.shift
            + self.shift
        )


class Scaled(torch.optim.SGD):
    scale = rate = 1.0

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = group["transform"](parameter.grad)
                parameter.sub_(gradient * (group["lr"] * self.scale * self.rate))


class CallableLoss:
    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.factor * F.cross_entropy(prediction, target)

    def method(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self(prediction, target)


def change_global(setting) -> None:
    global FACTOR
    FACTOR = 2.0


def change_class(setting) -> None:
    Scaled.rate *= 2.0


def of_global(prediction: Tensor, target: Tensor) -> Tensor:
    return FACTOR * F.cross_entropy(prediction, target)


class Setting:
    def __init__(self) -> None:
        self.model, self.loss, self.box = Configured(), CallableLoss(), {"factor": 1.0}
        self.opt = Scaled(self.model.parameters(), lr=0.3)
        powers = self.powers = [1.0]
        self.opt.param_groups[0]["transform"] = lambda gradient: gradient * powers[0]
        self.train = cases.batches((5, 4), 3, seed=1)
        self.val = unstack(self.train)[0]


def replace_hook(setting: Setting) -> None:
    weight = setting.model.linear.weight
    weight._backward_hooks.clear()
    weight.register_hook(lambda grad: grad * 0.1)


CHANGES = {
    "a function attribute": lambda s: setattr(s.model, "act", torch.sin),
    "an entry of a dictionary": lambda s: s.model.config.update(factor=2.0),
    "a factor of an object": lambda s: setattr(s.model.settings, "factor", 2.0),
    "an entry of a namespace": lambda s: setattr(s.model.options, "factor", 2.0),
    "an item of a list": lambda s: s.model.widths.__setitem__(0, 2.0),
    "forward on the instance": lambda s: setattr(s.model, "forward", lambda x: s.model.linear(x)),
    "a tensor attribute": lambda s: setattr(s.model, "shift", torch.ones(3).cumsum(0)),
    "an attribute of the optimizer": lambda s: setattr(s.opt, "scale", 3.0),
    "an attribute of an object": lambda s: setattr(s.model.record, "shift", torch.pi),
    "what a function in a param group reads": lambda s: s.powers.__setitem__(0, 2.0),
    "an attribute of the optimizer's class": change_class,
    "an attribute of the loss": lambda s: setattr(s.loss, "factor", 2.0),
    "a dictionary in a closure": lambda s: s.box.update(factor=2.0),
    "a global": change_global,
    "a hook": replace_hook,
}
LOSSES = ("callable", "method", "closure", "global")


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "FACTOR", 1.0)
    setting = Setting()
    setting.model.linear.weight.register_hook(lambda grad: grad * 1.0)
    box = setting.box

    def nested() -> Callable[[Tensor, Tensor], Tensor]:
        return lambda p, t: box["factor"] * F.cross_entropy(p, t)

    loss = {
        "callable": setting.loss,
        "method": setting.loss.method,
        "closure": nested(),
        "global": of_global,
    }[kind]
    program = unrollc.compile(setting.model, setting.opt, loss)
    with torch.no_grad():
        program(setting.train, setting.val)
        lowered = program.lower(setting.train, setting.val)
        assert program.lower(setting.train, setting.val) is lowered
        CHANGES[change](setting)
        again = program(setting.train, setting.val).loss
        fresh = unrollc.compile(setting.model, setting.opt, loss)(setting.train, setting.val).loss
    torch.testing.assert_close(again, fresh, rtol=1e-14, atol=0)


def test_nested_settings_that_stay_are_no_reason_to_lower_again() -> None:
    model = nn.Linear(4, 3)
    model.settings = [{"a": {"b": [{"c": ({"d": 1.0},)}]}}]
    train = cases.batches((5, 4), 2, seed=1)
    program = unrollc.compile(model, torch.optim.SGD(model.parameters(), lr=0.3), F.cross_entropy)
    lowered = program.lower(train, unstack(train)[0])
    assert program.lower(train, unstack(train)[0]) is lowered


def test_autocast_is_part_of_the_key() -> None:
    model = nn.Linear(4, 3, dtype=torch.float32)
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    inputs, target = cases.batches((5, 4), 3, seed=1)
    train, val = (inputs.float(), target), (inputs[0].float(), target[0])
    program = unrollc.compile(model, opt, F.cross_entropy)
    outside = program(train, val)
    with torch.autocast("cpu", torch.bfloat16):
        inside = program(train, val)
        inside.loss.backward()
    assert outside.loss.dtype is torch.float32
    assert not torch.equal(inside.params["weight"], outside.params["weight"])
    assert torch.equal(program(train, val).params["weight"], outside.params["weight"])


def test_a_closure_tensor_that_begins_to_require_grad() -> None:
    setting = Setting()
    factor = torch.tensor(1.5)
    loss = lambda p, t: F.cross_entropy(p * factor, t)  # noqa: E731
    program = unrollc.compile(setting.model, setting.opt, loss)
    program(setting.train, setting.val)
    factor.requires_grad_()
    program(setting.train, setting.val).loss.backward()
    assert factor.grad is not None and factor.grad != 0


def test_the_mode_of_a_network_in_a_closure() -> None:
    """The loss sees it through a closure, where no label of the program names it."""
    setting = Setting()
    critic = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False).eval()
    loss = lambda p, t: F.cross_entropy(critic[0](p) if critic[1].training else p, t)  # noqa: E731
    program = unrollc.compile(setting.model, setting.opt, loss)
    before = program(setting.train, setting.val).loss
    critic.train()
    again = program(setting.train, setting.val).loss
    fresh = unrollc.compile(setting.model, setting.opt, loss)(setting.train, setting.val).loss
    torch.testing.assert_close(again, fresh, rtol=1e-14, atol=0)
    assert not torch.equal(before, again)


def test_a_child_called_loss() -> None:
    """Its labels do not meet those of the loss module."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.loss(x)

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(prediction * self.weight, target)

    model, loss = Model(), Weighted()
    setting = Setting()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    unrollc.compile(model, opt, loss)(setting.train, setting.val).loss.backward()
    assert model.loss.weight.grad.shape == (3, 4)
    assert loss.weight.grad.shape == (3,)


def test_a_replaced_step_is_refused() -> None:
    setting = Setting()
    setting.opt.step = lambda: None
    program = unrollc.compile(setting.model, setting.opt, F.cross_entropy)
    with pytest.raises(unrollc.CaptureError, match="step was replaced"):
        program(setting.train, setting.val)


def test_a_scheduled_optimizer_is_accepted() -> None:
    setting = Setting()
    torch.optim.lr_scheduler.StepLR(setting.opt, 10)
    unrollc.compile(setting.model, setting.opt, F.cross_entropy)(setting.train, setting.val)


def test_copies_lower_again() -> None:
    import copy

    setting = Setting()
    program = unrollc.compile(setting.model, setting.opt, F.cross_entropy)
    program(setting.train, setting.val)
    copy.deepcopy(program)(setting.train, setting.val)
