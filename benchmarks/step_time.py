"""How long is a step, against everything a user would pick instead?

python benchmarks/step_time.py --threads 1 --work C1 C3 C4 C4b --trainers
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", nargs="+", default=["C1", "C3", "C4", "C4b"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--modes", nargs="+", default=["graph", "accum", "eager"])
    parser.add_argument("--trainers", action="store_true", help="Lightning, Hugging Face's Trainer and Accelerate, too")
    parser.add_argument("--same-allocator", action="store_true", help="the C library keeps pages for all, as for us")
    args = parser.parse_args()
    if args.threads == 1 and hasattr(os, "sched_setaffinity"):  # before anything counts the cores: JAX does
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from harness import check_equal, measure, record, summary
    from peers import Accelerated, HuggingFace, Jax, Lightning, Ours, Plain
    from workloads import WORKLOADS

    torch.set_num_threads(args.threads)
    for name in args.work:
        work = WORKLOADS[name]()
        peers = {f"trainfn {mode}": Ours(work, mode) for mode in args.modes}
        peers |= {"eager": Plain(work, compiled=False), "compiled model": Plain(work, compiled=True)}
        if args.trainers:
            peers |= {"Lightning": Lightning(work), "HF Trainer": HuggingFace(work), "Accelerate": Accelerated(work)}
        try:
            peers["JAX"] = Jax(work)
        except ImportError:
            print("JAX is not installed: left out")
        check_equal(peers)
        found = measure(peers, rounds=args.rounds, steps=work.steps, same_allocator=args.same_allocator)
        rows = summary(found, f"trainfn {args.modes[0]}")
        kind = f"{name}-trainers" if args.trainers else name
        kind += "-same-allocator" if args.same_allocator else ""
        record(f"step-{kind}", rows, work=name, rounds=args.rounds, steps=work.steps)


if __name__ == "__main__":
    main()
