"""Losses of every kind: modules, functions, objectives, one for training and one for validation."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import assert_equals_eager
from tests.oracles import cases, eager
from tests.oracles.models import MLP, WeightedLoss
from tests.oracles.objectives import Objective, unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 3


class Setting:
    def __init__(self) -> None:
        self.model = MLP()
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.8)
        self.train = cases.batches((5, 4), T, seed=1)
        inputs, target = cases.batches((5, 4), 1, seed=2)
        self.val = (inputs[0], target[0])
        self.theta = dict(self.model.named_parameters())


@pytest.fixture
def setting() -> Setting:
    return Setting()


def penalized(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Looks into the model, past its output."""
    inputs, target = batch
    hidden = torch.tanh(model.hidden(inputs))
    penalty = hidden.square().mean() + 0.1 * model.output.weight.square().sum()
    return F.cross_entropy(model.output(hidden), target) + penalty


def test_the_validation_loss_is_the_training_loss_by_default(setting: Setting) -> None:
    """The loss's own weight then matters twice: through the steps and directly."""
    loss = WeightedLoss()
    expected = eager.unroll(setting.model, setting.opt, loss, unstack(setting.train), setting.val)
    result = unrollc.compile(setting.model, setting.opt, loss)(setting.train, setting.val)
    assert_equals_eager(result, expected, setting.theta | dict(loss.named_parameters()))


def test_a_validation_loss_of_its_own(setting: Setting) -> None:
    train_loss, val_loss = WeightedLoss(), WeightedLoss()
    with torch.no_grad():
        val_loss.weight.mul_(-2)
    expected = eager.unroll(
        setting.model,
        setting.opt,
        train_loss,
        unstack(setting.train),
        setting.val,
        val_loss=val_loss,
    )
    program = unrollc.compile(setting.model, setting.opt, train_loss, val_loss=val_loss)
    meta = {f"train.{name}": param for name, param in train_loss.named_parameters()}
    meta |= {f"val.{name}": param for name, param in val_loss.named_parameters()}
    assert_equals_eager(program(setting.train, setting.val), expected, setting.theta | meta)


def test_an_objective_for_both(setting: Setting) -> None:
    expected = eager.unroll(
        setting.model, setting.opt, Objective(penalized), unstack(setting.train), setting.val
    )
    program = unrollc.compile(setting.model, setting.opt, unrollc.objective(penalized))
    assert_equals_eager(program(setting.train, setting.val), expected, setting.theta)


def test_an_objective_for_one_of_the_two(setting: Setting) -> None:
    batches = unstack(setting.train)
    for own, ours in (
        (
            {"loss": Objective(penalized), "val_loss": F.cross_entropy},
            {"loss": unrollc.objective(penalized), "val_loss": F.cross_entropy},
        ),
        (
            {"loss": F.cross_entropy, "val_loss": Objective(penalized)},
            {"loss": F.cross_entropy, "val_loss": unrollc.objective(penalized)},
        ),
    ):
        setting = Setting()
        expected = eager.unroll(setting.model, setting.opt, train=batches, val=setting.val, **own)
        program = unrollc.compile(setting.model, setting.opt, **ours)
        assert_equals_eager(program(setting.train, setting.val), expected, setting.theta)


def test_an_objective_that_sees_targets_alone(setting: Setting) -> None:
    """A regularizer on validation: nothing of the batch is used."""

    def size(model: nn.Module, batch: object) -> Tensor:
        return sum(param.square().sum() for param in model.parameters())

    expected = eager.unroll(
        setting.model,
        setting.opt,
        F.cross_entropy,
        unstack(setting.train),
        setting.val,
        val_loss=Objective(size),
    )
    program = unrollc.compile(
        setting.model, setting.opt, F.cross_entropy, val_loss=unrollc.objective(size)
    )
    assert_equals_eager(program(setting.train, setting.val), expected, setting.theta)


def test_a_validation_batch_of_another_size(setting: Setting) -> None:
    inputs, target = cases.batches((9, 4), 1, seed=3)
    val = (inputs[0], target[0])
    expected = eager.unroll(
        setting.model, setting.opt, F.cross_entropy, unstack(setting.train), val
    )
    program = unrollc.compile(setting.model, setting.opt, F.cross_entropy)
    assert_equals_eager(program(setting.train, val), expected, setting.theta)
