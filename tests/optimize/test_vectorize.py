"""The loop of many tasks as a graph: what gets an axis, and what cannot."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unrollc
from unrollc.optimize.batching_rules import RULES
from unrollc.optimize.vectorize import NotVectorizableError, TaskLoop, vectorized
from unrollc.step import Role, StepGraph

COUNT = 2


def loop_of_tasks(opt: type[torch.optim.Optimizer], *layers: nn.Module) -> Any:
    """The lowered program of one task, without a backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Linear(3, 2))
    program = unrollc.compile(model, opt(model.parameters(), lr=0.1), F.cross_entropy)
    batch = (torch.randn(4, 3), torch.randint(2, (4,)))
    with torch.no_grad():
        return program.lower(unrollc.repeat(batch, 3), batch)


def marks(step: StepGraph) -> int:
    return sum(bool(node.meta.get("removable")) for node in step.graph.nodes)


def test_what_differs_between_tasks_gets_an_axis() -> None:
    lowered = loop_of_tasks(torch.optim.Adam)
    made = vectorized(lowered.loop, lowered.val, COUNT)
    assert isinstance(made, TaskLoop)
    assert made.loop.sequence == lowered.loop.sequence
    for one, many in zip(lowered.loop.steps, made.loop.steps, strict=True):
        assert marks(one) == marks(many) > 0
        for value, node in zip(many.inputs, many.placeholders, strict=True):
            old = next(n for v, n in one.inputs_with(value.role) if v == value)
            own = value.label in made.own
            shape = tuple(old.meta["val"].shape)
            assert tuple(node.meta["val"].shape) == ((COUNT, *shape) if own else shape)
            shared = value.role in (Role.HYPER, Role.CONSTANT) or "step" in value.label
            assert own != shared
        ((_, loss),) = many.outputs_with(Role.LOSS)
        assert loss is not None
        assert tuple(loss.meta["val"].shape) == (COUNT,)


def test_an_op_without_a_batching_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = loop_of_tasks(torch.optim.SGD, nn.BatchNorm1d(3))
    vectorized(lowered.loop, lowered.val, COUNT)
    norm = torch.ops.aten._native_batch_norm_legit_functional.default
    monkeypatch.delitem(RULES, norm)
    with pytest.raises(
        NotVectorizableError, match=r"no batching rule applies to aten\._native_bat"
    ):
        vectorized(lowered.loop, lowered.val, COUNT)


def embedding(padding: int | None) -> Any:
    """The lowered program of one task that learns an embedding, perhaps with a row of padding."""
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Flatten(), nn.Linear(6, 2))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    batch = torch.randint(5, (4, 2)), torch.randint(2, (4,))
    with torch.no_grad():
        return program.lower(unrollc.repeat(batch, 2), batch)


def test_a_row_of_padding_for_each_task_is_refused() -> None:
    """vmap's rule would let gradients flow to that row of all tasks but the first."""
    plain = embedding(None)
    vectorized(plain.loop, plain.val, COUNT)
    padded = embedding(0)
    with pytest.raises(NotVectorizableError, match="embedding"):
        vectorized(padded.loop, padded.val, COUNT)
