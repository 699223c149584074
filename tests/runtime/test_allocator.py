"""glibc is told to keep what a run frees, unless there is a budget."""

import pytest
import torch
from torch import nn

import unrollc
from unrollc.runtime import allocator


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What mallopt is called with, as if no run had been before."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(allocator, "_mallopt", lambda: lambda *pair: calls.append(pair))
    monkeypatch.setattr(allocator, "_kept", 0)
    return calls


def peak_of_a_call(memory: str | None) -> int:
    model = nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(3, 4), torch.randint(2, (3,))
    program = unrollc.compile(model, opt, nn.CrossEntropyLoss(), memory=memory)
    train = unrollc.repeat(batch, 2)
    lowered = program.lower(train, batch)
    program(train, batch)
    return lowered.plan.peak_bytes


def test_so_much_is_kept_as_a_run_holds(told: list[tuple[int, int]]) -> None:
    peak = peak_of_a_call(None)
    assert [name for name, _ in told] == [-3, -1] and told[-1][1] >= peak
    allocator.keep_freed_memory(peak - 1)
    assert len(told) == 2, "a smaller run changes nothing"
    allocator.keep_freed_memory(2**40)
    assert told[-1] == (-1, 2**31 - 1), "an int is all that mallopt takes"


def test_a_budget_changes_nothing(told: list[tuple[int, int]]) -> None:
    peak_of_a_call("1GiB")
    assert told == []


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_mallopt", lambda: None)
    monkeypatch.setattr(allocator, "_kept", 0)
    allocator.keep_freed_memory(2**30)
    assert allocator._kept == 0
