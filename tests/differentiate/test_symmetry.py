"""The proof that mixed mode may be used: what it grants, what it refuses, and that it is right.

Every refused model has a repaired twin that is granted, so that a proof which refused everything
would fail here as well.
"""

import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.capture.steps import Captured, capture, live_state
from tests.oracles.models import (
    CLASSES,
    MLP,
    ConvNet,
    LSTMClassifier,
    TransformerClassifier,
    WeightedLoss,
)
from unrollc.differentiate.adjoint import StepAdjoint
from unrollc.differentiate.mixed import mixed_adjoint, mixed_obstacle
from unrollc.differentiate.reverse import reverse_adjoint
from unrollc.differentiate.symmetry import asymmetry
from unrollc.optimize.simplify import simplify
from unrollc.step import Phase, Role, StepGraph, copy

pytestmark = pytest.mark.usefixtures("float64")

HERE = "test_symmetry.py"


class Embedded(nn.Module):
    """A bag of embeddings, read out by a linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, **options)
        self.output = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.table(tokens).sum(1)))


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def tokens() -> Tensor:
    return torch.randint(6, (5, 3))


PROVED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (MLP, floats(5, 4)),
    "conv, batch norm, relu, pool": (ConvNet, floats(6, 1, 4, 4)),
    "transformer": (TransformerClassifier, floats(3, 4, 8)),
    "lstm": (LSTMClassifier, floats(4, 2, 3)),
    "embedding": (Embedded, tokens),
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.8),
    # An eps that takes part: at g² against eps = 1e-8 the derivative itself cancels digits.
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr, eps=1e-2),
}


def captured(
    model: nn.Module,
    inputs: Tensor,
    loss: Any = F.cross_entropy,
    optimizer: str = "sgd",
    lr: Any = 0.1,
) -> Captured:
    target = torch.arange(len(inputs)) % CLASSES
    opt = OPTIMIZERS[optimizer](model.parameters(), lr)
    batch = (inputs, target)
    return capture(model, opt, loss, [batch, batch], batch)


def verdict(model: nn.Module, inputs: Tensor, loss: Any = F.cross_entropy) -> str | None:
    return asymmetry(captured(model, inputs, loss).steady)


# --- granted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROVED)
def test_ordinary_models_are_proved(name: str) -> None:
    build, data = PROVED[name]
    assert verdict(build(), data()) is None


def random_inputs(adjoint: StepGraph, theta: dict[str, Tensor], seed: int = 1) -> list[Tensor]:
    """Inputs of the right kind: classes, token numbers, counters, positive second moments.

    θ stays near the initial weights, where every unit is alive: a gradient that is exactly zero
    is a singularity of Adam's first step.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for value, node in zip(adjoint.inputs, adjoint.placeholders, strict=True):
        like = node.meta["val"]
        if value.role is Role.CONSTANT:
            found.append(adjoint.constants[value.name])
            continue
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        if not like.is_floating_point():
            drawn = torch.randint(CLASSES, like.shape, generator=generator)
        elif value.label.endswith('["step"]'):
            drawn = torch.full(like.shape, 3.0)
        elif value.role is Role.THETA:
            drawn = theta[value.label].detach() + 0.05 * drawn
        elif value.role is Role.HYPER:
            drawn = torch.full(like.shape, 0.1)
        elif value.role is Role.OPT_STATE:
            drawn = drawn.square() + 0.1
        found.append(drawn.to(like.dtype))
    return found


def cotangents(adjoint: StepAdjoint, given: list[Tensor]) -> dict[tuple[Any, str], Tensor | None]:
    graph = simplify(adjoint.graph)
    results = graph.module(*given)
    return {(v.of, v.label): r for v, r in zip(graph.outputs, results, strict=True)}


def gap(result: Captured, step: StepGraph) -> float:
    """The largest difference between the modes, relative to the cotangent it is in.

    A cotangent that is nothing but rounding (a bias before a softmax) is measured against the
    rest, a thousandth of it.
    """
    live = live_state(step)
    mixed = mixed_adjoint(step, result.wanted, live)
    reverse = reverse_adjoint(step, result.wanted, live)
    given = random_inputs(reverse.graph, result.stock.theta)
    found, expected = cotangents(mixed, given), cotangents(reverse, given)
    assert set(found) == set(expected)
    norms = [t.norm() for t in expected.values() if t is not None]
    floor = 1e-3 * float(torch.stack(norms).norm())
    worst = 0.0
    for key, exact in expected.items():
        exact = torch.zeros(()) if exact is None else exact
        ours = found[key]
        ours = torch.zeros_like(exact) if ours is None else ours
        error = float((ours - exact).norm()) / max(float(exact.norm()), floor)
        assert math.isfinite(error), key
        worst = max(worst, error)
    return worst


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PROVED)
def test_both_modes_agree_where_symmetry_is_proved(name: str, optimizer: str) -> None:
    """With a learned loss, learned inputs and a learned rate; the first step of the smallest
    model, whose state is made in it, and the steady step of all."""
    build, data = PROVED[name]
    inputs = data()
    if inputs.is_floating_point():
        inputs.requires_grad_()
    lr = torch.tensor(0.1, requires_grad=True)
    result = captured(build(), inputs, WeightedLoss(), optimizer, lr)
    assert {label for _, label in result.wanted} >= {"loss.weight", "loss.smoothing"}
    assert (Role.BATCH, "train.inputs") in result.wanted or name == "embedding"
    for step in {id(s): s for s in ([result.first] * (name == "mlp") + [result.steady])}.values():
        assert mixed_obstacle(step, result.wanted, live_state(step)) is None
        assert gap(result, step) < 1e-12


# --- refused, each with its repaired twin -----------------------------------------------------


def line_of(text: str) -> str:
    """``file:line`` of the one line of this file that ends with a marker comment."""
    with open(__file__, encoding="utf-8") as file:
        found = [i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {text}")]
    assert len(found) == 1, text
    return f"{HERE}:{found[0]}"


class Function(nn.Module):
    """An MLP with a function of the hidden layer between its layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.output = nn.Linear(6, CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.function(torch.tanh(self.hidden(x))))


def distilled(prediction: Tensor, target: Tensor) -> Tensor:
    teacher = prediction.detach().softmax(-1)  # the detached teacher
    return F.cross_entropy(prediction, target) + F.cross_entropy(2 * prediction, teacher)


def undistilled(prediction: Tensor, target: Tensor) -> Tensor:
    teacher = prediction.softmax(-1)
    return F.cross_entropy(prediction, target) + F.cross_entropy(2 * prediction, teacher)


def test_detach_in_the_loss() -> None:
    reason = verdict(MLP(), torch.randn(5, 4), distilled)
    assert reason == f"a stop-gradient (detach or no_grad) at {line_of('the detached teacher')}"
    assert verdict(MLP(), torch.randn(5, 4), undistilled) is None


def test_detach_in_the_model() -> None:
    def gated(x: Tensor) -> Tensor:
        return x * x.detach().flip(1)  # the detached gate

    reason = verdict(Function(gated), torch.randn(5, 4))
    assert reason == f"a stop-gradient (detach or no_grad) at {line_of('the detached gate')}"
    assert verdict(Function(lambda x: x * x.flip(1)), torch.randn(5, 4)) is None


def test_no_grad_in_the_model() -> None:
    def gated(switch: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            with switch():
                gate = torch.sigmoid(x)
            return x * gate  # the gate is used

        return function

    reason = verdict(Function(gated(torch.no_grad)), torch.randn(5, 4))
    assert reason is not None and reason.startswith("a stop-gradient (detach or no_grad)")
    assert f" at {HERE}:" in reason
    assert verdict(Function(gated(contextlib.nullcontext)), torch.randn(5, 4)) is None


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"padding_idx": 2}, "an embedding whose padding row gets no gradient"),
        ({"padding_idx": 0}, "an embedding whose padding row gets no gradient"),
        ({"padding_idx": -1}, "an embedding whose padding row gets no gradient"),
        ({"scale_grad_by_freq": True}, "an embedding that scales its gradient by frequency"),
    ],
)
def test_embeddings_with_a_gradient_of_their_own(options: dict[str, Any], what: str) -> None:
    reason = verdict(Embedded(**options), tokens())
    assert reason is not None and reason.startswith(what)
    assert f" at {HERE}:" in reason  # the line of the forward that reads the table
    assert verdict(Embedded(), tokens()) is None


class NewStyle(torch.autograd.Function):
    """The cube, whose declared derivative is 1."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class OldStyle(torch.autograd.Function):
    """Likewise, without ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.flip(1)


@pytest.mark.parametrize("declared", [NewStyle, OldStyle])
def test_a_custom_function(declared: type[torch.autograd.Function]) -> None:
    def cubed(x: Tensor) -> Tensor:
        return declared.apply(x)  # the declared cube

    reason = verdict(Function(cubed), torch.randn(5, 4))
    assert reason is not None
    assert reason.startswith(("a declared derivative", "a stop-gradient"))
    assert reason.endswith(f" at {line_of('the declared cube')}") or f" at {HERE}:" in reason
    assert verdict(Function(lambda x: x**3), torch.randn(5, 4)) is None


def test_a_tensor_hook_in_the_model() -> None:
    def hooked(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            x = x * 1.0
            if x.requires_grad:
                x.register_hook(change)
            return x

        return function

    reason = verdict(Function(hooked(lambda grad: grad.clamp(-0.02, 0.02))), torch.randn(5, 4))
    assert reason is not None and "is not that of the loss (a hook?)" in reason
    assert verdict(Function(hooked(lambda grad: grad)), torch.randn(5, 4)) is None


def test_a_parameter_hook() -> None:
    model = MLP()
    handle = model.hidden.weight.register_hook(lambda grad: grad * grad.sign().flip(0))
    reason = verdict(model, torch.randn(5, 4))
    assert reason == "the inner gradient of hidden.weight is not that of the loss (a hook?)"
    handle.remove()
    assert verdict(model, torch.randn(5, 4)) is None


def test_a_module_hook() -> None:
    def reversed_gradient(module: nn.Module, grad_in: Any, grad_out: Any) -> Any:
        return tuple(None if g is None else -g for g in grad_in)

    model = MLP()
    handle = model.hidden.register_full_backward_hook(reversed_gradient)
    model.output.register_forward_hook(lambda module, args, output: output * 2)
    with contextlib.suppress(Exception):  # capture may refuse it; it must not prove it
        assert verdict(model, torch.randn(5, 4)) is not None
    handle.remove()
    assert verdict(model, torch.randn(5, 4)) is None


# --- the refusals are needed ------------------------------------------------------------------


def with_parameter_hook() -> nn.Module:
    model = MLP()
    model.hidden.weight.register_hook(lambda grad: grad * torch.arange(6.0)[:, None])
    return model


BROKEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Any]] = {
    "padding": (lambda: Embedded(padding_idx=2), tokens, F.cross_entropy),
    "a parameter hook": (with_parameter_hook, floats(5, 4), F.cross_entropy),
}


@pytest.mark.parametrize("name", BROKEN)
def test_mixed_mode_is_wrong_without_symmetry(name: str) -> None:
    """The broken twin of the comparison of modes: it sees what the proof refuses."""
    build, data, loss = BROKEN[name]
    result = captured(build(), data(), loss)
    assert asymmetry(result.steady) is not None
    assert gap(result, result.steady) > 1e-3


# --- tampered graphs --------------------------------------------------------------------------


def gradient_nodes(step: StepGraph, *targets: Any) -> Iterator[Any]:
    return (
        node
        for node in step.graph.nodes
        if node.op == "call_function"
        and node.target in targets
        and node.meta["phase"] is Phase.GRADIENT
    )


def test_a_changed_gradient_graph_is_refused() -> None:
    """The gradient phase is compared node for node: another op or another number shows."""
    aten = torch.ops.aten
    original = captured(MLP(), torch.randn(5, 4)).steady
    assert asymmetry(copy(original)) is None
    sign = copy(original)
    next(gradient_nodes(sign, aten.tanh_backward.default)).target = aten.sigmoid_backward.default
    assert "hidden" in str(asymmetry(sign))
    number = copy(original)
    node = next(
        n
        for n in number.graph.nodes
        if n.op == "call_function"
        and n.meta["phase"] is Phase.GRADIENT
        and n.target is not operator.getitem
        and any(isinstance(a, int) and not isinstance(a, bool) for a in n.args)
    )
    node.args = tuple(
        a + 1 if isinstance(a, int) and not isinstance(a, bool) else a for a in node.args
    )
    assert asymmetry(number) is not None
