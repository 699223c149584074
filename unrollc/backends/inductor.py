"""The functions of a program compiled by Inductor: each distinct one once, in other processes.

Kernels come from the cache where they are in it; the others are dealt out to worker processes,
as many as there are processors. A run waits for those that take most of its time: the step and its
adjoint. What runs once (the first step, the last one, the validation loss) stays PyTorch's ops
until it is compiled as well. Neither Dynamo nor a guard stands between a call and machine code.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from unrollc.backends import worker
from unrollc.backends.bind import Function, arranged, bound
from unrollc.backends.cache import open_cache
from unrollc.backends.kernel import Kernel, kernels_of
from unrollc.backends.library import Code, NativeCode, runner_of
from unrollc.backends.toolchain import environment, key_of, toolchain
from unrollc.errors import BackendError
from unrollc.plan.cost import cost_of
from unrollc.plan.pieces import EPILOGUE, PROLOGUE, Pieces
from unrollc.plan.threads import is_small

#: The part of a run's time that compiled functions must make up before it begins.
_MOST = 0.9

#: Seconds between looks at what the workers have done.
_PAUSE = 0.01


class Compilation:
    """The kernels of a program on their way from source to machine code.

    Attributes:
        kernels: The functions by name.
        keys: The key of each kernel by the function's name.
        awaited: Names of the functions without which no run begins.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.kernels = kernels_of(pieces)
        self._home = pieces.device
        self._threads = {name: threads_for(pieces, name) for name in self.kernels}
        tools = toolchain()
        self.keys = {
            name: key_of(kernel, self._threads[name], tools)
            for name, kernel in self.kernels.items()
            if kernel.text
        }
        self.awaited = most_of(seconds_of(pieces))
        self._functions: dict[str, Function] = {}
        self._codes: dict[str, Code] = {}
        self._given_up: set[str] = set()
        self._cache = open_cache()
        self._draft: Path | None = None
        self._workers: dict[Path, subprocess.Popen[bytes]] = {}
        self._folders: dict[str, Path] = {}  # of the workers, by the keys that they were given
        self._sweep: Callable[[], object] = lambda: None
        self._settings = {"cpp.cxx": [tools.compiler]}
        self._start()

    def ready(self) -> bool:
        """Whether `functions` would not have to wait."""
        return all(self._is_settled(name) for name in self.awaited)

    def done(self) -> bool:
        """Whether nothing more will be compiled."""
        return len(self._functions) + len(self._given_up) == len(self.kernels)

    def functions(self, *, everything: bool = False) -> Mapping[str, Function]:
        """The functions by name, as far as they are compiled.

        Args:
            everything: Whether to wait for all of them, not only for `awaited`.

        Raises:
            BackendError: If one that is waited for cannot be compiled. Of others that is a
                warning, and they stay as they are.
        """
        if self.done():
            return self._functions
        required = self.kernels.keys() if everything else self.awaited
        while not all(self._is_settled(name) for name in required):
            time.sleep(_PAUSE)
        for name in self.kernels:
            if name not in self._functions and name not in self._given_up:
                self._take(name, required=name in required)
        if self.done():
            self._sweep()
        return self._functions

    def codes(self) -> dict[str, NativeCode] | None:
        """The C functions of the loop by name, once all of those that compute anything are C."""
        found = {name: code for name, code in self._codes.items() if isinstance(code, NativeCode)}
        inside = self.keys.keys() - {PROLOGUE, EPILOGUE}
        return found if found and found.keys() >= inside else None

    def arranged(self, name: str, function: Function) -> Function:
        """A function that is not compiled, which returns values as compiled ones take them."""
        return arranged(self.kernels[name], function)

    # -- compiling ------------------------------------------------------------------------------

    def _start(self) -> None:
        missing = {key: name for name, key in self.keys.items() if self._cache.find(key) is None}
        if not missing:
            return
        self._draft = self._cache.draft()
        sizes = {key: len(self.kernels[name].text) for key, name in missing.items()}
        first = {key for name, key in self.keys.items() if name in self.awaited}
        for number, keys in enumerate(dealt(sizes, first)):
            folder = self._draft / str(number)
            folder.mkdir()
            kernels = {key: self._described(missing[key], awaited=key in first) for key in keys}
            job = {"settings": self._settings, "kernels": kernels}
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            self._folders.update(dict.fromkeys(keys, folder))
            self._workers[folder] = _worker(folder)
        self._sweep = weakref.finalize(self, _end, list(self._workers.values()), self._draft)

    def _described(self, name: str, *, awaited: bool) -> dict[str, object]:
        kernel = self.kernels[name]
        inputs = [asdict(spec) for spec in kernel.inputs]
        return {
            "text": kernel.text,
            "inputs": inputs,
            "outputs": [asdict(spec) for spec in kernel.outputs],
            "threads": self._threads[name],
            "device": _device(kernel, self._home),
            "awaited": awaited,
        }

    def _is_settled(self, name: str) -> bool:
        """Whether a function is compiled, or will never be."""
        if name in self._functions or name in self._given_up or name not in self.keys:
            return True
        key = self.keys[name]
        folder = self._folders.get(key)
        taken = {self.keys.get(other) for other in self._functions}  # equal texts are one kernel
        if folder is None or key in taken:
            return True
        if any((folder / key / each).exists() for each in ("done", "error")):
            return True
        return self._workers[folder].poll() is not None

    def _take(self, name: str, *, required: bool) -> None:
        """Put a function in its place if it is settled."""
        if not self._is_settled(name):
            return
        try:
            self._functions[name] = self._function(name, self.kernels[name])
        except BackendError as error:
            if required:
                raise
            self._given_up.add(name)
            warnings.warn(f"{name} stays as it is: {error}", RuntimeWarning, stacklevel=5)

    def _function(self, name: str, kernel: Kernel) -> Function:
        if not kernel.text:
            return bound(kernel, None)
        key = self.keys[name]
        place = self._cache.find(key) or self._cache.add(key, self._made(name, key))
        outputs = [asdict(spec) for spec in kernel.outputs]
        self._codes[name] = runner_of(place, _device(kernel, self._home), outputs)
        return bound(kernel, self._codes[name])

    def _made(self, name: str, key: str) -> Path:
        """The folder that a worker has made."""
        folder = self._folders.get(key)
        if folder is None:
            raise _refused(name, "its compiled code has disappeared from the cache")
        place = folder / key
        if (place / "done").exists():
            (place / "done").unlink()
            return place
        if (place / "error").exists():
            raise _refused(name, (place / "error").read_text(encoding="utf-8"))
        log = (folder / "log").read_text(encoding="utf-8", errors="replace")
        raise _refused(name, "the compiling process has died: " + log[-2000:])


def seconds_of(pieces: Pieces) -> dict[str, float]:
    """The predicted time that each function takes of a run, if no step is repeated."""
    calls = {"validate": 1, PROLOGUE: 1, EPILOGUE: 1}
    for kind, sequence in (("step", pieces.sequence), ("adjoint", pieces.adjoint_sequence)):
        for index in sequence:
            name = f"{kind}_{index}"
            calls[name] = calls.get(name, 0) + 1
    return {name: calls[name] * cost_of(graph).seconds for name, graph in pieces.named_graphs}


def most_of(seconds: Mapping[str, float]) -> frozenset[str]:
    """The fewest names that make up most of the time."""
    found: list[str] = []
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        if sum(seconds[each] for each in found) >= _MOST * sum(seconds.values()):
            break
        found.append(name)
    return frozenset(found)


def threads_for(pieces: Pieces, name: str) -> int:
    """Threads that a function is compiled for: all of torch's, or one where it is small."""
    graph = dict(pieces.named_graphs)[name]
    return 1 if is_small(graph) else torch.get_num_threads()


def dealt(sizes: Mapping[str, int], first: Collection[str]) -> list[list[str]]:
    """Keys dealt out to processes, each to the one that has least to do.

    Args:
        sizes: How much there is to do for each.
        first: Those that are to be done before others; of these and of those, the largest first.
    """
    hands: list[list[str]] = [[] for _ in range(min(len(sizes), _processors()))]
    for key in sorted(sizes, key=lambda key: (key not in first, -sizes[key])):
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
