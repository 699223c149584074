"""Model, optimizer and loss are bit for bit what they were, until ``result.apply()``."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import compiled
from tests.oracles import cases
from tests.oracles.cases import Case
from tests.oracles.models import MLP, Branching
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")


def hooks(module: nn.Module) -> dict[str, list[Any]]:
    return {
        f"{name}{attribute}": list(values)
        for name, part in module.named_modules()
        for attribute, values in vars(part).items()
        if attribute.endswith("_hooks") and isinstance(values, dict)
    }


def snapshot(model: nn.Module, opt: torch.optim.Optimizer, *more: nn.Module) -> dict[str, Any]:
    """Everything that a program could disturb, copied; tensors with their identity."""

    def taken(tensor: Tensor) -> tuple[Any, ...]:
        return (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor._version)

    copies: dict[str, Any] = {}
    for index, module in enumerate((model, *more)):
        tensors = [*module.named_parameters(), *module.named_buffers()]
        for name, tensor in tensors:
            grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
            copies[f"{index}.{name}"] = (*taken(tensor), tensor.detach().clone(), grad)
        copies[f"{index} training"] = [part.training for part in module.modules()]
        copies[f"{index} hooks"] = hooks(module)
        copies[f"{index} attributes"] = {
            name: sorted(vars(part)) for name, part in module.named_modules()
        }
    copies["state"] = {
        id(param): {
            key: (*taken(value), value.clone()) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }
        for param, state in opt.state.items()
    }
    copies["groups"] = [
        {
            key: [id(param) for param in value] if key == "params" else (id(value), value)
            for key, value in group.items()
        }
        for group in opt.param_groups
    ]
    copies["attributes"] = sorted(vars(opt))
    return copies


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left is right or bool(left == right)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    changed = [key for key in left if not same(left[key], right[key])]
    assert not changed, f"changed: {changed}"


def build(warm: bool = False) -> Case:
    case = cases.build("conv", "adam", 3)
    if warm:  # state and .grad of every parameter
        case.loss(case.model(case.train[0][0].detach()), case.train[1][0]).backward()
        lr, case.opt.param_groups[0]["lr"] = case.opt.param_groups[0]["lr"], 0.01
        decay, case.opt.param_groups[0]["weight_decay"] = (
            case.opt.param_groups[0]["weight_decay"],
            0.0,
        )
        case.opt.step()
        case.opt.param_groups[0]["lr"] = lr
        case.opt.param_groups[0]["weight_decay"] = decay
    return case


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
def test_calling_and_lowering_change_nothing(warm: bool) -> None:
    case = build(warm)
    case.model.norm2.eval()  # modes may differ between modules
    case.model.conv1.register_forward_hook(lambda module, inputs, output: output)
    case.install(unrollc.PerStep)
    before = snapshot(case.model, case.opt, case.loss)
    program = compiled(case)
    case.opt.param_groups[1]["lr"] = before["groups"][1]["lr"][1]
    program.lower(case.train, case.val)
    assert_same(snapshot(case.model, case.opt, case.loss), before)
    result = program(case.train, case.val)
    assert_same(snapshot(case.model, case.opt, case.loss), before)
    with torch.no_grad():
        program(case.train, case.val)
    assert_same(snapshot(case.model, case.opt, case.loss), before)
    torch.autograd.grad(result.loss, [case.meta["lr"]])
    assert_same(snapshot(case.model, case.opt, case.loss), before)


def test_backward_fills_grad_alone() -> None:
    case = build(warm=True)
    program = compiled(case)
    before = snapshot(case.model, case.opt, case.loss)
    old = {name: param.grad.clone() for name, param in case.model.named_parameters()}
    result = program(case.train, case.val)
    found = torch.autograd.grad(result.loss, list(case.model.parameters()), retain_graph=True)
    result.loss.backward()
    for (name, param), gradient in zip(case.model.named_parameters(), found, strict=True):
        assert torch.equal(param.grad, old[name] + gradient), name
    for module in (case.model, case.loss):
        module.zero_grad()
    after = snapshot(case.model, case.opt, case.loss)
    strip = {key: value[:-1] for key, value in before.items() if isinstance(value, tuple)}
    assert_same({key: after[key][:-1] for key in strip}, strip)
    others = before.keys() - strip.keys()
    assert_same({key: after[key] for key in others}, {key: before[key] for key in others})


def test_data_are_untouched() -> None:
    case = build()
    tensors = [*case.train, *case.val, *case.meta.values()]
    before = [(t.detach().clone(), t._version) for t in tensors]
    compiled(case)(case.train, case.val).loss.backward()
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def test_the_check_sees_a_change() -> None:
    """The broken twin: every kind of disturbance is a finding."""
    disturbances = [
        lambda case: case.model.norm1.num_batches_tracked.add_(1),
        lambda case: case.model.conv1.eval(),
        lambda case: case.model.conv1.register_forward_hook(print),
        lambda case: case.opt.param_groups[0].update(differentiable=True),
        lambda case: case.opt.state[case.model.conv1.weight].update(extra=1),
        lambda case: setattr(case.model.conv1.weight, "grad", torch.zeros(3, 1, 3, 3)),
        lambda case: case.model.conv1.weight.requires_grad_(False),
        lambda case: setattr(case.opt, "leftover", None),
        lambda case: case.loss.weight.data.mul_(2),
    ]
    for disturb in disturbances:
        case = build()
        before = snapshot(case.model, case.opt, case.loss)
        assert_same(snapshot(case.model, case.opt, case.loss), before)
        disturb(case)
        with pytest.raises(AssertionError, match="changed"):
            assert_same(snapshot(case.model, case.opt, case.loss), before)


def test_a_failed_capture_changes_nothing() -> None:
    model = Branching()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = snapshot(model, opt)
    train = cases.batches((5, 4), 2, seed=1)
    with pytest.raises(unrollc.UnrollcError):
        unrollc.compile(model, opt, F.cross_entropy)(train, unstack(train)[0])
    assert_same(snapshot(model, opt), before)
    assert type(model(train[0][0])) is Tensor


def test_apply_writes_in_place_and_nothing_else() -> None:
    case = build(warm=True)
    program = compiled(case)
    before = snapshot(case.model, case.opt, case.loss)
    result = program(case.train, case.val)
    result.apply()
    after = snapshot(case.model, case.opt, case.loss)
    for name, param in case.model.named_parameters():
        assert torch.equal(param, result.params[name])
        assert after[f"0.{name}"][0] == before[f"0.{name}"][0]  # the same Parameter
        assert same(after[f"0.{name}"][-1], before[f"0.{name}"][-1])  # with the same .grad
    for name, buffer in case.model.named_buffers():
        assert torch.equal(buffer, result.buffers[name])
    for key in ("groups", "attributes", "0 training", "0 hooks"):
        assert same(after[key], before[key]), key
    for name, param in case.loss.named_parameters():
        assert same(after[f"1.{name}"], before[f"1.{name}"]), param


def test_applied_tensors_are_the_models_own() -> None:
    """Training on after apply() must not reach back into the result."""
    model = MLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train = cases.batches((5, 4), 3, seed=1)
    result = unrollc.compile(model, opt, F.cross_entropy)(train, unstack(train)[0])
    result.apply()
    kept = {name: value.clone() for name, value in result.params.items()}
    F.cross_entropy(model(train[0][0]), train[1][0]).backward()
    opt.step()
    assert all(torch.equal(value, kept[name]) for name, value in result.params.items())
    assert all(not torch.equal(param, kept[name]) for name, param in model.named_parameters())


def test_results_are_plain_tensors() -> None:
    case = build()
    result = compiled(case)(case.train, case.val)
    assert set(result.params) == {name for name, _ in case.model.named_parameters()}
    assert set(result.buffers) == {name for name, _ in case.model.named_buffers()}
    for value in (result.loss, result.inner_losses, *result.params.values()):
        assert type(value) is Tensor
    assert repr(result.loss)
