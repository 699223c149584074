"""What graphs cost, counted by hand."""

import pytest
import torch

from tests.plan.graphs import Sketch
from unrollc.plan.cost import Cost, cost_of, human_bytes

aten = torch.ops.aten


def test_a_product_is_counted() -> None:
    sketch = Sketch()
    a, b = sketch.input("a", 4, 8), sketch.input("b", 8, 2)
    step = sketch.returning(sketch.call(aten.mm.default, a, b))
    assert cost_of(step) == Cost(2 * 4 * 8 * 2, 8 * (4 * 8 + 8 * 2 + 4 * 2), 1)


def test_views_and_projections_move_nothing() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    t = sketch.call(aten.t.default, x)
    assert cost_of(sketch.returning(t)) == Cost(0, 0, 1)

    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    both = sketch.call(aten.sort.default, x)
    step = sketch.returning(sketch.part(both, 0), sketch.part(both, 1))
    assert cost_of(step) == Cost(0, 3 * 256, 1)


def test_elementwise_ops_move_what_they_read_and_write() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    step = sketch.returning(sketch.call(aten.mul.Tensor, a, x))
    assert cost_of(step) == Cost(0, (2 + 3) * 256, 2)


def test_more_work_weighs_more() -> None:
    """The order that chooses between two graphs of one step, term by term."""
    base = Cost(10**6, 10**6, 10)
    for more in (Cost(2 * 10**6, 10**6, 10), Cost(10**6, 2 * 10**6, 10), Cost(10**6, 10**6, 11)):
        assert more.weight > base.weight


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (64 * 2**20, "64.0 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text
