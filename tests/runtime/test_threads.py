"""A program of small functions runs on one thread, and leaves the user's number as it was."""

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import unrollc
from unrollc.plan import threads
from unrollc.runtime.executor import Executor
from unrollc.runtime.lowering import Lowered


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def problem() -> tuple[unrollc.Program, Any, Any]:
    model = nn.Linear(2, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(3, 2), torch.randint(2, (3,))
    return unrollc.compile(model, opt, nn.CrossEntropyLoss()), unrollc.repeat(batch, 2), batch


def watched(lowered: Lowered) -> tuple[ModuleType, list[int]]:
    """What runs a program, and the number of threads at each of its steps."""
    module, seen = Executor(lowered, "aten").module(), []
    step = module.step_0

    def spying(*args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return step(*args)

    module.__dict__["step_0"] = spying
    return module, seen


@pytest.mark.parametrize(("seconds", "expected"), [(1e-4, 1), (1.0, 3)])
def test_small_programs_run_on_one_thread(
    seconds: float, expected: int, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "cost_of", lambda graph: SimpleNamespace(seconds=seconds))
    program, train, val = problem()
    module, seen = watched(program.lower(train, val))
    module.loss_and_gradients(program.inputs(train, val))
    assert seen == [expected] * 2
    assert torch.get_num_threads() == 3


def test_an_error_leaves_the_number_as_it_was(three_threads: None) -> None:
    program, train, val = problem()
    module, _ = watched(program.lower(train, val))
    with pytest.raises(RuntimeError):
        module.adapt({**program.inputs(train, val), "train.inputs": torch.ones(1)}, 0)
    assert torch.get_num_threads() == 3


def test_a_smaller_number_of_the_users_stays() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    program, train, val = problem()
    module, seen = watched(program.lower(train, val))
    module.adapt(program.inputs(train, val), 0)
    assert set(seen) == {1} and torch.get_num_threads() == 1
    torch.set_num_threads(before)
