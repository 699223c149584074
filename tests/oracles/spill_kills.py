"""Kill spilled runs and compare what they give with a run that was left alone.

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
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import unrollc
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


TWINS: dict[str, type[Store]] = {"drops": DropsFirst, "names": NamesFirst}


def toy(home: Path, result: Path, kind: type[Store]) -> Callable[[], None]:
    """A run of the toy loop, which writes a digest of what it finds to the file `result`."""

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


def compiled(home: Path, result: Path) -> Callable[[], None]:
    """A run of a compiled program, with dropout, batch statistics and a learning rate a step."""
    torch.set_num_threads(1)
    layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))
    model = nn.Sequential(*layers)
    lr = torch.linspace(0.01, 0.05, 200).requires_grad_()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt.param_groups[0]["lr"] = unrollc.PerStep(lr)
    train = (torch.randn(200, 5, 4), torch.randint(3, (200, 5)))
    val = (train[0][0], train[1][0])
    program = unrollc.compile(model, opt, F.cross_entropy, spill=home)
    program.lower(train, val)  # the children find it lowered

    def run() -> None:
        warnings.simplefilter("error")
        run = program(train, val)
        meta = [lr, *model.parameters()]
        found = [run.loss, run.params, run.buffers, run.inner_losses]
        found.append(torch.autograd.grad(run.loss, meta))
        result.write_text(fingerprint(found))

    return run


def fingerprint(found: Any) -> str:
    leaves = [t for t in pytree.tree_leaves(found) if t is not None]
    content = b"".join(t.detach().contiguous().numpy().tobytes() for t in leaves)
    return hashlib.sha256(content).hexdigest()


def judge(home: Path, result: Path, expected: str) -> None:
    assert result.read_text() == expected, "another result"
    left = sorted(path.name for path in home.iterdir())
    assert not left, f"left behind: {left}"
    result.unlink()


def at_random(base: Path, least: int = 50) -> dict[str, Any]:
    """Kill a compiled program at random moments until there were `least` kills in all."""
    draw = random.Random(7)
    home, result = base / "spill", base / "result"
    home.mkdir()
    task = compiled(home, result)
    seconds = kills.run_through(task)
    expected = result.read_text()
    judge(home, result, expected)
    total = runs = 0
    while total < least:
        total += kills.kill_until_done(task, 0.6 * seconds, draw)
        judge(home, result, expected)
        runs += 1
    return {"kills": total, "runs": runs}


def at_every_change(base: Path, kind: type[Store] = Store) -> dict[str, Any]:
    """Kill before the first change of files, before the second, and so on to the end."""
    home, result = base / "spill", base / "result"
    home.mkdir()
    toy_loop.SEGMENT = 25  # three segments: every change takes two children
    os.fsync = lambda _: None  # what was written survives a kill; a power cut is not tried
    kills.run_through(toy(home, result, kind))
    expected = result.read_text()
    judge(home, result, expected)
    number = 1
    while kills.kill_before_change(toy(home, result, kind), number):
        kills.run_through(toy(home, result, kind))
        judge(home, result, expected)
        number += 1
    return {"kills": number - 1}


def together(base: Path, rounds: int = 6) -> dict[str, Any]:
    """Two processes with equal runs in one directory, both killed again and again."""
    home, results = base / "spill", [base / "one", base / "other"]
    home.mkdir()
    tasks = [toy(home, result, Store) for result in results]
    seconds = kills.run_through(tasks[0])
    expected = results[0].read_text()
    for each in range(rounds):

        def other(seed: int = each) -> None:
            kills.kill_until_done(tasks[1], seconds, random.Random(seed))

        with kills.beside(other):
            kills.kill_until_done(tasks[0], seconds, random.Random(100 + each))
        # What one had to leave behind while the other lived goes with the next run.
        kills.run_through(tasks[0])
        for result in results:
            assert result.read_text() == expected, "another result"
        assert not list(home.iterdir()), "something is left behind"
    return {"rounds": rounds}


EXPERIMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "random": at_random,
    "changes": at_every_change,
    "together": together,
}

if __name__ == "__main__":
    folder, experiment, *twin = sys.argv[1:]
    print(json.dumps(EXPERIMENTS[experiment](Path(folder), *(TWINS[each] for each in twin))))
