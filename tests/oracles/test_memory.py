"""The memory meters on programs whose peak is known, and on each other."""

import pytest
import torch

from tests.oracles import memory

KIB = 1024
N = 256  # float32: one KiB


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count * N)


def test_temporaries_are_released() -> None:
    x = kib(4)  # an input: not counted

    def run() -> torch.Tensor:
        a = x + 1
        b = a * 2
        del a
        return b.sum()

    usage = memory.measure(run)
    assert usage.peak == 8 * KIB
    assert usage.kept == 4  # the sum; b died with the frame


def test_views_count_once_and_keep_their_storage() -> None:
    def run() -> torch.Tensor:
        a = kib(4) + 1
        return a.view(4, N)[1]

    usage = memory.measure(run)
    assert usage.peak == 8 * KIB
    assert usage.kept == 4 * KIB


def test_writing_into_inputs_is_free() -> None:
    x, y = kib(4), kib(4)

    def run() -> None:
        x.mul_(2)
        torch.add(x, 1, out=y)
        y.view(2, -1)[0].zero_()

    assert memory.measure(run).peak == 0


def test_the_autograd_graph_counts() -> None:
    x = kib(4).requires_grad_()

    def run() -> torch.Tensor:
        h = x
        for _ in range(5):
            h = h.tanh()  # keeps its result for the backward pass
        return h.sum()

    usage = memory.measure(run)
    assert usage.peak == 5 * 4 * KIB + 4
    assert usage.kept == usage.peak

    def forget() -> torch.Tensor:
        with torch.no_grad():
            return run()

    assert memory.measure(forget).peak == 2 * 4 * KIB


def test_addresses_that_are_used_again() -> None:
    def run() -> None:
        for _ in range(200):
            kib(1)
            torch.tensor([1.0])

    assert memory.measure(run).peak <= KIB + 8


class NeverReleases(memory.PeakMeter):
    """The broken twin: sums what is ever created."""

    def _released(self, key: int) -> None:
        before = self.live
        super()._released(key)
        self.live = before


class CountsInputs(memory.PeakMeter):
    """Another: everything an operator returns counts, inputs written in place too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._outside.clear()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._outside.clear()
        for storage in memory._storages(result):
            self._count(storage)
        return result


@pytest.mark.parametrize("broken", [NeverReleases, CountsInputs])
def test_broken_meters_are_caught(broken: type[memory.PeakMeter]) -> None:
    x = kib(4)

    def run() -> torch.Tensor:
        a = x + 1
        del a
        b = x + 2
        x.mul_(2)
        return b

    assert memory.measure(run).peak == 4 * KIB
    assert memory.measure(run, broken).peak > 4 * KIB


def test_both_meters_agree_on_elementwise_programs() -> None:
    x = kib(8).requires_grad_()

    def run() -> torch.Tensor:
        h = x * 2
        for _ in range(3):
            h = torch.sigmoid(h) * h
        return torch.autograd.grad(h.sum(), x)[0]

    counted, recorded = memory.measure(run).peak, memory.allocator_peak(run)
    # Kernels may hold scratch, and scalars are rounded up to the allocator's alignment.
    assert counted <= recorded <= counted + 4 * KIB
