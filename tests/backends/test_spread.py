"""Ops on concatenated vectors, piece by piece: the same numbers to the last bit, fewer copies."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from unrollc.backends.spread import spread

aten = torch.ops.aten


class Made:
    """A function's graph as a worker takes it down, and what is made of it."""

    def __init__(self, function: Callable[..., Any], given: Sequence[Tensor]) -> None:
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(each) for each in given]
            self.whole = make_fx(function, select_decomp_table())(*fake)
            self.spread = spread(self.whole)
        self.given = given

    def check(self) -> None:
        """Both give the same numbers, in tensors of the same kind."""
        self.spread.graph.lint()
        ours, theirs = self.spread(*self.given), self.whole(*self.given)
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.dtype is its.dtype and mine.shape == its.shape
            assert torch.equal(mine, its)

    def unchanged(self) -> bool:
        return calls(self.spread) == calls(self.whole)


def calls(module: fx.GraphModule) -> Counter[Any]:
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


def vectors(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


# -- an optimizer's update --------------------------------------------------------------------


def adam(g0: Tensor, g1: Tensor, m: Tensor, v: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
    g = torch.cat([g0, g1])
    m = 0.9 * m + 0.1 * g
    v = torch.addcmul(0.99 * v, g, g, value=0.01)
    d0, d1 = torch.split(rate * m / (v.sqrt() + 1e-8), [len(g0), len(g1)])
    return m, v, d0, d1


def test_gradients_are_not_put_side_by_side() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64)
    made = Made(adam, [*vectors(600, 700, 1300), torch.rand(1300).double(), rate])
    made.check()
    before, after = calls(made.whole), calls(made.spread)
    assert (before[aten.cat.default], before[aten.split_with_sizes.default]) == (1, 1)
    assert (after[aten.cat.default], after[aten.split_with_sizes.default]) == (2, 0)
    cats = [node for node in made.spread.graph.nodes if node.target is aten.cat.default]
    assert all(piece.op != "placeholder" for cat in cats for piece in cat.args[0])
    assert all(set(cat.users) == {made.spread.graph.output_node()} for cat in cats)


def test_what_nobody_needs_whole_is_never_put_together() -> None:
    def update(g0: Tensor, g1: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return torch.split(m - 0.1 * torch.cat([g0, g1]), [600, 700])

    made = Made(update, vectors(600, 700, 1300))
    made.check()
    assert calls(made.spread)[aten.cat.default] == 0
    slices = [node for node in made.spread.graph.nodes if node.target is aten.slice.Tensor]
    assert [node.args[1:] for node in slices] == [(0, 0, 600), (0, 600, 1300)]


# -- what stays as it is ----------------------------------------------------------------------

LEFT_ALONE: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "few elements": (lambda a, b: (torch.cat([a, b]) * 2,), vectors(500, 523)),
    "another axis": (
        lambda a, b: (torch.cat([a, b], 1) * 2,),
        [each.view(40, 40) for each in vectors(1600, 1600)],
    ),
    "matrices": (
        lambda a, b: (torch.cat([a, b]) * 2,),
        [each.view(40, 40) for each in vectors(1600, 1600)],
    ),
    "nothing pointwise": (lambda a, b: (torch.cat([a, b]).cumsum(0),), vectors(600, 700)),
    "another shape": (lambda a, b, c: (torch.cat([a, b]) * c[:, None],), vectors(600, 700, 2)),
    "other vectors": (lambda a, b: (a * b + 1, a - b), vectors(2000, 2000)),
    "dtypes that cat brings together": (
        lambda a, b: (torch.cat([a, b]) * 0.1,),
        [torch.randn(600), *vectors(700)],
    ),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_what_would_not_be_faster_or_not_the_same_is_left_alone(what: str) -> None:
    made = Made(*LEFT_ALONE[what])
    made.check()
    assert made.unchanged()


def test_one_element_more_is_enough() -> None:
    made = Made(LEFT_ALONE["few elements"][0], vectors(500, 524))
    made.check()
    assert not made.unchanged() and calls(made.spread)[aten.mul.Tensor] == 2


# -- pieces of several kinds ------------------------------------------------------------------


def test_a_vector_that_stands_there_twice() -> None:
    made = Made(lambda a, b: (torch.cat([a, b, a]) * 2,), vectors(600, 700))
    made.check()
    assert calls(made.spread)[aten.mul.Tensor] == 3


def test_other_places_of_cutting() -> None:
    """One sum of two vectors in other pieces, and a vector that is cut elsewhere."""

    def update(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        one, other = torch.cat([a, b]) * 2, torch.cat([b, a]) * 3
        return one + other, *torch.split(one, [100, 1200]), *torch.split(other, [700, 600])

    made = Made(update, vectors(600, 700))
    made.check()
    after = calls(made.spread)
    assert after[aten.cat.default] == 2 and after[aten.split_with_sizes.default] == 1


def test_results_of_another_dtype() -> None:
    def update(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        whole = torch.cat([a, b])
        return torch.where(whole > c, whole, c), (whole < 0), whole.to(torch.float32)

    made = Made(update, vectors(600, 700, 1300))
    made.check()
    assert calls(made.spread)[torch.ops.prims.convert_element_type.default] == 2


# -- random graphs ----------------------------------------------------------------------------


class Drawn:
    """A random function of vectors, whose ops round in one way whatever the vectors' lengths."""

    UNARY = (torch.neg, torch.abs, lambda t: t * 0.3, lambda t: 1 - t, lambda t: t.abs().sqrt())
    BINARY = (torch.add, torch.mul, torch.sub, torch.maximum, lambda a, b: a + 0.7 * b)
    SIZES = (0, 1, 300, 400, 724, 1024)

    def __init__(self, seed: int) -> None:
        self.seed = seed
        draw = random.Random(seed)
        self.sizes = [draw.choice(self.SIZES) for _ in range(5)]

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        draw = random.Random(self.seed + 1)
        number, *vectors = given
        known, cuts = list(vectors), []
        for _ in range(draw.randrange(4, 25)):
            kind, value = draw.randrange(6), draw.choice(known[-6:])
            alike = [each for each in known if each.shape == value.shape]
            if kind == 0:
                pieces = draw.choices(known, k=draw.randrange(1, 4))
                known.append(torch.cat(pieces))
                cuts.append([len(each) for each in pieces])
            elif kind == 1:
                known.append(draw.choice(self.UNARY)(value))
            elif kind == 2:
                known.append(draw.choice(self.BINARY)(value, number))
            elif kind == 3 and (fitting := [each for each in cuts if sum(each) == len(value)]):
                known += torch.split(value, draw.choice(fitting))
            else:
                known.append(draw.choice(self.BINARY)(value, draw.choice(alike)))
        return tuple(draw.choices(known, k=5))


def drawn(seed: int) -> Made:
    function = Drawn(seed)
    return Made(function, [torch.randn((), dtype=torch.float64), *vectors(*function.sizes)])


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs_keep_their_values(seed: int) -> None:
    drawn(seed).check()


def test_random_graphs_are_changed() -> None:
    made = [drawn(seed) for seed in range(60)]
    assert sum(not each.unchanged() for each in made) > 15
