"""Capturing a step leaves Python's functions alone, and what a fill takes keeps its gradient.

What is captured is held against the real optimizers in `tests/optimizers/`.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, finite, ordinary
from tests.oracles.compare import assert_close
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 5
SHAPE = (5, 4)

REAL = torch.tensor(3.0)
PLAIN = {"max": max, "min": min, "sqrt": math.sqrt}


#: What the step below sees. A method of a list, because a step may not change values it refers to.
SEEN: list[Any] = []
note = SEEN.append


class Watching(torch.optim.Adafactor):
    """Looks at Python's own functions while its step is captured; may fail there."""

    def __init__(self, params: Any, fail: bool) -> None:
        super().__init__(params, lr=0.1)
        self.fail = fail

    def step(self, closure: Any = None) -> None:
        size = self.param_groups[0]["params"][0].square().sum()
        note(max(1.0, size))
        with ThreadPoolExecutor(1) as other:
            note(other.submit(max, 1.0, REAL).result())
            note(other.submit(math.sqrt, REAL).result())
        note(max([2, 5, 3], key=lambda x: -x))
        note(math.sqrt(size))
        if self.fail:
            raise ValueError("on purpose")
        super().step()


@pytest.mark.parametrize("fail", [False, True])
def test_pythons_functions_are_put_back(fail: bool) -> None:
    """``max``, ``min`` and `math` take traced numbers in the thread that captures, and then."""
    model = MLP()
    opt = Watching(model.parameters(), fail)
    SEEN.clear()
    train = cases.batches(SHAPE, 2, seed=1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    if fail:
        with pytest.raises(unrollc.CaptureError, match="on purpose"):
            program.lower(train, unstack(train)[0])
    else:
        program.lower(train, unstack(train)[0])
    assert {"max": max, "min": min, "sqrt": math.sqrt} == PLAIN
    traced, elsewhere, root, plain, traced_root = SEEN[:5]
    assert isinstance(traced, Tensor) and elsewhere is REAL and plain == 2
    assert root == 3.0**0.5 and isinstance(traced_root, Tensor)


class Filling(torch.optim.Optimizer):
    """Keeps its rate in the state, filled in by one of the ways to do so."""

    fill: Callable[[Tensor, Any], Tensor]

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        for param in group["params"]:
            state = self.state[param]
            if not state:
                state["rate"] = self.fill(param, group["lr"])
            state["rate"].mul_(0.9)
            param.sub_(param.grad * state["rate"])


@pytest.mark.parametrize(
    "fill",
    [
        torch.full_like,
        lambda param, lr: torch.full_like(param, fill_value=lr),
        lambda param, lr: torch.full(param.shape, lr),
        lambda param, lr: param.new_full(param.shape, lr),
        lambda param, lr: torch.zeros_like(param).fill_(lr),
    ],
)
def test_a_fill_keeps_the_gradient(fill: Callable[[Tensor, Any], Tensor]) -> None:
    """The rate lives in the state from the first step on."""
    model = MLP()
    opt = type("Filling", (Filling,), {"fill": staticmethod(fill)})(model.parameters())
    lr = opt.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    batch = unstack(cases.batches(SHAPE, 1, seed=1))[0]
    program = unrollc.compile(model, opt, F.cross_entropy, meta=[lr])
    (gradient,) = torch.autograd.grad(program([batch] * 3, batch).loss, [lr])
    finite.assert_gradient(
        lambda: ordinary.train(model, opt, F.cross_entropy, [batch] * 3, batch).loss,
        lr,
        gradient,
        directions=1,
    )


class Reassigned(torch.optim.Optimizer):
    """Gives its parameters new data, as much code from before ``no_grad`` does."""

    def __init__(self, params: Any, lr: Any = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state, old = self.state[param], param.data
                param.data = old - group["lr"] * param.grad.data
                if "before" in state:  # of the step before: `old` keeps its memory
                    param.data = param.data + 0.5 * (old - state["before"])
                state["before"] = old


def test_new_data_of_a_parameter() -> None:
    model = MLP()
    lr = torch.tensor(0.1, requires_grad=True)
    opt = Reassigned(model.parameters())
    opt.param_groups[0]["lr"] = lr
    train = cases.batches(SHAPE, 3, seed=1)
    val = unstack(cases.batches(SHAPE, 1, seed=2))[0]

    def trained() -> ordinary.Trained:
        return ordinary.train(model, opt, F.cross_entropy, unstack(train), val)

    result = unrollc.compile(model, opt, F.cross_entropy)(train, val)
    assert_close(result.params, trained().params, rtol=1e-12)
    leaves = [lr, next(model.parameters())]
    found = torch.autograd.grad(result.loss, leaves)
    for leaf, gradient in zip(leaves, found, strict=True):
        finite.assert_gradient(lambda: trained().loss, leaf.data, gradient, directions=1)


class Aliased(Reassigned):
    """Keeps no copy of a parameter: what it keeps moves with the parameter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["first"] = param.data
                param.data.add_(0.1 * (state["first"] - param.data) - group["lr"] * param.grad.data)


def test_state_in_the_memory_of_a_parameter_is_refused() -> None:
    model = MLP()
    opt = Aliased(model.parameters())
    program = unrollc.compile(model, opt, F.cross_entropy)
    data = cases.batches(SHAPE, 3, seed=1), unstack(cases.batches(SHAPE, 1, seed=2))[0]
    with pytest.raises(unrollc.CaptureError, match=r'\["first"\].*in one memory'):
        program.lower(*data)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    opt.step()
    with pytest.raises(unrollc.InputError, match=r'\["first"\].*in one memory'):
        program.lower(*data)
