"""Rates of a machine: defaults, measured ones, and files that hold neither."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from unrollc.cli import app
from unrollc.errors import InputError
from unrollc.plan import calibration
from unrollc.plan.calibration import DEFAULT, Rates, Row, current_rates, rates_path, save
from unrollc.plan.cost import Cost

MEASURED = Rates(50e9, 4.0, 1000.0, calibrated=True)


@pytest.fixture
def uncalibrated() -> None:
    """These tests write the file themselves."""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path


def test_without_a_file_the_defaults_count_and_say_so() -> None:
    assert current_rates() == DEFAULT
    assert "defaults" in str(DEFAULT) and "calibrate" in str(DEFAULT)


def test_what_is_saved_counts_at_once(directory: Path) -> None:
    cost = Cost(10**6, 10**5, 10)
    before = cost.weight
    assert save(MEASURED) == directory / "unrollc" / "rates.json" == rates_path()
    assert current_rates() == MEASURED and "measured" in str(MEASURED)
    assert cost.weight == 10**6 + 4 * 10**5 + 1000 * 10 != before
    assert cost.seconds == cost.weight / 50e9
    assert os.listdir(rates_path().parent) == ["rates.json"]


def test_rates_of_another_number_of_threads_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    save(MEASURED)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 6)
    assert current_rates() == DEFAULT
    other = Rates(300e9, 12.0, 5000.0, calibrated=True)
    save(other)
    assert current_rates() == other
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert current_rates() == MEASURED


def test_the_home_directory_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert rates_path() == Path.home() / ".cache" / "unrollc" / "rates.json"


_ENTRY = dict.fromkeys(("operations_per_second", "operations_per_byte", "operations_per_call"), 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"1": 2}',
        '{"1": {"operations_per_second": 1}}',
        json.dumps({"1": {**_ENTRY, "operations_per_byte": "2"}}),
        json.dumps({"1": {**_ENTRY, "operations_per_byte": -2.0}}),
        json.dumps({"1": {**_ENTRY, "operations_per_byte": float("nan")}}),
        json.dumps({"1": {**_ENTRY, "more": 1.0}}),
    ],
)
def test_a_file_of_something_else_is_refused_and_replaced(text: str) -> None:
    rates_path().parent.mkdir()
    rates_path().write_text(text)
    with pytest.raises(InputError, match=r"rates\.json does not hold the rates of a machine"):
        current_rates()
    save(MEASURED)
    assert current_rates() == MEASURED


def test_the_command_measures_prints_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_SIDES", (16, 32))
    monkeypatch.setattr(calibration, "_ELEMENTS", (64, 128))
    done = CliRunner().invoke(app, ["calibrate"])
    assert done.exit_code == 0, done.output
    for text in ("product of 32 × 32", "addition of 128", "G operations/s", "µs", "(measured)"):
        assert text in done.stdout
    rates = current_rates()
    assert rates.calibrated and f"{rates}" in done.stdout


def test_rates_follow_from_the_measured_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 1000.0))
    monkeypatch.setattr(calibration, "_median", lambda run: next(seconds))
    rates, rows = calibration.measure()
    assert rates.operations_per_second == max(2 * 512**3, 2 * 1024**3 / 2)
    bandwidth = 12 * 2**23 / 4.0
    assert rates.operations_per_byte == rates.operations_per_second / bandwidth
    assert rates.operations_per_call == rates.operations_per_second * 1.0
    assert rows[-1] == Row("addition of two numbers", 1.0, 0, 12)
