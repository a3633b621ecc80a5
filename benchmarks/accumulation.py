"""What does it cost to accumulate a window of 16 sequences in 1, 4 or 16 micro-batches (C8)?

python benchmarks/accumulation.py
"""

from __future__ import annotations

import os


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from harness import check_equal, measure, record, summary
    from peers import Ours, Plain
    from workloads import gpt

    torch.set_num_threads(1)
    rows = []
    for count in (1, 4, 16):
        work = gpt("C8", layers=4, width=64, context=32, batch=16, steps=10)
        peers = {
            "trainfn accum": Ours(work, "accum", accumulate=count),
            "eager": Plain(work, compiled=False, accumulate=count),
            "compiled model": Plain(work, compiled=True, accumulate=count),
        }
        check_equal(peers)
        rows += [row | {"micro_batches": count} for row in summary(measure(peers, rounds=9, steps=10), "trainfn accum")]
    record("accumulation", rows)


if __name__ == "__main__":
    main()
