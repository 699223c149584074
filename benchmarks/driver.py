"""Starting workers, asking them, and stopping them."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).parent


class WorkerError(Exception):
    """What an implementation could not do, and why."""


@dataclass(frozen=True)
class Job:
    """What one worker computes.

    Attributes:
        workload, implementation: Names.
        budget: What ``memory=`` is given, for ours.
        steps: T, if another than the workload's own.
        dtype: "float32" or "float64".
    """

    workload: str
    implementation: str
    budget: str | None = None
    steps: int = 0
    dtype: str = "float32"

    def __str__(self) -> str:
        return " ".join([self.implementation, *([self.budget] if self.budget else [])])


class Worker:
    """A process that serves one `Job`."""

    def __init__(self, job: Job, cache: pathlib.Path) -> None:
        self.job = job
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | _environment(job, cache),
            start_new_session=True,  # compilers that it starts end with it
        )

    def prepare(self, limit: float) -> dict[str, Any]:
        """Build and compile; the reply has ``seconds`` and facts of the plan."""
        job = self.job
        return self._ask(
            limit,
            do="prepare",
            workload=job.workload,
            implementation=job.implementation,
            budget=job.budget,
            steps=job.steps,
            dtype=job.dtype,
        )

    def call(self, times: int = 1, limit: float | None = None) -> list[float]:
        """Seconds of each call."""
        return self._ask(limit, do="call", times=times)["seconds"]  # type: ignore[no-any-return]

    def memory(self, limit: float | None = None) -> dict[str, Any]:
        """One call: bytes of the resident peak over the start, and seconds."""
        return self._ask(limit, do="memory")

    def settle(self, limit: float | None = None) -> None:
        """One call, and waiting for what is compiled in the background."""
        self._ask(limit, do="settle")

    def profile(self) -> dict[str, float]:
        """One call: seconds by part; for ours."""
        return self._ask(None, do="profile")["profile"]  # type: ignore[no-any-return]

    def save(self, path: pathlib.Path, limit: float | None = None) -> list[float]:
        """One call: its gradients go to a file, the losses come back."""
        return self._ask(limit, do="save", path=str(path))["losses"]  # type: ignore[no-any-return]

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _ask(self, limit: float | None, **request: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        if self._process.poll() is not None:
            raise WorkerError(self._ending())
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._ending()) from None
        if limit is not None and not _readable(stdout, limit):
            self.stop()
            raise WorkerError(f"> {limit:.0f} s")
        line = stdout.readline()
        if not line:
            raise WorkerError(self._ending())
        reply: dict[str, Any] = json.loads(line)
        if "failed" in reply:
            raise WorkerError(reply["failed"])
        return reply

    def _ending(self) -> str:
        code = self._process.wait()
        return f"killed by signal {-code}" if code < 0 else f"ended with code {code}"


def _readable(stream: Any, limit: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(limit))


def _environment(job: Job, cache: pathlib.Path) -> dict[str, str]:
    """Caches below one directory, so that what is cold and what is warm is known.

    Comparisons in float64 run side by side, one thread each; what is timed chooses for itself.
    """
    alone = {"OMP_NUM_THREADS": "1"} if job.dtype == "float64" else {}
    return {
        **alone,
        "PYTHONPATH": str(HERE.parent),
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
    }


@contextlib.contextmanager
def serving(job: Job, cache: pathlib.Path) -> Iterator[Worker]:
    """A worker that is stopped at the end."""
    worker = Worker(job, cache)
    try:
        yield worker
    finally:
        worker.stop()
