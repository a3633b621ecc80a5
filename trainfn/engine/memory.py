"""Memory that a step has used on a CPU is kept for the next one.

A step allocates its gradients and activations and frees them all at its end. glibc then gives the pages back to the
operating system, and the next step gets them again, one page fault each: for 67 MB of gradients 16,000 faults, 30 of
80 ms. So the first step on a CPU asks glibc to keep them, to the same end as the usual advice to preload another
allocator. The process holds on to the most memory that it has used; it does not use more.
"""

from __future__ import annotations

import ctypes
import os
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # malloc.h's numbers for mallopt


def keep_pages() -> bool:
    """Ask the C library to keep freed memory; return whether it does.

    Left alone where it is not glibc, where another allocator is preloaded, and where someone has set ``MALLOC_...``.

    >>> keep_pages() in (True, False)
    True
    """
    chosen = "LD_PRELOAD" in os.environ or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
