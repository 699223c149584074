"""A spilled run gives what a run in memory gives, and goes on after a kill as if there was none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import toy_loop
from tests.oracles.spill_kills import fingerprint
from unrollc.errors import SpillError
from unrollc.runtime.spill import Spilled, spilled_adapt, spilled_backward
from unrollc.runtime.store import open_store
from unrollc.runtime.tensor_files import digest_of

ROOT = Path(__file__).parents[2]
SEED = 5


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is not tested here; waiting for the disk takes most of a run."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def in_memory(inputs: dict[str, Any]) -> list[Any]:
    """The toy loop as one segment."""
    losses = torch.empty(toy_loop.STEPS, dtype=torch.float64)
    kept: dict[int, list[Tensor]] = {}
    state = toy_loop.start(inputs)
    stop = {toy_loop.STOP}
    state = toy_loop.forward(inputs, SEED, state, losses, kept, stop, 0, toy_loop.STEPS)
    loss, cotangents, totals = toy_loop.finish(inputs, SEED, list(state))
    span = (toy_loop.STOP, toy_loop.STEPS)
    cotangents = toy_loop.reverse(inputs, SEED, kept, *span, cotangents, totals)
    return [loss, state, losses, toy_loop.gradients(cotangents, totals)]


def run(home: Path, seed: int = SEED, progress: Any = None) -> Spilled:
    store = open_store(home, digest_of("toy", toy_loop.make_inputs()), seed)
    return Spilled(toy_loop, store, progress)


def complete(spilled: Spilled) -> list[Any]:
    inputs = toy_loop.make_inputs()
    return [*spilled_adapt(spilled, inputs), spilled_backward(spilled, inputs)]


def damage(spilled: Spilled, name: str) -> None:
    path = spilled.store._run.folder / spilled.store._files[name]["file"]
    path.write_bytes(path.read_bytes()[:-3])


@pytest.fixture(params=[(0, 7), (0, 60), (0, 100), (20, 7), (59, 7)], ids=str)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """STOP and SEGMENT of the toy loop."""
    monkeypatch.setattr(toy_loop, "STOP", request.param[0])
    monkeypatch.setattr(toy_loop, "SEGMENT", request.param[1])
    yield


def test_the_toy_loop_is_right() -> None:
    """Against autograd, so that what it is compared with is a meta-gradient."""
    inputs = toy_loop.make_inputs()
    wanted = ("weights", "lr", "momentum", "y")
    leaves = {**inputs, **{key: inputs[key].clone().requires_grad_() for key in wanted}}
    state = toy_loop.start(leaves)
    for j in range(toy_loop.STEPS):
        state, _ = toy_loop._step(leaves, SEED, j, state)
    error = leaves["val.x"] @ state[0] - leaves["val.y"]
    (error.square().sum() / 2).backward()
    found = in_memory(inputs)[-1]
    for key in wanted:
        gradient = torch.stack(found[key]) if isinstance(found[key], list) else found[key]
        torch.testing.assert_close(gradient, leaves[key].grad, rtol=1e-10, atol=0)


@pytest.mark.usefixtures("cut")
def test_segments_change_no_bit(tmp_path: Path) -> None:
    expected = fingerprint(in_memory(toy_loop.make_inputs()))
    assert fingerprint(complete(run(tmp_path))) == expected
    assert list(tmp_path.iterdir()) == []


class Cut(BaseException):
    """Ends a run like a kill: nothing that runs afterwards changes the disk."""


def cut_off(home: Path, moment: int) -> Spilled:
    """A run that ended when so many steps were done."""

    def end(done: int, _: int) -> None:
        if done >= moment:
            spilled.store._remove.detach()
            spilled.store._run.release()
            raise Cut

    spilled = run(home, progress=end)
    with pytest.raises(Cut):
        complete(spilled)
    return spilled


@pytest.mark.usefixtures("cut")
def test_a_run_is_taken_up_at_every_segment(tmp_path: Path) -> None:
    """The same result, and no segment runs twice."""
    expected = fingerprint(in_memory(toy_loop.make_inputs()))
    total = 2 * toy_loop.STEPS - toy_loop.STOP
    reports: list[int] = []
    complete(run(tmp_path, progress=lambda done, of: reports.append(done) or of == total))
    assert reports == sorted(reports) and reports[-1] == total
    for position, moment in enumerate(reports):
        cut_off(tmp_path, moment)
        calls: list[int] = []
        again = run(tmp_path, seed=99, progress=lambda done, _, calls=calls: calls.append(done))
        assert fingerprint(complete(again)) == expected
        assert calls == reports[position + 1 :]
        assert list(tmp_path.iterdir()) == []


def test_a_second_backward_pass(tmp_path: Path) -> None:
    inputs = toy_loop.make_inputs()
    expected = in_memory(inputs)[-1]
    spilled = run(tmp_path)
    spilled_adapt(spilled, inputs)
    for again in (True, True, False):
        assert fingerprint(spilled_backward(spilled, inputs, again=again)) == fingerprint(expected)
    with pytest.raises(SpillError, match="retain_graph"):
        spilled_backward(spilled, inputs)
    assert list(tmp_path.iterdir()) == []


DAMAGES = [
    (35, "state 35"),
    (35, "state 7"),
    (60, "state 56"),
    (60, "outcome"),
    (92, "progress"),
    (92, "outcome"),
    (60, "turn"),
    (92, "state 21"),
]


@pytest.mark.parametrize(("moment", "name"), DAMAGES)
def test_damaged_files_are_computed_again(tmp_path: Path, moment: int, name: str) -> None:
    expected = fingerprint(in_memory(toy_loop.make_inputs()))
    damage(cut_off(tmp_path, moment), name)
    with pytest.warns(RuntimeWarning, match="a spilled file is damaged"):
        assert fingerprint(complete(run(tmp_path))) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_in_the_same_process(tmp_path: Path) -> None:
    inputs = toy_loop.make_inputs()
    expected = fingerprint(in_memory(inputs)[-1])
    for names in (["turn"], ["state 56", "state 49"], ["state 7"]):
        spilled = run(tmp_path)
        spilled_adapt(spilled, inputs)
        for name in names:
            damage(spilled, name)
        with pytest.warns(RuntimeWarning, match="a spilled file is damaged"):
            assert fingerprint(spilled_backward(spilled, inputs)) == expected


@pytest.mark.parametrize("moment", [7, 60, 99])
def test_an_exception_leaves_nothing(tmp_path: Path, moment: int) -> None:
    def interrupt(done: int, _: int) -> None:
        if done >= moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(run(tmp_path, progress=interrupt))
    assert list(tmp_path.iterdir()) == []


# --- kills ------------------------------------------------------------------------------------


def kills(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.oracles.spill_kills", str(directory), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_fifty_kills_at_random_moments(tmp_path: Path) -> None:
    done = kills(tmp_path, "random")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] >= 50


def test_two_processes_in_one_directory(tmp_path: Path) -> None:
    done = kills(tmp_path, "together")
    assert done.returncode == 0, done.stderr


def test_a_kill_before_every_change_of_files(tmp_path: Path) -> None:
    done = kills(tmp_path, "changes")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] >= 50


@pytest.mark.parametrize("twin", ["drops", "names"])
def test_stores_that_change_things_in_the_wrong_order_are_caught(tmp_path: Path, twin: str) -> None:
    done = kills(tmp_path, "changes", twin)
    assert done.returncode != 0
    assert "a spilled file is damaged" in done.stderr
