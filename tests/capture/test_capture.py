"""What a captured step looks like, and what capturing leaves untouched."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.capture.steps import Captured, capture
from tests.oracles import cases
from tests.oracles.models import MLP, ConvNet, DropoutMLP, WeightedLoss
from tests.oracles.objectives import unstack
from unrollc.step import Noise, Phase, Role, StepGraph, tensors_of, verify

pytestmark = pytest.mark.usefixtures("float64")

T = 4


def captured(
    model: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    loss: Any = F.cross_entropy,
    shape: tuple[int, ...] = (5, 4),
    **hyper: Any,
) -> Captured:
    opt = optimizer(model.parameters(), **{"lr": 0.1, **hyper})
    train = cases.batches(shape, T, seed=1)
    return capture(model, opt, loss, train, unstack(train)[0])


def labels(step: StepGraph, role: Role) -> list[str]:
    return [value.label for value, _ in step.inputs_with(role)]


# --- roles and phases -------------------------------------------------------------------------


def test_inputs_have_their_roles() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    found = captured(ConvNet(), torch.optim.Adam, WeightedLoss(), (6, 1, 4, 4), lr=lr)
    step = found.steady
    verify(step)
    theta = ["conv1.weight", "norm1.weight", "norm1.bias", "conv2.weight", "norm2.weight"]
    theta += ["norm2.bias", "output.weight", "output.bias"]
    assert labels(step, Role.THETA) == theta
    entries = ("step", "exp_avg", "exp_avg_sq")
    state = [f'state["{owner}"]["{entry}"]' for owner in theta for entry in entries]
    assert labels(step, Role.OPT_STATE) == state
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    buffers = [f"{norm}.{name}" for norm in ("norm1", "norm2") for name in statistics]
    assert labels(step, Role.BUFFER) == buffers
    assert labels(step, Role.HYPER) == ['param_groups[0]["lr"]']
    assert labels(step, Role.CONTEXT) == ["loss.weight", "loss.smoothing"]
    assert labels(step, Role.BATCH) == ["train.inputs", "train.target"]
    assert labels(step, Role.NOISE) == []


def test_outputs_have_their_roles() -> None:
    step = captured(ConvNet(), torch.optim.Adam, WeightedLoss(), (6, 1, 4, 4)).steady
    for role in (Role.THETA, Role.OPT_STATE, Role.BUFFER):
        assert [v.label for v, _ in step.outputs_with(role)] == labels(step, role)
    ((_, loss),) = step.outputs_with(Role.LOSS)
    assert loss is not None and loss.meta["val"].shape == ()
    gradients = step.outputs_with(Role.GRADIENT)
    assert [v.label for v, _ in gradients if v.of is Role.THETA] == labels(step, Role.THETA)
    assert [v.label for v, _ in gradients if v.of is Role.CONTEXT] == labels(step, Role.CONTEXT)
    for _, node in gradients:
        assert node is not None and node.meta["phase"] is Phase.GRADIENT


def test_phases_follow_each_other() -> None:
    step = captured(MLP(), torch.optim.Adam).steady
    order = [Phase.FORWARD, Phase.LOSS, Phase.GRADIENT, Phase.UPDATE]
    phases = [n.meta["phase"] for n in step.graph.nodes if n.op == "call_function"]
    assert set(phases) == set(order)
    assert phases == sorted(phases, key=order.index)
    rank = {phase: i for i, phase in enumerate(order)}
    for node in step.graph.nodes:
        for source in node.all_input_nodes:
            if node.op == source.op == "call_function":
                assert rank[source.meta["phase"]] <= rank[node.meta["phase"]]
    # The update sees the inner step through its gradients alone.
    gradients = {node for _, node in step.outputs_with(Role.GRADIENT)}
    for node in step.graph.nodes:
        if node.op == "call_function" and node.meta["phase"] is Phase.UPDATE:
            for source in node.all_input_nodes:
                inner = source.op == "call_function" and source.meta["phase"] is not Phase.UPDATE
                assert not inner or source in gradients


def test_the_validation_reads_weights_buffers_and_its_batch() -> None:
    found = captured(ConvNet(), torch.optim.Adam, shape=(6, 1, 4, 4))
    assert labels(found.val, Role.OPT_STATE) == []
    assert labels(found.val, Role.THETA) == labels(found.steady, Role.THETA)
    assert labels(found.val, Role.BATCH) == ["val.inputs", "val.target"]
    phases = {n.meta["phase"] for n in found.val.graph.nodes if n.op == "call_function"}
    assert phases == {Phase.FORWARD, Phase.LOSS}


def test_a_captured_step_is_the_ordinary_one() -> None:
    model = MLP()
    found = captured(model)
    inputs, target = cases.batches((5, 4), T, seed=1)
    theta = dict(model.named_parameters())
    given = [
        theta[v.label] if v.role is Role.THETA else inputs[0] if "inputs" in v.label else target[0]
        for v in found.first.inputs
    ]
    with torch.no_grad():
        results = found.first.module(*given)
    loss = F.cross_entropy(model(inputs[0]), target[0])
    gradients = torch.autograd.grad(loss, list(theta.values()))
    pairs = zip(found.first.outputs, results, strict=True)
    by_key = {(v.role, v.label, v.of): r for v, r in pairs}
    torch.testing.assert_close(by_key[Role.LOSS, "loss", None], loss.detach(), rtol=1e-14, atol=0)
    for name, gradient in zip(theta, gradients, strict=True):
        expected = theta[name].detach() - 0.1 * gradient
        torch.testing.assert_close(by_key[Role.THETA, name, None], expected, rtol=1e-13, atol=0)


def test_a_tampered_graph_is_no_step() -> None:
    """The broken twins of `verify`."""
    step = captured(MLP()).steady
    node = next(n for n in step.graph.nodes if n.op == "call_function")
    phase = node.meta.pop("phase")
    with pytest.raises(AssertionError, match="no metadata"):
        verify(step)
    node.meta["phase"] = phase
    verify(step)
    target, node.target = node.target, torch.ops.aten.add_.Tensor
    with pytest.raises(AssertionError, match="mutation"):
        verify(step)
    node.target = torch.tanh
    with pytest.raises(AssertionError):
        verify(step)
    node.target = target
    with pytest.raises(AssertionError, match="is typed as"):
        verify(StepGraph(step.graph, step.inputs[::-1], step.outputs, step.constants))
    with pytest.raises(AssertionError):
        verify(StepGraph(step.graph, step.inputs[1:], step.outputs, step.constants))


# --- distinct steps ---------------------------------------------------------------------------


def test_plain_descent_has_one_step() -> None:
    loop = captured(MLP()).loop
    assert len(loop.steps) == len(loop.kinds) == 1
    assert loop.sequence == (0,) * T


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [(torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1})],
    ids=["adam", "momentum"],
)
def test_the_step_that_makes_the_state_is_apart(optimizer: Any, hyper: dict[str, Any]) -> None:
    found = captured(MLP(), optimizer, **hyper)
    assert found.loop.sequence == (0, *(1,) * (T - 1))
    assert labels(found.first, Role.OPT_STATE) == []
    made = [value.label for value, _ in found.first.outputs_with(Role.OPT_STATE)]
    assert made and labels(found.steady, Role.OPT_STATE) == made


def test_state_that_is_there_already_needs_no_first_step() -> None:
    model = MLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train = cases.batches((5, 4), T, seed=1)
    val = unstack(train)[0]
    F.cross_entropy(model(val[0]), val[1]).backward()
    opt.step()
    assert capture(model, opt, F.cross_entropy, train, val).loop.sequence == (0,) * T


# --- parameters that are not trained ----------------------------------------------------------


def test_frozen_and_foreign_parameters_are_context() -> None:
    model = MLP()
    model.hidden.bias.requires_grad_(False)
    opt = torch.optim.SGD([model.hidden.weight, model.hidden.bias, model.output.weight], lr=0.1)
    train = cases.batches((5, 4), T, seed=1)
    found = capture(model, opt, F.cross_entropy, train, unstack(train)[0])
    assert labels(found.steady, Role.THETA) == ["hidden.weight", "output.weight"]
    assert labels(found.steady, Role.CONTEXT) == ["hidden.bias", "output.bias"]
    assert found.wanted == {(Role.CONTEXT, "output.bias")}


def test_statistics_that_stand_still_are_context() -> None:
    model = ConvNet().eval()
    step = captured(model, shape=(6, 1, 4, 4)).steady
    assert labels(step, Role.BUFFER) == []
    assert "norm1.running_mean" in labels(step, Role.CONTEXT)


def test_tensors_of_closures_are_lifted() -> None:
    shift, scale = torch.randn(3), torch.tensor(2.0, requires_grad=True)

    def shifted(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction * scale + shift, target)

    found = captured(MLP(), loss=shifted)
    lifted = found.loop.lifted
    assert {id(t) for t in lifted.values()} == {id(shift), id(scale)}
    assert set(lifted) == {"closure[0]", "closure[1]"} == set(labels(found.steady, Role.CONTEXT))
    assert not found.steady.constants


# --- what capturing leaves untouched ----------------------------------------------------------


class Scribbling(MLP):
    """A forward that sets attributes, fills containers and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.last: Tensor | None = None
        self.history: list[Tensor] = []
        self.cache: dict[str, Tensor] = {"old": torch.ones(1)}
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.history.append(x)
        self.cache["new"] = x
        self.late = x
        self.seen = self.seen + 1
        return super().forward(x)


def test_attributes_that_a_forward_sets_are_put_back() -> None:
    model = Scribbling()
    history, cache, seen = model.history, model.cache, model.seen
    attributes = set(vars(model))
    found = captured(model)
    assert labels(found.steady, Role.BUFFER) == ["seen"]
    assert set(vars(model)) == attributes
    assert model.calls == 0 and model.last is None
    assert model.history is history == []
    assert model.cache is cache and set(cache) == {"old"}
    assert model.seen is seen and seen == 0
    assert model.hidden.weight.grad is None


class Rolling(MLP):
    """A forward that draws from torch's generator, and from those of others that are given."""

    def __init__(self, *others: Callable[[], float]) -> None:
        super().__init__()
        self.others = others

    def forward(self, x: Tensor) -> Tensor:
        for draw in self.others:
            draw()
        torch.rand(3)
        return super().forward(F.dropout(x, 0.5))


OTHERS = {"torch": (), "random": (random.random,), "numpy.random": (np.random.rand,)}


@pytest.mark.parametrize("generator", OTHERS)
def test_generators_are_untouched(generator: str) -> None:
    """Numbers that torch does not draw would be the same at every step, which is refused."""
    model = Rolling(*OTHERS[generator])
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    train = cases.batches((5, 4), T, seed=1)
    program = unrollc.compile(model, opt, F.cross_entropy)

    def states() -> Any:
        return list(torch.get_rng_state()), random.getstate(), repr(np.random.get_state())

    before = states()
    refused = pytest.raises(unrollc.CaptureError, match=f"draws numbers from {generator}")
    with refused if generator != "torch" else contextlib.nullcontext():
        program.lower(train, unstack(train)[0])
    assert states() == before


# --- noise ------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A linear layer on inputs that a random function has changed."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.output = nn.Linear(4, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.change(x))


def noise_of(step: StepGraph) -> list[Noise | None]:
    return [value.noise for value, _ in step.inputs_with(Role.NOISE)]


NOISES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, tuple[float, ...]]]] = {
    "rand": (lambda x: x + torch.rand_like(x), ("uniform", (0.0, 1.0))),
    "randn": (lambda x: x + torch.randn(5, 4), ("normal", (0.0, 1.0))),
    "dropout": (lambda x: F.dropout(x, 0.25), ("bernoulli", (0.75,))),
    "bernoulli": (lambda x: x * torch.bernoulli(x, p=0.3), ("bernoulli", (0.3,))),
    "probabilities": (lambda x: torch.bernoulli(x.sigmoid()), ("uniform", (0.0, 1.0))),
    "uniform": (lambda x: x + torch.empty_like(x).uniform_(-1, 2), ("uniform", (-1, 2))),
    "normal": (lambda x: x + torch.empty_like(x).normal_(1, 3), ("normal", (1, 3))),
    "exponential": (lambda x: x + torch.empty_like(x).exponential_(2), ("exponential", (2.0,))),
}


@pytest.mark.parametrize("name", NOISES)
def test_random_ops_become_inputs(name: str) -> None:
    change, (distribution, parameters) = NOISES[name]
    found = captured(Noisy(change))
    for step in (found.steady, found.val):
        (noise,) = noise_of(step)
        assert noise is not None
        assert (noise.distribution, noise.parameters) == (distribution, parameters)
        assert noise.shape == (5, 4) and noise.dtype is torch.float64
        for node in step.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                assert torch.Tag.nondeterministic_seeded not in node.target.tags


def test_permutations_and_integers_become_inputs() -> None:
    def change(x: Tensor) -> Tensor:
        return x[torch.randperm(5)] + torch.randint(2, 7, (5, 4))

    first, second = noise_of(captured(Noisy(change)).steady)
    assert first is not None and second is not None
    assert (first.distribution, first.shape, first.dtype) == ("randperm", (5,), torch.int64)
    assert (second.distribution, second.parameters) == ("randint", (2, 7))


def test_no_noise_without_random_ops() -> None:
    """The broken twin: dropout that is switched off."""
    assert noise_of(captured(DropoutMLP()).steady)
    assert not noise_of(captured(DropoutMLP().eval()).steady)


# --- devices ----------------------------------------------------------------------------------


def off_device(step: StepGraph) -> list[str]:
    """Values that are not on the meta device, scalars aside (they may stay on the CPU)."""
    return [
        node.format_node() or node.name
        for node in step.graph.nodes
        if any(t.dim() > 0 and t.device.type != "meta" for t in tensors_of(node))
    ]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_capture_stays_on_the_device(optimizer: Any) -> None:
    """The meta device stands for any but the CPU: autograd's engine refuses a device for which
    PyTorch was not built, fake tensors or not."""
    model = DropoutMLP().to("meta")
    opt = optimizer(model.parameters(), lr=0.1)
    inputs, target = (part.to("meta") for part in cases.batches((5, 4), T, seed=1))
    found = capture(model, opt, F.cross_entropy, (inputs, target), (inputs[0], target[0]))
    for step in (*found.loop.steps, found.val):
        assert off_device(step) == []
        for noise in noise_of(step):
            assert noise is not None and noise.device.type == "meta"
    # The broken twin: the same on the CPU.
    assert off_device(captured(DropoutMLP(), optimizer).steady)
