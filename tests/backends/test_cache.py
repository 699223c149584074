"""Compiled kernels on the disk: damaged and foreign entries are found out, whoever puts them there.

Each kind of damage is also given to a cache that does not look (`Trusting`): it must take the
entry, or else the damage would be none and the test could not fail.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unrollc.backends import cache as cache_module
from unrollc.backends.cache import Cache, clear_cache, open_cache, set_cache_directory

#: Compiles and runs a tiny program in a shared cache, and compares with the ops.
SHARED = """
import sys, time, torch, unrollc
from pathlib import Path
from unrollc.backends import inductor
from unrollc.backends.cache import set_cache_directory
torch.set_num_threads(1)
ready, other = Path(sys.argv[2], sys.argv[3]), Path(sys.argv[2], sys.argv[4])
set_cache_directory(Path(sys.argv[1]))
def gradients(backend):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    program = unrollc.compile(model, opt, torch.nn.MSELoss(), backend=backend)
    program(unrollc.repeat(batch, 2), batch).loss.backward()
    return model.weight.grad
expected = gradients("aten")
start, started = inductor._worker, []
def counting(folder):
    if not started:  # neither begins to compile before the other has looked into the cache
        ready.touch()
        while not other.exists():
            time.sleep(0.01)
    started.append(folder)
    return start(folder)
inductor._worker = counting
torch.testing.assert_close(gradients("inductor"), expected, rtol=1e-10, atol=1e-12)
print(len(started))
"""

KEY, OTHER = "a" * 64, "b" * 64
SECRET = b"s" * 32


class Trusting(Cache):
    """A cache that takes whatever lies at the place of an entry."""

    def _is_sound(self, place: Path, key: str) -> bool:
        return True


def filled(cache: Cache, key: str = KEY, content: bytes = b"machine code") -> Path:
    made = cache.draft() / "made"
    made.mkdir()
    (made / "kernel.so").write_bytes(content)
    (made / "kernel.json").write_bytes(b"{}")
    return cache.add(key, made)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "kernels"
    path.mkdir(mode=0o700)
    return path


# -- damage -----------------------------------------------------------------------------------


def cut_off(place: Path) -> None:
    (place / "kernel.so").write_bytes(b"machine")


def emptied(place: Path) -> None:
    (place / "kernel.so").write_bytes(b"")


def one_bit(place: Path) -> None:
    content = bytearray((place / "kernel.so").read_bytes())
    content[3] ^= 1
    (place / "kernel.so").write_bytes(content)


def other_data(place: Path) -> None:
    (place / "kernel.json").write_bytes(b"[]")


def gone(place: Path) -> None:
    (place / "kernel.json").unlink()


def one_more(place: Path) -> None:
    (place / "injected.so").write_bytes(b"")


def linked(place: Path) -> None:
    target = place.parent / "elsewhere"
    (place / "kernel.so").rename(target)
    (place / "kernel.so").symlink_to(target)


def no_manifest(place: Path) -> None:
    (place / "manifest.json").unlink()


def half_a_manifest(place: Path) -> None:
    text = (place / "manifest.json").read_text()
    (place / "manifest.json").write_text(text[: len(text) // 2])


def not_a_manifest(place: Path) -> None:
    (place / "manifest.json").write_text("[1, 2]")


def without_code(place: Path) -> None:
    manifest = json.loads((place / "manifest.json").read_text())
    del manifest["code"]
    (place / "manifest.json").write_text(json.dumps(manifest))


def of_another_key(place: Path) -> None:
    """A sound entry of this user's, copied to where another belongs."""
    cache = Cache(place.parent, SECRET)
    other = filled(cache, OTHER, b"other machine code")
    shutil.rmtree(place)
    other.rename(place)


def of_another_user(place: Path) -> None:
    """What another user's programs have written under the same key."""
    shutil.rmtree(place)
    filled(Cache(place.parent, b"t" * 32), KEY, b"foreign machine code")


def of_another_format(place: Path) -> None:
    """What a version with another format has written, code and all."""
    cache = Cache(place.parent, SECRET)
    manifest = json.loads((place / "manifest.json").read_text())
    del manifest["code"]
    manifest["format"] += 1
    manifest["code"] = cache._code(manifest)
    (place / "manifest.json").write_text(json.dumps(manifest))


def a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_bytes(b"machine code")


DAMAGE = (
    cut_off,
    emptied,
    one_bit,
    other_data,
    gone,
    one_more,
    linked,
    no_manifest,
    half_a_manifest,
    not_a_manifest,
    without_code,
    of_another_key,
    of_another_user,
    of_another_format,
    a_file,
)


def taken(cache: Cache, damage: Callable[[Path], None]) -> bool:
    """Whether a cache hands out an entry after that."""
    damage(filled(cache))
    return cache.find(KEY) is not None


def test_an_entry_is_found_again(folder: Path) -> None:
    cache = Cache(folder, SECRET)
    assert cache.find(KEY) is None
    place = filled(cache)
    assert cache.find(KEY) == place == Cache(folder, SECRET).find(KEY)
    assert (place / "kernel.so").read_bytes() == b"machine code"
    assert cache.find(OTHER) is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_out(folder: Path, damage: Callable[[Path], None]) -> None:
    cache = Cache(folder, SECRET)
    assert not taken(cache, damage)
    assert not os.path.lexists(folder / KEY), "it is removed"
    assert cache.find(KEY) is None
    filled(cache)
    assert cache.find(KEY) is not None, "and can be made again"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_trusting_cache_would_take_it(folder: Path, damage: Callable[[Path], None]) -> None:
    assert taken(Trusting(folder, SECRET), damage)


# -- places -----------------------------------------------------------------------------------


def test_the_first_of_two_equal_entries_stays(folder: Path) -> None:
    cache = Cache(folder, SECRET)
    filled(cache, content=b"first")
    place = filled(cache, content=b"second")
    assert (place / "kernel.so").read_bytes() == b"first"


def test_a_damaged_entry_makes_room(folder: Path) -> None:
    cache = Cache(folder, SECRET)
    cut_off(filled(cache))
    place = filled(cache, content=b"again")
    assert (place / "kernel.so").read_bytes() == b"again"
    assert cache.find(KEY) == place


ADDER = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("cache_by_path", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["cache_by_path"] = module
spec.loader.exec_module(module)
folder = pathlib.Path(sys.argv[2])
for number in range(150):
    cache = module.Cache(folder, module._secret_of(folder))
    key = f"{number:064x}"
    made = cache.draft() / "made"
    made.mkdir()
    (made / "kernel.so").write_bytes(key.encode() * 100)
    place = cache.add(key, made)
    assert (place / "kernel.so").read_bytes() == key.encode() * 100
    assert cache.find(key) == place
"""


def test_processes_that_write_the_same_do_each_other_no_harm(folder: Path) -> None:
    """Started with no secret, too: one secret must come out, or entries would be lost."""
    command = [sys.executable, "-c", ADDER, cache_module.__file__, str(folder)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    cache = Cache(folder, cache_module._secret_of(folder))
    assert all(cache.find(f"{number:064x}") for number in range(150))


@pytest.fixture
def elsewhere() -> object:
    yield
    set_cache_directory(None)


def test_the_directory_can_be_chosen_and_cleared(tmp_path: Path, elsewhere: object) -> None:
    set_cache_directory(tmp_path / "mine" / "kernels")
    cache = open_cache()
    assert cache.folder == tmp_path / "mine" / "kernels"
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert (cache.folder / "secret").stat().st_mode & 0o777 == 0o600
    assert open_cache().secret == cache.secret
    filled(cache)
    clear_cache()
    assert cache.find(KEY) is None


def test_the_default_is_in_the_users_cache_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_cache().folder == tmp_path / "unrollc" / "kernels"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_write_to_is_not_used(
    folder: Path, mode: int, elsewhere: object
) -> None:
    set_cache_directory(folder)
    folder.chmod(mode)
    with pytest.warns(RuntimeWarning, match="others may write to it"):
        cache = open_cache()
    assert cache.folder != folder
    assert cache.folder.stat().st_mode & 0o077 == 0


def test_a_directory_of_somebody_else_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: object
) -> None:
    set_cache_directory(folder)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(RuntimeWarning, match=f"it belongs to user {me}"):
        assert open_cache().folder != folder


def test_a_secret_that_others_could_read_counts_no_more(folder: Path) -> None:
    before = cache_module._secret_of(folder)
    assert cache_module._secret_of(folder) == before
    (folder / "secret").chmod(0o644)
    assert cache_module._secret_of(folder) != before


def test_a_secret_that_was_cut_off_counts_no_more(folder: Path) -> None:
    cache_module._secret_of(folder)
    (folder / "secret").write_bytes(b"")
    assert len(cache_module._secret_of(folder)) == 32


def test_two_processes_that_compile_one_program_at_once_both_get_it_right(
    folder: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(folder), str(tmp_path), mine, its],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mine, its in (("one", "two"), ("two", "one"))
    ]
    for process in processes:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        assert int(output) > 0, "it found everything in the cache"
    left = {path.name for path in folder.iterdir()}
    assert any(len(name) == 64 for name in left)
    assert not [name for name in left if name.startswith("draft-")]
