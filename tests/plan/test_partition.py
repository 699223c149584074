"""Partitions: the same values at every price, and cuts no worse than any other choice.

The optimum is found by trying every subset of the shared values, on the storages of fake tensors;
two broken twins of the cut, one that ignores bytes and one that ignores work, must be caught.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.differentiate.steps import captured
from tests.oracles.compare import relative_error
from tests.oracles.models import MLP, ConvNet, LSTMClassifier, TransformerClassifier
from tests.plan.graphs import Sketch
from unrollc.capture.assemble import assemble_graph
from unrollc.differentiate.mixed import mixed_adjoint, mixed_obstacle
from unrollc.differentiate.reverse import reverse_adjoint
from unrollc.optimize.simplify import simplify
from unrollc.optimize.views import is_view
from unrollc.plan import partition as module
from unrollc.plan.op_rules import EQUALS, RULES, Again, recompute_cost, rule_of
from unrollc.plan.partition import Partition, partition, shared
from unrollc.step import STATE_ROLES, Phase, Role, StepGraph, Value, iterate_calls

aten = torch.ops.aten

PRICES = (0, 10, 300, 1000, 3000, 10_000, 100_000, math.inf)


# --- steps of real models ----------------------------------------------------------------------


class DropoutConvNet(ConvNet):
    """Convolution, BatchNorm in training mode, ReLU, max-pooling, dropout."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.dropout(x, 0.3)
        x = F.relu(self.norm2(self.conv2(x)))
        return self.output(x.flatten(1))


@dataclass(frozen=True)
class Setting:
    """A model, its optimizer and the shape of its batches."""

    model: type[nn.Module]
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]
    shape: tuple[int, ...]


SETTINGS = {
    "mlp-adam": Setting(MLP, torch.optim.Adam, {}, (5, 4)),
    "conv-momentum": Setting(DropoutConvNet, torch.optim.SGD, {"momentum": 0.8}, (6, 1, 4, 4)),
    "transformer": Setting(TransformerClassifier, torch.optim.SGD, {}, (3, 4, 8)),
    "lstm": Setting(LSTMClassifier, torch.optim.SGD, {"momentum": 0.8}, (4, 3, 3)),
}
MODES = {"reverse": reverse_adjoint, "mixed": mixed_adjoint}


@functools.cache
def graphs_of(name: str, mode: str) -> tuple[StepGraph, StepGraph]:
    """The primal step, new state and loss, and its adjoint, as programs contain them."""
    torch.manual_seed(0)
    setting = SETTINGS[name]
    model = setting.model()
    rate = torch.tensor(0.1, requires_grad=True)
    opt = setting.optimizer(model.parameters(), lr=rate, **setting.options)  # type: ignore[call-arg]
    batch = (torch.randn(setting.shape), torch.arange(setting.shape[0]) % 3)
    step = captured(model, opt, F.cross_entropy, batch)
    wanted = frozenset({(Role.HYPER, v.label) for v, _ in step.inputs_with(Role.HYPER)})
    live = frozenset(
        (value.role, value.label)
        for value, _ in step.outputs_with(Role.THETA, Role.OPT_STATE)
        if not value.label.endswith("step")
    )
    if mode == "mixed":
        assert mixed_obstacle(step, wanted, live) is None
    adjoint = MODES[mode](step, wanted, live).graph
    outputs = [
        (value, node)
        for value, node in zip(step.outputs, step.results, strict=True)
        if value.role in (*STATE_ROLES, Role.LOSS)
    ]
    inputs = zip(step.inputs, step.placeholders, strict=True)
    return simplify(assemble_graph(step, inputs, outputs)), simplify(adjoint)


def value_of(value: Value, node: fx.Node, graph: StepGraph) -> Tensor:
    """A tensor that fits an input: second moments are positive, masks 0 or 1."""
    example = node.meta["val"]
    seed = hashlib.sha256(repr((value.role.value, value.label)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:4], "big"))
    if value.role is Role.CONSTANT:
        return graph.constants[value.name]
    if not example.is_floating_point():
        return torch.randint(0, 3, example.shape, generator=generator).to(example.dtype)
    if value.role is Role.NOISE:
        drawn = torch.rand(example.shape, generator=generator) < 0.7
        return drawn.to(example.dtype)
    normal = torch.randn(example.shape, generator=generator, dtype=example.dtype)
    return normal.abs() + 0.1 if value.role in (Role.OPT_STATE, Role.BUFFER) else normal


def run(graph: StepGraph, given: dict[str, Tensor] | None = None) -> dict[Any, Tensor]:
    """The outputs by identity; residuals are taken from `given`."""
    values = [
        given[value.name]
        if given is not None and value.role is Role.RESIDUAL
        else value_of(value, node, graph)
        for value, node in zip(graph.inputs, graph.placeholders, strict=True)
    ]
    with torch.no_grad():
        results = graph.module(*values)
    pairs = zip(graph.outputs, results, strict=True)
    return {value.key: result for value, result in pairs if result is not None}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_price_gives_the_same_values(name: str, mode: str) -> None:
    step, adjoint = graphs_of(name, mode)
    expected, pulled = run(step), run(adjoint)
    numbers_kept = []
    for price in PRICES:
        parts = partition(step, adjoint, price)
        found = run(parts.step)
        residuals = {v.name: found.pop(v.key) for v, _ in parts.step.outputs_with(Role.RESIDUAL)}
        assert [each.name for each in parts.kept] == list(residuals)
        assert [v.name for v, _ in parts.adjoint.inputs_with(Role.RESIDUAL)] == list(residuals)
        back = run(parts.adjoint, residuals)
        assert found.keys() == expected.keys() and back.keys() == pulled.keys()
        assert all(relative_error(found[key], expected[key]) < 1e-12 for key in expected)
        assert all(relative_error(back[key], pulled[key]) < 1e-12 for key in pulled)
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in residuals.values()}
        held = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        assert parts.kept_bytes == held
        numbers_kept.append(len(parts.kept))
    assert numbers_kept[0] > numbers_kept[-1] == 0
    assert len(set(numbers_kept)) >= 4, numbers_kept


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_ends(name: str, mode: str) -> None:
    step, adjoint = graphs_of(name, mode)
    nothing = partition(step, adjoint, math.inf)
    assert nothing.step is step and nothing.adjoint is adjoint and not nothing.kept
    everything = partition(step, adjoint, 0)
    left = [n for n in iterate_calls(everything.adjoint) if not _moved(everything.adjoint, n)]
    again = [n for n in left if n.name in {common.name for common in shared(step, adjoint)}]
    assert all(rule_of(node).kind in ("view", "fill") for node in again), again
    assert everything.recomputed.operations == 0
    assert nothing.recomputed.operations > 0


def _moved(graph: StepGraph, node: fx.Node) -> bool:
    """Whether a cotangent reaches the op."""
    if node.op == "placeholder":
        return node in [n for _, n in graph.inputs_with(Role.COTANGENT)]
    return any(_moved(graph, source) for source in node.all_input_nodes)


@pytest.mark.usefixtures("float64")
def test_a_higher_price_keeps_less_and_recomputes_more() -> None:
    step, adjoint = graphs_of("transformer", "mixed")
    found = [partition(step, adjoint, price) for price in PRICES]
    sizes = [each.kept_bytes for each in found]
    work = [each.recomputed.operations for each in found]
    assert sizes == sorted(sizes, reverse=True) and work == sorted(work)


@pytest.mark.usefixtures("float64")
def test_noise_that_is_no_longer_read_is_no_input() -> None:
    step, adjoint = graphs_of("conv-momentum", "reverse")
    assert adjoint.inputs_with(Role.NOISE)
    parts = partition(step, adjoint, 0)
    assert not any(not node.users for _, node in parts.adjoint.inputs_with(Role.NOISE))


@pytest.mark.usefixtures("float64")
def test_the_text_names_what_is_kept_and_where() -> None:
    step, adjoint = graphs_of("mlp-adam", "reverse")
    text = str(partition(step, adjoint, 300))
    assert "values kept for the adjoint" in text.splitlines()[0]
    assert any("kept_tanh" in line and "models.py:" in line for line in text.splitlines())


SCRIPT = """
import torch
torch.set_default_dtype(torch.float64)
from tests.plan.test_partition import graphs_of
from unrollc.plan.partition import partition
for price in (0, 1000, 3000):
    parts = partition(*graphs_of("transformer", "reverse"), price)
    print(parts, parts.step, parts.adjoint)
"""


def test_two_processes_make_the_same_partition() -> None:
    texts = []
    for seed in ("0", "4711"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        texts.append(done.stdout)
    assert texts[0] == texts[1] and "kept_" in texts[0]


# --- what is shared -----------------------------------------------------------------------------


def pair(
    forward: Callable[[Sketch, list[fx.Node]], fx.Node],
    backward: Callable[[Sketch, list[fx.Node]], fx.Node],
) -> tuple[StepGraph, StepGraph]:
    """A step that returns `forward`, and an adjoint: the cotangent times `backward`."""
    graphs = []
    for body in (forward, backward):
        sketch = Sketch()
        known = [sketch.input("x", 4, 4), sketch.input("y", 4, 4)]
        made = body(sketch, known)
        if body is backward:
            cotangent = sketch.input("adj_new_w", 4, 4, role=Role.COTANGENT)
            made = sketch.call(aten.mul.Tensor, cotangent, made, phase=Phase.ADJOINT)
        graphs.append(sketch.returning(made))
    return graphs[0], graphs[1]


@pytest.mark.parametrize(
    ("forward", "backward", "same"),
    [
        (
            lambda s, k: s.call(aten.mul.Scalar, k[0], 2.0),
            lambda s, k: s.call(aten.mul.Scalar, k[0], 2.0),
            True,
        ),
        (
            lambda s, k: s.call(aten.mul.Scalar, k[0], 2.0),
            lambda s, k: s.call(aten.mul.Scalar, k[0], 3.0),
            False,
        ),
        (
            lambda s, k: s.call(aten.mul.Scalar, k[0], 0.0),
            lambda s, k: s.call(aten.mul.Scalar, k[0], -0.0),
            False,
        ),
        (
            lambda s, k: s.call(aten.sub.Tensor, k[0], k[1]),
            lambda s, k: s.call(aten.sub.Tensor, k[1], k[0]),
            False,
        ),
        (
            lambda s, k: s.call(aten.add.Tensor, k[0], k[1], alpha=2),
            lambda s, k: s.call(aten.add.Tensor, k[0], k[1], alpha=3),
            False,
        ),
        (
            lambda s, k: s.call(aten.tanh.default, k[0]),
            lambda s, k: s.call(aten.tanh.default, k[1]),
            False,
        ),
    ],
)
def test_only_equal_ops_are_shared(forward: Any, backward: Any, same: bool) -> None:
    step, adjoint = pair(forward, backward)
    assert bool(shared(step, adjoint)) is same
    assert bool(partition(step, adjoint, 0).kept) is same


def test_a_residual_takes_no_name_that_is_in_use() -> None:
    def graph(backward: bool) -> StepGraph:
        sketch = Sketch()
        made = sketch.call(aten.mm.default, *(sketch.input(n, 4, 4) for n in ("kept_mm", "x")))
        made.name = "mm"
        if backward:
            cotangent = sketch.input("g", 4, 4, role=Role.COTANGENT)
            made = sketch.call(aten.mul.Tensor, cotangent, made, phase=Phase.ADJOINT)
        return sketch.returning(made)

    (kept,) = partition(graph(False), graph(True), 0).kept
    assert kept.name == "kept_mm_"


def test_constants_are_compared_by_value() -> None:
    def graph(number: float, cotangent: bool) -> StepGraph:
        sketch = Sketch()
        x = sketch.input("x", 4, 4)
        c = sketch.input("c", role=Role.CONSTANT)
        made = sketch.call(aten.mul.Tensor, x, c)
        if cotangent:
            g = sketch.input("g", 4, 4, role=Role.COTANGENT)
            made = sketch.call(aten.mul.Tensor, g, made, phase=Phase.ADJOINT)
        sketch.graph.output((made,))
        constants = {"c": torch.tensor(number)}
        out = (Value(Role.LOSS, "out", "out"),)
        return StepGraph(sketch.graph, tuple(sketch.inputs), out, constants)

    assert shared(graph(2.0, False), graph(2.0, True))
    assert not shared(graph(2.0, False), graph(3.0, True))


@pytest.mark.parametrize("row", EQUALS, ids=lambda row: str(row.op))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ops_that_are_said_to_be_equal_are(row: Any, dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 4, 4, dtype=dtype)
    weight, bias, mean = (torch.randn(3, dtype=dtype) for _ in range(3))
    args: Any = (x, weight, bias, mean, mean.abs() + 0.1, True, 0.1, 1e-5)
    assert row.applies(args)
    first = row.op(*args)
    second = row.other(*(args[i] for i in row.arguments))
    assert all(torch.equal(first[i], second[i]) for i in row.results)
    evaluation = (*args[:5], False, *args[6:])
    assert not row.applies(evaluation)
    different = row.op(*evaluation)
    assert not torch.equal(different[0], second[0])


# --- rules --------------------------------------------------------------------------------------


def _example(kind: str, sketch: Sketch) -> fx.Node:
    x = sketch.input("x", 4, 4)
    index = sketch.input("index", 4, 4, dtype=torch.int64)
    if kind == "projection":
        return sketch.part(sketch.call(aten.sort.default, x), 0)
    calls: dict[str, tuple[Any, ...]] = {
        "view": (aten.t.default, x),
        "random": (aten.bernoulli.default, x),
        "fill": (aten.zeros_like.default, x),
        "product": (aten.mm.default, x, x),
        "transcendental": (aten.tanh.default, x),
        "elementwise": (aten.mul.Tensor, x, x),
        "sorting": (aten.sort.default, x),
        "addressing": (aten.gather.default, x, 1, index),
        "other": (aten.sum.dim_IntList, x, [0]),
    }
    return sketch.call(*calls[kind])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_each_row_has_an_op(rule: Any) -> None:
    node = _example(rule.kind, Sketch())
    assert rule_of(node) is rule and rule.reason
    cost = recompute_cost(node)
    match rule.again:
        case Again.FREE:
            assert cost == 0
        case Again.NEVER:
            assert cost is None
        case Again.AT_COST:
            assert cost is not None and cost > 0


def test_reshapes_and_parts_of_splits_are_views_where_they_share_memory() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 4)
    flat = sketch.call(aten.reshape.default, x, [16])
    turned = sketch.call(aten.t.default, x)
    copied = sketch.call(aten.reshape.default, turned, [16])
    halves = sketch.call(aten.split.Tensor, x, 2)
    part = sketch.part(halves, 1)
    ordered = sketch.part(sketch.call(aten.sort.default, x), 0)
    assert [is_view(n) for n in (flat, turned, copied, part, ordered)] == [True] * 2 + [
        False,
        True,
        False,
    ]


def test_a_value_and_its_views_are_kept_once() -> None:
    """The adjoint reads two halves of a product: the product is kept, and pays its bytes once."""

    def body(sketch: Sketch, known: list[fx.Node]) -> fx.Node:
        made = sketch.call(aten.mm.default, *known)
        halves = sketch.call(aten.split.Tensor, made, 2)
        first, second = sketch.part(halves, 0), sketch.part(halves, 1)
        return sketch.call(aten.cat.default, [second, first], phase=Phase.ADJOINT)

    step, adjoint = pair(lambda s, k: s.call(aten.mm.default, *k), body)
    (kept,) = partition(step, adjoint, 1).kept
    assert kept.bytes == 4 * 4 * 8


# --- the optimum --------------------------------------------------------------------------------


def random_pair(seed: int) -> tuple[StepGraph, StepGraph]:
    """A step of a few ops on values of several sizes, and an adjoint that repeats them."""
    choice = random.Random(seed)
    script = [
        (choice.choice(_OPS), choice.randrange(99), choice.randrange(99))
        for _ in range(choice.randint(5, 14))
    ]
    read = [choice.randrange(99) for _ in range(choice.randint(2, 6))]
    graphs = []
    for backward in (False, True):
        sketch = Sketch()
        known = [sketch.input("x", 8, 8), sketch.input("y", 1, 8)]
        inputs = len(known)
        cotangent = sketch.input("g", 8, 8, role=Role.COTANGENT)
        for op, first, second in script:
            known.append(op(sketch, known[first % len(known)], known[second % len(known)]))
        made = known[inputs:]
        results = made
        if backward:
            used = [made[index % len(made)] for index in read]
            results = [
                sketch.call(aten.mul.Tensor, cotangent, _wide(sketch, n), phase=Phase.ADJOINT)
                for n in used
            ]
        graphs.append(simplify(sketch.returning(*results)))
    return graphs[0], graphs[1]


def _wide(sketch: Sketch, node: fx.Node) -> fx.Node:
    shape = tuple(node.meta["val"].shape)
    if shape == (8, 8):
        return node
    return sketch.call(aten.expand.default, node, [8, 8])


_OPS: tuple[Callable[[Sketch, fx.Node, fx.Node], fx.Node], ...] = (
    lambda s, a, b: s.call(aten.tanh.default, a),
    lambda s, a, b: s.call(aten.neg.default, a),
    lambda s, a, b: s.call(aten.add.Tensor, a, b),
    lambda s, a, b: s.call(aten.mul.Tensor, a, b),
    lambda s, a, b: s.call(aten.mm.default, _wide(s, a), _wide(s, b)),
    lambda s, a, b: s.call(aten.sum.dim_IntList, a, [0], True),
    lambda s, a, b: s.call(aten.slice.Tensor, _wide(s, a), 0, 3, 4),
    lambda s, a, b: s.call(aten.t.default, _wide(s, a)),
    lambda s, a, b: s.call(
        aten._to_copy.default,
        s.call(aten._to_copy.default, a, dtype=torch.float16),
        dtype=torch.float64,
    ),
    lambda s, a, b: s.part(s.call(aten.max.dim, _wide(s, a), 0, True), 0),
    lambda s, a, b: s.call(aten.reshape.default, s.call(aten.t.default, _wide(s, a)), [8, 8]),
)


def spent(parts: Partition, price: int) -> int:
    """What a partition costs, read off its graphs."""
    work = [
        recompute_cost(node)
        for node in parts.adjoint.graph.nodes
        if node.op == "call_function" and not _moved(parts.adjoint, node)
    ]
    assert None not in work
    residuals = [node.meta["val"] for _, node in parts.step.outputs_with(Role.RESIDUAL)]
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in residuals}
    held = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    return price * held + sum(cost for cost in work if cost is not None)


def least(step: StepGraph, adjoint: StepGraph, price: int) -> int | None:
    """The least cost over all subsets of the shared values; None if these are more than 12."""
    common = shared(step, adjoint)
    ops = [n for n in adjoint.graph.nodes if n.op == "call_function" and not _moved(adjoint, n)]
    place = {node: index for index, node in enumerate(ops)}
    arguments = [sum(1 << place[a] for a in set(n.all_input_nodes) if a in place) for n in ops]
    work = [recompute_cost(node) or 0 for node in ops]
    roots = sum(
        1 << place[n] for n in ops if any(u.op == "output" or u not in place for u in n.users)
    )
    values = [(i, n.meta["val"]) for i, n in enumerate(ops) if n in common]
    storage = {i: t.untyped_storage() for i, t in values if isinstance(t, Tensor)}
    if len(storage) > 12:
        return None
    best = math.inf
    for choice in range(1 << len(storage)):
        keep = sum(1 << i for bit, i in enumerate(storage) if choice >> bit & 1)
        need, total = roots, 0
        held: dict[int, int] = {}
        for i in reversed(range(len(ops))):
            if need >> i & 1 and keep >> i & 1:
                held[storage[i]._cdata] = storage[i].nbytes()
            elif need >> i & 1:
                need |= arguments[i]
                total += work[i]
        best = min(best, total + price * sum(held.values()))
    return int(best)


def shortfalls(count: int) -> list[int]:
    """The seeds, of the first `count` that are small enough, at which another choice is cheaper."""
    found, tried, seed = [], 0, 0
    while tried < count:
        seed += 1
        step, adjoint = random_pair(seed)
        price = random.Random(-seed).choice((1, 30, 300, 600, 1000, 3000, 5000, 20_000))
        best = least(step, adjoint, price)
        if best is not None:
            tried += 1
            if spent(partition(step, adjoint, price), price) != best:
                found.append(seed)
    return found


def test_no_choice_is_cheaper_than_the_cut() -> None:
    assert shortfalls(200) == []


def test_a_cut_that_ignores_bytes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "kept_bytes", lambda node: 64)
    assert shortfalls(40)


def test_a_cut_that_ignores_work_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "recompute_cost", lambda node: 1000)
    assert shortfalls(40)
