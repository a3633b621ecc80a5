"""How things are timed here: in one process, in turns, after the answers have been compared.

The protocol is in README.md. A *peer* is anything with ``loss()`` (take one step, return its loss) and
``run(steps)`` (take steps, return the seconds that they took, set-up left out).
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from trainfn.engine.memory import keep_pages

RESULTS = Path(__file__).parent / "results"


class Peer(Protocol):
    def loss(self) -> float: ...

    def run(self, steps: int) -> float: ...


def timed(step: Callable[[], Any], steps: int) -> float:
    """Return the seconds that ``steps`` calls take, the device's work included."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def check_equal(peers: Mapping[str, Peer], *, steps: int = 5, tolerance: float = 2e-3) -> None:
    """Raise unless all peers have the same losses over the first steps: what is timed is the same work."""
    losses = {name: [peer.loss() for _ in range(steps)] for name, peer in peers.items()}
    reference = next(iter(losses.values()))
    for name, found in losses.items():
        for ours, theirs in zip(found, reference, strict=True):
            if not abs(ours - theirs) <= tolerance * max(1.0, abs(theirs)):
                raise SystemExit(f"{name} does other work: losses {found}, expected {reference}")


def measure(
    peers: Mapping[str, Peer], *, rounds: int, steps: Mapping[str, int] | int, same_allocator: bool = False
) -> dict[str, list[float]]:
    """Return microseconds per step of each peer, one number a round; in each round every peer has its turn.

    The engine asks the C library to keep freed pages, for the whole process. In the turns of the others that is taken
    back, so that each has what it would have by itself; with ``same_allocator`` all have ours.
    """
    found: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds + 1):
        for name, peer in peers.items():
            keep_pages() if same_allocator or getattr(peer, "keeps_pages", False) else _give_pages_back()
            count = steps if isinstance(steps, int) else steps[name]
            seconds = peer.run(count)
            if number:  # the first round warms up
                found[name].append(seconds / count * 1e6)
    return found


def _give_pages_back() -> None:
    """Set glibc's thresholds to where they go by themselves in a process that uses large tensors."""
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its greatest
        ctypes.CDLL(None).mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD, twice that


def summary(found: Mapping[str, list[float]], ours: str) -> list[dict[str, Any]]:
    """Return a row for each peer: median, quartiles, and its median ratio to ours within the same rounds."""
    rows = []
    for name, times in found.items():
        ratios = [theirs / own for theirs, own in zip(times, found[ours], strict=True)]
        low, _, high = statistics.quantiles(times, n=4)
        rows.append(
            {
                "peer": name,
                "us": round(statistics.median(times), 1),
                "quartiles": [round(low, 1), round(high, 1)],
                "ratio": round(statistics.median(ratios), 3),
            }
        )
    return rows


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def record(name: str, rows: Any, **more: Any) -> None:
    """Print rows, and put them with the machine's description into a dated file."""
    about = machine() | more
    print(json.dumps(about))
    for row in rows:
        print(json.dumps(row))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{about['date']}-{name}-{about['threads']}t.json"
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
