"""Optimizers that are networks: their weights are meta-parameters."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import unrollc
from tests.gradients import learned
from tests.gradients.learned import Build, Rule, Setting
from tests.oracles import finite, ordinary
from tests.oracles.compare import assert_close, relative_error
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")


def assert_equals(
    result: unrollc.Result,
    expected: learned.Unrolled,
    meta: dict[str, Tensor],
    of: dict[str, Tensor] | None = None,
) -> None:
    """`of` are the oracle's own copies of the meta-parameters, where it has some."""
    assert relative_error(result.loss, expected.loss) < 1e-12
    assert_close(result.params, expected.params, rtol=1e-12)
    assert relative_error(result.inner_losses, expected.inner_losses) < 1e-12
    wanted = torch.autograd.grad(expected.loss, list((of or meta).values()))
    result.loss.backward()
    assert_close(
        {name: tensor.grad for name, tensor in meta.items()}, dict(zip(meta, wanted, strict=True))
    )


def mlp() -> tuple[Build, Rule, dict[str, Tensor]]:
    net = learned.Mlp()
    labels = {f"opt.net.{name}": p for name, p in net.named_parameters()}
    return lambda params: learned.PerParameter(params, net), learned.per_parameter(net), labels


def lstm() -> tuple[Build, Rule, dict[str, Tensor]]:
    net = learned.TwoCells(3)
    labels = {f"opt.net.{name}": p for name, p in net.named_parameters()}
    return lambda params: learned.Coordinatewise(params, net), learned.coordinatewise(net), labels


def shared() -> tuple[Build, Rule, dict[str, Tensor]]:
    nets = nn.ModuleList([nn.LSTM(2, 3, num_layers=2), nn.Linear(3, 1)])
    labels = {f"opt.nets.{name}": p for name, p in nets.named_parameters()}
    return (
        lambda params: learned.Concatenated(params, *nets),
        learned.concatenated(*nets),
        labels,
    )


def rates() -> tuple[Build, Rule, dict[str, Tensor]]:
    net = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 1))
    labels = {f'param_groups[0]["net"].{name}': p for name, p in net.named_parameters()}
    return lambda params: learned.Rates(params, net), learned.rates(net), labels


VARIANTS = {"mlp": mlp, "lstm": lstm, "shared": shared, "rates": rates}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_initial_weights_equal_eager(variant: str) -> None:
    build, rule, labels = VARIANTS[variant]()
    setting = Setting(build)
    program = setting.program()
    lowered = program.lower(setting.train, setting.val)
    for label, tensor in labels.items():
        verdict = lowered.requirements[tensor]
        assert (verdict.label, verdict.status) == (label, "exists")
        assert verdict.IIIa.holds and verdict.IIIb.holds is None
    expected = setting.unroll(rule)
    result = program(setting.train, setting.val)
    assert_equals(result, expected, {**labels, **dict(setting.model.named_parameters())})
    if expected.state is not None:
        state = {"shared": expected.state} if variant == "shared" else expected.state
        found, wanted = pytree.tree_leaves(dict(result.opt_state)), pytree.tree_leaves(state)
        for left, right in zip(found, wanted, strict=True):
            assert relative_error(left, right) < 1e-12


@pytest.mark.parametrize("variant", ["lstm", "rates"])
def test_weights_equal_finite_differences_of_ordinary_training(variant: str) -> None:
    """The optimizer's own step, run on a copy; nothing of the oracle's rule takes part."""
    build, _, labels = VARIANTS[variant]()
    setting = Setting(build)
    batches = unstack(setting.train)

    def loss() -> Tensor:
        trained = ordinary.train(setting.model, setting.opt, F.cross_entropy, batches, setting.val)
        assert trained.loss is not None
        return trained.loss

    result = setting.program(meta=list(labels.values()))(setting.train, setting.val)
    assert relative_error(result.loss, loss()) < 1e-12
    for tensor, gradient in zip(
        labels.values(), torch.autograd.grad(result.loss, list(labels.values())), strict=True
    ):
        finite.assert_gradient(loss, tensor, gradient, directions=1, step=2e-3)


# --- approximations -------------------------------------------------------------------------------


def test_first_order_is_the_original_assumption() -> None:
    """Andrychowicz et al. 2016, section 2: the gradients of the optimizee are constants."""
    build, rule, labels = lstm()
    setting = Setting(build)
    expected = setting.unroll(rule, first_order=True)
    result = setting.program(gradient=unrollc.FirstOrder())(setting.train, setting.val)
    assert_equals(result, expected, labels)


def test_truncated_goes_back_through_the_last_steps() -> None:
    build, rule, labels = mlp()
    setting = Setting(build, steps=4)
    expected = setting.unroll(rule, back=2)
    program = setting.program(gradient=unrollc.Truncated(2), meta=list(labels.values()))
    assert_equals(program(setting.train, setting.val), expected, labels)


def test_both_modes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights enter the update alone, so forward-over-reverse covers them."""
    build, rule, labels = mlp()
    setting = Setting(build)
    expected = setting.unroll(rule)
    monkeypatch.setattr("unrollc.runtime.adjoints._CLEARLY_CHEAPER", float("inf"))
    program = setting.program()
    adjoints = program.lower(setting.train, setting.val).pieces.adjoints
    assert {adjoint.mode for adjoint in adjoints} == {"mixed"}
    assert_equals(program(setting.train, setting.val), expected, labels)


# --- segments -------------------------------------------------------------------------------------


def test_state_is_carried_from_segment_to_segment() -> None:
    build, rule, labels = lstm()
    setting = Setting(build, steps=4)
    expected = setting.unroll(rule, back=2)
    program = setting.program(meta=list(labels.values()))
    inputs, target = setting.train
    with torch.no_grad():
        program((inputs[:2], target[:2]), setting.val).apply()
    result = program((inputs[2:], target[2:]), setting.val)
    wanted = torch.autograd.grad(expected.loss, list(labels.values()))
    found = torch.autograd.grad(result.loss, list(labels.values()))
    assert_close(dict(zip(labels, found, strict=True)), dict(zip(labels, wanted, strict=True)))


# --- buffers, modes, noise ------------------------------------------------------------------------


def test_the_statistics_of_a_batch_norm_are_state() -> None:
    net = learned.Mlp(nn.BatchNorm1d(4))
    labels = {f"opt.net.{name}": p for name, p in net.named_parameters()}
    del labels["opt.net.hidden.bias"]  # the norm takes it out again
    net.hidden.bias.requires_grad_(False)
    setting = Setting(lambda params: learned.PerParameter(params, net))
    buffers = {f"opt.net.{name}": b for name, b in net.named_buffers()}
    before = {name: b.clone() for name, b in buffers.items()}
    twin = copy.deepcopy(net)
    of = {label: twin.get_parameter(label.removeprefix("opt.net.")) for label in labels}
    expected = setting.unroll(learned.per_parameter(twin))
    result = setting.program()(setting.train, setting.val)
    assert_equals(result, expected, labels, of)
    assert_close(buffers, before, rtol=0)
    moved = {f"opt.net.{name}": b for name, b in twin.named_buffers()}
    assert_close(result.other_buffers, moved, rtol=1e-12)
    assert not result.buffers
    result.apply()
    assert_close(buffers, dict(result.other_buffers), rtol=0)


def test_a_change_of_mode_is_seen() -> None:
    """In evaluation mode the statistics are constants, and dropout draws nothing."""
    net = learned.Mlp(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.4)))
    net.inner[0].running_mean.normal_()
    setting = Setting(lambda params: learned.PerParameter(params, net))
    program = setting.program(meta=[net.out.weight])
    program(setting.train, setting.val)
    net.eval()
    expected = setting.unroll(learned.per_parameter(net))
    assert_equals(
        program(setting.train, setting.val), expected, {"opt.net.out.weight": net.out.weight}
    )


def test_dropout_is_noise_of_the_run() -> None:
    net = learned.Mlp(nn.Dropout(0.4))
    setting = Setting(lambda params: learned.PerParameter(params, net))
    program = setting.program(meta=[net.hidden.weight])

    def loss() -> Tensor:
        torch.manual_seed(3)
        return program(setting.train, setting.val).loss

    (found,) = torch.autograd.grad(loss(), [net.hidden.weight])
    with torch.no_grad():
        assert loss() == loss() != program(setting.train, setting.val).loss
        finite.assert_gradient(loss, net.hidden.weight, found, directions=1, step=2e-3)


# --- nothing is stale -----------------------------------------------------------------------------


def test_a_network_that_is_replaced_or_moved_is_not_stale() -> None:
    setting = Setting(mlp()[0])
    program = setting.program(meta=["opt.net.out.weight"])
    first = program(setting.train, setting.val).loss
    for net in (setting.opt.net, learned.Mlp(), learned.Mlp(nn.Tanh())):
        with torch.no_grad():
            net.hidden.weight.add_(0.1)
        setting.opt.net = net
        result = program(setting.train, setting.val)
        expected = setting.unroll(learned.per_parameter(net))
        assert relative_error(result.loss, expected.loss) < 1e-12 and result.loss != first
        assert_equals(result, expected, {"out": net.out.weight})


def test_a_saved_program() -> None:
    build, rule, labels = lstm()
    setting = Setting(build)
    program = setting.program()
    namespace: dict[str, Any] = {}
    exec(program.lower(setting.train, setting.val).code, namespace)
    loss, gradients = namespace["loss_and_gradients"](program.inputs(setting.train, setting.val))
    expected = setting.unroll(rule)
    assert relative_error(loss, expected.loss) < 1e-12
    wanted = torch.autograd.grad(expected.loss, list(labels.values()))
    found = {label: gradients[label] for label in labels}
    assert_close(found, dict(zip(labels, wanted, strict=True)))


# --- stop-gradients -------------------------------------------------------------------------------


class Stopping(learned.Mlp):
    """A network whose forward stops gradients by one of the ways to do so."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, features: Tensor) -> Tensor:
        if self.way == "no_grad":
            with torch.no_grad():
                gate = torch.sigmoid(self.hidden(features))
        else:
            gate = torch.sigmoid(self.hidden(features))
            gate = gate.data if self.way == "data" else gate.detach()
        return super().forward(features) * gate.sum(1)


@pytest.mark.parametrize("way", ["detach", "data", "no_grad"])
def test_a_stop_in_a_network_is_its_authors(way: str) -> None:
    """The step's own ``no_grad`` and ``detach`` mean "do not track" and are looked through."""
    net = Stopping(way)
    labels = {f"opt.net.{name}": p for name, p in net.named_parameters()}
    setting = Setting(lambda params: learned.PerParameter(params, net))
    program = setting.program(meta=list(labels.values()))
    stops = program.lower(setting.train, setting.val).requirements.stops
    assert [stop.reason for stop in stops] == ["detach() or no_grad stops the gradient"]
    assert "gate = " in stops[0].where.text
    result = program(setting.train, setting.val)
    assert_equals(result, setting.unroll(learned.per_parameter(net)), labels)


def test_a_function_in_a_network_has_the_derivative_that_it_declares() -> None:
    net = learned.Mlp(learned.Halved())
    labels = {f"opt.net.{name}": p for name, p in net.named_parameters()}
    setting = Setting(lambda params: learned.PerParameter(params, net))
    before = torch._C._are_functorch_transforms_active
    result = setting.program()(setting.train, setting.val)
    assert torch._C._are_functorch_transforms_active is before
    meta = {**labels, **dict(setting.model.named_parameters())}
    assert_equals(result, setting.unroll(learned.per_parameter(net)), meta)
