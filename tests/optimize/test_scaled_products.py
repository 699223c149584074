"""Products with a scaled matrix: the same numbers with one product less, in each orientation."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import fx

from tests.plan.graphs import Sketch, targets, values_for
from unrollc.optimize import scaled_products
from unrollc.optimize.scaled_products import share_scaled_products
from unrollc.optimize.simplify import simplify
from unrollc.step import StepGraph, verify

aten = torch.ops.aten
FORMS = list(itertools.product([False, True], repeat=3))


@dataclass
class Pair:
    """A graph in the making: the dot product, its partner, and what they are made of."""

    sketch: Sketch
    rows: fx.Node
    product: fx.Node
    scaled: fx.Node
    results: list[fx.Node]

    def finish(self, *more: fx.Node) -> StepGraph:
        return self.sketch.returning(*self.results, *more)


def dot_and_product(form: tuple[bool, bool, bool], partner: str, *, square: bool = False) -> Pair:
    """``sum(B * (P @ Q))`` beside a product with ``B * lr``.

    Args:
        form: Whether P, Q and B are written down transposed.
        partner: Which product: Pᵀ @ W, W @ Qᵀ, or one of their transposes.
        square: Whether all matrices have one shape, so that a mistake fits.
    """
    sketch = Sketch()
    n, k, m = (3, 3, 3) if square else (3, 4, 5)
    flip_p, flip_q, flip_b = form

    def matrix(name: str, rows: int, columns: int, flipped: bool) -> tuple[fx.Node, fx.Node]:
        """An input, and how the product reads it."""
        node = sketch.input(name, *((columns, rows) if flipped else (rows, columns)))
        return node, sketch.call(aten.t.default, node) if flipped else node

    rows, rate = sketch.input("rows", 2, m if flip_b else n), sketch.input("rate")
    _, p = matrix("p", n, k, flip_p)
    _, q = matrix("q", k, m, flip_q)
    plain, _ = matrix("b", n, m, flip_b)

    def t(node: fx.Node) -> fx.Node:
        return sketch.call(aten.t.default, node)

    product = sketch.call(aten.mm.default, p, q)
    seen = t(product) if flip_b else product
    total = sketch.call(aten.sum.default, sketch.call(aten.mul.Tensor, plain, seen))
    scaled = sketch.call(aten.mul.Tensor, plain, rate)
    w = t(scaled) if flip_b else scaled
    operands = {"Pt W": (t(p), w), "Wt P": (t(w), p), "W Qt": (w, t(q)), "Q Wt": (q, t(w))}
    found = sketch.call(aten.mm.default, *operands[partner])
    return Pair(sketch, rows, product, scaled, [total, found])


def agree(first: StepGraph, second: StepGraph) -> bool:
    given = values_for(first)
    pairs = zip(first.module(*given), second.module(*given), strict=True)
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("partner", ["Pt W", "Wt P", "W Qt", "Q Wt"])
@pytest.mark.parametrize("form", FORMS)
def test_one_product_serves_both(form: tuple[bool, bool, bool], partner: str) -> None:
    before = dot_and_product(form, partner).finish()
    after = simplify(before)
    assert targets(before).count(aten.mm.default) == 2
    assert targets(after).count(aten.mm.default) == 1
    assert agree(before, after)


@pytest.mark.parametrize("partner", ["Pt W", "W Qt"])
def test_a_dot_product_with_the_wrong_factor_is_caught(
    monkeypatch: pytest.MonkeyPatch, partner: str
) -> None:
    right = scaled_products._other_factor
    before = dot_and_product(FORMS[0], partner, square=True).finish()

    def wrong(*args: object) -> object:
        found = right(*args)  # type: ignore[arg-type]
        return found and found.T

    monkeypatch.setattr(scaled_products, "_other_factor", wrong)
    after = simplify(before)
    assert targets(after).count(aten.mm.default) == 1
    assert not agree(before, after)


def test_other_products_lose_their_scaled_operand_too() -> None:
    pair = dot_and_product(FORMS[0], "Pt W")
    before = pair.finish(pair.sketch.call(aten.mm.default, pair.rows, pair.scaled))
    after = simplify(before)
    assert targets(after).count(aten.mm.default) == 2
    assert all(n.meta["val"].shape != (3, 5) for n in after.graph.nodes if n.op == "call_function")
    assert agree(before, after)


@pytest.mark.parametrize("read", ["scaled", "product"])
def test_what_something_else_reads_stays(read: str) -> None:
    pair = dot_and_product(FORMS[0], "Pt W")
    step = pair.finish(pair.sketch.call(aten.tanh.default, getattr(pair, read)))
    assert not share_scaled_products(step.graph)
    verify(step)


def test_a_product_of_something_else_is_no_partner() -> None:
    sketch = Sketch()
    p, q, b, r = (sketch.input(name, 3, 3) for name in "pqbr")
    rate = sketch.input("rate")
    product = sketch.call(aten.mm.default, p, q)
    total = sketch.call(aten.sum.default, sketch.call(aten.mul.Tensor, b, product))
    scaled = sketch.call(aten.mul.Tensor, b, rate)
    found = sketch.call(aten.mm.default, sketch.call(aten.t.default, r), scaled)
    step = sketch.returning(total, found)
    assert not share_scaled_products(step.graph)
