"""Lowering happens once for each kind of call, and never serves what has changed since."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import gradients
from tests.oracles import cases, eager
from tests.oracles.compare import assert_close, relative_error
from tests.oracles.models import MLP, ConvNet, DropoutMLP, WeightedLoss
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 3
SHAPES = {MLP: (5, 4), ConvNet: (6, 1, 4, 4)}


class Setting:
    """A program, and the eager run of what its model and optimizer are at the moment."""

    def __init__(self, model: nn.Module | None = None, **options: float) -> None:
        self.model = MLP() if model is None else model
        self.opt = torch.optim.SGD(self.model.parameters(), **{"lr": 0.1, **options})
        self.shape = SHAPES[type(self.model)]
        self.train = cases.batches(self.shape, T, seed=1)
        self.val = unstack(cases.batches(self.shape, 1, seed=2))[0]
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy)

    def check(self, **more: Tensor) -> None:
        meta = {name: p for name, p in self.model.named_parameters() if p.requires_grad} | more
        expected = eager.unroll(
            self.model, self.opt, F.cross_entropy, unstack(self.train), self.val
        )
        result = self.program(self.train, self.val)
        assert relative_error(result.loss, expected.loss) < 1e-12
        assert_close(result.params, expected.params, rtol=1e-12)
        assert_close(result.buffers, expected.buffers, rtol=1e-12)
        assert_close(gradients(result.loss, meta), gradients(expected.loss, meta))


@pytest.fixture
def setting() -> Setting:
    return Setting()


# --- lowered once ---------------------------------------------------------------------------------


def test_the_same_shapes_lower_once(setting: Setting) -> None:
    lowered = setting.program.lower(setting.train, setting.val)
    assert setting.program.lower(setting.train, setting.val) is lowered
    setting.program(setting.train, setting.val).loss.backward()
    assert setting.program.lower(setting.train, setting.val) is lowered
    other = cases.batches(setting.shape, T, seed=9)
    setting.program(other, unstack(other)[0])
    assert setting.program.lower(other, unstack(other)[0]) is lowered


def test_a_call_lowers_what_lower_returns(setting: Setting) -> None:
    setting.program(setting.train, setting.val)
    lowered = setting.program.lower(setting.train, setting.val)
    assert setting.program.lower(setting.train, setting.val) is lowered


def test_new_values_of_parameters_do_not_lower_again(setting: Setting) -> None:
    lowered = setting.program.lower(setting.train, setting.val)
    with torch.no_grad():
        for param in setting.model.parameters():
            param.add_(0.1)
    assert setting.program.lower(setting.train, setting.val) is lowered
    setting.check()


def test_new_values_of_a_tensor_rate_do_not_lower_again(setting: Setting) -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    setting.opt.param_groups[0]["lr"] = lr
    lowered = setting.program.lower(setting.train, setting.val)
    with torch.no_grad():
        lr.mul_(3)
    assert setting.program.lower(setting.train, setting.val) is lowered
    setting.check(lr=lr)
    replaced = torch.tensor(0.02, requires_grad=True)
    setting.opt.param_groups[0]["lr"] = replaced
    assert setting.program.lower(setting.train, setting.val) is lowered
    setting.check(lr=replaced)


def test_a_new_shape_lowers_again(setting: Setting) -> None:
    lowered = setting.program.lower(setting.train, setting.val)
    variants = {
        "batch size": (cases.batches((7, 4), T, seed=1), setting.val),
        "T": (cases.batches(setting.shape, T + 1, seed=1), setting.val),
        "validation size": (setting.train, unstack(cases.batches((2, 4), 1, seed=1))[0]),
    }
    found = {"first": lowered}
    for name, (train, val) in variants.items():
        found[name] = setting.program.lower(train, val)
        assert setting.program.lower(train, val) is found[name], name
    assert len({id(each) for each in found.values()}) == len(found)
    assert setting.program.lower(setting.train, setting.val) is lowered  # still there


def test_another_dtype_lowers_again() -> None:
    setting = Setting()
    lowered = setting.program.lower(setting.train, setting.val)
    setting.model.float()
    train = (setting.train[0].float(), setting.train[1])
    val = (setting.val[0].float(), setting.val[1])
    assert setting.program.lower(train, val) is not lowered
    assert setting.program(train, val).loss.dtype == torch.float32


def test_two_programs_do_not_share_what_differs() -> None:
    first, second = Setting(), Setting(momentum=0.9)
    second.model.load_state_dict(first.model.state_dict())
    first.check()
    second.check()
    first.check()


# --- never stale ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.3),
        ("weight_decay", 0.2),
        ("momentum", 0.5),
        ("nesterov", True),
        ("dampening", 0.4),
        ("maximize", True),
    ],
)
def test_a_changed_entry_of_a_param_group(key: str, value: float) -> None:
    setting = Setting(momentum=0.9)
    setting.check()
    setting.opt.param_groups[0][key] = value
    setting.check()


def test_a_rate_that_becomes_a_tensor(setting: Setting) -> None:
    setting.check()
    lr = torch.tensor(0.25, requires_grad=True)
    setting.opt.param_groups[0]["lr"] = lr
    setting.check(lr=lr)
    setting.opt.param_groups[0]["lr"] = torch.tensor(0.4)
    setting.check()
    setting.opt.param_groups[0]["lr"] = 0.15
    setting.check()


def test_a_decay_that_becomes_zero(setting: Setting) -> None:
    """The optimizer's ``if weight_decay != 0`` was true when it was captured."""
    decay = torch.tensor(0.1, requires_grad=True)
    setting.opt.param_groups[0]["weight_decay"] = decay
    setting.check(decay=decay)
    with torch.no_grad():
        decay.zero_()
    setting.check(decay=decay)
    with torch.no_grad():
        decay.fill_(-0.2)
    setting.check(decay=decay)


def test_training_and_evaluation_mode() -> None:
    setting = Setting(ConvNet())
    setting.check()
    setting.model.eval()
    setting.check()
    setting.model.train()
    setting.model.norm1.eval()
    setting.check()
    setting.model.train()
    setting.check()


def test_changed_requires_grad(setting: Setting) -> None:
    setting.check()
    setting.model.hidden.weight.requires_grad_(False)
    setting.check()
    setting.model.hidden.weight.requires_grad_(True)
    setting.check()


def test_data_that_begin_to_require_grad(setting: Setting) -> None:
    setting.check()
    inputs = setting.train[0].requires_grad_()
    setting.check(inputs=inputs)


def test_a_param_group_that_is_added(setting: Setting) -> None:
    setting.opt.param_groups[0]["params"].pop()  # output.bias
    setting.check()
    setting.opt.add_param_group({"params": [setting.model.output.bias], "lr": 0.5})
    setting.check()


def test_buffers_that_moved() -> None:
    setting = Setting(ConvNet())
    setting.check()
    setting.model(torch.randn(20, 1, 4, 4) * 3 + 1)
    setting.check()
    setting.model.eval()
    setting.check()
    setting.model.norm1.running_mean.add_(1)
    setting.check()


def test_optimizer_state_that_appears_and_goes() -> None:
    setting = Setting(momentum=0.9)
    setting.opt.param_groups[0]["dampening"] = 0.5
    setting.check()
    setting.program(setting.train, setting.val).apply()
    setting.check()
    setting.program(setting.train, setting.val).apply()  # the same structure, other values
    setting.check()
    setting.opt.state.clear()
    setting.check()


def test_adams_step_count_is_where_it_was() -> None:
    model = MLP()
    opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-2)
    train = cases.batches((5, 4), T, seed=1)
    val = unstack(train)[0]
    program = unrollc.compile(model, opt, F.cross_entropy)
    theta = dict(model.named_parameters())
    for _ in range(3):
        expected = eager.unroll(model, opt, F.cross_entropy, unstack(train), val)
        result = program(train, val)
        assert_close(result.params, expected.params, rtol=1e-12)
        assert_close(gradients(result.loss, theta), gradients(expected.loss, theta))
        result.apply()


def test_a_changed_dropout_probability() -> None:
    model = DropoutMLP(p=0.0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train = cases.batches((5, 4), T, seed=1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    losses = []
    for p in (0.0, 0.9, 0.0):
        model.drop.p = p
        torch.manual_seed(0)
        losses.append(program(train, unstack(train)[0]).loss.item())
    assert losses[0] == losses[2] != losses[1]


def test_a_parameter_that_is_replaced(setting: Setting) -> None:
    setting.check()
    old, new = setting.model.output.bias, nn.Parameter(torch.ones(3))
    setting.model.output.bias = new
    params = setting.opt.param_groups[0]["params"]
    params[[id(param) for param in params].index(id(old))] = new
    setting.check()
    assert old.grad is None


def test_changed_parameters_of_a_loss() -> None:
    model, loss = MLP(), WeightedLoss()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train = cases.batches((5, 4), T, seed=1)
    batches = unstack(train)
    program = unrollc.compile(model, opt, loss)
    for _ in range(2):
        expected = eager.unroll(model, opt, loss, batches, batches[0])
        meta = dict(loss.named_parameters())
        found = gradients(program(train, batches[0]).loss, meta)
        assert_close(found, gradients(expected.loss, meta))
        with torch.no_grad():
            loss.weight.mul_(-1.5)
