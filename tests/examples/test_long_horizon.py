"""The long run goes on after a kill at any point, and ends with the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
ARGUMENTS = ("--steps", "400", "--outer-steps", "2", "--state")


def started(state: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
        "TERM": "dumb",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "long_horizon.py"), *ARGUMENTS, str(state)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finished(state: Path) -> str:
    process = started(state)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def stored(state: Path) -> set[str]:
    """What the training that is on its way has on the disk."""
    for manifest in (state / "spilled").glob("*/manifest.json"):
        try:
            return set(json.loads(manifest.read_text())["files"])
        except OSError:  # the training ended in this moment
            break
    return set()


def killed(state: Path, moment: Callable[[set[str]], bool]) -> set[str]:
    """Kill a run when what is on the disk meets a condition; returns what was left there."""
    process = started(state)
    end = time.monotonic() + 600
    while not moment(stored(state)):
        assert process.poll() is None, "the run ended before that moment"
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.communicate()
    return stored(state)


def outer_state(state: Path) -> dict[str, Any]:
    assert not list((state / "spilled").iterdir())
    found: dict[str, Any] = torch.load(state / "outer.pt")
    return found


def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    alone, state = tmp_path / "alone", tmp_path / "state"
    expected = finished(alone)
    assert "tuned" in expected and "%" in expected
    forward = killed(state, lambda names: len(names) > 5)
    assert len(forward) > 5 and "outcome" not in forward
    backward = killed(state, lambda names: "progress" in names)
    assert "progress" in backward
    after_one = killed(state, lambda names: bool(names) and (state / "outer.pt").exists())
    assert after_one
    output = finished(state)
    assert "holds 1 outer steps: going on from there" in output
    end = "from unseen weights and batches"
    assert output[output.index(end) :] == expected[expected.index(end) :]
    one, other = outer_state(alone), outer_state(state)
    assert one["losses"] == other["losses"] and torch.equal(one["log_lr"], other["log_lr"])
    moments = [each["adam"]["state"][0]["exp_avg_sq"] for each in (one, other)]
    assert torch.equal(*moments)
