"""Where a root's argument is zero: dead units, unused rows, padding, norms of zero.

Adam at a coordinate whose gradient has always been zero divides zero by zero when eager PyTorch
differentiates it, though the update is differentiable there. The oracles are closed forms of the
limit, and finite differences of ordinary training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.differentiate.steps import captured, pulled_back
from tests.gradients.programs import gradients
from tests.oracles import eager, finite, ordinary
from tests.oracles.compare import relative_error
from tests.oracles.models import WeightedLoss
from tests.oracles.objectives import unstack
from unrollc.differentiate import replay
from unrollc.differentiate.reverse import reverse_adjoint
from unrollc.step import Role, StepGraph

ROOT = torch.ops.aten.sqrt.default
T, LR, EPS = 3, 0.03, 1e-2

# An eps that takes part, as in tests/oracles/cases.py: 1e-8 would cancel eight digits.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.95), "eps": EPS}),
    "amsgrad": (torch.optim.Adam, {"betas": (0.8, 0.95), "eps": EPS, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": EPS, "weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"betas": (0.8, 0.95), "eps": EPS, "momentum_decay": 0.3}),
    "radam": (torch.optim.RAdam, {"betas": (0.8, 0.95), "eps": EPS}),
    "adamax": (torch.optim.Adamax, {"betas": (0.8, 0.95), "eps": EPS}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "eps": EPS}),
    "rmsprop centered": (torch.optim.RMSprop, {"alpha": 0.9, "eps": EPS, "centered": True}),
    "rmsprop momentum": (torch.optim.RMSprop, {"alpha": 0.9, "eps": EPS, "momentum": 0.7}),
    "adagrad": (torch.optim.Adagrad, {"eps": EPS}),
    "adadelta": (torch.optim.Adadelta, {"rho": 0.8, "eps": EPS}),
}

#: Optimizers that stay away from the singularity: eps is added under the root, or to |g|.
REGULAR = {"adamax", "adadelta"}

#: RAdam uses its root from the sixth step on, so it starts at its fifth.
RADAM_START = 4


@pytest.fixture(params=[torch.float64], autouse=True)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def without_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "zero_where_zero", lambda slope, cotangent: slope)


def build(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """The optimizer with every float hyperparameter that it uses as a tensor."""
    kind, given = OPTIMIZERS[name]
    opt = kind(list(params), **{"lr": LR, **given, **options})
    group = opt.param_groups[0]
    for key in ("lr", *given, *options):
        value = group[key]
        if isinstance(value, tuple):
            group[key] = tuple(torch.tensor(item, requires_grad=True) for item in value)
        elif type(value) is float:
            group[key] = torch.tensor(value, requires_grad=True)
    return opt


def hyperparameters(opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for key, value in opt.param_groups[0].items():
        if key != "params":
            items = value if isinstance(value, tuple) else (value,)
            found |= {f"{key} {i}": v for i, v in enumerate(items) if isinstance(v, Tensor)}
    return found


# --- the update alone, against closed forms ---------------------------------------------------


class Weights(nn.Module):
    """ℓ(w) = w·x, so that the inner gradient is the data."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).sum()


def linear(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction


# Coordinates whose gradients are: never nonzero, nonzero from the second step on, nonzero at the
# first step only, always nonzero.
DATA = [[0.0, 0.0, 0.4, -0.3], [0.0, 0.2, 0.0, 0.5], [0.0, -0.6, 0.0, 0.7]]


def limit(name: str, first: int, last: int, start: int = 0) -> float:
    """∂θ_T/∂G_j at a coordinate where every gradient is zero: the sum of what each step adds.

    Args:
        name: The optimizer.
        first: The step j whose gradient moves, from 1.
        last: T.
        start: Steps taken before.
    """
    _, given = OPTIMIZERS[name]
    beta1, beta2 = given.get("betas", (0.0, 0.0))
    total = 0.0
    for step in range(first, last + 1):
        t, age = start + step, step - first
        mean = (1 - beta1) * beta1**age
        if name == "adagrad" or name in ("rmsprop", "rmsprop centered"):
            total -= LR / EPS * (age == 0)
        elif name == "rmsprop momentum":
            total -= LR / EPS * 0.7**age
        elif name == "adadelta":
            total -= LR * (age == 0)
        elif name == "nadam":
            mu = [beta1 * (1 - 0.5 * 0.96 ** (i * 0.3)) for i in range(1, t + 2)]
            product = math.prod(mu[:-1])
            total -= LR * (1 - mu[-2]) / (1 - product) / EPS * (age == 0)
            total -= LR * mu[-1] / (1 - product * mu[-1]) / EPS * mean
        elif name == "radam":
            total -= LR * mean / (1 - beta1**t) * _rectified(t, beta2)
        else:
            decay = (1 - LR * given.get("weight_decay", 0.0)) ** (last - step)
            total -= LR * mean / (1 - beta1**t) / EPS * decay
    return total


def _rectified(t: int, beta2: float) -> float:
    """RAdam's factor; 1 while the length of its moving average is at most 5."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 5:
        return 1.0
    scale = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return math.sqrt(scale) * math.sqrt(1 - beta2**t) / EPS


def warm(name: str, opt: torch.optim.Optimizer, param: Tensor) -> int:
    """RAdam as after four steps with zero gradients; the others as new."""
    if name != "radam":
        return 0
    zeros = {key: torch.zeros_like(param.detach()) for key in ("exp_avg", "exp_avg_sq")}
    opt.state[param] = {"step": torch.tensor(float(RADAM_START)), **zeros}
    return RADAM_START


def line_problem(
    name: str, steps: int = T, **options: Any
) -> tuple[Weights, torch.optim.Optimizer, Tensor, int]:
    model = Weights(torch.tensor([0.5, -0.4, 0.3, 0.2]))
    opt = build(name, model.parameters(), **options)
    data = torch.tensor(DATA[:steps], requires_grad=True)
    return model, opt, data, warm(name, opt, model.w)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_limit_at_zero(name: str) -> None:
    model, opt, data, start = line_problem(name)
    meta = {"w": model.w, "data": data, **hyperparameters(opt)}
    program = unrollc.compile(model, opt, linear, meta=list(meta.values()))
    coefficients = torch.tensor([2.0, -1.0, 0.7, 1.3])
    train, val = (data, torch.zeros(T)), (coefficients, torch.zeros(()))
    found = gradients(program(train, val).loss, meta)
    assert all(gradient.isfinite().all() for gradient in found.values())
    expected = [2.0 * limit(name, j, T, start) for j in range(1, T + 1)]
    assert relative_error(found["data"][:, 0], torch.tensor(expected)) < 1e-12
    decay = (1 - LR * OPTIMIZERS[name][1].get("weight_decay", 0.0)) ** T
    assert relative_error(found["w"], decay * coefficients) < 1e-12

    def loss() -> Tensor:
        batches = [(x, torch.zeros(())) for x in data.detach()]
        return ordinary.train(model, opt, linear, batches, val).loss

    # At a zero the loss is differentiable once: differences converge with h, not with h².
    for key, tensor in meta.items():
        step, rtol = (1e-6, 1e-4) if key == "data" else (1e-3, 1e-7)
        finite.assert_gradient(loss, tensor, found[key], rtol=rtol, directions=1, step=step)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw"])
def test_weight_decay_makes_the_weight_a_gradient(name: str) -> None:
    """At θ = g = 0 the decayed gradient is zero too, and now θ moves it."""
    model, opt, data, start = line_problem(name, 1, weight_decay=0.2)
    with torch.no_grad():
        model.w[0] = 0.0
    meta = {"w": model.w, "data": data, "lr": opt.param_groups[0]["lr"]}
    program = unrollc.compile(model, opt, linear, meta=list(meta.values()))
    found = gradients(program((data, torch.zeros(1)), (torch.ones(4), torch.zeros(()))).loss, meta)
    once = limit(name, 1, 1, start)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert abs(found["w"][0] - (1 + 0.2 * once)) < 1e-12
    assert abs(found["data"][0, 0] - once) < 1e-12 * abs(once)


@pytest.mark.parametrize("default_dtype", [torch.float32], indirect=True)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32(name: str, default_dtype: torch.dtype) -> None:
    model, opt, data, start = line_problem(name, 2)
    meta = {"w": model.w, "data": data, **hyperparameters(opt)}
    program = unrollc.compile(model, opt, linear, meta=list(meta.values()))
    val = (torch.ones(4), torch.zeros(()))
    found = gradients(program((data, torch.zeros(2)), val).loss, meta)
    assert all(g.isfinite().all() and g.dtype == default_dtype for g in found.values())
    expected = torch.tensor([limit(name, j, 2, start) for j in (1, 2)])
    assert relative_error(found["data"][:, 0], expected) < 1e-5


# --- networks, against finite differences of ordinary training --------------------------------


class Dead(nn.Module):
    """Unused embedding rows, a padding row, units that never fire, and padded input columns."""

    def __init__(self, padding: bool) -> None:
        super().__init__()
        self.rows = nn.Embedding(6, 2, padding_idx=0 if padding else None)
        self.hidden = nn.Linear(6, 5)
        with torch.no_grad():
            self.hidden.bias[3:] = -50.0
            self.hidden.bias[:3] += 0.5

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        h = torch.relu(self.hidden(torch.cat([self.rows(tokens).mean(1), x], -1)))
        return h[:, :3] + h[:, 2:]


class Cancelling(nn.Module):
    """A bias before batch norm and a key bias: their gradients are zero up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.bias, self.key_bias = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.weight
        attention = torch.softmax(h @ (h + self.key_bias).mT, -1)
        return F.batch_norm((attention @ h).mean(1) + self.bias, None, None, training=True)


class Net:
    """A network with its optimizer, its loss, its data and its meta-parameters.

    Args:
        everything: Whether data and loss hold meta-parameters too, beside θ_0 and the optimizer.
    """

    def __init__(self, model: nn.Module, name: str, steps: int, everything: bool) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.model = model
        self.loss = WeightedLoss() if everything else nn.CrossEntropyLoss()
        self.opt = build(name, model.parameters())
        if name == "radam":
            for param in model.parameters():
                warm(name, self.opt, param)
        if isinstance(model, Dead):
            self.x = normal(steps, 6, 4)
            self.x[..., 2:] = 0.0
            tokens = torch.randint(0, 4, (steps, 6, 2), generator=generator)
            inputs: Any = (tokens, self.x)
            val: Any = (tokens[0], normal(6, 4))
        else:
            self.x = normal(steps, 5, 3, 3)
            inputs, val = self.x, normal(5, 3, 3)
        self.x.requires_grad_(everything)
        size = self.x.shape[1]
        self.train = (inputs, torch.randint(0, 3, (steps, size), generator=generator))
        self.val = (val, torch.randint(0, 3, (size,), generator=generator))
        named = {n: p for n, p in model.named_parameters()}
        self.meta = {**named, **hyperparameters(self.opt)}
        self.meta |= {"x": self.x} if self.x.requires_grad else {}
        self.meta |= {f"loss.{n}": p for n, p in self.loss.named_parameters()}

    def found(self) -> dict[str, Tensor]:
        program = unrollc.compile(self.model, self.opt, self.loss, val_loss=F.cross_entropy)
        return gradients(program(self.train, self.val).loss, self.meta)

    def trained(self) -> Tensor:
        return ordinary.train(
            self.model,
            self.opt,
            self.loss,
            unstack(self.train),
            self.val,
            val_loss=F.cross_entropy,
        ).loss

    def along_one_direction(self, found: dict[str, Tensor], step: float) -> tuple[float, float]:
        """All meta-parameters moved at once: the claimed derivative and finite differences."""
        generator = torch.Generator().manual_seed(5)
        directions = {
            name: torch.randn(t.shape, generator=generator) * t.detach().abs().mean()
            for name, t in self.meta.items()
        }
        if isinstance(self.model, Dead):
            if "x" in directions:
                directions["x"] *= self.x.detach() != 0  # padding stays padding
            if self.model.rows.padding_idx is not None:
                directions["rows.weight"][0] = 0.0  # declared to be constant
        line = torch.zeros(())

        def loss() -> Tensor:
            with ExitStack() as moves:
                for name, tensor in self.meta.items():
                    moves.enter_context(finite.moved(tensor, line * directions[name]))
                return self.trained()

        claimed = sum(float((found[n] * d).sum()) for n, d in directions.items())
        estimate = finite.directional_derivative(loss, line, torch.ones(()), step=step)
        return claimed, estimate.value


def eager_gradients(net: Net) -> list[Tensor]:
    """Meta-gradients of θ_0 in eager PyTorch: the hand-written rules, or ``differentiable``."""
    params = dict(net.model.named_parameters())
    if type(net.opt) in eager.RULES:
        run = eager.unroll(
            net.model,
            net.opt,
            net.loss,
            unstack(net.train),
            net.val,
            val_loss=F.cross_entropy,
        )
        return list(run.gradients(list(params.values())))
    fast = {name: param.clone() for name, param in params.items()}
    _, given = OPTIMIZERS[next(n for n, (k, _) in OPTIMIZERS.items() if k is type(net.opt))]
    opt = type(net.opt)(
        [p.detach() for p in fast.values()], lr=LR, **given, foreach=False, differentiable=True
    )
    opt.param_groups[0]["params"] = list(fast.values())
    for name, param in fast.items():
        if params[name] in net.opt.state:
            opt.state[param] = {k: v.clone() for k, v in net.opt.state[params[name]].items()}
    for inputs, target in unstack(net.train):
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        read = {name: param.clone() for name, param in fast.items()}  # steps are in place
        prediction = torch.func.functional_call(net.model, read, arguments)
        loss = net.loss(prediction, target)
        grads = torch.autograd.grad(loss, list(read.values()), create_graph=True)
        for param, grad in zip(fast.values(), grads, strict=True):
            param.grad = grad
        opt.step()
    inputs, target = net.val
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    prediction = torch.func.functional_call(net.model, fast, arguments)
    loss = F.cross_entropy(prediction, target)
    return list(torch.autograd.grad(loss, list(params.values())))


@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padding_idx"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dead_coordinates(name: str, padding: bool) -> None:
    net = Net(Dead(padding), name, 2 if padding else T, everything=not padding)
    found = net.found()
    assert all(gradient.isfinite().all() for gradient in found.values())
    claimed, expected = net.along_one_direction(found, step=1e-4)
    assert abs(claimed - expected) < 1e-6 * abs(expected)
    # Weights that read padding have no inner gradient; Lval reads them through the identity.
    assert found["hidden.weight"][:3, -2:].abs().min() > 0
    if name != "adamax":  # PyTorch's differentiable Adamax raises for every model
        clean = all(gradient.isfinite().all() for gradient in eager_gradients(net))
        assert clean == (name in REGULAR)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_that_cancel(name: str) -> None:
    net = Net(Cancelling(), name, 2, everything=False)
    found = net.found()
    assert all(gradient.isfinite().all() for gradient in found.values())
    claimed, expected = net.along_one_direction(found, step=1e-4)
    assert abs(claimed - expected) < 1e-6 * abs(expected)


# --- one step: what the rule leaves alone, and where it would be wrong -------------------------


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in REGULAR])
def test_regular_coordinates_are_bit_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rule and without it: the same bits, but for NaN at the singular coordinate."""
    model, opt, _, _ = line_problem(name)
    if name == "radam":
        opt.state[model.w]["step"].fill_(8.0)
    step = captured(model, opt, linear, (torch.ones(4), torch.zeros(())))
    trained = model.w.detach()
    given = {v.label: trained.clone() for v, _ in step.inputs_with(Role.THETA)}
    given["train.inputs"] = torch.tensor([0.0, 0.3, -0.2, 0.5])
    given |= {v.label: v_tensor for v, v_tensor in _hyper_inputs(step, opt)}
    for value, node in step.inputs_with(Role.OPT_STATE):
        filled = torch.tensor([0.0, 0.02, 0.05, 0.01]) * (0.1 if "grad_avg" in value.label else 1)
        scalar = 0.9 if "mu_product" in value.label else 8.0
        given[value.label] = filled if node.meta["val"].dim() else torch.tensor(scalar)
    ruled = pulled_back(step, given, reverse_adjoint)
    without_the_rule(monkeypatch)
    plain = pulled_back(step, given, reverse_adjoint)
    per_coordinate = [label for label, t in ruled.items() if t.shape == (4,)]
    assert len(per_coordinate) > 1
    for label in per_coordinate:
        assert ruled[label].isfinite().all()
        assert torch.equal(ruled[label][1:], plain[label][1:])
    assert any(plain[label][0].isnan() for label in per_coordinate)
    # A step with no singular coordinate: everything.
    for tensor in given.values():
        if tensor.shape == (4,):
            tensor[0] = tensor[1]
    plain = pulled_back(step, given, reverse_adjoint)
    monkeypatch.undo()
    ruled = pulled_back(step, given, reverse_adjoint)
    assert all(torch.equal(ruled[label], plain[label]) for label in plain)


def _hyper_inputs(step: StepGraph, opt: torch.optim.Optimizer) -> list[tuple[Any, Tensor]]:
    group = opt.param_groups[0]
    found = []
    for value, _ in step.inputs_with(Role.HYPER):
        key = value.label.split('"')[1]
        index = value.label.rpartition("[")[2].rstrip("]")
        found.append((value, group[key][int(index)] if index.isdigit() else group[key]))
    return found


class Rooted(torch.optim.Optimizer):
    """θ' = θ - lr (√g)² for g ≥ 0: the square takes the root's slope away and leaves one."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad.sqrt().square())


def test_zero_times_infinity_is_not_always_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a proof is needed: at g = 0 the rule would give 0 in place of -lr a step."""

    def found() -> Tensor:
        model = Weights(torch.tensor([0.5, 0.3]))
        data = torch.tensor([[0.0, 0.4]] * T, requires_grad=True)
        program = unrollc.compile(model, Rooted(model.parameters()), linear)
        loss = program((data, torch.zeros(T)), (torch.ones(2), torch.zeros(()))).loss
        (gradient,) = torch.autograd.grad(loss, [data])
        assert relative_error(gradient[:, 1], torch.full((T,), -LR)) < 1e-12
        return gradient[:, 0]

    assert found().isnan().all()  # no proof, no claim
    monkeypatch.setattr(
        "unrollc.requirements.check.removable",
        lambda step: {n: "assumed" for n in step.graph.nodes if n.target is ROOT},
    )
    assert (found() == 0).all()
