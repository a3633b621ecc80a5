"""Memory of a run: what a step has used on a CPU is kept for the next one, and garbage is looked for between rows.

A step allocates its gradients and activations and frees them all at its end. glibc then gives the pages back to the
operating system, and the next step gets them again, one page fault each: for 67 MB of gradients 16,000 faults, 30 of
80 ms. So the first step on a CPU asks glibc to keep them, to the same end as the usual advice to preload another
allocator. The process holds on to the most memory that it has used; it does not use more.

Python looks for cycles of garbage whenever enough objects have been made, through all that there are: with torch and
its compiler imported, 370,000 objects and a pause of 170 ms in the middle of some step, while a GPU runs dry. A loop
knows better moments: when a row of its history is due, it waits for the device anyway.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NEVER = 2**30  # collections of the middle generation
_OF_PYTHON = 2_000  # objects; what someone freezes with torch imported are a hundred thousand
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


def is_frozen() -> bool:
    """Return whether someone has frozen objects. Python 3.12 begins with some hundreds, which are its own.

    >>> is_frozen()
    False
    """
    return gc.get_freeze_count() > _OF_PYTHON


@contextmanager
def collecting_young() -> Iterator[None]:
    """Keep Python's collector from going through all objects inside: for what makes many and keeps most.

    A compilation is one to two seconds shorter for it.

    >>> before = gc.get_threshold()
    >>> with collecting_young():
    ...     gc.get_threshold()[2] > before[2]
    True
    >>> gc.get_threshold() == before
    True
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def collecting_at_rows(*, after: float = 2.0) -> Iterator[Callable[[], None]]:
    """Keep Python's collector from going through all objects in the middle of a step; yield what does it instead.

    At the first call ``after`` seconds from the beginning (most is compiled by then, and short runs are over), all that
    exists is collected once and set aside (``gc.freeze``); from then on old objects are looked at in such calls only,
    by Python's own rule. Young ones are looked at as always, which is short. At the end everything is as it was, after
    an error, too. Where someone has switched the collector off or has frozen objects, that stays so.

    >>> with collecting_at_rows(after=0) as collect:
    ...     collect()
    >>> gc.get_freeze_count()
    0
    """
    began, before = time.perf_counter(), gc.get_threshold()
    young, middle, old = before
    is_ours = False

    def collect() -> None:
        nonlocal is_ours
        if is_ours:
            if gc.get_count()[2] >= old:
                gc.collect()
        elif time.perf_counter() - began >= after and gc.isenabled() and young and old and not is_frozen():
            is_ours = True
            gc.collect()
            gc.freeze()
            gc.set_threshold(young, middle, _NEVER)

    try:
        yield collect
    finally:
        if is_ours:
            gc.set_threshold(*before)
            gc.unfreeze()
