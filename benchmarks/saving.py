"""What a checkpoint costs the training: saved beside it, or before it goes on.

    python benchmarks/saving.py [--width 1024] [--steps 60] [--every 10] [--rounds 5]

Both ways in turns in one process, after their last states have been found bitwise equal. Prints one JSON object:
seconds of a whole run, medians and spread, with no checkpoints for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time

import torch
from torch import nn

import trainfn
from trainfn.tree import digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=None, help="where to write: its file system decides")
    args = parser.parse_args()
    x, y = torch.randn(512, args.width), torch.randint(0, 10, (512,))
    torch.manual_seed(0)
    hidden = [part for _ in range(4) for part in (nn.Linear(args.width, args.width), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(args.width, 10))

    def once(way: str) -> tuple[float, str]:
        with tempfile.TemporaryDirectory(dir=args.dir) as run:
            settings = (
                {} if way == "none" else {"out_dir": run, "save_every": args.every, "save_async": way == "beside"}
            )
            result = trainfn.fit(
                model, (x, y), loss="classification", lr=1e-4, batch_size=64, max_steps=args.steps, compile="eager",
                progress=False, health_every=None, **settings,
            )  # fmt: skip
            return result.seconds, digest(result.state)

    ways = ("none", "before", "beside")
    assert len({once(way)[1] for way in ways}) == 1
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            seconds[way].append(once(way)[0])
    parameters = sum(param.numel() for param in model.parameters())
    told = {way: {"median": round(statistics.median(s), 3), "spread": [round(min(s), 3), round(max(s), 3)]}
            for way, s in seconds.items()}  # fmt: skip
    print(json.dumps({
        "parameters": parameters, "saves": args.steps // args.every, "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "seconds": told,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
