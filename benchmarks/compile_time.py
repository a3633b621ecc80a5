"""How long does the first step take, cold and with the compiler's caches warm (C7)?

    python benchmarks/compile_time.py --work C1 C4 C4b

Each number is a process of its own, with cache directories of its own: the user's, and PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import os
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


def main() -> None:
    from harness import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=["C1", "C4", "C4b"])
    rows = []
    for name in parser.parse_args().work:
        for who in WHO:
            with tempfile.TemporaryDirectory() as cache:
                environment = os.environ | {"XDG_CACHE_HOME": f"{cache}/user", "TMPDIR": cache}
                call = [sys.executable, str(Path(__file__)), who, name]
                found = [
                    subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
                    for _ in range(2)
                ]
            cold, warm = (round(json.loads(text.splitlines()[-1]), 1) for text in found)
            rows.append({"work": name, "peer": who, "cold_s": cold, "warm_s": warm})
    record("compile-time", rows)


if __name__ == "__main__":
    first_step(*sys.argv[1:]) if len(sys.argv) == 3 and sys.argv[1] in WHO else main()
