"""How much memory a try may take, and takes: on a GPU its allocator says, on a host the operating system.

A host that runs out of memory kills a process instead of refusing it something, so nothing is found out there by
trying: Linux says how much was resident at most while a try ran (``VmHWM``, which is set back before it by writing to
``clear_refs``), and what the next one takes is foreseen from those before. Where it cannot be set back, all that the
process ever took counts, which is careful.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from trainfn.engine.memory import is_frozen
from trainfn.errors import ConfigError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")
_PAIRS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))  # v2, v1


class Gauge:
    """Reads how much memory of a device is left, and how much is taken within a context.

    Attributes:
        on_host: whether it is a host's memory, where a try that will not fit must not be made.
        peak: bytes that were taken in the last ``watching`` at most, above what was taken when the gauge was made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.on_host = device.type == "cpu"
        if self.on_host and not _STATUS.exists():
            raise ConfigError(
                "The memory of this host cannot be measured.",
                where=sys.platform,
                expected="/proc, as Linux has it",
                hint="try a few batch sizes by hand, or find it on the GPU that will be used",
            )
        release(device)
        self._before = self._taken()
        self.peak = 0

    def free(self) -> int:
        """Return the bytes that may be taken, those included that this process holds in reserve on a GPU."""
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return available() if self.on_host else sys.maxsize

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Measure what is taken within."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_reserved(self._device) - self._before
            return
        if self.on_host:
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5")
        yield
        self.peak = (highest() if self.on_host else 0) - self._before

    def _taken(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device)
        return resident() if self.on_host else 0


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Keep what exists out of the collector's way, so that looking for the garbage of a try takes no tenth of a second.

    Where someone else has frozen objects, nothing is done.

    >>> with set_aside():
    ...     gc.get_freeze_count() > 0
    True
    """
    is_ours = not is_frozen()
    if is_ours:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


def resident() -> int:
    """Return the bytes of this process that are in memory.

    >>> 1 << 20 < resident() <= highest()
    True
    """
    return _status("VmRSS")


def highest() -> int:
    """Return the most bytes of this process that were in memory since that was set back."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def available() -> int:
    """Return the bytes that this process may still take: what the host has left, and its control group.

    >>> available() > 0
    True
    """
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    left = [int(lines["MemAvailable"].split()[0]) * 1024]
    for limit, used in _PAIRS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            left.append(int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text()))
    return max(min(left), 0)


def release(device: torch.device) -> None:
    """Give back what is not in use, so that one try does not pay for another."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform.startswith("linux"):  # a step on a CPU has asked glibc to keep freed pages
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
