"""Capturing a step leaves Python's functions alone, and what a fill takes keeps its gradient.

What is captured is held against the real optimizers in `tests/optimizers/`.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, finite, ordinary
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 5
SHAPE = (5, 4)

REAL = torch.tensor(3.0)
PLAIN = {"max": max, "min": min, "sqrt": math.sqrt}


class Watching(torch.optim.Adafactor):
    """Looks at Python's own functions while its step is captured; may fail there."""

    seen: ClassVar[list[Any]] = []

    def __init__(self, params: Any, fail: bool) -> None:
        super().__init__(params, lr=0.1)
        self.fail = fail

    def step(self, closure: Any = None) -> None:
        size = self.param_groups[0]["params"][0].square().sum()
        self.seen.append(max(1.0, size))
        with ThreadPoolExecutor(1) as other:
            self.seen.append(other.submit(max, 1.0, REAL).result())
            self.seen.append(other.submit(math.sqrt, REAL).result())
        self.seen.append(max([2, 5, 3], key=lambda x: -x))
        self.seen.append(math.sqrt(size))
        if self.fail:
            raise ValueError("on purpose")
        super().step()


@pytest.mark.parametrize("fail", [False, True])
def test_pythons_functions_are_put_back(fail: bool) -> None:
    """``max``, ``min`` and `math` take traced numbers in the thread that captures, and then."""
    model = MLP()
    opt = Watching(model.parameters(), fail)
    opt.seen.clear()
    train = cases.batches(SHAPE, 2, seed=1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    if fail:
        with pytest.raises(unrollc.CaptureError, match="on purpose"):
            program.lower(train, unstack(train)[0])
    else:
        program.lower(train, unstack(train)[0])
    assert {"max": max, "min": min, "sqrt": math.sqrt} == PLAIN
    traced, elsewhere, root, plain, traced_root = opt.seen[:5]
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
