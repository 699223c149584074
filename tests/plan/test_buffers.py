"""Slots of storages: lifetimes re-derived from their definition, and graphs that run in a slab."""

import itertools
import operator
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.nn import functional as F

import unrollc
from tests.plan.graphs import Sketch, misplaced, random_graphs, values_for
from unrollc.plan.buffers import (
    ALIGNMENT,
    BufferPlan,
    Lifetime,
    lifetimes_of,
    most_live,
    place,
    plan_buffers,
    slab_bytes,
)
from unrollc.plan.liveness import TAKEN_OVER
from unrollc.step import Role, StepGraph, iterate_calls

aten = torch.ops.aten
MATRIX = 4 * 8 * 8  # bytes of an f64[4, 8]


# --- lifetimes, straight from the definition --------------------------------------------------


def named(node: fx.Node) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a node; those of an op with several results under the readers' names."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        yield node.name, value
    for index, tensor in enumerate(value if isinstance(value, tuple | list) else ()):
        readers = [u.name for u in node.users if u.target is operator.getitem]
        places = [u.args[1] for u in node.users if u.target is operator.getitem]
        if isinstance(tensor, Tensor):
            name = readers[places.index(index)] if index in places else f"{node.name}[{index}]"
            yield name, tensor


def storages(nodes: Collection[fx.Node]) -> dict[int, tuple[str, int]]:
    """Name and bytes of the storages behind nodes."""
    return {
        t.untyped_storage()._cdata: (name, t.untyped_storage().nbytes())
        for node in nodes
        for name, t in named(node)
    }


def alive(step: StepGraph, owned: Collection[Role]) -> Iterator[dict[int, tuple[str, int]]]:
    """For each op, and after the last, the storages that must be there.

    That is what exists by then (an owned input, or the result of this op or one before) and is
    needed yet (this op or a later one touches it, or the graph returns it).
    """
    ops = list(iterate_calls(step))
    mine = [n for v, n in zip(step.inputs, step.placeholders, strict=True) if v.role in owned]
    foreign = set(storages([n for n in step.placeholders if n not in mine]))
    touched = [set(storages([op, *op.all_input_nodes])) for op in ops]
    needed = set(storages([result for result in step.results if result is not None]))
    suffixes = [set(needed)]
    for op in reversed(touched):
        needed |= op
        suffixes.append(set(needed))
    suffixes.reverse()
    exists = storages(mine)
    for position, suffix in enumerate(suffixes):
        if position < len(ops):
            exists = {**storages([ops[position]]), **exists}
        unread = set(storages(mine)) if position == 0 else set()  # it can't die before the call
        yield {key: exists[key] for key in exists if key in suffix | unread and key not in foreign}


def findings(step: StepGraph, owned: Collection[Role], plan: BufferPlan) -> list[str]:
    """What is wrong with a plan; empty for a good one."""
    found = []
    most = 0
    for position, live in enumerate(alive(step, owned)):
        most = max(most, sum(size for _, size in live.values()))
        ranges = sorted(
            (plan.slots[name].offset, plan.slots[name].offset + size, name)
            for name, size in live.values()
            if size
        )
        for (_, end, name), (start, _, other) in itertools.pairwise(ranges):
            if start < end:
                found.append(f"op {position}: {name} ends at {end}, {other} starts at {start}")
        if ranges and max(end for _, end, _ in ranges) > plan.slab_bytes:
            found.append(f"op {position}: beyond the slab's {plan.slab_bytes} bytes")
    found += [f"{name} is not aligned" for name, at in plan.offsets.items() if at % ALIGNMENT]
    if most != plan.lower_bound:
        found.append(f"{most} bytes live at once, the plan says {plan.lower_bound}")
    return found


# --- a graph that runs in a slab --------------------------------------------------------------


def run_in_slab(step: StepGraph, plan: BufferPlan, values: Sequence[Tensor]) -> list[Tensor]:
    """Execute a graph with every planned value in its slot.

    A slot is overwritten before the op that fills it runs: an op that reads what its own result
    destroys computes nonsense, as it would with ``out=``.
    """
    slab = torch.empty(plan.slab_bytes, dtype=torch.uint8)
    space: dict[fx.Node, Any] = {}
    made: set[str] = set()

    def slot(name: str, fake: Tensor) -> Tensor:
        place = plan.slots[name]
        bytes_ = slab[place.offset : place.offset + place.bytes]
        if place.storage not in made:
            made.add(place.storage)
            bytes_.fill_(0xFF)
        typed = bytes_.view(fake.dtype)
        start = typed.storage_offset() + fake.storage_offset()
        return typed.as_strided(fake.shape, fake.stride(), start)

    for node, value in zip(step.placeholders, values, strict=True):
        space[node] = value
        if node.name in plan.slots:
            space[node] = slot(node.name, node.meta["val"]).copy_(value)
    for node in step.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            space[node] = space[node.args[0]][node.args[1]]
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), space.__getitem__)
        targets = {n: (n not in made, slot(n, t)) for n, t in named(node) if n in plan.slots}
        result = node.target(*args, **kwargs)
        parts = [result] if isinstance(result, Tensor) else list(result)
        for at, (name, _) in enumerate(named(node)):
            if name in targets:
                fresh, where = targets[name]
                parts[at] = where.copy_(parts[at]) if fresh else where
        space[node] = parts[0] if isinstance(result, Tensor) else parts
    return [space[node] for node in step.results if node is not None]


def run_plainly(step: StepGraph, values: Sequence[Tensor]) -> list[Tensor]:
    results = fx.Interpreter(step.module).run(*values)
    return [result for result in results if result is not None]


def runs_right(step: StepGraph, plan: BufferPlan) -> bool:
    values = values_for(step)
    planned, plain = run_in_slab(step, plan, values), run_plainly(step, values)
    return all(torch.equal(a, b) for a, b in zip(planned, plain, strict=True))


# --- graphs by hand ---------------------------------------------------------------------------


def chain(length: int, role: Role = Role.BATCH) -> StepGraph:
    sketch = Sketch()
    node = sketch.input("x", 4, 8, role=role)
    for _ in range(length):
        node = sketch.call(aten.tanh.default, node)
    return sketch.returning(node)


def test_a_chain_takes_two_slots_in_turn() -> None:
    plan = plan_buffers(chain(5))
    assert [(life.first, life.last) for life in plan.lifetimes] == [
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
        (4, 5),  # five ops; what is returned lives after the last
    ]
    assert plan.slab_bytes == plan.lower_bound == 2 * MATRIX
    assert sorted(set(plan.offsets.values())) == [0, MATRIX]


@pytest.mark.parametrize("role", TAKEN_OVER)
def test_an_owned_input_dies_at_its_last_use(role: Role) -> None:
    step = chain(3, role)
    lives = {life.name: (life.first, life.last) for life in lifetimes_of(step)}
    assert lives["x"] == (0, 0)
    assert plan_buffers(step).slab_bytes == 2 * MATRIX
    kept = lifetimes_of(step, owned=())
    assert "x" not in {life.name for life in kept}
    assert "x" not in plan_buffers(step, owned=()).slots


def test_an_owned_input_that_nobody_reads_is_there_at_the_start() -> None:
    sketch = Sketch()
    sketch.input("dead", 4, 8, role=Role.COTANGENT)
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    plan = plan_buffers(sketch.returning(sketch.call(aten.exp.default, a)))
    assert plan.lifetimes[0] == Lifetime("dead", MATRIX, 0, 0)
    assert plan.slab_bytes == 2 * MATRIX


def test_an_owned_input_that_is_returned_stays() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8, role=Role.THETA)
    flipped = sketch.call(aten.t.default, x)
    a = sketch.call(aten.tanh.default, x)
    step = sketch.returning(flipped, a)
    assert lifetimes_of(step)[0] == Lifetime("x", MATRIX, 0, 2)
    assert plan_buffers(step).slots[flipped.name].storage == "x"


def test_views_have_the_slot_of_their_base_and_keep_it() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    row = sketch.call(aten.select.int, a, 0, 0)
    b = sketch.call(aten.exp.default, x)
    c = sketch.call(aten.add.Tensor, b, row)
    step = sketch.returning(c)
    plan = plan_buffers(step)
    assert plan.slots[row.name] == plan.slots[a.name]
    assert plan.lifetimes[0] == Lifetime(a.name, MATRIX, 0, 3)
    assert plan.slab_bytes == plan.lower_bound == 3 * MATRIX


def test_a_view_of_somebody_elses_input_has_no_slot() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    t = sketch.call(aten.t.default, x)
    assert plan_buffers(sketch.returning(t, x, None)) == BufferPlan((), {}, {}, 0, 0)


def test_every_result_of_an_op_with_several_has_a_slot() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    both = sketch.call(aten.sort.default, x)
    part = sketch.part(both, 0)
    a = sketch.call(aten.mul.Tensor, part, part)
    plan = plan_buffers(sketch.returning(sketch.call(aten.mul.Tensor, a, part)))
    assert plan.lifetimes[:2] == (
        Lifetime(part.name, MATRIX, 0, 2),
        Lifetime(f"{both.name}[1]", MATRIX, 0, 0),
    )
    assert plan.slab_bytes == 3 * MATRIX


def test_a_graph_without_ops_and_one_without_inputs() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8, role=Role.THETA)
    plan = plan_buffers(sketch.returning(x))
    assert plan.slab_bytes == plan.lower_bound == MATRIX
    assert plan_buffers(Sketch().returning(None)).slab_bytes == 0


# --- random graphs, random intervals ----------------------------------------------------------


@given(random_graphs())
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_no_two_live_storages_of_a_random_graph_overlap(step: StepGraph) -> None:
    for owned in ((), (Role.BATCH,)):
        plan = plan_buffers(step, owned)
        assert not findings(step, owned, plan)
        assert runs_right(step, plan)
        assert plan == plan_buffers(step, owned)


def random_lives(seed: int) -> list[Lifetime]:
    """Up to 80 storages, many short and few long, of even or heavy-tailed sizes."""
    rng = random.Random(seed)
    ops = rng.randint(1, 60)
    length = rng.choice([2, 5, 20])
    lives = []
    for index in range(rng.randint(1, 80)):
        size = rng.randint(1, 10_000) if seed % 2 else int(500 * rng.paretovariate(0.7))
        first = rng.randrange(ops)
        last = min(ops, first + int(rng.expovariate(1 / length)))
        lives.append(Lifetime(f"s{index}", size, first, last))
    return lives


def clashes(lives: Sequence[Lifetime], offsets: dict[str, int]) -> int:
    """Pairs of storages that share a byte while both live."""
    return sum(
        any(position in range(b.first, b.last + 1) for position in range(a.first, a.last + 1))
        and max(offsets[a.name], offsets[b.name])
        < min(offsets[a.name] + a.bytes, offsets[b.name] + b.bytes)
        for index, a in enumerate(lives)
        for b in lives[:index]
    )


def test_random_intervals_do_not_clash_and_lie_close() -> None:
    ratios = []
    for seed in range(500):
        lives = random_lives(seed)
        offsets = place(lives)
        assert clashes(lives, offsets) == 0
        ratios.append(slab_bytes(lives, offsets) / most_live(lives))
    ratios.sort()
    assert ratios[0] >= 1
    assert ratios[-5] <= 1.1, ratios[-5:]  # the bound itself cannot always be reached


# --- the workloads ----------------------------------------------------------------------------


class Conv4(nn.Sequential):
    def __init__(self) -> None:
        widths = [(1, 64), (64, 64), (64, 64), (64, 64)]
        blocks = [
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for before, after in widths
        ]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(64, 5))


class SmallGPT(nn.Module):
    """Two layers of causal attention, width 64, over 32 tokens of a vocabulary of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(128, 64)
        self.position = nn.Parameter(torch.randn(32, 64) / 50)
        layer = nn.TransformerEncoderLayer(
            64, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.read_out = nn.Linear(64, 128, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.layers(self.token(tokens) + self.position, mask=mask, is_causal=True)
        return self.read_out(hidden).transpose(1, 2)


def mlp_small() -> Any:
    sizes = [(784, 32), (32, 32), (32, 10)]
    first, second, third = (nn.Linear(*size) for size in sizes)
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)
    rates = [torch.tensor(1e-3, requires_grad=True) for _ in model.parameters()]
    pairs = zip(model.parameters(), rates, strict=True)
    opt = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in pairs])
    return model, opt, (torch.rand(3, 8, 784), torch.randint(10, (3, 8)))


def conv4() -> Any:
    model = Conv4()
    images, classes = torch.rand(2, 25, 1, 28, 28), torch.randint(5, (2, 25))
    return model, torch.optim.SGD(model.parameters(), lr=0.01), (images, classes)


def small_gpt() -> Any:
    model = SmallGPT()
    tokens = torch.randint(128, (2, 4, 33))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), (tokens[..., :-1], tokens[..., 1:])


WORKLOADS: dict[str, Callable[[], Any]] = {
    "mlp-small": mlp_small,
    "maml-conv4": conv4,
    "gpt": small_gpt,
}


def graphs_of(name: str) -> list[StepGraph]:
    """The distinct steps, the validation and the adjoints of a workload."""
    model, opt, train = WORKLOADS[name]()
    val = (train[0][0], train[1][0])
    pieces = unrollc.compile(model, opt, F.cross_entropy).lower(train, val).pieces
    validation = pieces.val_gradient or pieces.val
    return [*pieces.steps, validation, *(adjoint.graph for adjoint in pieces.adjoints)]


@pytest.mark.parametrize("name", WORKLOADS)
def test_slabs_of_the_workloads_are_close_to_the_bound(name: str) -> None:
    for step in graphs_of(name):
        assert not misplaced(step)
        for owned in ((), TAKEN_OVER):
            plan = plan_buffers(step, owned)
            assert not findings(step, owned, plan)
            assert plan.slab_bytes <= 1.1 * plan.lower_bound
            early = freed_early(step, plan)
            assert findings(step, owned, early), "the broken twin passed"


# --- broken twins -----------------------------------------------------------------------------


def freed_early(step: StepGraph, plan: BufferPlan) -> BufferPlan:
    """The plan of a planner that frees each storage an op too early."""
    lives = tuple(replace(life, last=max(life.first, life.last - 1)) for life in plan.lifetimes)
    return moved(plan, place(lives))


def moved(plan: BufferPlan, offsets: dict[str, int]) -> BufferPlan:
    """The plan with other offsets."""
    slots = {name: replace(slot, offset=offsets[slot.storage]) for name, slot in plan.slots.items()}
    height = slab_bytes(plan.lifetimes, offsets)
    return replace(plan, offsets=offsets, slots=slots, slab_bytes=height)


def test_a_storage_freed_early_is_caught() -> None:
    step = chain(4)
    good = plan_buffers(step)
    assert not findings(step, TAKEN_OVER, good) and runs_right(step, good)
    early = freed_early(step, good)
    assert findings(step, TAKEN_OVER, early)[0].startswith("op 1: ")
    assert not runs_right(step, early)


def test_a_view_that_does_not_keep_its_base_is_caught() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    row = sketch.call(aten.select.int, a, 0, 0)
    b = sketch.call(aten.exp.default, x)
    step = sketch.returning(sketch.call(aten.add.Tensor, b, row))
    good = plan_buffers(step)
    lives = [replace(life, last=1) if life.name == a.name else life for life in good.lifetimes]
    bad = moved(good, place(lives))
    assert findings(step, TAKEN_OVER, bad)
    assert runs_right(step, good) and not runs_right(step, bad)


def test_a_slab_that_is_too_small_and_a_wrong_bound_are_caught() -> None:
    step = chain(4)
    good = plan_buffers(step)
    assert findings(step, TAKEN_OVER, replace(good, slab_bytes=good.slab_bytes - 1))
    assert findings(step, TAKEN_OVER, replace(good, lower_bound=good.lower_bound - 1))
    shifted = {name: offset + 8 for name, offset in good.offsets.items()}
    assert findings(step, TAKEN_OVER, moved(good, shifted))


def test_clashing_intervals_are_caught() -> None:
    lives = random_lives(1)
    assert clashes(lives, place(lives)) == 0
    assert clashes(lives, {life.name: 0 for life in lives}) > 0
