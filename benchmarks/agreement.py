"""Whether implementations compute the same meta-gradient, in float64, before anything is timed."""

from __future__ import annotations

import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from driver import Job, WorkerError, serving
from registry import BACKENDS, BY_NAME, FLOOR, OURS
from torch import Tensor
from workloads import WORKLOADS

#: The relative error that is allowed.
TOLERANCE = 1e-8

#: A leaf counts as if its meta-gradient had at least this share of the largest one's norm: some are
#: zero in exact arithmetic, such as that of a bias before BatchNorm, and rounding alone in ours.
SMALLEST = 1e-6

#: One process for each core: nothing is timed here.
PROCESSES = 2


def compared(jobs: Sequence[Job], limit: float, cache: pathlib.Path) -> dict[Job, dict[str, Any]]:
    """Each job's distance to our fastest plan: ``worst``, ``leaf`` and ``steps``.

    Where one cannot do the workload, ``failed`` says why instead; so it does where `worst` exceeds
    `TOLERANCE`. What trains without a meta-gradient is compared by its losses.

    Args:
        jobs: As they will be measured, in float32.
        limit: Seconds that each may compile.
    """
    doubles = {job: in_float64(job) for job in jobs}
    references = {job: _reference(double) for job, double in doubles.items()}
    each = list(dict.fromkeys([*references.values(), *doubles.values()]))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PROCESSES) as pool:

        def found(number: int) -> Any:
            path = pathlib.Path(folder) / f"{number}.pt"
            try:
                with serving(each[number], cache) as worker:
                    worker.prepare(limit)
                    worker.settle(limit)
                    losses = worker.save(path)
                return losses, torch.load(path, weights_only=True)
            except WorkerError as error:
                return str(error)

        results = dict(zip(each, pool.map(found, range(len(each))), strict=True))
    return {
        job: _verdict(double, results[double], results[references[job]])
        for job, double in doubles.items()
    }


def in_float64(job: Job) -> Job:
    """What is compared: fewer steps where float64 is slow, twice the budget for twice the bytes."""
    workload, most = WORKLOADS[job.workload], BY_NAME[job.implementation].checked
    steps = job.steps or workload.checked or workload.steps
    budget = job.budget and f"{2 * int(job.budget.removesuffix('MiB'))}MiB"
    return replace(job, steps=min(steps, most or steps), budget=budget, dtype="float64")


def _reference(job: Job) -> Job:
    return replace(job, implementation=f"{OURS} {BACKENDS[0]}", budget=None)


def _verdict(job: Job, result: Any, reference: Any) -> dict[str, Any]:
    steps, trains = job.steps, BY_NAME[job.implementation].peer == FLOOR
    for each in (reference, result):
        if isinstance(each, str):
            return {"steps": steps, "failed": each}
    expected = _losses(reference) if trains else reference[1]
    actual = _losses(result) if trains else result[1]
    leaf, worst = distance(actual, expected)
    if not math.isfinite(worst):
        return {"steps": steps, "failed": f"its meta-gradient of {leaf} is missing or not finite"}
    found = {"steps": steps, "worst": worst, "leaf": leaf}
    if worst > TOLERANCE:
        found["failed"] = f"its meta-gradient of {leaf} differs by {worst:.1e}"
    return found


def _losses(result: tuple[list[float], Any]) -> dict[str, Tensor]:
    return {"the losses": torch.tensor(result[0], dtype=torch.float64)}


def distance(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    """The leaf that is furthest off, and its relative error; NaN is furthest of all."""
    least = SMALLEST * max(float(value.norm()) for value in expected.values())
    worst = ("", 0.0)
    for label, value in expected.items():
        if label not in actual:
            return label, math.inf
        error = float((actual[label] - value).norm()) / max(float(value.norm()), least)
        error = math.inf if math.isnan(error) else error
        worst = max(worst, (label, error), key=lambda item: item[1])
    return worst
