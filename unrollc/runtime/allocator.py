"""What the C allocator does with memory that a run frees."""

from __future__ import annotations

import functools

import torch

#: The largest block that moves glibc's thresholds is 32 MiB with its header.
_BLOCK = 2**25 - 2**16


@functools.cache
def keep_freed_memory() -> None:
    """Let the process keep what a run frees, for the next step and the next call.

    glibc returns large blocks to the system as they are freed. The next tensor of that size is
    made of fresh pages, which the system clears when they are first written: that takes as long as
    an elementwise op. What counts as large is 128 KiB at first and grows to the size of the largest
    such block that was freed, up to 32 MiB (mallopt(3), ``M_MMAP_THRESHOLD``). So one block of that
    size is freed here, whose pages are never touched. Other allocators take no notice.
    """
    torch.empty(_BLOCK, dtype=torch.uint8)
