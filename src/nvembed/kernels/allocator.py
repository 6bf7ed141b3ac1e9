"""What glibc does with memory that was freed: keep it, instead of giving it back at once."""

from __future__ import annotations

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT = 256 << 20
_LARGEST_REUSED = 32 << 20  # the most that glibc allows


@cache
def keep_freed_memory() -> None:
    """Let up to 256 MB of freed memory stay with this process, for buffers of up to 32 MB.

    Each forward on a CPU frees what the next one needs again. By default glibc returns such buffers
    to the system and gets them as fresh pages, which have to be cleared: a third of the time of
    encoding in float32 (docs/results.md). Where ``MALLOC_TRIM_THRESHOLD_`` or ``GLIBC_TUNABLES`` is
    set, and with other C libraries, nothing changes.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_REUSED)
    mallopt(_TRIM_THRESHOLD, _KEPT)
