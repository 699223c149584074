"""The captured update is the optimizer's own, and its hyperparameters keep their gradient."""

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
from tests.oracles.compare import assert_close, flattened
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 5
SHAPE = (5, 4)

#: Optimizers with values at which every hyperparameter named takes part, away from kinks.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "nadam": (
        torch.optim.NAdam,
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2, "momentum_decay": 0.3},
    ),
    "nadam decoupled": (
        torch.optim.NAdam,
        {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "asgd": (torch.optim.ASGD, {"lr": 0.2, "lambd": 0.1, "alpha": 0.6, "weight_decay": 0.05}),
    "asgd averaging": (torch.optim.ASGD, {"lr": 0.2, "lambd": 0.1, "alpha": 0.6, "t0": 1.5}),
    "rprop": (torch.optim.Rprop, {"lr": 0.03, "etas": (0.4, 1.3), "step_sizes": (0.02, 50)}),
    "adafactor": (
        torch.optim.Adafactor,
        {"lr": 0.1, "beta2_decay": -0.7, "weight_decay": 0.1, "d": 1.02, "eps": (1e-4, 1e-3)},
    ),
    "adafactor, small weights": (torch.optim.Adafactor, {"lr": 0.1, "d": 1.7, "eps": (None, 2.0)}),
    "adafactor, relative steps": (torch.optim.Adafactor, {"lr": 3.0, "d": 1.02}),
}


def as_tensors(group: dict[str, Any]) -> dict[str, Tensor]:
    """Put a tensor in the place of every float of a param group; they come back by label."""
    found: dict[str, Tensor] = {}

    def tensor(label: str, value: Any) -> Any:
        if type(value) is not float:
            return value
        found[label] = torch.tensor(value, requires_grad=True)
        return found[label]

    for key, value in list(group.items()):
        label = f'param_groups[0]["{key}"]'
        if isinstance(value, tuple):
            group[key] = tuple(tensor(f"{label}[{i}]", item) for i, item in enumerate(value))
        elif key != "params":
            group[key] = tensor(label, value)
    return found


class Problem:
    """A small net trained by one of the optimizers, every float hyperparameter a tensor."""

    def __init__(self, name: str) -> None:
        kind, options = OPTIMIZERS[name]
        self.model = MLP()
        self.opt = kind(self.model.parameters(), **options)
        self.hyper = as_tensors(self.opt.param_groups[0])
        self.train = cases.batches(SHAPE, T, seed=1)
        inputs, target = cases.batches(SHAPE, 1, seed=2)
        self.val = (inputs[0], target[0])

    def trained(self) -> ordinary.Trained:
        return ordinary.train(self.model, self.opt, F.cross_entropy, unstack(self.train), self.val)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_captured_update_is_the_optimizers_own(name: str) -> None:
    problem = Problem(name)
    trained = problem.trained()
    program = unrollc.compile(problem.model, problem.opt, F.cross_entropy, meta=["hidden.weight"])
    with torch.no_grad():
        result = program(problem.train, problem.val)
    assert_close(result.params, trained.params, rtol=1e-12)
    assert_close(flattened(result.opt_state), flattened(trained.opt_state), rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hyperparameters_equal_finite_differences(name: str) -> None:
    problem = Problem(name)
    verdicts = unrollc.check(
        problem.model, problem.opt, F.cross_entropy, problem.train, problem.val
    )
    assert not [v.label for v in verdicts if v.status == "undefined"]
    meta = {k: t for k, t in problem.hyper.items() if verdicts[k].status == "exists"}
    assert meta
    program = unrollc.compile(problem.model, problem.opt, F.cross_entropy, meta=list(meta.values()))
    result = program(problem.train, problem.val)
    found = torch.autograd.grad(result.loss, list(meta.values()))
    for (label, tensor), gradient in zip(meta.items(), found, strict=True):
        scale = max(tensor.abs().item(), 0.1)
        try:
            finite.assert_gradient(
                lambda: problem.trained().loss,
                tensor,
                gradient,
                directions=1,
                step=1e-2 * scale,
            )
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error
    silent = {k: t for k, t in problem.hyper.items() if verdicts[k].status == "zero"}
    for label, tensor in silent.items():
        start = problem.trained().loss
        with finite.moved(tensor, 1e-4 * tensor.detach()):
            assert problem.trained().loss == start, label


# --- what capturing does to torch.optim -------------------------------------------------------


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
    lr = as_tensors(opt.param_groups[0])['param_groups[0]["lr"]']
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
