"""Pooling before rectifying: equal bits, also in the gradient and in its derivative."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrollc
from tests.oracles.compare import relative_error
from tests.plan.graphs import Sketch, targets
from unrollc.optimize import packing
from unrollc.optimize.pooling import pool_first
from unrollc.runtime import adjoints, lowering
from unrollc.step import StepGraph

aten = torch.ops.aten


def pooled(case: str = "", window: int = 2, stride: int = 2, padding: int = 0) -> StepGraph:
    """Pooling of a rectified image with its gradient, or a case that must stay."""
    sketch = Sketch()
    x = sketch.input("x", 2, 3, 6, 6)
    y = sketch.call(aten.relu.default, x)
    size = ([window] * 2, [stride] * 2, [padding] * 2)
    pool = sketch.call(aten.max_pool2d_with_indices.default, y, *size)
    value, places = sketch.part(pool, 0), sketch.part(pool, 1)
    g = sketch.input("g", *value.meta["val"].shape)
    spread = sketch.call(
        aten.max_pool2d_with_indices_backward.default, g, y, *size, [1, 1], False, places
    )
    bound = 0.5 if case == "another bound" else 0
    slope = sketch.call(aten.threshold_backward.default, spread, y, bound)
    others: dict[str, Any] = {
        "read by another": lambda: sketch.call(aten.exp.default, y),
        "returned": lambda: y,
        "places returned": lambda: places,
        "places read by another": lambda: sketch.call(aten.neg.default, places),
        "gradient read by another": lambda: sketch.call(aten.exp.default, spread),
        "pooled again": lambda: sketch.part(
            sketch.call(aten.max_pool2d_with_indices.default, y, [3, 3]), 0
        ),
    }
    extra = [others[case]()] if case in others else []
    return sketch.returning(value, slope, *extra)


def inputs(step: StepGraph) -> list[Tensor]:
    """With zeros, equal elements, windows without a positive element and NaN."""
    generator = torch.Generator().manual_seed(0)
    x, g = (
        torch.randn(node.meta["val"].shape, generator=generator, dtype=torch.float64)
        for node in step.placeholders
    )
    x = (2 * x).round() / 2
    x[0, 0, :3] = -1
    x[0, 1, 3:, 3:] = 0
    x[1, 1, 0, 0] = torch.nan
    return [x, g]


@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 1, 0), (3, 2, 1)])
def test_the_same_bits_come_out(window: int, stride: int, padding: int) -> None:
    before = pooled("", window, stride, padding)
    after = pool_first(before)
    assert [t for t in targets(after) if isinstance(t, torch._ops.OpOverload)] == [
        aten.max_pool2d_with_indices.default,
        aten.relu.default,
        aten.threshold_backward.default,
        aten.max_pool2d_with_indices_backward.default,
    ]
    given = inputs(before)
    for one, other in zip(after.module(*given), before.module(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert pool_first(after) is after


CASES = """another bound, read by another, returned, places returned, places read by another,
gradient read by another, pooled again"""


@pytest.mark.parametrize("case", [case.strip() for case in CASES.split(",")])
def test_these_stay(case: str) -> None:
    step = pooled(case)
    assert pool_first(step) is step


def found(dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).to(dtype)
    opt = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    program = unrollc.compile(model, opt, nn.functional.cross_entropy)
    x, y = torch.randn(3, 6, 1, 8, 8, dtype=dtype), torch.randint(3, (3, 6))
    train, val = (x[1:], y[1:]), (x[0], y[0])
    result = program(train, val)
    result.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return program.lower(train, val), gradients | {"rate": opt.param_groups[0]["lr"].grad}


def test_the_meta_gradient_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered, ours = found(torch.float64)
    step = lowered.pieces.steps[-1]
    (pool,) = step.graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices.default)
    assert pool.args[0].target is not aten.relu.default

    def plain(loop: Any, val: Any, val_gradient: Any) -> packing.PackedLoop:
        return packing.rewritten(loop, val, val_gradient, ())

    monkeypatch.setattr(adjoints, "rewritten", plain)
    monkeypatch.setattr(lowering, "rewritten", plain)
    _, theirs = found(torch.float64)
    for name, expected in theirs.items():
        if name != "0.bias":  # batch normalisation takes it out: it is rounding
            assert relative_error(ours[name], expected) < 1e-12, name
