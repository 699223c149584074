"""The functions of a program compiled by Inductor: each distinct one once, in other processes.

Kernels come from the cache where they are in it; the others are dealt out to worker processes,
as many as there are processors. Neither Dynamo nor a guard stands between a call and machine code.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from unrollc.backends import worker
from unrollc.backends.bind import Function, bound
from unrollc.backends.cache import open_cache
from unrollc.backends.kernel import Kernel, kernels_of
from unrollc.backends.toolchain import environment, key_of, toolchain
from unrollc.backends.worker import runner_of
from unrollc.errors import BackendError
from unrollc.plan.cost import cost_of
from unrollc.plan.pieces import Pieces

#: A graph that one thread is done with in so many seconds is compiled for one: waking others takes
#: longer than they save.
ALONE = 1e-3


class Compilation:
    """The kernels of a program on their way from source to machine code.

    Attributes:
        keys: The key of each kernel by the function's name.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._kernels = kernels_of(pieces)
        self._home = pieces.device
        self._threads = {name: threads_for(pieces, name) for name in self._kernels}
        tools = toolchain()
        self.keys = {
            name: key_of(kernel, self._threads[name], tools)
            for name, kernel in self._kernels.items()
            if kernel.text
        }
        self._cache = open_cache()
        self._draft: Path | None = None
        self._workers: list[subprocess.Popen[bytes]] = []
        self._sweep: Callable[[], object] = lambda: None
        self._settings = {"cpp.cxx": [tools.compiler]}
        self._start()

    def done(self) -> bool:
        """Whether `functions` would not have to wait."""
        return all(each.poll() is not None for each in self._workers)

    def functions(self) -> dict[str, Function]:
        """The functions by name, once they are compiled.

        Raises:
            BackendError: If one cannot be compiled.
        """
        for each in self._workers:
            each.wait()
        found = {name: self._function(name, kernel) for name, kernel in self._kernels.items()}
        self._sweep()
        return found

    # -- compiling ------------------------------------------------------------------------------

    def _start(self) -> None:
        missing = {key: name for name, key in self.keys.items() if self._cache.find(key) is None}
        if not missing:
            return
        self._draft = self._cache.draft()
        hands = dealt({key: len(self._kernels[name].text) for key, name in missing.items()})
        for number, keys in enumerate(hands):
            folder = self._draft / str(number)
            folder.mkdir()
            kernels = {key: self._described(missing[key]) for key in keys}
            job = {"settings": self._settings, "kernels": kernels}
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            self._workers.append(_worker(folder))
        self._sweep = weakref.finalize(self, _end, self._workers, self._draft)

    def _described(self, name: str) -> dict[str, object]:
        kernel = self._kernels[name]
        inputs = [asdict(spec) for spec in kernel.inputs]
        return {
            "text": kernel.text,
            "inputs": inputs,
            "threads": self._threads[name],
            "device": _device(kernel, self._home),
        }

    def _function(self, name: str, kernel: Kernel) -> Function:
        if not kernel.text:
            return bound(kernel, None)
        key = self.keys[name]
        place = self._cache.find(key) or self._cache.add(key, self._made(name, key))
        return bound(kernel, runner_of(place, _device(kernel, self._home)))

    def _made(self, name: str, key: str) -> Path:
        """The folder that a worker has made."""
        for folder in sorted(self._draft.iterdir()) if self._draft else ():
            place = folder / key
            if (place / "done").exists():
                (place / "done").unlink()
                return place
            if (place / "error").exists():
                raise _refused(name, (place / "error").read_text(encoding="utf-8"))
            job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            if key in job["kernels"]:
                log = (folder / "log").read_text(encoding="utf-8", errors="replace")
                raise _refused(name, "the compiling process has died: " + log[-2000:])
        raise _refused(name, "its compiled code has disappeared from the cache")


def threads_for(pieces: Pieces, name: str) -> int:
    """Threads that a function is compiled for: all of torch's, or one where it is small."""
    graph = dict(pieces.named_graphs)[name]
    return 1 if cost_of(graph).seconds < ALONE else torch.get_num_threads()


def dealt(sizes: Mapping[str, int]) -> list[list[str]]:
    """Keys dealt out to processes, the largest first, each to the one that has least to do."""
    hands: list[list[str]] = [[] for _ in range(min(len(sizes), _processors()))]
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        min(hands, key=lambda hand: sum(sizes[each] for each in hand)).append(key)
    return hands


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device(kernel: Kernel, home: torch.device) -> str:
    """Where a kernel runs: on the device of the fast weights, if it has anything to do there."""
    devices = [spec.device for spec in (*kernel.inputs, *kernel.outputs)]
    return str(home) if str(home) in devices else devices[0]


def _worker(folder: Path) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise BackendError(
            "Inductor cannot run in this process",
            why="it has no Python executable, which compilation in another process needs",
            remedy='pass backend="aten"',
        )
    root = str(Path(torch.__file__).parents[1])
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", worker.__file__, str(folder)],
            cwd=folder,
            env=environment(os.environ, [root, *sys.path]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _end(workers: list[subprocess.Popen[bytes]], draft: Path) -> None:
    for each in workers:
        with contextlib.suppress(ProcessLookupError):
            each.kill()
        each.wait()
    shutil.rmtree(draft, ignore_errors=True)


def _refused(name: str, said: str) -> BackendError:
    return BackendError(
        f"Inductor cannot compile {name}",
        why=said,
        remedy='pass backend="aten", which calls PyTorch\'s ops as they are',
    )
