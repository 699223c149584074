"""Who holds which memory: storages of a simulated run, counted by their holders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Memory that the run allocated, by what it holds."""

    bytes: int
    what: str


#: What stands for a tensor in lists; None is one of the user's.
Held = Storage | None


class Ledger:
    """Counts how often each storage is held."""

    def __init__(self) -> None:
        self.total = 0
        self.counts: Counter[Storage] = Counter()
        self.by_kind: Counter[str] = Counter()

    def hold(self, storages: Iterable[Held]) -> None:
        for storage in storages:
            if storage is not None:
                count = self.counts.get(storage, 0)
                self.counts[storage] = count + 1
                if not count:
                    self.total += storage.bytes
                    self.by_kind[storage.what] += storage.bytes

    def release(self, storages: Iterable[Held]) -> None:
        for storage in storages:
            if storage is not None:
                count = self.counts[storage] - 1
                if count:
                    self.counts[storage] = count
                else:
                    del self.counts[storage]
                    self.total -= storage.bytes
                    self.by_kind[storage.what] -= storage.bytes
