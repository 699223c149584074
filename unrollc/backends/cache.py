"""Compiled kernels on the disk: what is run is what this user's programs have written.

An entry is a folder named by its key, with a manifest that holds the key, a digest of every file
and a code made with a secret of the user's (HMAC, Krawczyk et al. 1997, RFC 2104). So a file that
was cut off or changed is found out, as is an entry that somebody else has written, and one that was
copied to where another belongs; each is thrown away, and its kernel compiled again. The folder of
all entries must belong to the user, and nobody else may write to it.

Entries come by renaming a complete folder. Two processes that compile the same at once both do so,
and the second finds the place taken.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Of the manifest; entries of another format are not read.
_FORMAT = 1

_MANIFEST = "manifest.json"
_SECRET = "secret"
_BYTES = 32

#: Folders in which compilation goes on; what is left of a killed process is removed after a day.
_DRAFT = "draft-"
_STALE = 24 * 3600

_chosen: Path | None = None


@dataclass(frozen=True)
class Cache:
    """A folder of entries.

    Attributes:
        folder: Where they are.
        secret: What the codes in their manifests are made with.
    """

    folder: Path
    secret: bytes

    def find(self, key: str) -> Path | None:
        """The folder of an entry whose files are what was written; a damaged entry is removed."""
        place = self.folder / key
        if not place.exists():
            return None
        if self._is_sound(place, key):
            return place
        self._discard(place)
        return None

    def draft(self) -> Path:
        """A new folder to compile in."""
        for old in self.folder.glob(f"{_DRAFT}*"):
            if time.time() - old.lstat().st_mtime > _STALE:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=_DRAFT, dir=self.folder))

    def add(self, key: str, made: Path) -> Path:
        """Make the folder `made` the entry of a key, unless there is a sound one by now.

        Returns:
            The entry's folder.
        """
        files = {path.name: _digest(path) for path in sorted(made.iterdir())}
        manifest = {"format": _FORMAT, "key": key, "files": files}
        manifest["code"] = self._code(manifest)
        (made / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        place = self.folder / key
        while True:
            try:
                made.rename(place)
                return place
            except OSError:
                if not place.exists():
                    raise
            if self._is_sound(place, key):
                shutil.rmtree(made)
                return place
            self._discard(place)

    def clear(self) -> None:
        """Remove every entry; the machine code of running programs stays in their memory."""
        for place in self.folder.iterdir():
            if place.is_dir() and not place.name.startswith(_DRAFT):
                self._discard(place)

    def _is_sound(self, place: Path, key: str) -> bool:
        try:
            manifest: dict[str, Any] = json.loads((place / _MANIFEST).read_bytes())
            code = manifest.pop("code")
            files = manifest["files"]
            return (
                hmac.compare_digest(code, self._code(manifest))
                and (manifest["format"], manifest["key"]) == (_FORMAT, key)
                and {path.name for path in place.iterdir()} == {*files, _MANIFEST}
                and all(_digest(place / name) == digest for name, digest in files.items())
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False

    def _code(self, manifest: dict[str, Any]) -> str:
        text = json.dumps(manifest, sort_keys=True).encode()
        return hmac.new(self.secret, text, hashlib.sha256).hexdigest()

    def _discard(self, place: Path) -> None:
        """Remove an entry: out of the way at once, then file by file."""
        trash = self.folder / f"{_DRAFT}{secrets.token_hex(8)}"
        try:
            place.rename(trash)
        except FileNotFoundError:  # another process was faster
            return
        if trash.is_dir() and not trash.is_symlink():
            shutil.rmtree(trash, ignore_errors=True)
        else:
            trash.unlink()


def default_folder() -> Path:
    """In the user's cache directory (``$XDG_CACHE_HOME``, by default ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "unrollc" / "kernels"


def set_cache_directory(directory: str | os.PathLike[str] | None) -> None:
    """Choose where this process keeps compiled kernels from now on.

    Args:
        directory: A directory of the user's own, made where it does not exist; None for the
            default, ``unrollc/kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    global _chosen
    _chosen = None if directory is None else Path(directory).absolute()


def clear_cache() -> None:
    """Remove all compiled kernels from the cache directory; programs that run keep theirs."""
    open_cache().clear()


def open_cache() -> Cache:
    """The cache of this process.

    Where its directory cannot be used (it cannot be written, or others could write to it), that is
    said in a warning, and kernels are kept in a new directory until the process ends.
    """
    folder = default_folder() if _chosen is None else _chosen
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        obstacle = _obstacle(folder)
        if obstacle is None:
            return Cache(folder, _secret_of(folder))
    except OSError as error:
        obstacle = str(error)
    warnings.warn(
        f"compiled kernels are not kept: {folder} cannot be used ({obstacle}); "
        "choose another directory with unrollc.set_cache_directory()",
        RuntimeWarning,
        stacklevel=2,
    )
    return _temporary()


def _temporary() -> Cache:
    global _passing
    if _passing is None:
        _passing = tempfile.TemporaryDirectory(prefix="unrollc-kernels-")
    folder = Path(_passing.name)
    return Cache(folder, _secret_of(folder))


_passing: tempfile.TemporaryDirectory[str] | None = None


def _obstacle(folder: Path) -> str | None:
    """Why code from a folder must not be run."""
    found = folder.stat()
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "it cannot be written"
    return None


def _secret_of(folder: Path) -> bytes:
    """The secret of a cache; a new one where there is none, or where others could have read it."""
    path = folder / _SECRET
    while True:
        try:
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and not found.st_mode & 0o077:
                content = path.read_bytes()
                if len(content) == _BYTES:
                    return content
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        with tempfile.NamedTemporaryFile(dir=folder) as draft:  # readable by the user alone
            draft.write(secrets.token_bytes(_BYTES))
            draft.flush()
            try:
                os.link(draft.name, path)
            except FileExistsError:  # another process was faster: its secret counts
                continue


def _digest(path: Path) -> str:
    """Of a regular file; anything else is none of ours."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(f"{path} is not a regular file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
