"""What does a call cost, as a model of one size is cut into more and more tensors (C5)?

The host's part of it is a call of a program that does nothing: after its first run it hands out the same results.

python benchmarks/tensor_count.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from harness import check_equal, measure, record, summary
    from peers import Ours, Plain
    from torch import Tensor, nn
    from workloads import Workload

    torch.set_num_threads(1)

    class Scaled(nn.Module):
        """A product with a vector that is stored in pieces: the arithmetic is the same however many there are."""

        def __init__(self, pieces: int) -> None:
            super().__init__()
            each = 7_200 // pieces
            self.pieces = nn.ParameterList(torch.linspace(0.5, 1.5, 7_200).split(each))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.cat(list(self.pieces))

    rows = []
    for pieces in (24, 72, 300):
        data = (torch.linspace(-1, 1, 7_200).expand(2, -1).contiguous(), torch.ones(2, 7_200))
        work = Workload(f"C5-{pieces}", lambda pieces=pieces: Scaled(pieces), data, "mse", nn.functional.mse_loss, 200)
        peers = {"trainfn graph": Ours(work, "graph"), "eager": Plain(work, compiled=False)}
        check_equal(peers)
        peers["trainfn graph, the host's part"] = idle = Ours(work, "graph", backend=run_once)
        idle.take()
        rows += [row | {"tensors": pieces} for row in summary(measure(peers, rounds=9, steps=100), "trainfn graph")]

    def growth(peer: str) -> float:
        times = [row["us"] for row in rows if row["peer"] == peer]
        return round((times[-1] - times[0]) / 276, 4)

    names = ("trainfn graph", "trainfn graph, the host's part", "eager")
    record("tensor-count", rows, us_per_tensor={name: growth(name) for name in names})


def run_once(program: Any, _: Any) -> Callable[..., Any]:
    """A backend of torch.compile whose programs do nothing after their first run."""
    results: list[Any] = []

    def run(*arguments: Any) -> Any:
        if not results:
            results.append(program(*arguments))
        return results[0]

    return run


if __name__ == "__main__":
    main()
