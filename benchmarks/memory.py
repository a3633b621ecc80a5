"""How much memory does a step need, at its peak?

    python benchmarks/memory.py --layers 8

Each number is a process of its own. What is counted is what PyTorch's allocator hands out: all tensors that are alive
before a step (parameters, moments, EMA, batch), and the most that the third step adds to them. Scratch space inside
kernels is not seen, for anybody.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

OURS = (
    "trainfn eager",
    "trainfn graph",
    "trainfn accum",
    "trainfn split",
    "trainfn split, checkpoint",
    "trainfn eager, checkpoint",
)
PEERS = ("eager", "compiled model")


def workload(name: str, layers: int) -> Any:
    from workloads import gpt, wide

    return wide() if name == "C3" else gpt("GPT", layers=layers, width=256, context=256, batch=8, steps=1)


def make_peer(who: str, work: Any, precision: str) -> Any:
    import torch
    from peers import Ours, Plain

    if who in PEERS:
        peer = Plain(work, compiled=who == "compiled model")
        if precision == "bf16-mixed":
            inner = peer.call

            def call(x: Any) -> Any:
                with torch.autocast("cpu", torch.bfloat16):
                    return inner(x)

            peer.call = call
        return peer
    mode, _, checkpointed = who.removeprefix("trainfn ").partition(", ")
    peer = Ours(work, mode, precision=precision, checkpoint="blocks.*" if checkpointed else None)
    # The module's own weights are not used: they may go, as ours is the state.
    for param in peer.step.step.model.parameters():
        param.data = torch.empty(0)
    return peer


def resident() -> int:
    """Return the bytes of all tensors that are alive, each storage once."""
    import torch

    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = (torch.Tensor, torch.nn.Parameter)  # and not the compiler's fake ones
        tensors = [each for each in gc.get_objects() if type(each) in kinds and each.device.type == "cpu"]
        tensors = [each for each in tensors if not torch._is_functional_tensor(each)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def peak(take: Any) -> int:
    """Return the most bytes that a call holds beyond those that it found."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        take()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        seen.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for _, size in changes:
        held += size
        most = max(most, held)
    return most


def one(who: str, name: str, precision: str, layers: int) -> None:
    import torch

    torch.set_num_threads(2)
    peer = make_peer(who, workload(name, layers), precision)
    losses = [peer.loss(), peer.loss()]
    kept = resident()
    print(json.dumps({"resident": kept, "peak": peak(peer.take), "losses": losses}))


def main() -> None:
    from harness import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--work", nargs="+", default=["C3", "GPT"])
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.work:
        for precision in args.precision:
            found = {}
            for who in (*PEERS, *OURS):
                if name == "C3" and who.endswith("checkpoint"):
                    continue
                call = [sys.executable, str(Path(__file__)), who, name, precision, str(args.layers)]
                done = subprocess.run(call, capture_output=True, text=True, check=True)
                found[who] = json.loads(done.stdout.splitlines()[-1])
                theirs, own = found[PEERS[0]]["losses"], found[who]["losses"]
                if any(abs(a - b) > 0.02 * max(1.0, abs(b)) for a, b in zip(own, theirs, strict=True)):
                    raise SystemExit(f"{who} does other work: {own}, expected {theirs}")
                print(name, precision, who, found[who], flush=True)
            totals = {who: each["resident"] + each["peak"] for who, each in found.items()}
            rows += [
                {
                    "work": name,
                    "precision": precision,
                    "peer": who,
                    "resident_mb": round(found[who]["resident"] / 1e6, 1),
                    "peak_mb": round(found[who]["peak"] / 1e6, 1),
                    "total_mb": round(total / 1e6, 1),
                    **{f"to_{peer.replace(' ', '_')}": round(total / totals[peer], 3) for peer in PEERS},
                }
                for who, total in totals.items()
            ]
    record("-".join(["memory", *args.work, *args.precision]), rows, layers=args.layers)


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] in (*PEERS, *OURS):
        one(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
