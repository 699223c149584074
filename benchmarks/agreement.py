"""Whether implementations compute the same meta-gradient, in float64, before anything is timed."""

from __future__ import annotations

import math
import pathlib
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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


def compared(
    workload: str, names: list[str], steps: int, limit: float, cache: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Each implementation's distance to ours, by name: ``worst``, ``leaf``, ``steps``.

    Where one cannot do the workload, ``failed`` says why instead; so it does where `worst` exceeds
    `TOLERANCE`. What trains without a meta-gradient is compared by its losses.

    Args:
        steps: T, if another than what the workload is compared at.
        limit: Seconds that each may compile.
    """
    reference = f"{OURS} {BACKENDS[0]}"
    steps = steps or WORKLOADS[workload].checked or WORKLOADS[workload].steps
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PROCESSES) as pool:

        def found(name: str, short: int) -> Any:
            job = Job(workload, name, None, short, "float64")
            path = pathlib.Path(folder) / f"{name} {short}.pt"
            try:
                with serving(job, cache) as worker:
                    worker.prepare(limit)
                    losses = worker.save(path)
                return losses, torch.load(path, weights_only=True)
            except WorkerError as error:
                return str(error)

        lengths = {name: min(steps, BY_NAME[name].checked or steps) for name in names}
        jobs = {(reference, length) for length in lengths.values()} | set(lengths.items())
        results = dict(zip(jobs, pool.map(lambda job: found(*job), jobs), strict=True))
    return {
        name: _verdict(name, length, results[name, length], results[reference, length])
        for name, length in lengths.items()
    }


def _verdict(name: str, steps: int, result: Any, reference: Any) -> dict[str, Any]:
    for each in (reference, result):
        if isinstance(each, str):
            return {"steps": steps, "failed": each}
    expected = _losses(reference) if BY_NAME[name].peer == FLOOR else reference[1]
    actual = _losses(result) if BY_NAME[name].peer == FLOOR else result[1]
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
