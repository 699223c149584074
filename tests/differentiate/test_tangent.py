"""Forward-mode accumulation, driven by hand over T steps: the gradient of the reverse program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import unrollc
from tests.differentiate.steps import captured
from tests.oracles import finite
from tests.oracles.compare import assert_close, relative_error
from tests.oracles.models import CLASSES, MLP, ConvNet, DropoutMLP, WeightedLoss
from unrollc.differentiate import pushforward
from unrollc.differentiate.replay import calls
from unrollc.differentiate.tangent import moving_in, tangent_obstacle
from unrollc.plan.pieces import ForwardMode
from unrollc.runtime import lowering, tangents
from unrollc.runtime.load import load
from unrollc.runtime.lowering import Lowered
from unrollc.step import STATE_ROLES, Phase, Role, StepGraph

pytestmark = pytest.mark.usefixtures("float64", "short_loops_too")

T, SEED = 5, 11


Alternatives = tuple[Lowered, ForwardMode | str]


def alternatives(program: Any, train: Any, val: Any) -> Alternatives:
    """The program with a backward pass, and its form in forward mode (or why there is none)."""
    found: list[ForwardMode | str] = []

    def first(*args: Any) -> str:
        found.append(tangents.forward_mode(*args))
        return "the test wants both"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "forward_mode", first)
        lowered = program.lower(train, val)
    return lowered, found[0]


class Driver:
    """Runs the graphs of a lowered program node by node, as the generated code would."""

    def __init__(self, lowered: Lowered, inputs: dict[str, Any]) -> None:
        self.pieces, self.inputs = lowered.pieces, inputs
        self.state: dict[tuple[Role, str], Tensor] = {}
        self.tangents: dict[tuple[int, Role, str], Tensor] = {}

    def value(self, graph: StepGraph, value: Any, step: int, noise: dict[str, Tensor]) -> Tensor:
        if value.role is Role.CONSTANT:
            return graph.constants[value.name]
        if value.role is Role.NOISE:
            return noise[value.name]
        if value.role is Role.TANGENT:
            return self.tangents[value.direction, value.of, value.label]
        if value.role in STATE_ROLES:
            return self.state.get((value.role, value.label), self.inputs.get(value.label))
        found = self.inputs[value.label]
        return found[step] if value.label in self.pieces.per_step else found

    def call(self, graph: StepGraph, step: int) -> list[tuple[Any, Tensor]]:
        generator = torch.Generator().manual_seed((SEED * 1000003 + step) % 2**63)
        noise = {}
        for value, _ in graph.inputs_with(Role.NOISE):
            assert value.noise is not None and value.noise.distribution == "bernoulli"
            like = torch.empty(value.noise.shape, dtype=value.noise.dtype)
            noise[value.name] = like.bernoulli_(*value.noise.parameters, generator=generator)
        given = [self.value(graph, value, step, noise) for value in graph.inputs]
        with torch.no_grad():
            results = graph.module(*given)
        pairs = zip(graph.outputs, results, strict=True)
        return [(value, tensor) for value, tensor in pairs if tensor is not None]

    def run(self, found: ForwardMode) -> tuple[Tensor, dict[str, Tensor]]:
        """The validation loss and the meta-gradients by label."""
        for step, index in enumerate(found.sequence):
            self.advance(found.steps[index], step)
        return self.products(found)

    def advance(self, graph: StepGraph, step: int) -> None:
        results = self.call(graph, step)
        self.state = {(v.role, v.label): t for v, t in results if v.role in STATE_ROLES}
        self.tangents = {
            (v.direction, v.of, v.label): t for v, t in results if v.role is Role.TANGENT
        }

    def products(self, found: ForwardMode) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.pieces.val_gradient is not None
        results = self.call(self.pieces.val_gradient, T)
        ((_, loss),) = [pair for pair in results if pair[0].role is Role.LOSS]
        cotangents = {(v.of, v.label): t for v, t in results if v.role is Role.COTANGENT}
        totals: dict[str, Tensor] = {}
        for number, direction in enumerate(found.directions):
            label = direction.key[1]
            if label not in totals:
                totals[label] = torch.zeros_like(self.inputs[label])
                totals[label] += cotangents.get(direction.key, 0.0)
            totals[label][direction.index] += sum(
                (cotangents[role, name] * tangent).sum()
                for (other, role, name), tangent in self.tangents.items()
                if other == number
            )
        return loss, totals


# --- programs -----------------------------------------------------------------------------------


def scalar(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def sgd() -> dict[str, Any]:
    model, lr = MLP(), scalar(0.1)
    return {"model": model, "opt": torch.optim.SGD(model.parameters(), lr=lr), "meta": [lr]}


def momentum() -> dict[str, Any]:
    model, lr, mu = MLP(), scalar(0.1), scalar(0.8)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8, weight_decay=0.02)
    opt.param_groups[0]["momentum"] = mu
    return {"model": model, "opt": opt, "meta": [lr, mu]}


def adam() -> dict[str, Any]:
    model, lr, beta, eps = MLP(), scalar(0.02), scalar(0.8), scalar(1e-2)
    opt = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.8, 0.95))
    opt.param_groups[0].update(betas=(beta, 0.95), eps=eps)
    return {"model": model, "opt": opt, "meta": [lr, beta, eps]}


def loss_weights() -> dict[str, Any]:
    """A tensor of several elements, which the validation loss reads as well."""
    model, loss = MLP(), WeightedLoss()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    return {
        "model": model,
        "opt": opt,
        "loss": loss,
        "val_loss": lambda p, t: loss(p, t) + loss.weight.square().sum(),
        "meta": list(loss.parameters()),
    }


def dropout() -> dict[str, Any]:
    model, lr = DropoutMLP(), scalar(0.1)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8)
    return {"model": model, "opt": opt, "meta": [lr]}


def batch_norm() -> dict[str, Any]:
    model, lr = ConvNet(), scalar(0.1)
    return {"model": model, "opt": torch.optim.SGD(model.parameters(), lr=lr), "meta": [lr]}


class Levelled(nn.Module):
    """A buffer that the loss reads: it carries tangents from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)
        self.register_buffer("level", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        level = self.level
        self.level = 0.8 * self.level + 0.2 * hidden.square().mean()
        return hidden * level


def buffers() -> dict[str, Any]:
    model, lr = Levelled(), scalar(0.1)
    return {"model": model, "opt": torch.optim.SGD(model.parameters(), lr=lr), "meta": [lr]}


def asymmetric() -> dict[str, Any]:
    """A stop-gradient in the loss: the inner gradient is no gradient, which nothing here needs."""
    model, lr = MLP(), scalar(0.1)
    return {
        "model": model,
        "opt": torch.optim.SGD(model.parameters(), lr=lr),
        "loss": lambda p, t: F.cross_entropy(p * p.detach().square(), t),
        "meta": [lr],
    }


def averaged() -> dict[str, Any]:
    """The validation loss reads averaged weights; gradients are clipped on the way."""
    model, lr = MLP(), scalar(0.1)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def clip(params: Any) -> None:
        nn.utils.clip_grad_norm_(params, 0.3)

    return {"model": model, "opt": opt, "average": average, "grad_transform": clip, "meta": [lr]}


PROGRAMS: dict[str, Callable[[], dict[str, Any]]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adam": adam,
    "loss weights": loss_weights,
    "dropout": dropout,
    "batch norm": batch_norm,
    "buffers": buffers,
    "asymmetric": asymmetric,
    "averaged": averaged,
}


def program_of(name: str, **options: Any) -> tuple[Any, Any, Any]:
    """A program, its training data and its validation batch."""
    torch.manual_seed(3)
    given = {"loss": F.cross_entropy, **PROGRAMS[name](), **options}
    shape = (6, 1, 4, 4) if name == "batch norm" else (5, 4)
    train = (torch.randn(T, *shape), torch.randint(CLASSES, (T, shape[0])))
    val = (torch.randn(*shape), torch.randint(CLASSES, (shape[0],)))
    program = unrollc.compile(given.pop("model"), given.pop("opt"), given.pop("loss"), **given)
    return program, train, val


def both_of(name: str, **options: Any) -> tuple[Lowered, ForwardMode, dict[str, Any]]:
    """Both forms of a program, and its inputs."""
    given = program_of(name, **options)
    lowered, found = alternatives(*given)
    assert isinstance(found, ForwardMode), found
    return lowered, found, given[0].inputs(*given[1:])


def in_reverse(lowered: Lowered, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    return load(lowered.generated).loss_and_gradients(inputs, SEED)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_gradient_is_that_of_the_reverse_program(name: str) -> None:
    lowered, forward, inputs = both_of(name)
    loss, expected = in_reverse(lowered, inputs)
    found_loss, found = Driver(lowered, inputs).run(forward)
    assert relative_error(found_loss, loss) < 1e-14
    assert_close(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_the_first_order_gradient_is_that_of_the_reverse_program(name: str) -> None:
    lowered, forward, inputs = both_of(name, gradient=unrollc.FirstOrder())
    _, expected = in_reverse(lowered, inputs)
    _, found = Driver(lowered, inputs).run(forward)
    assert_close(found, expected, rtol=1e-12)


def test_finite_differences_agree() -> None:
    lowered, forward, inputs = both_of("adam")
    _, found = Driver(lowered, inputs).run(forward)

    def value() -> Tensor:
        return in_reverse(lowered, inputs)[0]

    for label, gradient in found.items():
        step = 2e-3 if label.endswith('["eps"]') else 1e-2
        finite.assert_gradient(value, inputs[label], gradient, step=step)


# --- broken twins and structure -------------------------------------------------------------------


def test_a_dropped_tangent_is_caught() -> None:
    """The momentum buffer's tangent, taken as zero at every step."""
    lowered, found, inputs = both_of("momentum")
    _, expected = in_reverse(lowered, inputs)
    driver = Driver(lowered, inputs)
    for step, index in enumerate(found.sequence):
        for (number, role, label), tangent in driver.tangents.items():
            if role is Role.OPT_STATE:
                driver.tangents[number, role, label] = torch.zeros_like(tangent)
        driver.advance(found.steps[index], step)
    _, broken = driver.products(found)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(broken, expected, rtol=1e-4)


def test_only_what_moves_has_a_tangent() -> None:
    """A learning rate moves θ_1, which moves the momentum of step 1; step T-1 hands on θ alone."""
    _, found, _ = both_of("momentum")
    graphs = [found.steps[index] for index in found.sequence]
    entering = [{value.of for value, _ in graph.inputs_with(Role.TANGENT)} for graph in graphs]
    both = {Role.THETA, Role.OPT_STATE}
    assert entering == [set(), {Role.THETA}, *[both] * (T - 2)]
    assert {key[0] for _, key in moving_in(graphs[-1].outputs_with(Role.TANGENT))} == {Role.THETA}
    assert found.sequence == (0, 1, 2, 2, 3)


def test_the_primal_ops_stand_there_once() -> None:
    """Directions add tangents, not steps: products of the primal are not repeated."""
    lowered, found, _ = both_of("adam")

    def count(graph: StepGraph) -> int:
        return sum(n.meta["phase"] is not Phase.TANGENT for n in calls(graph, *Phase))

    assert count(found.steps[1]) == count(lowered.pieces.steps[-1])


# --- singular points ------------------------------------------------------------------------------


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -0.4, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).square().sum() + (self.w * x).sum()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_coordinate_without_a_gradient(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second moment is zero, where the root's slope is infinite: the limit, as in reverse."""
    model, lr = Weights(), scalar(0.02)
    opt = kind(model.parameters(), lr=lr, eps=1e-2)
    x = torch.randn(T, 3)
    x[:, 1] = 0.0
    program = unrollc.compile(model, opt, lambda p, t: p - t, meta=[lr])
    batch = (x, torch.zeros(T)), (torch.randn(3), torch.zeros(()))
    lowered, forward = alternatives(program, *batch)
    inputs = program.inputs(*batch)
    _, expected = in_reverse(lowered, inputs)
    _, found = Driver(lowered, inputs).run(forward)
    assert_close(found, expected, rtol=1e-12)
    assert all(gradient.isfinite().all() for gradient in found.values())
    # The broken twin: the same without the rule.
    monkeypatch.setattr(pushforward, "zero_where_zero", lambda slope, factor: slope)
    again = unrollc.compile(model, opt, lambda p, t: p - t, meta=[lr])
    _, broken = Driver(lowered, inputs).run(alternatives(again, *batch)[1])
    assert all(gradient.isnan().all() for gradient in broken.values())


# --- what takes reverse mode ----------------------------------------------------------------------


class Bag(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, **options)
        self.output = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.table(tokens).sum(1)))


def bag(**options: Any) -> StepGraph:
    model = Bag(**options)
    batch = (torch.randint(6, (5, 3)), torch.randint(CLASSES, (5,)))
    return captured(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, batch)


def test_an_embedding_that_masks_its_gradient_is_left_to_reverse_mode() -> None:
    """PyTorch's two modes disagree about the padding row; its own double backward is the norm."""
    reason = tangent_obstacle(bag(padding_idx=0))
    assert reason is not None and reason.startswith("an embedding whose padding row")
    assert tangent_obstacle(bag()) is None


def reason_of(meta: list[Any], **options: Any) -> str:
    """Why a linear model and these meta-parameters are left to reverse mode."""
    model = nn.Linear(4, CLASSES)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    group = opt.param_groups[0]
    group.update(lr=meta[0] if meta else 0.1)
    batch = (torch.randn(5, 4), torch.randint(CLASSES, (5,)))
    program = unrollc.compile(
        model, opt, WeightedLoss(), meta=meta or [model.bias], val_loss=F.cross_entropy, **options
    )
    _, reason = alternatives(program, unrollc.repeat(batch, T), batch)
    assert isinstance(reason, str), reason
    return reason


def test_what_is_left_to_reverse_mode() -> None:
    assert reason_of([]) == "bias, where the loop starts, is a meta-parameter"
    rates = unrollc.PerStep(torch.full((T,), 0.1, requires_grad=True))
    stepwise = 'param_groups[0]["lr"] has one value a step, hence a direction a step'
    assert reason_of([rates]) == stepwise
    truncated = "the gradient is truncated, which bounds what is kept"
    assert reason_of([scalar(0.1)], gradient=unrollc.Truncated(2)) == truncated
    many = torch.full((tangents.MOST_DIRECTIONS + 1,), 0.1, requires_grad=True)
    objective = unrollc.objective(lambda model, batch: model(batch).square().sum() * many.mean())
    model = nn.Linear(4, CLASSES)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, objective, meta=[many])
    _, reason = alternatives(program, unrollc.repeat(torch.randn(5, 4), T), torch.randn(5, 4))
    assert reason == "the meta-parameters have 9 elements, which are not few"


def test_an_op_without_a_forward_formula_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap is made up: the ops of these programs have formulas."""
    jvp = torch.func.jvp

    def patchy(function: Any, primals: Any, directions: Any) -> Any:
        value, tangent = jvp(function, primals, directions)
        if isinstance(value, Tensor) and value.shape == (5, 6):
            raise NotImplementedError("no forward-mode derivative")
        return value, tangent

    given = program_of("sgd")
    monkeypatch.setattr(torch.func, "jvp", patchy)
    _, reason = alternatives(*given)
    assert reason == "aten.addmm.default has no forward-mode derivative"
