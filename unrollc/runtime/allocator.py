"""What the C allocator does with memory that a run frees."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

#: Parameters of glibc's mallopt(3), and the largest value of the second.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP = 2**25

#: mallopt takes an int.
_MOST = 2**31 - 1

_kept = 0


def keep_freed_memory(peak: int) -> None:
    """Let the process keep what a run frees, for the next step and the next call.

    glibc returns blocks of more than 128 KiB to the system as they are freed, and the top of its
    heap where more than that is free. The next tensor is then made of fresh pages, which the system
    clears when they are first written: that takes as long as an elementwise op. Other allocators
    are left alone.

    Args:
        peak: Bytes that a run holds at most; so much is kept from now on.
    """
    global _kept
    mallopt = _mallopt()
    if mallopt is None or peak <= _kept:
        return
    _kept = peak
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)
    mallopt(_TRIM_THRESHOLD, min(max(2 * peak, 2 * _LARGEST_MMAP), _MOST))


@functools.cache
def _mallopt() -> Any:
    """glibc's, or None with another C library."""
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
        return library.mallopt
    except (OSError, AttributeError, TypeError):
        return None
