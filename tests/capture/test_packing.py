"""Packed sequences: captured for the lengths that a batch has, and guarded."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unrollc
from tests.oracles import eager
from tests.oracles.compare import assert_close
from tests.oracles.objectives import Objective

pytestmark = pytest.mark.usefixtures("float64")

STEPS, TIMES, COUNT = 3, 3, 2
Batch = tuple[tuple[Tensor, Tensor], Tensor]


class Tagger(nn.Module):
    """A layer over sequences of different lengths, sorted or not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(2, 2)

    def lengths(self, given: Tensor) -> Tensor:
        return given

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, self.lengths(given), enforce_sorted=False)
        return pad_packed_sequence(self.layer(packed)[0], total_length=TIMES)[0]


class Masked(Tagger):
    """The lengths follow from a mask."""

    def lengths(self, given: Tensor) -> Tensor:
        return given.sum(0)


class Learned(Tagger):
    """The lengths follow from a parameter, which one graph cannot hold."""

    def lengths(self, given: Tensor) -> Tensor:
        return given + (self.layer.bias_hh_l0.sum() > 0).long()


def batch(lengths: Sequence[int]) -> Batch:
    inputs = (torch.randn(TIMES, COUNT, 2), torch.tensor(lengths))
    return inputs, torch.randn(TIMES, COUNT, 2)


class Problem:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.opt = torch.optim.SGD(model.parameters(), lr=0.1)
        self.program = unrollc.compile(model, self.opt, nn.functional.mse_loss)

    def check(self, train: list[Batch], val: Batch) -> unrollc.Lowered:
        """Compare the gradients with eager double backward; what was lowered comes back."""
        result = self.program(train, val)
        parameters = dict(self.model.named_parameters())
        found = torch.autograd.grad(result.loss, list(parameters.values()))
        # On copies: swapping the weights of a recurrent layer renews its list of them, which the
        # cache of programs takes for another module.
        model, opt = copy.deepcopy((self.model, self.opt))
        unrolled = eager.unroll(model, opt, nn.functional.mse_loss, train, val)
        expected = unrolled.gradients(list(model.parameters()))
        assert_close(
            dict(zip(parameters, found, strict=True)), dict(zip(parameters, expected, strict=True))
        )
        return self.program.lower(train, val)


def test_lengths_that_differ_from_step_to_step_are_steps_of_their_own() -> None:
    problem = Problem(Tagger())
    train = [batch([3, 1]), batch([2, 2]), batch([3, 1])]
    lowered = problem.check(train, batch([1, 2]))
    assert lowered.loop.sequence == (0, 1, 0)


def test_other_lengths_are_lowered_again_and_the_same_are_not() -> None:
    problem = Problem(Tagger())
    train, val = [batch([3, 1]) for _ in range(STEPS)], batch([2, 3])
    first = problem.check(train, val)
    assert problem.check([batch([3, 1]) for _ in range(STEPS)], batch([2, 3])) is first
    assert problem.check(train, batch([3, 3])) is not first  # the validation batch alone
    second = problem.check([*train[:-1], batch([1, 2])], val)
    assert second is not first
    assert problem.program.lower(train, val) is first


def test_lengths_may_follow_from_a_mask() -> None:
    mask = torch.tensor([[1, 1], [0, 1], [0, 1]])
    problem = Problem(Masked())
    made = [((batch([1, 1])[0][0], mask), torch.randn(TIMES, COUNT, 2)) for _ in range(STEPS + 1)]
    problem.check(made[:-1], made[-1])


def test_a_closures_lengths_are_guarded_too() -> None:
    lengths = torch.tensor([3, 1])
    model = nn.RNN(2, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        output, _ = model(pack_padded_sequence(x, lengths))
        return output.data.square().sum()

    program = unrollc.compile(model, opt, unrollc.objective(loss))
    train, val = torch.randn(STEPS, TIMES, COUNT, 2), torch.randn(TIMES, COUNT, 2)
    for given in ([3, 1], [2, 2]):
        lengths.copy_(torch.tensor(given))
        found = program(list(train), val).loss
        twin, its = copy.deepcopy((model, opt))
        unrolled = eager.unroll(twin, its, Objective(loss), list(train), val)
        assert_close({"loss": found.detach()}, {"loss": unrolled.loss.detach()})


def test_lengths_that_follow_from_a_parameter_are_refused() -> None:
    problem = Problem(Learned())
    with pytest.raises(unrollc.CaptureError, match="lengths of sequences depend on") as caught:
        problem.program([batch([2, 1])], batch([2, 1]))
    assert caught.value.where is not None and "pack_padded" in caught.value.where.text
