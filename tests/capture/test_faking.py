"""Fake results are those of the ops, also where PyTorch's own fake ops say more than there is."""

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unrollc.capture.faking import faked

aten = torch.ops.aten


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)))
def test_a_backward_pass_returns_what_it_is_asked_for(mask: tuple[bool, ...]) -> None:
    def args(make: Any) -> tuple[Any, ...]:
        images, row = make(2, 3, 4, 4), make(3)
        return images, images, row, None, None, row, row, True, 1e-5, list(mask)

    op = aten.native_batch_norm_backward.default
    real = op(*args(torch.ones))
    with FakeTensorMode() as mode:
        made = args(torch.ones)
    for _ in range(2):  # the second time from memory
        fake = faked(mode, op, made, {})
        assert [each is None for each in fake] == [each is None for each in real]


def test_zeros_of_autograd_stay_what_they_are() -> None:
    """A product with such a tensor is another one: it must not be remembered as a plain one."""
    op = aten._efficientzerotensor.default
    with FakeTensorMode() as mode:
        pass
    for _ in range(2):
        found = faked(mode, op, ([2],), {"device": torch.device("cpu")})
        assert found._is_zerotensor()
