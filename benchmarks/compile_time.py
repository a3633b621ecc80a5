"""How long does the first step take, cold and with the compiler's caches warm (C7)?

    python benchmarks/compile_time.py --work C1 C4 C4b

Each number is a process of its own. Reported are medians, and the least and the most: of ``--cold`` processes whose
cache directories are new (the user's, and PyTorch's), and of ``--warm`` after each of them that find them filled; the
two peers in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WHO = ("trainfn", "compiled model")


def first_step(who: str, name: str) -> None:
    import time

    import torch
    from peers import Ours, Plain
    from workloads import WORKLOADS

    torch.set_num_threads(2)
    work = WORKLOADS[name]()
    began = time.perf_counter()
    peer = Ours(work, "auto") if who == "trainfn" else Plain(work, compiled=True)
    peer.loss()
    print(json.dumps(time.perf_counter() - began))


def seconds(who: str, name: str, cache: str) -> float:
    """Return what the first step takes in a new process with this cache directory."""
    Path(cache, "tmp").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"XDG_CACHE_HOME": f"{cache}/user", "TMPDIR": f"{cache}/tmp"}
    call = [sys.executable, str(Path(__file__)), who, name]
    found = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
    return float(json.loads(found.splitlines()[-1]))


def spread(name: str, found: list[float]) -> dict[str, float]:
    numbers = {f"{name}_s": statistics.median(found), f"{name}_least": min(found), f"{name}_most": max(found)}
    return {key: round(number, 1) for key, number in numbers.items()}


def main() -> None:
    from harness import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=["C1", "C4", "C4b"])
    parser.add_argument("--cold", type=int, default=3)
    parser.add_argument("--warm", type=int, default=3)
    asked = parser.parse_args()
    if min(asked.cold, asked.warm) < 1:
        parser.error("at least one process of each kind is measured: --cold and --warm are 1 or more")
    rows = []
    for name in asked.work:
        cold: dict[str, list[float]] = {who: [] for who in WHO}
        warm: dict[str, list[float]] = {who: [] for who in WHO}
        for _ in range(asked.cold):
            with tempfile.TemporaryDirectory() as cache:
                for found in (cold, *[warm] * asked.warm):
                    for who in WHO:  # no cache's path has a space: PyTorch does not quote it for the compiler
                        found[who].append(seconds(who, name, f"{cache}/{who.replace(' ', '-')}"))
        rows += [{"work": name, "peer": who} | spread("cold", cold[who]) | spread("warm", warm[who]) for who in WHO]
    record("compile-time", rows)


if __name__ == "__main__":
    first_step(*sys.argv[1:]) if len(sys.argv) == 3 and sys.argv[1] in WHO else main()
