"""Where the time of one call goes, by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile

from unrollc.backends.library import NativeCode
from unrollc.runtime.taped import Player

#: The parts, with what the profiler calls their ops.
PARTS = {
    "products": ("mm", "linear", "dot", "mv"),
    "convolutions": ("convolution",),
}


def breakdown(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call by part.

    What is called one by one as PyTorch's ops is seen by its profiler; compiled functions are
    "machine code", their products included. "rest" is Python, autograd and, where functions have
    Inductor's own wrapper, those.
    """
    with _counted_machine_code() as seconds:
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call()
        whole = time.perf_counter() - start
    found = {**dict.fromkeys((*PARTS, "other ops"), 0.0), "machine code": sum(seconds)}
    for event in profiled.key_averages():
        if event.key.startswith(("aten::", "mkldnn::")):
            found[_part(event.key)] += event.self_cpu_time_total / 1e6
    found["rest"] = max(0.0, whole - sum(found.values()))
    return {part: round(value, 6) for part, value in found.items()}


def _part(op: str) -> str:
    name = op.partition("::")[2]
    return next((part for part, keys in PARTS.items() if any(k in name for k in keys)), "other ops")


@contextmanager
def _counted_machine_code() -> Iterator[list[float]]:
    """Seconds of tapes and of single C functions, while this is open."""
    seconds: list[float] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds.append(time.perf_counter() - start)

        return timed

    with (
        mock.patch.object(Player, "_run", counted(Player._run)),
        mock.patch.object(NativeCode, "__call__", counted(NativeCode.__call__)),
    ):
        yield seconds
