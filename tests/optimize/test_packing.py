"""Packed state: the same program, fewer ops; what must not be packed is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import unrollc
from tests.oracles.compare import relative_error
from tests.plan.graphs import Sketch
from unrollc.errors import RequirementError
from unrollc.optimize import grouping, packed_loop, packing
from unrollc.optimize.congruence import equal_state
from unrollc.optimize.packed_step import Group, Pack, UnpackableError, packed
from unrollc.runtime import adjoints, lowering
from unrollc.step import Phase, Role, StepGraph, Value, iterate_calls

aten = torch.ops.aten
UPDATE = Phase.UPDATE

Make = Callable[[nn.Module], torch.optim.Optimizer]


def rate_each(make: Any, **options: Any) -> Make:
    """An optimizer with a learning rate that requires grad for each tensor."""

    def built(model: nn.Module) -> torch.optim.Optimizer:
        groups = [
            {"params": [p], "lr": torch.tensor(0.01 * (i + 1), requires_grad=True)}
            for i, p in enumerate(model.parameters())
        ]
        return make(groups, **options)

    return built


def plain(make: Any, **options: Any) -> Make:
    return lambda model: make(model.parameters(), **options)


def warmed(make: Make, *, apart: bool = False) -> Make:
    """An optimizer that has state already; with counters of their own where they are `apart`."""

    def built(model: nn.Module) -> torch.optim.Optimizer:
        opt = make(model)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            opt.step()
        opt.zero_grad()
        if apart:
            for i, state in enumerate(opt.state.values()):
                state["step"] += i
        return opt

    return built


def half_warm(model: nn.Module) -> torch.optim.Optimizer:
    """Pretrained first layers have state, and weights alone decay: counters differ, groups too."""
    named = dict(model.named_parameters())
    weights = [p for name, p in named.items() if name.endswith("weight")]
    biases = [p for name, p in named.items() if name.endswith("bias")]
    groups = [{"params": biases, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.01}]
    opt = torch.optim.AdamW(groups, lr=0.02, eps=1e-2)
    for name, p in named.items():
        if name.startswith("0."):
            zero, one = torch.zeros_like(p), torch.ones_like(p)
            opt.state[p] = {"step": torch.tensor(3.0), "exp_avg": zero, "exp_avg_sq": one}
    return opt


OPTIMIZERS: dict[str, Make] = {
    "adam, a rate each": rate_each(torch.optim.Adam),
    "amsgrad, warm": warmed(plain(torch.optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True)),
    "adam, warm, counters apart": warmed(rate_each(torch.optim.Adam), apart=True),
    "adamw, half warm, two decays": half_warm,
    "momentum": plain(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": rate_each(torch.optim.RMSprop, momentum=0.5, centered=True),
    "nadam": plain(torch.optim.NAdam, lr=0.01),
    "rprop": plain(torch.optim.Rprop, lr=0.01),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)]
    return nn.Sequential(*layers)


def data(steps: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps + 1, 5, 4, generator=generator)
    y = torch.randn(steps + 1, 5, 2, generator=generator)
    return (x[1:], y[1:]), (x[0], y[0])


def run(make: Make, steps: int, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Everything that a run gives, by name, and its lowered program."""
    model = network()
    opt = make(model)
    program = unrollc.compile(model, opt, nn.functional.mse_loss, **options)
    train, val = data(steps)
    lowered = program.lower(train, val)
    result = program(train, val)
    result.loss.backward()
    rates = [group["lr"] for group in opt.param_groups if isinstance(group["lr"], Tensor)]
    found = {"loss": result.loss, "inner losses": result.inner_losses}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found |= {f"gradient of rate {i}": rate.grad for i, rate in enumerate(rates)}
    found |= {f"θ_T {name}": tensor for name, tensor in result.params.items()}
    for owner, state in result.opt_state.items():
        found |= {f"{owner} {key}": torch.as_tensor(value) for key, value in state.items()}
    return lowered, found


def with_passes(monkeypatch: pytest.MonkeyPatch, passes: tuple[packing.LoopPass, ...]) -> None:
    def some(loop: Any, val: Any, val_gradient: Any) -> packed_loop.PackedLoop:
        return packing.rewritten(loop, val, val_gradient, passes)

    monkeypatch.setattr(adjoints, "rewritten", some)
    monkeypatch.setattr(lowering, "rewritten", some)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_program_stays_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_program(OPTIMIZERS[name], packing.PASSES, monkeypatch)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rewrite", [packing.share_equal_state, packing.pack_alike])
def test_each_pass_alone(rewrite: packing.LoopPass, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_program(OPTIMIZERS["adam, a rate each"], (rewrite,), monkeypatch)


def assert_same_program(
    make: Make, passes: tuple[packing.LoopPass, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_passes(monkeypatch, passes)
    lowered, found = run(make, 3)
    assert lowered.packing != packed_loop.Packing(), "nothing has changed"
    with_passes(monkeypatch, ())
    _, expected = run(make, 3)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert tensor.shape == found[key].shape, key
        assert relative_error(found[key], tensor) < 1e-12, key


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [{"gradient": unrollc.FirstOrder()}, {"gradient": unrollc.Truncated(2)}, {"memory": "64KiB"}],
)
def test_every_kind_of_gradient_over_packed_state(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = OPTIMIZERS["adam, a rate each"]
    if "memory" not in options:
        inner = make

        def make(model: nn.Module) -> torch.optim.Optimizer:  # θ_0 is far away
            return inner(model)

        options |= {"meta": [f'param_groups[{i}]["lr"]' for i in range(4)]}
    lowered, found = run(make, 6, **options)
    assert lowered.packing.groups
    with_passes(monkeypatch, ())
    _, expected = run(make, 6, **options)
    for key, tensor in expected.items():
        if tensor is not None:
            assert relative_error(found[key], tensor) < 1e-12, key


@pytest.mark.usefixtures("float64")
def test_fewer_ops_run() -> None:
    lowered, _ = run(OPTIMIZERS["adam, a rate each"], 4)
    captured = sum(node.meta["phase"] is UPDATE for node in iterate_calls(lowered.loop.steps[1]))
    steady = lowered.pieces.steps[lowered.pieces.sequence[-2]]
    now = sum(node.meta["phase"] is UPDATE for node in iterate_calls(steady))
    assert now < captured / 3, (now, captured)
    assert len(steady.inputs_with(Role.OPT_STATE)) == 3  # two moments and one counter


@pytest.mark.usefixtures("float64")
def test_what_is_updated_otherwise_is_packed_apart() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        one, two = list(model.parameters())[:2], list(model.parameters())[2:]
        return torch.optim.Adam([{"params": one, "betas": (0.5, 0.9)}, {"params": two}])

    lowered, _ = run(make, 3)
    labels = [{label for _, label in g.packs[0].members} for g in lowered.packing.groups]
    assert labels == [{"0.weight", "0.bias"}, {"2.weight", "2.bias", "4.weight", "4.bias"}]


@pytest.mark.usefixtures("float64")
def test_a_large_tensor_travels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "BYTES_PER_LAUNCH", 20)
    lowered, _ = run(OPTIMIZERS["amsgrad, warm"], 3)
    (group,) = lowered.packing.groups
    members = {label for _, label in group.packs[0].members}
    assert "0.weight" not in members
    assert "0.bias" in members


class Ignoring(nn.Module):
    """A network part of which only the inner loss sees."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 2)
        self.ignored = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_what_the_validation_loss_ignores_keeps_its_verdict() -> None:
    """In a vector, its cotangent would be zeros that nobody sees to be zeros."""
    model = Ignoring()

    def loss(model: Ignoring, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(model(x), y) + model.ignored(x).square().mean()

    def val_loss(model: Ignoring, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    program = unrollc.compile(
        model,
        torch.optim.Adam(model.parameters()),
        unrollc.objective(loss),
        val_loss=unrollc.objective(val_loss),
    )
    with pytest.raises(RequirementError, match=r"ignored\.weight"):
        program.lower(*data(3))
    program = unrollc.compile(
        model,
        torch.optim.Adam(model.parameters()),
        unrollc.objective(loss),
        val_loss=unrollc.objective(val_loss),
        meta=["used.weight", "used.bias"],
    )
    (group,) = program.lower(*data(3)).packing.groups
    assert {label for _, label in group.packs[0].members} == {"used.weight", "used.bias"}


# --- the graph alone --------------------------------------------------------------------------

SHAPES = ((2, 3), (4,), (1, 2, 2))
THETA = [(Role.THETA, f"p{i}") for i in range(len(SHAPES))]
STATE = [(Role.OPT_STATE, f"m{i}") for i in range(len(SHAPES))]
GROUP = Group(
    tuple(
        Pack(Value(keys[0][0], name, name), tuple(keys), tuple(map(torch.Size, SHAPES)))
        for name, keys in (("theta", THETA), ("memory", STATE))
    )
)

_UNARY = (aten.tanh.default, aten.neg.default, aten.clone.default, aten.zeros_like.default)
_BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.maximum.default)
_KINDS = ("unary", "binary", "binary", "number", "rate", "own rate", "reduced", "view")


@st.composite
def updates(draw: st.DrawFn) -> StepGraph:
    """A step whose update is one random chain of ops for each of three parameters."""
    sketch = Sketch()
    thetas = [sketch.input(f"p{i}", *shape, role=Role.THETA) for i, shape in enumerate(SHAPES)]
    states = [sketch.input(f"m{i}", *shape, role=Role.OPT_STATE) for i, shape in enumerate(SHAPES)]
    rate = sketch.input("rate", role=Role.HYPER)
    rates = [sketch.input(f"r{i}", role=Role.HYPER) for i in range(len(SHAPES))]
    grads = [
        sketch.call(aten.sin.default, theta, phase=Phase.GRADIENT) for theta in reversed(thetas)
    ][::-1]
    known = [thetas, states, grads]
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(_KINDS))
        op, other = draw(st.sampled_from(_BINARY)), draw(st.sampled_from(_UNARY))
        first, second = (draw(st.sampled_from(known)) for _ in range(2))
        known.append(
            [
                _member(sketch, kind, op, other, *each)
                for each in zip(first, second, [rate] * len(rates), rates, strict=True)
            ]
        )
    new_theta, new_state = (draw(st.sampled_from(known[3:])) for _ in range(2))
    loss = sketch.call(aten.sum.default, grads[0], phase=Phase.LOSS)
    sketch.graph.output((*new_theta, *new_state, loss, *grads))
    values = [Value(role, label, f"new_{label}") for role, label in (*THETA, *STATE)]
    values += [Value(Role.LOSS, "loss", "loss")]
    values += [Value(Role.GRADIENT, label, f"g_{label}", Role.THETA) for _, label in THETA]
    return StepGraph(sketch.graph, tuple(sketch.inputs), tuple(values), {})


def _member(
    sketch: Sketch,
    kind: str,
    binary: Any,
    unary: Any,
    first: fx.Node,
    second: fx.Node,
    rate: fx.Node,
    own: fx.Node,
) -> fx.Node:
    """One op of the chain for one parameter."""
    if kind == "unary":
        return sketch.call(unary, first, phase=UPDATE)
    if kind == "binary":
        return sketch.call(binary, first, second, phase=UPDATE)
    if kind == "number":
        return sketch.call(aten.add.Tensor, first, 0.5, alpha=2, phase=UPDATE)
    if kind == "view":
        flat = sketch.call(aten.reshape.default, first, [-1], phase=UPDATE)
        return sketch.call(aten.view.default, flat, list(first.meta["val"].shape), phase=UPDATE)
    number = {"rate": rate, "own rate": own}.get(kind)
    if number is None:
        total = sketch.call(aten.sum.default, second, phase=UPDATE)
        number = sketch.call(aten.tanh.default, total, phase=UPDATE)
    scaled = sketch.call(aten.mul.Tensor, number, 0.5, phase=UPDATE)
    return sketch.call(binary, first, scaled, phase=UPDATE)


def evaluated(step: StepGraph, given: dict[str, Tensor]) -> dict[str, Tensor]:
    step.module.recompile()
    results = step.module(*(given[value.name] for value in step.inputs))
    return {
        (value.role.value + value.label): tensor
        for value, tensor in zip(step.outputs, results, strict=True)
    }


def joined(tensors: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def assert_packed_equals(step: StepGraph, group: Group = GROUP) -> None:
    generator = torch.Generator().manual_seed(0)
    given = {
        value.name: torch.randn(node.meta["val"].shape, generator=generator, dtype=torch.float64)
        for value, node in zip(step.inputs, step.placeholders, strict=True)
    }
    expected = evaluated(step, given)
    together = dict(given)
    for pack in group.packs:
        together[pack.value.name] = joined(given, [label for _, label in pack.members])
    for first in (True, False):
        found = evaluated(packed(step, group, first=first), together)
        for pack in group.packs:
            role = pack.members[0][0].value
            names = [role + label for _, label in pack.members]
            assert relative_error(found[role + pack.value.label], joined(expected, names)) < 1e-12
        assert found["lossloss"].equal(expected["lossloss"])


@settings(max_examples=100, deadline=None)
@given(updates())
def test_a_random_update_is_the_same_packed(step: StepGraph) -> None:
    assert_packed_equals(step)


def test_members_in_another_order_are_caught() -> None:
    """The broken twin of the test above: state whose members belong to other parameters."""
    theta, memory = GROUP.packs
    order = (1, 0, 2)
    wrong = Pack(
        memory.value,
        tuple(memory.members[i] for i in order),
        tuple(memory.shapes[i] for i in order),
    )
    sketch = Sketch()
    thetas = [sketch.input(f"p{i}", *shape, role=Role.THETA) for i, shape in enumerate(SHAPES)]
    states = [sketch.input(f"m{i}", *shape, role=Role.OPT_STATE) for i, shape in enumerate(SHAPES)]
    moved = [
        sketch.call(aten.add.Tensor, *pair, phase=UPDATE)
        for pair in zip(thetas, states, strict=True)
    ]
    sketch.graph.output((*moved, *states))
    values = [Value(role, label, f"new_{label}") for role, label in (*THETA, *STATE)]
    step = StepGraph(sketch.graph, tuple(sketch.inputs), tuple(values), {})
    with pytest.raises((AssertionError, RuntimeError)):
        assert_packed_equals(step, Group((theta, wrong)))


def test_an_update_that_reads_another_ones_result_is_refused() -> None:
    sketch = Sketch()
    thetas = [sketch.input(f"p{i}", *shape, role=Role.THETA) for i, shape in enumerate(SHAPES)]
    new = [sketch.call(aten.mul.Tensor, thetas[0], 2.0, phase=UPDATE)]
    for theta in thetas[1:]:
        before = sketch.call(aten.sum.default, new[-1], phase=UPDATE)
        shifted = sketch.call(aten.add.Tensor, theta, before, phase=UPDATE)
        new.append(sketch.call(aten.mul.Tensor, shifted, 2.0, phase=UPDATE))
    sketch.graph.output(tuple(new))
    values = [Value(role, label, f"new_{label}") for role, label in THETA]
    step = StepGraph(sketch.graph, tuple(sketch.inputs), tuple(values), {})
    with pytest.raises(UnpackableError):
        packed(step, Group(GROUP.packs[:1]))


# --- state that is equal ----------------------------------------------------------------------


def counting(*increments: int, start: str) -> StepGraph:
    """A step of one counter for each increment, which start at zero or as they come in."""
    sketch = Sketch()
    count = [sketch.input(f"c{i}", role=Role.OPT_STATE) for i in range(len(increments))]
    if start == "zero":
        count = [
            sketch.call(aten.zeros.default, [], dtype=torch.float64, phase=UPDATE) for _ in count
        ]
    new = [
        sketch.call(aten.add.Tensor, each, number, phase=UPDATE)
        for each, number in zip(count, increments, strict=True)
    ]
    sketch.graph.output(tuple(new))
    values = [Value(Role.OPT_STATE, f"c{i}", f"new_c{i}") for i in range(len(increments))]
    return StepGraph(sketch.graph, tuple(sketch.inputs), tuple(values), {})


def stands(steps: list[StepGraph], sequence: list[int]) -> list[str]:
    return [label for _, label in equal_state(steps, sequence).values()]


def test_counters_that_start_and_move_alike_are_one() -> None:
    first, later = counting(1, 1, 1, start="zero"), counting(1, 1, 1, start="given")
    assert stands([first, later], [0, 1, 1]) == ["c0", "c0", "c0"]


def test_counters_that_start_apart_or_move_apart_are_not() -> None:
    first, later = counting(1, 2, 1, start="zero"), counting(1, 1, 1, start="given")
    assert stands([first, later], [0, 1, 1]) == ["c0", "c1", "c0"]
    first, later = counting(1, 1, 1, start="zero"), counting(1, 1, 2, start="given")
    assert stands([first, later], [0, 1, 1]) == ["c0", "c0", "c2"]
    assert stands([later], [0, 0, 0]) == ["c0", "c1", "c2"]
