"""Two meters of how many bytes of tensors live at once while a callable runs.

:class:`PeakMeter` follows the storages that operators create, by weak references: it counts what
a program holds, whoever holds it (variables, views, the autograd graph). :func:`allocator_peak`
replays the allocator's own record, which also has the scratch memory inside kernels. Neither
counts what existed before the run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Usage:
    """Bytes of live tensors: at the worst moment, and still alive at the end of the run."""

    peak: int
    kept: int
    result: Any


class PeakMeter(TorchDispatchMode):
    """Counts the bytes of storages created while the mode is active and still alive.

    A storage that an operator takes as an argument before any operator has returned it came from
    outside (inputs, parameters, constants) and is never counted. A storage counts once, however
    many views it has, until its last owner lets go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._outside: set[int] = set()
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # torch.tensor(): new in spite of it
            for storage in _storages((args, kwargs)):
                if storage._cdata not in self._sizes:
                    self._follow(storage)
                    self._outside.add(storage._cdata)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._outside:
            return
        self._follow(storage)
        self.live += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._references:
            self._references[key] = weakref.ref(storage, lambda _: self._released(key))

    def _released(self, key: int) -> None:
        """The storage is gone, and its address may be used for another one."""
        del self._references[key]
        self._outside.discard(key)
        self.live -= self._sizes.pop(key, 0)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


def measure(run: Callable[[], Any], meter: type[PeakMeter] = PeakMeter) -> Usage:
    """Run once under a meter. The result is kept alive, so ``kept`` includes it."""
    with meter() as active:
        result = run()
        kept = active.live
    return Usage(active.peak, kept, result)


def allocator_peak(run: Callable[[], Any]) -> int:
    """The peak, in bytes over the start, of the CPU allocator's own record of one run."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = run()
    del result
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        live += change
        peak = max(peak, live)
    return peak
