"""The comparison that every kernel goes through: wrong code is found out, rounding is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unrollc.backends.verify import DisagreementError, _exactly, _random, agree, verify
from unrollc.backends.worker import _module

#: A step of SGD on a linear layer: what Inductor has got wrong before.
SCALED = """
def compute(call, v0, v1, v2, ):
    n0 = call('aten.mm.default', v1, v2)
    n1 = call('aten.add.Tensor', v0, n0, alpha=-0.1)
    return (n1, )
"""

#: A gradient that is zero but for rounding, divided by its size as Adam's first step does.
ILL_CONDITIONED = """
def compute(call, v0, v1, v2, ):
    n0 = call('aten.mean.dim', v1, [0], True)
    n1 = call('aten.sub.Tensor', v1, n0)
    n2 = call('aten.sum.dim_IntList', n1, [0])
    n3 = call('aten.abs.default', n2)
    n4 = call('aten.div.Tensor', n2, n3)
    return (n4, )
"""


def examples(dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.empty(6, 5, dtype=dtype),
        torch.empty(6, 8, dtype=dtype),
        torch.empty(8, 5, dtype=dtype),
    ]


def right(v0: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    return torch.addmm(v0, v1, v2, alpha=-0.1)


WRONG: dict[str, Callable[..., Tensor]] = {
    "the scale is forgotten": lambda v0, v1, v2: torch.addmm(v0, v1, v2),
    "the product is forgotten": lambda v0, v1, v2: v0.clone(),
    "one element": lambda v0, v1, v2: right(v0, v1, v2).index_fill_(0, torch.tensor(0), 0),
    "slightly off": lambda v0, v1, v2: right(v0, v1, v2) * 1.001,
    "not a number": lambda v0, v1, v2: right(v0, v1, v2) * float("nan"),
    "other precision": lambda v0, v1, v2: right(v0, v1, v2).half(),
    "other shape": lambda v0, v1, v2: right(v0, v1, v2)[None],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", WRONG)
def test_wrong_code_is_found_out(how: str, dtype: torch.dtype) -> None:
    with pytest.raises(DisagreementError, match="result 0"):
        verify(_module(SCALED, 3), lambda inputs: [WRONG[how](*inputs)], examples(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_another_order_of_sums_is_no_difference(dtype: torch.dtype) -> None:
    def reordered(inputs: Any) -> list[Tensor]:
        v0, v1, v2 = inputs
        return [v0 - 0.1 * (v1.flip(1) @ v2.flip(0))]

    verify(_module(SCALED, 3), reordered, examples(dtype))


COPIES = """
def compute(call, v0, ):
    n0 = call('aten.clone.default', v0)
    n1 = call('aten.clone.default', v0)
    return (n0, n1, )
"""


@pytest.mark.parametrize(
    "run",
    [
        lambda inputs: [inputs[0], inputs[0].clone()],
        lambda inputs: [inputs[0].clone(), inputs[0].view(-1).view(6, 5)],
        lambda inputs: [inputs[0].clone()] * 2,
    ],
)
def test_memory_that_results_should_not_share_is_found_out(run: Any) -> None:
    with pytest.raises(DisagreementError, match="share memory"):
        verify(_module(COPIES, 1), run, examples(torch.float32)[:1])


def test_memory_of_their_own_passes() -> None:
    kernel = _module(COPIES, 1)
    verify(kernel, lambda inputs: [t.clone() for t in inputs * 2], examples(torch.float32)[:1])


def test_noise_that_is_blown_up_is_no_difference() -> None:
    def reordered(inputs: Any) -> list[Tensor]:
        total = (inputs[1] - inputs[1].flip(0).mean(0)).flip(0).sum(0)
        return [total / total.abs()]

    verify(_module(ILL_CONDITIONED, 3), reordered, examples(torch.float32))


#: The gradient of a bias that a normalisation takes away again: zero on paper, for any input.
CANCELLED = """
def compute(call, v0, v1, v2, ):
    n0 = call('aten.mean.dim', v1, [0], True)
    n1 = call('aten.sub.Tensor', v1, n0)
    n2 = call('aten.sum.dim_IntList', n1, [0])
    return (n2, )
"""


def naive(inputs: Any) -> Tensor:
    """The sum, a row after the other."""
    total = torch.zeros_like(inputs[1][0])
    for row in inputs[1] - inputs[1].mean(0):
        total = total + row
    return total


def test_what_cancels_out_on_paper_is_no_difference() -> None:
    many = [torch.empty(6, 5), torch.empty(600, 8), torch.empty(8, 5)]
    verify(_module(CANCELLED, 3), lambda inputs: [naive(inputs)], many)


def test_what_should_cancel_out_and_does_not_is_found_out() -> None:
    many = [torch.empty(6, 5), torch.empty(600, 8), torch.empty(8, 5)]
    with pytest.raises(DisagreementError, match="result 0"):
        verify(_module(CANCELLED, 3), lambda inputs: [naive(inputs) + 0.01], many)


def test_integers_are_compared_exactly() -> None:
    a, b = torch.arange(3), torch.tensor([0, 1, 3])
    assert agree(a, a.clone(), [a], a) and not agree(b, a, [a, a], a)


#: Zero on paper, and the dtype is named on the way.
BACK = """
def compute(call, v0, ):
    n0 = call('aten.log.default', v0)
    n1 = call('aten._to_copy.default', n0, dtype=torch.float32)
    n2 = call('aten.exp.default', n1)
    n3 = call('aten.sub.Tensor', n2, v0)
    return (n3, )
"""


def test_a_single_number_that_chance_does_not_move_is_held_against_float64() -> None:
    """The ops' own result may be the one that is off; what is right must not be refused for it."""
    ours, theirs = torch.tensor(3.86e-5), torch.tensor(3.93e-5)
    lucky = [theirs + 1e-8, theirs - 7e-9]
    assert not agree(ours, theirs, lucky, theirs.double())
    assert agree(ours, theirs, lucky, ours.double())
    assert not agree(ours + 1e-5, theirs, lucky, ours.double())


def test_the_same_ops_run_in_float64() -> None:
    given = [torch.linspace(0.1, 1, 100)]
    (exact,), (rounded,) = _exactly(_module(BACK, 1), given), _module(BACK, 1)(*given)
    assert exact.dtype is torch.float64 and rounded.dtype is torch.float32
    assert exact.norm() < 1e-14 < 1e-8 < rounded.norm()


def test_random_numbers_are_positive_at_first() -> None:
    """Second moments are: roots of negative numbers would leave nothing to compare."""
    kinds = [
        torch.empty(4, 3),
        torch.empty((), dtype=torch.float64),
        torch.empty(2, dtype=torch.int64),
    ]
    drawn = _random(kinds, signed=False, nudge=0.0)
    assert all((tensor > 0).all() for tensor in drawn[:2]) and not drawn[2].any()
    assert (_random(kinds, signed=True, nudge=0.0)[0] < 0).any()
