"""What README says of other libraries, shown on the smallest case that shows it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, eager, finite, ordinary
from tests.oracles.compare import assert_close, relative_error
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 3


def setting(build):
    model = MLP()
    train = cases.batches((5, 4), T, seed=1)
    return model, build(model.parameters()), train, unstack(train)


def test_highers_adam_is_another() -> None:
    higher = pytest.importorskip("higher")
    model, opt, train, batches = setting(lambda p: torch.optim.Adam(p, lr=0.05, eps=1e-2))
    trained = ordinary.train(model, opt, F.cross_entropy, batches).params
    ours = unrollc.compile(model, opt, F.cross_entropy)(train, batches[0]).params
    assert_close(ours, trained, rtol=1e-12)
    with higher.innerloop_ctx(model, opt) as (functional, inner):
        for inputs, target in batches:
            inner.step(F.cross_entropy(functional(inputs), target))
    theirs = dict(zip(trained, functional.parameters(), strict=True))
    gaps = [relative_error(theirs[name], trained[name]) for name in trained]
    assert max(gaps) > 1e-3


def test_differentiable_momentum_loses_its_first_term() -> None:
    """PyTorch's own ``differentiable=True`` against finite differences and against ours."""
    model, opt, _, batches = setting(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    program = unrollc.compile(model, opt, F.cross_entropy)
    train, val = batches[:1], batches[1]
    weight = model.hidden.weight
    (ours,) = torch.autograd.grad(program(train, val).loss, [weight])

    def loss() -> torch.Tensor:
        with torch.no_grad():
            return program(train, val).loss

    finite.assert_gradient(loss, weight, ours)
    expected = eager.unroll(model, opt, F.cross_entropy, train, val)
    (exact,) = torch.autograd.grad(expected.loss, [weight])
    assert relative_error(ours, exact) < 1e-10
    assert relative_error(_differentiable_sgd(model, train[0], val), exact) > 1e-3


def _differentiable_sgd(model: nn.Module, batch, val) -> torch.Tensor:
    start = dict(model.named_parameters())
    inputs, target = batch
    loss = F.cross_entropy(torch.func.functional_call(model, start, inputs), target)
    grads = torch.autograd.grad(loss, list(start.values()), create_graph=True)
    fast = {name: parameter.clone() for name, parameter in start.items()}
    for parameter, grad in zip(fast.values(), grads, strict=True):
        parameter.grad = grad
    torch.optim.SGD(list(fast.values()), lr=0.1, momentum=0.9, differentiable=True).step()
    inputs, target = val
    outer = F.cross_entropy(torch.func.functional_call(model, fast, inputs), target)
    return torch.autograd.grad(outer, [start["hidden.weight"]])[0]
