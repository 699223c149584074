"""State that the inner gradient depends on: mixed mode has no product for it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.differentiate.steps import captured
from unrollc.differentiate.mixed import mixed_adjoint, mixed_obstacle
from unrollc.differentiate.reverse import reverse_adjoint
from unrollc.differentiate.symmetry import asymmetry
from unrollc.step import Role, StepGraph

pytestmark = pytest.mark.usefixtures("float64")


class Levelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("level", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        level = self.level
        self.level = 0.8 * self.level + 0.2 * hidden.square().mean()
        return hidden * level


def step_of(model: nn.Module) -> StepGraph:
    batch = (torch.randn(4, 3), torch.randint(2, (4,)))
    return captured(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, batch)


def live(step: StepGraph) -> frozenset[tuple[Role, str]]:
    return frozenset((value.role, value.label) for value, _ in step.outputs_with(Role.THETA))


def test_a_buffer_that_the_loss_reads_takes_reverse_mode() -> None:
    """The Jacobian is symmetric all the same; what is missing is the buffer's own cotangent."""
    step = step_of(Levelled())
    assert asymmetry(step) is None
    reached = [
        any(label == "level" for _, label in adjoint(step, frozenset(), live(step)).live)
        for adjoint in (mixed_adjoint, reverse_adjoint)
    ]
    assert reached == [False, True]
    reason = mixed_obstacle(step, frozenset(), live(step))
    assert reason == "the inner gradient depends on level, which is state"


def test_running_statistics_that_are_only_written_stand_in_nobodys_way() -> None:
    step = step_of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    assert mixed_obstacle(step, frozenset(), live(step)) is None
