"""What the operating system says of the processor."""

from __future__ import annotations

from pathlib import Path


def cpuinfo() -> list[str]:
    """Return the lines of Linux's ``/proc/cpuinfo``; none where there is no such file.

    >>> isinstance(cpuinfo(), list)
    True
    """
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
