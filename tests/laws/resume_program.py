"""Train to a number of steps in a process of its own, and print the digest of the state and the history's losses."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

import trainfn
from trainfn.result import CLOCK
from trainfn.tree import digest


class Net(nn.Module):
    """Dropout and BatchNorm: random draws and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def train(max_steps: int, out_dir: str | Path | None, *, seed: int = 0, **settings: object) -> trainfn.FitResult:
    """22 examples, batches of 2 x 3: an epoch is four steps, the last one short."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(22, 4, generator=generator)
    y = torch.randint(0, 3, (22,), generator=generator)
    torch.manual_seed(1)
    model = Net()
    options = {
        "optimizer": trainfn.optim.adamw(lr=trainfn.optim.warmup_cosine(0.05, warmup=2, total=12)),
        "batch_size": 2,
        "accumulate": 3,
        "ema": 0.9,
        "log_every": 1,
        "device": "cpu",
        "compile": "eager",
        "progress": False,
        "resume": "auto" if out_dir else None,
    } | settings
    return trainfn.fit(
        model, {"x": x, "y": y}, loss="classification", max_steps=max_steps, out_dir=out_dir, seed=seed, **options
    )


def summary(result: trainfn.FitResult) -> dict[str, object]:
    """Every bit of the state, and every row but for the clock."""
    rows = [{name: value for name, value in row.items() if name not in CLOCK} for row in result.history + result.epochs]
    return {"digest": digest(result.state), "rows": rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(summary(train(int(sys.argv[1]), sys.argv[2]))))
