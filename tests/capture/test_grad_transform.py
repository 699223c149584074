"""What a gradient transform may do, and that a program never outlives a change of it."""

from collections import deque

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import unrollc
from tests.gradients.surroundings import task

pytestmark = pytest.mark.usefixtures("float64")


def compiled(transform: object, model: nn.Module | None = None) -> tuple:
    made, train, val = task()
    model = model or made
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    program = unrollc.compile(model, opt, F.cross_entropy, grad_transform=transform)
    return program, train, val


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, parameters: list[Tensor]) -> None:
        self.calls += 1


def test_python_state_is_refused() -> None:
    norms: list[Tensor] = []
    behind, counting = Counting(), Counting()
    appending = (lambda p: norms.append(clip_grad_norm_(p, 1.0)), lambda p: behind(p))
    for transform in (*appending, counting):
        program, train, val = compiled(transform)
        with pytest.raises(unrollc.CaptureError, match="changes Python values"):
            program(train, val)
    assert counting.calls == 0


class Count:
    calls = 0


@pytest.mark.parametrize("kept", ["long list", "deque", "object"])
def test_python_state_is_refused_wherever_it_is(kept: str) -> None:
    entries, recent, count = [0.0] * 100, deque([0.0], maxlen=1), Count()
    changes = {
        "long list": lambda p: entries.append(1.0),
        "deque": lambda p: recent.append(1.0),
        "object": lambda p: setattr(count, "calls", count.calls + 1),
    }
    program, train, val = compiled(changes[kept])
    with pytest.raises(unrollc.CaptureError, match="changes Python values"):
        program(train, val)


def test_tensors_from_outside_are_not_written_to() -> None:
    """A running mean or a counter in a closure would change at capture alone."""
    running = torch.tensor(0.5)

    def averaging(parameters: list[Tensor]) -> None:
        running.mul_(0.9).add_(parameters[0].grad.norm(), alpha=0.1)

    def counting(parameters: list[Tensor]) -> None:
        nonlocal running
        running += 1

    for transform in (averaging, counting):
        program, train, val = compiled(transform)
        with pytest.raises(unrollc.CaptureError, match="writes to a tensor from outside") as caught:
            program(train, val)
        assert "test_grad_transform.py" in str(caught.value)
    assert running == 0.5


def test_reading_data_is_refused() -> None:
    program, train, val = compiled(lambda p: clip_grad_norm_(p, 1.0, error_if_nonfinite=True))
    with pytest.raises(unrollc.CaptureError, match="depends on the data") as caught:
        program(train, val)
    assert "error_if_nonfinite=True" in str(caught.value)


def test_a_transform_is_a_callable() -> None:
    with pytest.raises(unrollc.InputError, match="grad_transform is float"):
        compiled(1.0)


def test_a_parameter_left_without_gradient_is_passed_over() -> None:
    def transform(parameters: list[Tensor]) -> None:
        parameters[0].grad = None

    program, train, val = compiled(transform)
    with torch.no_grad():
        result = program(train, val)
    model = program._problem.model
    assert torch.equal(result.params["0.weight"], model[0].weight)
    assert not torch.equal(result.params["2.weight"], model[2].weight)


def test_a_changed_transform_is_lowered_again() -> None:
    settings = {"bound": 0.2}

    def transform(parameters: list[Tensor]) -> None:
        clip_grad_norm_(parameters, settings["bound"])

    program, train, val = compiled(transform)
    with torch.no_grad():
        first = program.lower(train, val)
        assert program.lower(train, val) is first
        before = program(train, val).loss
        settings["bound"] = 0.1
        assert program.lower(train, val) is not first
        assert program(train, val).loss != before
        settings["bound"] = 0.2
        assert program(train, val).loss == before
