"""The inner loop starts from the state that the optimizer holds: training goes on."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F

import unrollc
from tests.gradients.surroundings import assert_agrees, task, unroll
from tests.oracles import finite
from tests.oracles.compare import assert_close, flattened

pytestmark = pytest.mark.usefixtures("float64")

T = 2
Build = Callable[[Any], optim.Optimizer]

#: Every optimizer of torch.optim with state, at values away from kinks.
OPTIMIZERS: dict[str, Build] = {
    "sgd, nesterov": lambda p: optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True),
    "sgd, dampening": lambda p: optim.SGD(p, lr=0.2, momentum=0.9, dampening=0.3),
    "adam, amsgrad": lambda p: optim.Adam(p, lr=0.05, amsgrad=True, eps=1e-2),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.02, momentum=0.5, centered=True, eps=1e-2),
    "adadelta": lambda p: optim.Adadelta(p, eps=1e-3),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.1, eps=1e-2),
    "nadam": lambda p: optim.NAdam(p, lr=0.05, eps=1e-2),
    "radam": lambda p: optim.RAdam(p, lr=0.05, betas=(0.9, 0.9), eps=1e-2),
    "asgd": lambda p: optim.ASGD(p, lr=0.2, t0=3.0),
    "rprop": lambda p: optim.Rprop(p, lr=0.03),
    "adamax": lambda p: optim.Adamax(p, lr=0.05, eps=1e-2),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "muon": lambda p: optim.Muon([q for q in p if q.dim() == 2], lr=0.05),
}


def trained(model: nn.Module, opt: optim.Optimizer, batches: list[Any]) -> None:
    for inputs, target in batches:
        opt.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        opt.step()
    opt.zero_grad()


def warm(build: Build, seed: int = 0) -> tuple[nn.Module, optim.Optimizer, list[Any]]:
    """A model and its optimizer after three steps, and batches to go on with."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 3)
    opt = build(list(model.parameters()))
    batches = [(torch.randn(5, 3), torch.randint(3, (5,))) for _ in range(3 + T)]
    trained(model, opt, batches[:3])
    return model, opt, batches[3:]


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon orthogonalises in bfloat16, whose steps finite differences would measure."""
    for kind in (Tensor, FunctionalTensor):
        monkeypatch.setattr(kind, "bfloat16", lambda self: self.clone())


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loop_continues_training(name: str) -> None:
    """θ_T and state are those of ordinary training continued; the gradient is that of θ_T(θ_0)."""
    model, opt, batches = warm(OPTIMIZERS[name])
    theirs, their_opt = copy.deepcopy((model, opt))
    held = [p for group in opt.param_groups for p in group["params"]]
    program = unrollc.compile(model, opt, F.cross_entropy, meta=held)
    result = program(batches, batches[0])
    trained(theirs, their_opt, batches)
    names = {parameter: name for name, parameter in theirs.named_parameters()}
    state = {names[p]: dict(values) for p, values in their_opt.state.items()}
    assert_close(result.params, dict(theirs.named_parameters()), rtol=1e-13)
    assert_close(flattened(result.opt_state), flattened(state), rtol=1e-13)
    weight = held[0]
    (gradient,) = torch.autograd.grad(result.loss, weight)

    def loss() -> Tensor:
        with torch.no_grad():
            return program(batches, batches[0]).loss

    finite.assert_gradient(loss, weight, gradient, rtol=1e-8, step=1e-3)


def test_loaded_state_is_where_the_loop_starts() -> None:
    """A state dictionary that is loaded between two calls is not answered by the old one."""
    model, opt, batches = warm(OPTIMIZERS["adam, amsgrad"])
    _, other, _ = warm(OPTIMIZERS["adam, amsgrad"], seed=1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    with torch.no_grad():
        before = program(batches, batches[0])
        lowered = program.lower(batches, batches[0])
        opt.load_state_dict(other.state_dict())
        after = program(batches, batches[0])
        assert program.lower(batches, batches[0]) is lowered
    theirs, their_opt = copy.deepcopy((model, opt))
    trained(theirs, their_opt, batches)
    assert_close(after.params, dict(theirs.named_parameters()), rtol=1e-13)
    assert after.loss != before.loss


def test_momentum_to_start_from_is_a_meta_parameter() -> None:
    model, train, val = task()
    opt = optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    buffers = [torch.randn_like(parameter).requires_grad_() for parameter in model.parameters()]
    for parameter, buffer in zip(model.parameters(), buffers, strict=True):
        opt.state[parameter]["momentum_buffer"] = buffer
    program = unrollc.compile(model, opt, F.cross_entropy)
    expected = unroll(model, train, val, rates=[0.3] * 3, momentum=0.9, buffers=buffers)
    names = [f'state["{name}"]["momentum_buffer"]' for name, _ in model.named_parameters()]
    leaves = {**dict(zip(names, buffers, strict=True)), **dict(model.named_parameters())}
    found = program.check(train, val)
    assert {found[name].status for name in names} == {"exists"}
    assert found[buffers[0]].label == names[0]
    assert_agrees(program(train, val), expected, leaves)


def test_moments_to_start_from_and_what_cuts_them() -> None:
    """Adam's second moment, against finite differences; Truncated does not reach it."""
    model, opt, batches = warm(OPTIMIZERS["adam, amsgrad"])
    second = opt.state[model.weight]["exp_avg_sq"].add_(0.1).requires_grad_()
    opt.state[model.weight]["max_exp_avg_sq"].zero_()  # the larger one is what is read
    program = unrollc.compile(model, opt, F.cross_entropy, meta=[second])
    (gradient,) = torch.autograd.grad(program(batches, batches[0]).loss, second)

    def loss() -> Tensor:
        with torch.no_grad():
            return program(batches, batches[0]).loss

    finite.assert_gradient(loss, second, gradient, rtol=1e-6, step=1e-3)
    cut = unrollc.compile(model, opt, F.cross_entropy, meta=[second], gradient=unrollc.Truncated(1))
    with pytest.raises(unrollc.RequirementError, match="does not go back to the first state"):
        cut(batches, batches[0])
    waived = unrollc.compile(model, opt, F.cross_entropy, gradient=unrollc.Truncated(1))
    verdict = waived.check(batches, batches[0])['state["weight"]["exp_avg_sq"]']
    assert not verdict.requested
