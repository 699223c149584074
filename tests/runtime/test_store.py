"""A run's files: who owns them, when they go, what a full disk or another process does to them."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unrollc.errors import SpillError
from unrollc.runtime.store import Store, open_store

DIGEST, OTHER = "a" * 64, "b" * 64


def abandon(store: Store) -> None:
    """Leave the files as a process does that is killed."""
    store._remove.detach()
    store._run.release()


def names(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def test_update_and_read(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new" / "home", DIGEST, seed=3)
    store.update({"a": [torch.ones(2)], "b": [torch.zeros(1)]})
    store.update({"c": torch.ones(3)}, dropped=["a"])
    assert "a" not in store and "b" in store and torch.equal(store.read("c"), torch.ones(3))
    assert len(list(store._run.folder.glob("*.safetensors"))) == 2
    store.close()
    store.close()
    assert names(tmp_path / "new" / "home") == []


def test_a_dead_run_is_taken_up_with_its_seed(tmp_path: Path) -> None:
    first = open_store(tmp_path, DIGEST, seed=3)
    first.update({"a": torch.ones(2)})
    (first._run.folder / "leftover.safetensors").write_bytes(b"cut off")
    abandon(first)
    again = open_store(tmp_path, DIGEST, seed=4)
    assert again.seed == 3 and torch.equal(again.read("a"), torch.ones(2))
    assert names(again._run.folder) == sorted(["manifest.json", again._files["a"]["file"]])


def test_of_two_dead_runs_that_with_the_seed(tmp_path: Path) -> None:
    stores = [open_store(tmp_path, DIGEST, seed) for seed in range(6)]
    for store in stores:
        abandon(store)
    again = open_store(tmp_path, DIGEST, seed=4)
    assert again.seed == 4
    assert len(names(tmp_path)) == 2  # the others are removed


def test_another_run_uses_nothing_and_removes_what_is_dead(tmp_path: Path) -> None:
    dead = open_store(tmp_path, DIGEST, seed=3)
    dead.update({"a": torch.ones(2)})
    abandon(dead)
    living = open_store(tmp_path, OTHER, seed=4)
    living.update({"b": torch.ones(2)})
    assert living.seed == 4 and "a" not in living and not dead._run.folder.exists()
    third = open_store(tmp_path, OTHER, seed=5)  # of a living run nothing is taken
    assert third.seed == 5 and "b" not in third and "b" in living
    third.close()
    assert torch.equal(living.read("b"), torch.ones(2))


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.lock").write_text("mine")
    (tmp_path / "unrollc-mine").mkdir()
    open_store(tmp_path, DIGEST, seed=0).close()
    assert names(tmp_path) == ["notes.lock", "unrollc-mine"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}'])
def test_an_unreadable_manifest_counts_for_nothing(tmp_path: Path, content: str) -> None:
    store = open_store(tmp_path, DIGEST, seed=3)
    (store._run.folder / "manifest.json").write_text(content)
    abandon(store)
    assert open_store(tmp_path, DIGEST, seed=4).seed == 4
    assert len(names(tmp_path)) <= 2


def test_files_go_with_the_object(tmp_path: Path) -> None:
    store = open_store(tmp_path, DIGEST, seed=3)
    store.update({"a": torch.ones(2)})
    del store
    gc.collect()
    assert names(tmp_path) == []


def test_files_go_with_an_exception(tmp_path: Path) -> None:
    for kind in (ValueError, KeyboardInterrupt):
        store = open_store(tmp_path, DIGEST, seed=3)
        with pytest.raises(kind), store.removed_on_failure():
            raise kind
        assert names(tmp_path) == []
        with pytest.raises(SpillError, match="retain_graph"):
            store.update({"a": torch.ones(2)})


def test_files_go_with_the_interpreter_but_not_with_a_child(tmp_path: Path) -> None:
    script = f"""
import os, sys
from pathlib import Path
import torch
from unrollc.runtime.store import open_store
store = open_store({str(tmp_path)!r}, {DIGEST!r}, seed=3)
store.update({{"a": torch.ones(2)}})
child = os.fork()
if not child:
    sys.exit(0)  # its own finalizers run
os.waitpid(child, 0)
print(len(os.listdir({str(tmp_path)!r})), float(store.read("a").sum()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path.cwd()
    )
    assert done.stdout.split() == ["2", "2.0"], done.stderr
    assert names(tmp_path) == []


def test_a_child_does_not_keep_a_dead_run_alive(tmp_path: Path) -> None:
    store = open_store(tmp_path, DIGEST, seed=3)
    read, write = os.pipe()
    runs, started = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.write(started, b"!")
        os.read(read, 1)  # lives until the parent lets it go
        os._exit(0)
    os.read(runs, 1)
    abandon(store)
    try:
        assert open_store(tmp_path, DIGEST, seed=4).seed == 3
    finally:
        os.close(write)
        os.waitpid(child, 0)
        for descriptor in (read, runs, started):
            os.close(descriptor)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """A limit on the size of files fails a write in its middle, as a full disk does."""
    store = open_store(tmp_path, DIGEST, seed=3)
    store.update({"a": torch.ones(2)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(SpillError, match=r"cannot be spilled to[\s\S]*Fix: pass spill="):
            store.update({"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(store.read("a"), torch.ones(2))  # what was there still is
    store.close()
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(SpillError, match="cannot be spilled"):
        open_store(tmp_path / "file" / "below", DIGEST, seed=0)
