"""What stands for a function of PyTorch has its value and its first derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import _VF, Tensor
from torch.nn import functional as F

import unrollc
from tests.oracles.compare import assert_close
from unrollc.capture.equivalents import equivalent

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:size_average and reduce args"),
]


def normal(*shape: int) -> Tensor:
    """A tensor whose gradient is compared; drawn anew at each call from one generator."""
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


_I = torch.tensor
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **kwargs: Any) -> Arguments:
    return args, kwargs


#: Calls of a function, by what is special about them.
CALLS: dict[str, tuple[Any, Callable[[], Arguments]]] = {
    "one_hot": (F.one_hot, lambda: call(_I([[0, 2]]), 4)),
    "one_hot, classes from the data": (F.one_hot, lambda: call(_I([0, 2]))),
    "embedding": (F.embedding, lambda: call(_I([0, 2]), normal(3, 2), padding_idx=2)),
    "embedding_bag": (F.embedding_bag, lambda: call(_I([[0, 2]]), normal(3, 2))),
    **{
        f"embedding_bag, an empty bag, {mode}": (
            F.embedding_bag,
            lambda mode=mode: call(_I([0, 2, 2]), normal(3, 2), _I([0, 1, 1]), mode=mode),
        )
        for mode in ("sum", "mean", "max")
    },
    "embedding_bag, nothing but padding": (
        F.embedding_bag,
        lambda: call(_I([[1, 1], [0, 1]]), normal(3, 2), mode="max", padding_idx=1),
    ),
    "embedding_bag, last offset": (
        F.embedding_bag,
        lambda: call(_I([0, 2, 1]), normal(3, 2), _I([0, 2, 3]), include_last_offset=True),
    ),
    "embedding_bag, weighted": (
        F.embedding_bag,
        lambda: call(
            _I([0, 2, 2]), normal(3, 2), _I([0, 2]), mode="sum", per_sample_weights=normal(3)
        ),
    ),
    **{
        f"cdist, p={p}": (torch.cdist, lambda p=p: call(normal(2, 3, 2), normal(1, 4, 2), p))
        for p in (0.0, 0.5, 1.0, 2.0, 4.0, math.inf)
    },
    "cdist, points that coincide": (
        torch.cdist,
        lambda: call(torch.ones(1, 2).requires_grad_(), torch.ones(1, 2).requires_grad_()),
    ),
    "pdist": (F.pdist, lambda: call(normal(4, 2), 3.0)),
    "multi_margin_loss": (F.multi_margin_loss, lambda: call(normal(3, 4), _I([0, 1, 3]), 2, 0.5)),
    "multi_margin_loss, one sample": (
        F.multi_margin_loss,
        lambda: call(normal(4), _I(2), reduction="none"),
    ),
    "multi_margin_loss, weights": (
        F.multi_margin_loss,
        lambda: call(normal(2, 3), _I([0, 2]), weight=torch.rand(3), size_average=False),
    ),
    "multilabel_margin_loss": (
        F.multilabel_margin_loss,
        lambda: call(normal(3, 3), _I([[2, -1, 1], [0, 1, 2], [-1, 0, 0]])),
    ),
    "multilabel_margin_loss, one sample": (
        F.multilabel_margin_loss,
        lambda: call(normal(3), _I([1, 0, -1]), reduce=False),
    ),
    "ctc_loss, not normalised": (
        F.ctc_loss,
        lambda: call(normal(4, 2, 3), _I([[1, 1], [2, 1]]), _I([4, 3]), _I([2, 1])),
    ),
    "ctc_loss, lengths as numbers": (
        F.ctc_loss,
        lambda: call(normal(4, 2, 3), _I([1, 1, 2]), (4, 3), (2, 1), reduction="sum"),
    ),
    "ctc_loss, one sequence": (
        F.ctc_loss,
        lambda: call(normal(3, 3), _I([1, 2]), _I(3), _I(2), reduction="none"),
    ),
    "ctc_loss, an empty target": (
        F.ctc_loss,
        lambda: call(normal(3, 2, 3), _I([[1, 2], [2, 1]]), _I([3, 2]), _I([2, 0])),
    ),
    "ctc_loss, zero_infinity": (
        F.ctc_loss,
        lambda: call(normal(2, 1, 3), _I([[1, 1]]), _I([2]), _I([2]), zero_infinity=True),
    ),
    "gaussian_nll_loss": (
        F.gaussian_nll_loss,
        lambda: call(normal(2, 3), normal(2, 3), torch.rand(2, 3).requires_grad_(), full=True),
    ),
    "gaussian_nll_loss, one variance a sample": (
        F.gaussian_nll_loss,
        lambda: call(normal(2, 3), normal(2, 3), torch.rand(2).requires_grad_(), reduction="sum"),
    ),
    "gaussian_nll_loss, a column of variances": (
        F.gaussian_nll_loss,
        lambda: call(normal(2, 3), normal(2, 3), torch.rand(2, 1), reduction="none"),
    ),
    "gaussian_nll_loss, a number": (
        F.gaussian_nll_loss,
        lambda: call(normal(2, 3), normal(2, 3), 0.5),
    ),
    "gaussian_nll_loss, a variance below eps": (
        F.gaussian_nll_loss,
        lambda: call(normal(2), normal(2), torch.zeros(2).requires_grad_()),
    ),
    "rrelu, evaluation": (F.rrelu, lambda: call(normal(4), 0.1, 0.5)),
    "pack": (
        _VF._pack_padded_sequence,
        lambda: call(normal(3, 2, 2), _I([3, 1]), False),
    ),
    "pack, batch_first": (
        _VF._pack_padded_sequence,
        lambda: call(normal(2, 3, 2), _I([2, 2]), True),
    ),
    "pad": (
        _VF._pad_packed_sequence,
        lambda: call(normal(4, 2), _I([2, 1, 1]), False, 0.5, 5),
    ),
    "pad, batch_first": (
        _VF._pad_packed_sequence,
        lambda: call(normal(4), _I([2, 2]), True, 0.0, 2),
    ),
}


def outcome(function: Callable[..., Any], arguments: Arguments) -> dict[str, Tensor]:
    """Results, and gradients of the first in a fixed direction."""
    args, kwargs = arguments
    found = function(*args, **kwargs)
    results = found if isinstance(found, tuple) else (found,)
    seen = {f"result {i}": each.detach().double() for i, each in enumerate(results)}
    moving = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    if moving:
        direction = torch.arange(1.0, results[0].numel() + 1).reshape(results[0].shape)
        gradients = torch.autograd.grad(
            results[0], moving, direction, allow_unused=True, materialize_grads=True
        )
        seen |= {f"gradient {i}": each for i, each in enumerate(gradients)}
    return seen


@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradient_are_pytorchs(name: str) -> None:
    function, arguments = CALLS[name]
    stands = equivalent(function, Tensor.tolist)
    assert stands is not None
    torch.manual_seed(0)
    expected = outcome(function, arguments())
    torch.manual_seed(0)
    assert_close(outcome(stands, arguments()), expected, rtol=1e-12)


def test_a_loss_without_alignment_is_infinite() -> None:
    stands = equivalent(F.ctc_loss, Tensor.tolist)
    assert stands is not None
    args, _ = call(normal(2, 1, 3), _I([[1, 1]]), _I([2]), _I([2]))
    assert stands(*args) == F.ctc_loss(*args) == math.inf


def test_a_negative_variance_makes_the_loss_nan() -> None:
    stands = equivalent(F.gaussian_nll_loss, Tensor.tolist)
    assert stands is not None
    assert stands(torch.ones(2), torch.zeros(2), torch.tensor([1.0, -1.0])).isnan()


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (F.embedding_bag, lambda: call(_I([[0]]), normal(3, 2), mode="none"), "is not defined"),
        (F.multi_margin_loss, lambda: call(normal(1, 2), _I([0]), reduction="all"), "not a valid"),
        (F.ctc_loss, lambda: call(normal(2, 1, 3), _I([[1]]), (2,), (1,), 0, "all"), "not a valid"),
        (F.gaussian_nll_loss, lambda: call(normal(2, 3), normal(2, 3), torch.rand(3)), "size"),
        (_VF._pack_padded_sequence, lambda: call(normal(3, 2), _I([1, 3]), False), "must be pos"),
    ],
)
def test_what_pytorch_refuses_is_refused(
    function: Any, arguments: Callable[[], Arguments], words: str
) -> None:
    args, kwargs = arguments()
    with pytest.raises((RuntimeError, ValueError)):
        function(*args, **kwargs)
    stands = equivalent(function, Tensor.tolist)
    assert stands is not None
    with pytest.raises(ValueError, match=words):
        stands(*args, **kwargs)


def test_other_functions_stand_for_themselves() -> None:
    assert equivalent(F.relu, Tensor.tolist) is None


def test_a_sparse_gradient_is_refused_at_its_line() -> None:
    model = torch.nn.Embedding(3, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model: torch.nn.Module, index: Tensor) -> Tensor:
        return F.embedding(index, model.weight, sparse=True).square().sum()  # the line

    program = unrollc.compile(model, opt, unrollc.objective(loss))
    with pytest.raises(unrollc.CaptureError, match="asks for a sparse gradient") as caught:
        program(unrollc.repeat(_I([0]), 1), _I([0]))
    assert caught.value.where is not None
    assert caught.value.where.text.endswith("# the line")
