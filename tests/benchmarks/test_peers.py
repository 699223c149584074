"""Every implementation of a workload computes our meta-gradient: float64, a few steps."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from agreement import TOLERANCE, distance
from implementations import torch_call, unrolled
from registry import BY_NAME, FLOOR, OURS, rows_of
from workloads import WORKLOADS, Problem, build

pytestmark = pytest.mark.usefixtures("float64")

#: Inner steps: a second one where it is cheap, since the first has no optimizer state.
STEPS = {"mlp-small": 3, "mlp": 2, "learned-opt": 2, "distill": 2}

#: `mlp-long` is `mlp-small` with more steps.
NAMES = [name for name in WORKLOADS if not name.startswith("mlp-long")]

#: What a peer does wrong: the derivative of torchopt's fused Adam is not that of its forward pass.
WRONG = {("mlp-small", "torchopt fused"), ("mlp", "torchopt fused"), ("gpt-adam", "torchopt fused")}


#: Ours on Inductor takes a minute to compile; before every measurement it is compared as well.
COMPILED = {f"{OURS} inductor"}

#: Samples in a batch, where the workload's own take long.
SAMPLES = {"gpt-sgd": 1, "gpt-adam": 1, "densenet-lr": 3}


def problem_of(name: str) -> Problem:
    """A workload with few steps, few samples and one task."""
    problem = build(name, STEPS.get(name, 1), torch.float64)
    train, val = problem.tasks[0]
    if (count := SAMPLES.get(name)) is not None:
        train = train[0][:, :count], train[1][:, :count]
        val = val[0][:count], val[1][:count]
    return dataclasses.replace(problem, tasks=((train, val),))


def results_of(name: str, implementation: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    prepared = BY_NAME[implementation].make(problem_of(name), None)
    losses = prepared.call()
    return losses, prepared.gradients()


@pytest.mark.parametrize("name", NAMES)
def test_eager_peers_agree_with_ours(name: str) -> None:
    rows = [row for row in rows_of(name) if row.package != "jax" and row.name not in COMPILED]
    reference = next(row.name for row in rows if row.peer == OURS)
    losses, expected = results_of(name, reference)
    assert all(float(value.norm()) > 0 for value in expected.values())
    for row in rows:
        found, gradients = results_of(name, row.name)
        assert found == pytest.approx(losses, rel=1e-10), row.name
        if row.peer != FLOOR:
            label, error = distance(gradients, expected)
            assert (error > TOLERANCE) == ((name, row.name) in WRONG), f"{row.name}: {label}"


@pytest.mark.parametrize("name", NAMES)
def test_what_torch_compile_is_given_agrees(name: str) -> None:
    """The function itself, uncompiled: compiling takes minutes."""
    from compiled_loop import meta_loss_of

    problem, other = problem_of(name), problem_of(name)
    losses = unrolled(problem)()
    leaves = {label: leaf.detach() for label, leaf in other.leaves.items()}
    with sdpa_kernel(SDPBackend.MATH):
        gradients, loss = torch.func.grad_and_value(meta_loss_of(other))(leaves, *other.tasks[0])
    assert float(loss) == pytest.approx(losses[0], rel=1e-10)
    assert distance(gradients, _gradients(problem))[1] <= TOLERANCE


@pytest.fixture
def jax64() -> Iterator[ModuleType]:
    """JAX in float64."""
    jax = pytest.importorskip("jax", reason="JAX is in requirements-bench.txt, for `make bench`")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("name", NAMES)
def test_jax_agrees(name: str, jax64: ModuleType) -> None:
    """With the unrolled loop, which the test above compares with ours."""
    problem = problem_of(name)
    losses = unrolled(problem)()
    found, gradients = results_of(name, "jax")
    assert found == pytest.approx(losses, rel=1e-10)
    assert distance(gradients, _gradients(problem))[1] <= TOLERANCE


def test_jax_agrees_with_checkpoints_and_several_tasks(jax64: ModuleType) -> None:
    for name, count in (("mlp-small", 1), ("distill", 2)):
        peers = []
        for _ in range(2):
            problem = build(name, 2, torch.float64)
            peers.append(dataclasses.replace(problem, tasks=problem.tasks * count))
        losses = unrolled(peers[0])()
        prepared = BY_NAME["jax checkpoint"].make(peers[1], None)
        assert prepared.call() == pytest.approx(losses, rel=1e-10)
        assert distance(prepared.gradients(), _gradients(peers[0]))[1] <= TOLERANCE


def test_a_step_less_is_told_apart() -> None:
    """The broken twin of every comparison here."""
    problem, shorter = problem_of("mlp-small"), build("mlp-small", 2, torch.float64)
    unrolled(problem)()
    unrolled(shorter)()
    assert distance(_gradients(shorter), _gradients(problem))[1] > 1e-3


def test_plain_training_gives_no_meta_gradient() -> None:
    problem = problem_of("mlp-small")
    initial = [p.detach().clone() for p in problem.model.parameters()]
    prepared = BY_NAME[FLOOR].make(problem, None)
    first = prepared.call()
    assert not prepared.gradients()
    assert prepared.call() == first, "a call starts from the initial weights"
    moved = zip(problem.model.parameters(), initial, strict=True)
    assert all(not torch.equal(p, before) for p, before in moved), "it trains"


def test_a_call_adds_to_the_gradient_of_its_leaves() -> None:
    problem = problem_of("mlp-small")
    leaf = problem.leaves["0.weight"]

    def run(train: Any, val: Any) -> torch.Tensor:
        return (2 * leaf).sum()

    torch_call(problem, run)()
    assert leaf.grad is not None and bool((leaf.grad == 2).all())


def _gradients(problem: Problem) -> dict[str, torch.Tensor]:
    return {label: leaf.grad for label, leaf in problem.leaves.items() if leaf.grad is not None}
