"""Settings every test shares: one thread, a fixed seed, stated rates, rare garbage collections."""

import gc
from collections.abc import Iterator

import pytest
import torch

from unrollc.plan.calibration import DEFAULT


def pytest_configure() -> None:
    # The tensors of the tests are small: threads of one operation only get in each other's way,
    # and summation in one thread is reproducible.
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # Each compiled program leaves thousands of objects in cycles. Looking for garbage among all
    # that PyTorch and the tests have imported, after each of them, takes a fifth of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 10, 10)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--programs",
        type=int,
        default=0,
        help="search this many random programs for unsound verdicts, not the 2,000 of each run",
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans use the stated rates, whatever was measured on the machine that runs the tests."""
    monkeypatch.setattr("unrollc.plan.calibration._read", lambda path, threads: DEFAULT)


@pytest.fixture
def short_loops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward mode is tried for loops of any length."""
    monkeypatch.setattr("unrollc.runtime.tangents.SHORTEST_LOOP", 0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default dtype for one test.

    The step counters of ``torch.optim`` take the default dtype, so without this Adam's bias
    correction may be computed in float32 even where the parameters are float64.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
