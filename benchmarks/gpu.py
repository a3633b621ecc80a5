"""What does a step cost on a GPU: speed, memory, launches, copies?

    python benchmarks/gpu.py --quick

``--quick`` takes small models and few rounds, minutes in all; ``--only train launches ...`` takes some questions.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from harness import check_equal, measure, record, summary, timed
from peers import Ours, Plain
from torch import Tensor, nn
from workloads import GPT, Workload

import trainfn

DEVICE = "cuda"
Rows = list[dict[str, Any]]

_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}  # dense bfloat16, per second


def gpt(name: str, *, layers: int, width: int, heads: int, context: int, batch: int, vocabulary: int) -> Workload:
    """A GPT with tied embeddings, and tokens that are always the same."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        net = GPT(layers=layers, width=width, heads=heads, context=context, vocabulary=vocabulary)
        for param in net.parameters():
            nn.init.normal_(param, std=0.02) if param.ndim > 1 else None
        net.head.weight = net.wte.weight
        return net

    ids = torch.randint(0, vocabulary, (batch, context), generator=torch.Generator().manual_seed(1))
    mean = lambda logits, y: F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())  # noqa: E731
    return Workload(name, model, (ids, ids.flip(1)), "masked_language_modeling", mean, 10)


def gpt2(quick: bool) -> Workload:
    if quick:
        return gpt("gpt2-quick", layers=4, width=256, heads=4, context=256, batch=8, vocabulary=50_304)
    return gpt("gpt2-124M", layers=12, width=768, heads=12, context=1024, batch=16, vocabulary=50_304)


def ours(work: Workload, mode: str, **options: Any) -> Ours:
    return Ours(work, mode, device=DEVICE, **options)


def train(quick: bool) -> Rows:
    """Tokens a second and the share of the peak, for GPT-2 in bfloat16."""
    work = gpt2(quick)
    options = {"precision": "bf16-mixed"}
    peers = {
        "trainfn graph": ours(work, "graph", cuda_graph=False, **options),
        "trainfn graph, captured": ours(work, "graph", cuda_graph=True, **options),
        "trainfn split": ours(work, "split", cuda_graph=False, **options),
        "trainfn split, captured": ours(work, "split", cuda_graph=True, **options),
        "compiled model, fused AdamW": Plain(work, compiled=True, device=DEVICE, bf16=True),
    }
    check_equal(peers, tolerance=2e-2)
    rows = summary(measure(peers, rounds=3 if quick else 9, steps=5 if quick else 10), "trainfn graph")
    ids, net = work.batch[0], work.model()
    size = sum(param.numel() for param in net.parameters())
    block = net.blocks[0]
    attention = 12 * len(net.blocks) * block.qkv.in_features * ids.shape[1]
    peak = next(
        (peak for name, peak in _PEAK.items() if DEVICE == "cuda" and name in torch.cuda.get_device_name()), None
    )
    for row in rows:
        row["tokens_per_s"] = round(ids.numel() / row["us"] * 1e6)
        flops = (6 * size + attention) * row["tokens_per_s"]
        row["share_of_peak"] = None if peak is None else round(flops / peak, 3)
    return rows


class Stack(nn.Module):
    """Square matrices, each of which sees one example: nothing but memory is moved."""

    def __init__(self, matrices: int, width: int) -> None:
        super().__init__()
        with torch.device(DEVICE):
            self.parts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(matrices))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).mean(0)


def update(quick: bool) -> Rows:
    """The share of the bandwidth of a plain copy that a step reaches which consists of little but the update.

    Bytes per parameter, in float32: forward 4, gradient 4, norm 4; the update reads parameter, two moments, average and
    gradient, and writes all but the last: 36. In all 48.
    """
    bandwidth, rows = _bandwidth(2**26 if quick else 2**28), []
    for name, matrices, width in [("quick", 4, 2048)] if quick else [("124M", 12, 3216), ("1.5B", 38, 6272)]:
        x = torch.linspace(-1, 1, width).view(1, -1)
        work = Workload(name, lambda m=matrices, w=width: Stack(m, w), (x, x.flip(1)), "mse", F.mse_loss, 5)
        for mode in ("graph", "split"):
            _free()
            found = measure({mode: ours(work, mode, cuda_graph=False)}, rounds=5, steps=5)
            row = summary(found, mode)[0]
            moved = 48 * matrices * width**2 / (row["us"] * 1e-6)
            rows.append(row | {"parameters": matrices * width**2, "share_of_copy": round(moved / bandwidth, 3)})
    return [*rows, {"peer": "copy", "GB_per_s": round(bandwidth / 1e9)}]


def _bandwidth(numbers: int) -> float:
    """Return the bytes a second that a plain copy reads and writes."""
    old, new = torch.zeros(numbers, device=DEVICE), torch.zeros(numbers, device=DEVICE)
    new.copy_(old)
    return 8 * numbers / (min(timed(lambda: new.copy_(old), 10) for _ in range(3)) / 10)


def launches(quick: bool) -> Rows:
    """A step that is bound by launches: a GPT of 10 million parameters, one sequence."""
    work = gpt("10M", layers=6, width=384, heads=6, context=256, batch=1, vocabulary=65)
    peers = {
        "trainfn graph": ours(work, "graph", cuda_graph=False),
        "trainfn graph, captured": ours(work, "graph", cuda_graph=True),
        "trainfn eager": ours(work, "eager", cuda_graph=False),
        "trainfn eager, captured": ours(work, "eager", cuda_graph=True),
        "compiled model, fused AdamW": Plain(work, compiled=True, device=DEVICE),
        "plain loop, fused AdamW": Plain(work, compiled=False, device=DEVICE),
    }
    check_equal(peers)
    return summary(measure(peers, rounds=3 if quick else 11, steps=20 if quick else 50), "trainfn graph")


class Pieces(nn.Module):
    """A product with a vector that is stored in pieces: the arithmetic is the same however many there are."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.pieces = nn.ParameterList(torch.linspace(0.5, 1.5, 6_000).split(6_000 // count))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cat(list(self.pieces))


class HostTime:
    """Counts only the time until a step's work has been handed over, step by step, with an idle device before each."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer

    def run(self, steps: int) -> float:
        total = 0.0
        for _ in range(steps):
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            began = time.perf_counter()
            self.peer.take()
            total += time.perf_counter() - began
        return total


def host(quick: bool) -> Rows:
    """Microseconds of the host a step, by number of tensors."""
    rows: Rows = []
    for count in (100, 300) if quick else (100, 300, 1000):
        data = (torch.linspace(-1, 1, 6_000).expand(2, -1).contiguous(), torch.ones(2, 6_000))
        work = Workload(f"{count}", lambda count=count: Pieces(count), data, "mse", F.mse_loss, 50)
        peers = {
            "trainfn graph": ours(work, "graph", cuda_graph=False),
            "trainfn graph, captured": ours(work, "graph", cuda_graph=True),
            "plain loop, fused AdamW": Plain(work, compiled=False, device=DEVICE),
        }
        check_equal(peers)
        found = measure({name: HostTime(peer) for name, peer in peers.items()}, rounds=5, steps=30)
        rows += [row | {"tensors": count} for row in summary(found, "trainfn graph")]
    return rows


def memory(quick: bool) -> Rows:
    """The most memory that was in use in the course of a step, in each mode."""
    rows: Rows = []
    work = gpt2(quick)
    makers: dict[str, Callable[[], Any]] = {
        f"trainfn {mode}": lambda mode=mode: ours(work, mode, precision="bf16-mixed", cuda_graph=False)
        for mode in ("graph", "split", "eager")
    }
    makers["trainfn graph, captured"] = lambda: ours(work, "graph", precision="bf16-mixed", cuda_graph=True)
    makers["compiled model, fused AdamW"] = lambda: Plain(work, compiled=True, device=DEVICE, bf16=True)
    for name, make in makers.items():
        _free()
        peer = make()
        for _ in range(4):
            peer.take()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            peer.take()
        torch.cuda.synchronize()
        found = {"held_MB": before / 2**20, "peak_MB": torch.cuda.max_memory_allocated() / 2**20}
        reserved = torch.cuda.max_memory_reserved() / 2**20  # a recording's memory is here, not in what is allocated
        rows.append({"peer": name} | {key: round(value) for key, value in (found | {"reserved_MB": reserved}).items()})
        del peer
    return rows


def accumulation(quick: bool) -> Rows:
    """A window of 16 sequences in 1, 4 or 16 micro-batches."""
    rows: Rows = []
    for count in (1, 4, 16):
        work = gpt("window", layers=6, width=384, heads=6, context=128 if quick else 256, batch=16, vocabulary=65)
        peers = {
            "trainfn accum": ours(work, "accum", accumulate=count, cuda_graph=False),
            "trainfn accum, captured": ours(work, "accum", accumulate=count, cuda_graph=True),
            "compiled model, fused AdamW": Plain(work, compiled=True, accumulate=count, device=DEVICE),
        }
        check_equal(peers)
        found = measure(peers, rounds=3 if quick else 9, steps=10)
        rows += [row | {"micro_batches": count} for row in summary(found, "trainfn accum")]
    return rows


class Running:
    """A run over images that have to be copied to the device, as ``fit`` takes its batches."""

    def __init__(self, quick: bool, *, prefetch: bool) -> None:
        side = 64 if quick else 224
        x, y = torch.randn(512, 3, side, side), torch.randint(0, 10, (512,))
        net = nn.Sequential(
            *(nn.Conv2d(3, 64, 7, 4), nn.ReLU(), nn.Conv2d(64, 128, 3, 2), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
        )
        self.prefetch = prefetch
        self.made = trainfn.plan(
            net, (x, y), loss="classification", batch_size=128, max_steps=10**9, compile="eager", progress=False,
            device=DEVICE, health_every=None,
        )  # fmt: skip

    def run(self, steps: int) -> float:
        import sys

        module, state = sys.modules["trainfn.loop"], None
        kept = module.prefetched
        if not self.prefetch:
            module.prefetched = lambda batches, lane: batches  # the run then copies on the stream of its steps
        try:
            states = trainfn.run(self.made)
            next(states)
            state = next(states)
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            began = time.perf_counter()
            for _, state in zip(range(steps), states, strict=False):  # noqa: B007
                pass
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            seconds = time.perf_counter() - began
            states.close()
        finally:
            module.prefetched = kept
        self.made = attrs.evolve(self.made, state=state)
        return seconds


def prefetch(quick: bool) -> Rows:
    """Batches of images copied while the step before runs, or on the stream of the steps."""
    peers = {"prefetched": Running(quick, prefetch=True), "not prefetched": Running(quick, prefetch=False)}
    return summary(measure(peers, rounds=3 if quick else 9, steps=10 if quick else 30), "prefetched")


QUESTIONS: dict[str, Callable[[bool], Rows]] = {
    "train": train,
    "update": update,
    "launches": launches,
    "host": host,
    "memory": memory,
    "accumulation": accumulation,
    "prefetch": prefetch,
}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("These benchmarks need a GPU that torch can use, and there is none here.")
    torch.set_float32_matmul_precision("high")
    for name in args.only:
        _free()
        try:
            rows = QUESTIONS[name](args.quick)
        except torch.OutOfMemoryError as error:
            rows = [{"peer": "none", "failed": str(error).splitlines()[0]}]
        record(f"gpu-{name}" + ("-quick" if args.quick else ""), rows, question=str(QUESTIONS[name].__doc__))


if __name__ == "__main__":
    main()
