"""What a run was made on: machine, versions, and the rate of a large matrix product."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from unrollc.runtime.products import faster_products

PACKAGES = ("torch", "jax", "jaxlib", "higher", "torchopt", "numpy")

#: The load average above which others compute as well; what starts a run is some of it.
QUIET = 0.7

_SIDE, _REPEATS = 2048, 15


def describe() -> dict[str, Any]:
    """Machine and versions: what must be equal for numbers to stand in one table."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def now() -> str:
    """Date and time, to the second: the name of a run."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def load() -> float:
    """Processes that wanted to run, on average over the last minute."""
    return round(os.getloadavg()[0], 2)


def gemm_rate() -> float:
    """Operations a second of a float32 product of 2048 × 2048 matrices in all threads: the median.

    A product of that size has 17 G operations. Of PyTorch's own product and the one that unrollc
    takes on this processor, the faster one counts.
    """
    a, b = (torch.rand(_SIDE, _SIDE) for _ in range(2))
    products = (torch.mm, faster_products().get("op_mm", torch.mm))
    return max(2 * _SIDE**3 / _median(product, a, b) for product in products)


def _median(product: Callable[..., object], *matrices: torch.Tensor) -> float:
    """Seconds of a product, after a first one."""
    product(*matrices)
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        product(*matrices)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _versions() -> dict[str, str]:
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _cpu() -> str:
    """The model's name, and its numbers, since some virtual machines name none."""
    found: dict[str, str] = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    parts = [found.get("model name", platform.processor())]
    parts += [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join(parts)
