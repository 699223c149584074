"""What this machine takes for an operation, a byte and a call: stated defaults, or measured once.

`measure` times products, additions of large tensors and additions of single numbers; the command
``unrollc calibrate`` writes the result to the user's cache directory, one entry for each number of
threads, since one thread computes less but moves almost as many bytes. Every later compilation in
as many threads uses it.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from unrollc.errors import InputError


@dataclass(frozen=True)
class Rates:
    """Three numbers of a machine.

    Attributes:
        operations_per_second: Of a large matrix product in float32.
        operations_per_byte: How many of these take as long as to read or write one byte.
        operations_per_call: How many take as long as to launch an op.
        calibrated: Whether they were measured on this machine.
    """

    operations_per_second: float
    operations_per_byte: float
    operations_per_call: float
    calibrated: bool = False

    def __str__(self) -> str:
        origin = "measured" if self.calibrated else "defaults; `unrollc calibrate` measures them"
        return (
            f"{self.operations_per_second / 1e9:.0f} G operations/s, a byte as "
            f"{self.operations_per_byte:.1f}, a call as {self.operations_per_call:,.0f} ({origin})"
        )


#: A core does some 100 G operations a second in a product, moves some 10 GB/s and launches an op
#: in two microseconds.
DEFAULT = Rates(100e9, 10.0, 200_000.0)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: The op and its size.
        seconds: Median of a call.
        operations, bytes_moved: Of a call.
    """

    what: str
    seconds: float
    operations: int
    bytes_moved: int

    def __str__(self) -> str:
        text = f"{self.what:<26} {self.seconds * 1e6:10.1f} µs"
        if self.operations:
            return f"{text} {self.operations / self.seconds / 1e9:8.1f} G operations/s"
        return f"{text} {self.bytes_moved / self.seconds / 1e9:8.1f} GB/s"


#: Sides of the products, elements of the additions: larger than caches, small enough for seconds.
_SIDES = (256, 512, 1024)
_ELEMENTS = (2**22, 2**23, 2**24)
_REPEATS = 7


def measure() -> tuple[Rates, tuple[Row, ...]]:
    """Time the table on the CPU, in as many threads as torch uses now; takes some seconds."""
    products, additions = [], []
    for side in _SIDES:
        a, b, out = (torch.rand(side, side) for _ in range(3))
        seconds = _median(functools.partial(torch.mm, a, b, out=out))
        products.append(Row(f"product of {side} × {side}", seconds, 2 * side**3, 12 * side**2))
    for count in _ELEMENTS:
        a, b, out = (torch.rand(count) for _ in range(3))
        seconds = _median(functools.partial(torch.add, a, b, out=out))
        additions.append(Row(f"addition of {count:,}", seconds, 0, 12 * count))
    call = Row("addition of two numbers", _call_seconds(), 0, 12)
    speed = max(row.operations / row.seconds for row in products)
    bandwidth = statistics.median(row.bytes_moved / row.seconds for row in additions)
    rates = Rates(speed, speed / bandwidth, speed * call.seconds, calibrated=True)
    return rates, (*products, *additions, call)


def _call_seconds() -> float:
    a, b = torch.rand(1), torch.rand(1)

    def thousand() -> None:
        for _ in range(1000):
            torch.add(a, b)

    return _median(thousand) / 1000


def _median(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rates_path() -> pathlib.Path:
    """The file in the user's cache directory (``$XDG_CACHE_HOME``, by default ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "unrollc" / "rates.json"


def save(rates: Rates) -> pathlib.Path:
    """Make `rates` those of this number of threads; entries of others stay."""
    path = rates_path()
    try:
        entries = _entries(path)
    except InputError:  # what cannot be read is replaced
        entries = {}
    numbers = asdict(rates)
    del numbers["calibrated"]
    entries[str(torch.get_num_threads())] = numbers
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(entries, file, indent=2, sort_keys=True)
    os.replace(file.name, path)
    _read.cache_clear()
    return path


def current_rates() -> Rates:
    """The rates measured for this number of threads, else `DEFAULT`.

    Raises:
        InputError: If the file is there but is not what `save` writes.
    """
    return _read(rates_path(), torch.get_num_threads())


@functools.lru_cache
def _read(path: pathlib.Path, threads: int) -> Rates:
    numbers = _entries(path).get(str(threads))
    return DEFAULT if numbers is None else Rates(**numbers, calibrated=True)


_NUMBERS = frozenset({"operations_per_second", "operations_per_byte", "operations_per_call"})


def _entries(path: pathlib.Path) -> dict[str, dict[str, float]]:
    """The file's entries by number of threads; none if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        entries: dict[str, dict[str, float]] = json.loads(text)
        sound = all(
            numbers.keys() == _NUMBERS
            and all(isinstance(x, float | int) and 0 < x < float("inf") for x in numbers.values())
            for numbers in entries.values()
        )
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise InputError(
            f"{path} does not hold the rates of a machine",
            why="each entry must have three positive numbers: " + ", ".join(sorted(_NUMBERS)),
            remedy="run `unrollc calibrate` again, or delete the file",
        )
    return entries
