"""The files of one run: a dictionary on the disk that survives its process.

A run called NAME owns ``NAME.lock``, on which it holds a lock as long as its process lives, and the
folder ``NAME/`` with its tensors and ``manifest.json``. The manifest says what there is: a change
counts from the moment at which a new manifest takes the place of the old one, in one rename. Files
that it does not name are leftovers of a change that was cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError

from unrollc.errors import SpillError
from unrollc.runtime.tensor_files import read_nest, write_nest

#: Of the manifest and of what is stored; a run of another format is not resumed.
_FORMAT = 1

_LOCK_NAME = re.compile(r"unrollc-[0-9a-f]{16}-[0-9a-f]{8}\.lock")


class Store:
    """A dictionary from names to nests of tensors, in a folder that one run has for itself.

    The files go with `close`, with the object, and with the interpreter; they stay where the
    process is killed, and `open_store` finds them again.

    Attributes:
        seed: The seed of the run.
    """

    def __init__(self, run: _Run, digest: str, seed: int, files: dict[str, dict[str, str]]) -> None:
        self.seed = seed
        self._run, self._digest, self._files = run, digest, files
        self._remove = weakref.finalize(self, run.remove)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Any:
        """What is stored under a name, in fresh memory.

        Raises:
            DamagedFileError: If its file is not what was written.
            SpillError: If the store is closed.
        """
        self._check_open()
        entry = self._files[name]
        return read_nest(self._run.folder / entry["file"], entry["sha256"])

    def update(self, added: Mapping[str, Any], dropped: Iterable[str] = ()) -> None:
        """Store nests under their names and forget others, at once: all of it or nothing.

        Raises:
            SpillError: If the disk is full, or cannot be written.
        """
        self._check_open()
        files = {name: entry for name, entry in self._files.items() if name not in set(dropped)}
        with _explained(self._run.folder):
            for name, nest in added.items():
                file = f"{secrets.token_hex(8)}.safetensors"
                files[name] = {"file": file, "sha256": write_nest(self._run.folder / file, nest)}
            _write_manifest(self._run.folder, self._digest, self.seed, files)
            self._files = files  # what nothing names any more goes last
            self._run.sweep(files)

    def clear(self) -> None:
        """Forget everything that is stored."""
        self.update({}, dropped=list(self._files))

    def close(self) -> None:
        """Remove every file of the run."""
        self._remove()

    @contextlib.contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """A block that no exception leaves without that the files go."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _check_open(self) -> None:
        if not self._remove.alive:
            raise SpillError(
                "the spilled states of this run are gone",
                why="its backward pass is over, or an exception ended it",
                remedy="call the program again, or pass retain_graph=True to every backward() but "
                "the last",
            )


def open_store(directory: str | os.PathLike[str], digest: str, seed: int) -> Store:
    """The store of a run: that of a dead process with the same digest, or a new one.

    What dead processes left of other runs is removed; runs of living ones are not touched.

    Args:
        directory: The user's directory; made where it does not exist.
        digest: What the program and its inputs are; see `digest_of`.
        seed: The seed of a new run. A run that is taken up again keeps its own.

    Raises:
        SpillError: If the directory cannot be written, or cannot be locked.
    """
    home = Path(directory)
    with _explained(home):
        home.mkdir(parents=True, exist_ok=True)
        dead = [run for lock in sorted(home.iterdir()) if (run := _taken_over(lock))]
        manifests = [(run, found) for run in dead if (found := _read_manifest(run, digest))]
        # Of several with this digest one may even have drawn the same seed.
        manifests.sort(key=lambda pair: pair[1]["seed"] != seed)
        for run in dead:
            if not manifests or run is not manifests[0][0]:
                run.remove()
        if not manifests:
            return _created(home, digest, seed)
        run, manifest = manifests[0]
        run.sweep(manifest["files"])
        return Store(run, digest, manifest["seed"], manifest["files"])


def _created(home: Path, digest: str, seed: int) -> Store:
    while True:
        lock = home / f"unrollc-{digest[:16]}-{secrets.token_hex(4)}.lock"
        run = _locked(lock, os.O_CREAT | os.O_EXCL)
        if run is not None:
            run.folder.mkdir()
            _write_manifest(run.folder, digest, seed, {})
            return Store(run, digest, seed, {})


# --- manifests --------------------------------------------------------------------------------

_MANIFEST = "manifest.json"


def _read_manifest(run: _Run, digest: str) -> dict[str, Any] | None:
    """The manifest of a dead process's run, if it has this digest and there is something in it."""
    try:
        found = json.loads((run.folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # cut off before the first manifest, or after the last
        return None
    if not isinstance(found, dict) or (found.get("format"), found.get("digest")) != (
        _FORMAT,
        digest,
    ):
        return None
    return found


def _write_manifest(
    folder: Path, digest: str, seed: int, files: Mapping[str, Mapping[str, str]]
) -> None:
    text = json.dumps({"format": _FORMAT, "digest": digest, "seed": seed, "files": files}, indent=1)
    draft = folder / "manifest.new"
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / _MANIFEST)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename, and the names of the files
    finally:
        os.close(descriptor)


# --- locks ------------------------------------------------------------------------------------


class _Run:
    """A lock that this process holds, and the folder that belongs to it."""

    def __init__(self, lock: Path, descriptor: int) -> None:
        self.lock, self.folder = lock, lock.with_suffix("")
        self._descriptor, self._owner = descriptor, os.getpid()
        _HELD.add(self)

    def sweep(self, files: Mapping[str, Mapping[str, str]]) -> None:
        """Remove the files that a manifest does not name."""
        named = {_MANIFEST, *(entry["file"] for entry in files.values())}
        for path in self.folder.iterdir():
            if path.name not in named:
                path.unlink()

    def remove(self) -> None:
        """Remove the folder, then the lock that told others to leave it alone."""
        if os.getpid() != self._owner:
            return  # a child of the process that owns the files
        with contextlib.suppress(OSError):
            # The manifest first: what is left of a run that is cut off here is taken up by none.
            (self.folder / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                self.lock.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let the lock go; a child holds a copy, which would make a dead parent look alive."""
        _HELD.discard(self)
        os.close(self._descriptor)


_HELD: weakref.WeakSet[_Run] = weakref.WeakSet()


def _release_in_child() -> None:
    for run in list(_HELD):
        run.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _taken_over(lock: Path) -> _Run | None:
    """The run of a lock file that no living process holds; None for any other file."""
    return _locked(lock, 0) if _LOCK_NAME.fullmatch(lock.name) else None


def _locked(lock: Path, flags: int) -> _Run | None:
    """Hold the lock of a run, or None if another process does, or did until now."""
    fcntl = _fcntl()
    try:
        descriptor = os.open(lock, os.O_RDWR | flags, 0o600)
    except (FileNotFoundError, FileExistsError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and flock its owner may have removed it: then this is no file's lock.
        if os.path.samestat(os.fstat(descriptor), lock.stat()):
            return _Run(lock, descriptor)
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _fcntl() -> ModuleType:
    try:
        import fcntl
    except ImportError as error:
        raise SpillError(
            "spill= is not available on this system",
            why="it has no flock(), which tells runs of living processes from those of dead ones",
            remedy="use memory= without spill=",
        ) from error
    return fcntl


@contextlib.contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Errors of the operating system as errors that say what the files are for."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SpillError(
            f"states cannot be spilled to {place}",
            why=str(error),
            remedy="pass spill= a directory on a disk with enough free space that can be written",
        ) from error
