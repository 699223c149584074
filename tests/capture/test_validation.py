"""The validation loss: counters that it reads are known, and guarded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles import eager
from tests.oracles.compare import assert_close

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 3


class Averaging(nn.Module):
    """Statistics as an average over all batches: the weight of one is 1 / their number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)  # in training mode: the statistics below are those after this batch
        return self.norm.weight * (x - self.norm.running_mean).exp()


@pytest.mark.parametrize("form", ["list", "repeat"])
def test_a_counter_that_the_validation_loss_reads_is_that_after_the_loop(form: str) -> None:
    model = Averaging()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    program = unrollc.compile(model, opt, F.mse_loss, meta=["norm.weight"])
    batch, val = (torch.randn(4, 2), torch.randn(4, 2)), (torch.randn(4, 2), torch.randn(4, 2))
    listed = [batch] * STEPS
    train = listed if form == "list" else unrollc.repeat(batch, STEPS)
    lowered = []
    for seen in (0, 5, 5):
        model.norm.num_batches_tracked.fill_(seen)
        result = program(train, val)
        lowered.append(program.lower(train, val))
        (found,) = torch.autograd.grad(result.loss, [model.norm.weight])
        twin, its = copy.deepcopy((model, opt))
        unrolled = eager.unroll(twin, its, F.mse_loss, listed, val)
        (wanted,) = unrolled.gradients([twin.norm.weight])
        assert_close(
            {"loss": result.loss.detach(), "weight": found},
            {"loss": unrolled.loss.detach(), "weight": wanted},
        )
    assert lowered[0] is not lowered[1] and lowered[1] is lowered[2]
