"""Measuring one workload: memory and cold compilation first, then run times, interleaved.

Memory is that of one call in a fresh process (`resident.py` says how). Compile time is what
preparing takes, and what the first call takes beyond the median one: *cold* in a process that finds
its caches empty, *warm* in the next, which finds what the first one left. For run times every
implementation is alive in a process of its own, and they take turns: one call, or as many as fit
into `TURN` after one that is not counted, in each of several rounds.
"""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agreement import compared
from driver import Job, Worker, WorkerError, serving
from registry import BY_NAME, OURS, omitted
from workloads import WORKLOADS

#: Seconds that one implementation's turn may take, and most calls in it.
TURN, MOST_CALLS = 0.4, 20

#: Seconds between turns, so that the last one's threads are asleep.
PAUSE = 0.05

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: Turns of each implementation, with at least one timed call each.
        check: Whether implementations are compared in float64 first.
        steps: T, if not the workload's own.
        limit: Seconds that an implementation may compile.
        say: Is told what happens.
    """

    rounds: int = 5
    check: bool = True
    steps: int = 0
    limit: float = 300
    say: Say = field(default=lambda line: None)


def measured(workload: str, names: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """One entry for each implementation and, for ours, each budget.

    An entry has ``seconds`` of every timed call, ``resident`` bytes, ``cold`` and ``warm`` seconds
    and ``agreement``; or ``failed``, why there are none.
    """
    entries = {job: _blank(job) for job in _jobs(workload, names, settings.steps)}
    with tempfile.TemporaryDirectory() as folder:
        caches = {job: pathlib.Path(folder) / str(job) for job in entries}
        if settings.check:
            _check(entries, settings, pathlib.Path(folder) / "float64")
        for job, entry in _sound(entries):
            with _recorded(entry, settings.say):
                entry |= _first(job, caches[job], settings.limit)
                settings.say(f"{job}: {entry['resident'] / 2**20:.0f} MiB")
        _time(entries, caches, settings)
    return list(entries.values())


def _jobs(workload: str, names: Sequence[str], steps: int) -> list[Job]:
    """Ours once for each budget, the others once."""
    return [
        Job(workload, name, budget, steps)
        for name in names
        for budget in (WORKLOADS[workload].budgets if BY_NAME[name].peer == OURS else (None,))
    ]


def _blank(job: Job) -> dict[str, Any]:
    reason = omitted(job.workload, job.implementation)
    return {
        "workload": job.workload,
        "implementation": job.implementation,
        "peer": BY_NAME[job.implementation].peer,
        "budget": job.budget,
        "steps": job.steps or WORKLOADS[job.workload].steps,
        **({} if reason is None else {"failed": reason}),
    }


def _sound(entries: dict[Job, dict[str, Any]]) -> list[tuple[Job, dict[str, Any]]]:
    return [(job, entry) for job, entry in entries.items() if "failed" not in entry]


@contextlib.contextmanager
def _recorded(entry: dict[str, Any], say: Say) -> Any:
    """What an implementation could not do goes into its entry."""
    try:
        yield
    except WorkerError as error:
        entry["failed"] = str(error)
        say(f"{entry['implementation']}: {error}")


def _check(entries: dict[Job, dict[str, Any]], settings: Settings, cache: pathlib.Path) -> None:
    sound = dict(_sound(entries))
    for job, verdict in compared(list(sound), settings.limit, cache).items():
        entry = entries[job]
        if "failed" in verdict:
            entry["failed"] = verdict.pop("failed")
            settings.say(f"{job}: {entry['failed']}")
        entry["agreement"] = verdict


def _first(job: Job, cache: pathlib.Path, limit: float) -> dict[str, Any]:
    """Facts, memory, and what to compute the cold compile time from.

    What compiles in the background is compiled before memory is measured, in another process: the
    first call of that one runs what every later call runs.
    """
    with serving(job, cache) as worker:
        facts = worker.prepare(limit)
        cold = facts.pop("seconds")
        if not facts.pop("settles"):
            memory = worker.memory()
            return {**facts, "resident": memory["resident"], "cold": cold + memory["seconds"]}
        cold += worker.call()[0]
        worker.settle()
    with serving(job, cache) as worker:
        worker.prepare(limit)
        return {**facts, "resident": worker.memory()["resident"], "cold": cold}


def _time(
    entries: dict[Job, dict[str, Any]], caches: dict[Job, pathlib.Path], settings: Settings
) -> None:
    """Fill in ``seconds`` and ``warm``, and take the median call off both compile times."""
    with contextlib.ExitStack() as stack:
        workers: dict[Job, Worker] = {}
        expected: dict[Job, float] = {}
        for job, entry in _sound(entries):
            with _recorded(entry, settings.say):
                worker = stack.enter_context(serving(job, caches[job]))
                entry["warm"] = worker.prepare(settings.limit)["seconds"]
                expected[job] = worker.call()[0]
                worker.settle()
                entry["warm"] += expected[job]
                entry["seconds"] = []
                workers[job] = worker
        for _ in range(settings.rounds):
            for job, entry in _sound(entries):
                with _recorded(entry, settings.say):
                    entry["seconds"] += _turn(workers[job], expected[job])
                    expected[job] = statistics.median(entry["seconds"])
        for job, entry in _sound(entries):
            if entry["peer"] == OURS:
                entry["profile"] = workers[job].profile()
            median = statistics.median(entry["seconds"])
            for key in ("cold", "warm"):
                entry[key] = round(max(0.0, entry[key] - median), 3)
            entry["seconds"] = [round(seconds, 6) for seconds in entry["seconds"]]
            settings.say(f"{job}: {median * 1e3:.1f} ms")


def _turn(worker: Worker, expected: float) -> list[float]:
    """One call, or several after one that brings the caches back.

    Args:
        expected: Seconds of a call, at most: the first call's before there are others.
    """
    time.sleep(PAUSE)
    times = min(MOST_CALLS, int(TURN / expected))
    return worker.call(1) if times <= 1 else worker.call(1 + times)[1:]
