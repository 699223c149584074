"""Kill spilled runs of the toy loop and compare what they give with a run that was left alone.

A script: ``python -m tests.oracles.spill_kills DIRECTORY EXPERIMENT [TWIN]``; it prints one JSON
object. Every warning is an error in the children: a kill damages no file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tests.oracles import kills, toy_loop
from unrollc.runtime.spill import Spilled, spilled_adapt, spilled_backward
from unrollc.runtime.store import Store, open_store
from unrollc.runtime.tensor_files import digest_of


class DropsFirst(Store):
    """A broken twin: the state goes before the progress is stored."""

    def update(self, added: Mapping[str, Any], dropped: Iterable[str] = ()) -> None:
        for name in set(dropped) & set(self._files):
            (self._run.folder / self._files[name]["file"]).unlink()
        super().update(added, dropped)


class NamesFirst(Store):
    """A broken twin: the manifest names files that are written only then."""

    def update(self, added: Mapping[str, Any], dropped: Iterable[str] = ()) -> None:
        super().update(added, dropped)
        paths = [self._run.folder / self._files[name]["file"] for name in added]
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, contents, strict=True):
            path.unlink()
            path.write_bytes(content)


TWINS: dict[str, type[Store]] = {"none": Store, "drops": DropsFirst, "names": NamesFirst}


def task(home: Path, result: Path, kind: type[Store]) -> Callable[[], None]:
    """A whole run, which writes a digest of what it finds to the file `result`."""

    def run() -> None:
        warnings.simplefilter("error")
        torch.set_num_threads(1)
        inputs = toy_loop.make_inputs()
        store = open_store(home, digest_of("toy", inputs), seed=1)
        store.__class__ = kind
        spilled = Spilled(toy_loop, store)
        found: list[Any] = list(spilled_adapt(spilled, inputs))
        found.append(spilled_backward(spilled, inputs))
        result.write_text(fingerprint(found))

    return run


def fingerprint(found: Any) -> str:
    leaves = [t for t in pytree.tree_leaves(found) if t is not None]
    content = b"".join(t.contiguous().numpy().tobytes() for t in leaves)
    return hashlib.sha256(content).hexdigest()


def judge(home: Path, result: Path, expected: str) -> None:
    assert result.read_text() == expected, "another result"
    left = sorted(path.name for path in home.iterdir())
    assert not left, f"left behind: {left}"
    result.unlink()


def at_random(base: Path, kind: type[Store], least: int = 50) -> dict[str, Any]:
    """Kill at random moments until there were `least` kills in all."""
    draw = random.Random(7)
    home, result = base / "spill", base / "result"
    home.mkdir()
    seconds = kills.run_through(task(home, result, kind))
    expected = result.read_text()
    judge(home, result, expected)
    total = runs = 0
    while total < least:
        total += kills.kill_until_done(task(home, result, kind), 0.6 * seconds, draw)
        judge(home, result, expected)
        runs += 1
    return {"kills": total, "runs": runs}


def at_every_change(base: Path, kind: type[Store]) -> dict[str, Any]:
    """Kill before the first change of files, before the second, and so on to the end."""
    home, result = base / "spill", base / "result"
    home.mkdir()
    toy_loop.SEGMENT = 25  # three segments: every change takes two children
    os.fsync = lambda _: None  # what was written survives a kill; a power cut is not tried
    kills.run_through(task(home, result, kind))
    expected = result.read_text()
    judge(home, result, expected)
    number = 1
    while kills.kill_before_change(task(home, result, kind), number):
        kills.run_through(task(home, result, kind))
        judge(home, result, expected)
        number += 1
    return {"kills": number - 1}


if __name__ == "__main__":
    base, experiment, twin = Path(sys.argv[1]), sys.argv[2], (*sys.argv[3:], "none")[0]
    run = {"random": at_random, "changes": at_every_change}[experiment]
    print(json.dumps(run(base, TWINS[twin])))
