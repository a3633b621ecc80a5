"""Streams of every kind, and a run over one; also a program that trains to a step, for a process of its own.

python tests/laws/stream_program.py KIND STEPS RUN      # prints what came of it, as JSON
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import trainfn
from trainfn.data import Batched
from trainfn.result import CLOCK
from trainfn.tree import digest

EXAMPLES = 22
Example = tuple[Tensor, int]


def example(index: int) -> Example:
    """The first feature is its number; noise is drawn from PyTorch's global generator."""
    return torch.cat([torch.tensor([float(index)]), torch.randn(3)]), index % 3


class Examples(IterableDataset[Example]):
    """Shards itself between workers, and shuffles with Python's global generator."""

    def __iter__(self) -> Iterator[Example]:
        info = get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        order = list(range(first, EXAMPLES, stride))
        random.shuffle(order)
        yield from map(example, order)


class Remembering(IterableDataset[Example]):
    """Knows where it is, with a generator of its own, and orders each epoch in its own way."""

    def __init__(self) -> None:
        self.at, self.epoch, self.own = 0, 0, random.Random(3)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Example]:
        for at in range(self.at, EXAMPLES):
            self.at = at + 1
            features, label = example((at * (2 * self.epoch + 3)) % EXAMPLES)
            yield features + self.own.random(), label
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "own": self.own.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        self.own.setstate(state["own"])


class RememberingLoader:
    """A loader that is none of PyTorch's: batches, fetched two ahead; its state is that of the last one given."""

    batch_size = 6

    def __init__(self) -> None:
        self.dataset = list(range(EXAMPLES))
        self._given, self._start = 0, 0

    def __iter__(self) -> Iterator[Any]:
        starts = list(range(self._start, EXAMPLES, self.batch_size))
        self._start, self._given = 0, starts[0] if starts else 0
        fetched = [self._batch(start) for start in starts[:2]]
        for at, start in enumerate(starts):
            fetched += [self._batch(later) for later in starts[at + 2 : at + 3]]
            self._given = start + self.batch_size
            yield fetched.pop(0)

    def _batch(self, start: int) -> Any:
        rows = [float(index) for index in self.dataset[start : start + self.batch_size]]
        return [torch.tensor(rows)[:, None] * torch.ones(4), torch.tensor(rows).long() % 3]

    def state_dict(self) -> dict[str, Any]:
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = state["given"]


def generated(epoch: int) -> Iterator[Example]:
    for index in range(EXAMPLES):
        yield example((index + epoch) % EXAMPLES)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, EXAMPLES, 5):
        rows = [example(index) for index in range(start, min(start + 5, EXAMPLES))]
        yield torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])


KINDS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "examples": lambda: (Examples(), {"batch_size": 3}),
    "examples, two workers": lambda: (Examples(), {"batch_size": 3, "workers": 2}),
    "a generator function": lambda: (generated, {"batch_size": 3}),
    "batches": lambda: (Batched(batches), {}),
    "a DataLoader": lambda: (DataLoader(Examples(), batch_size=6), {}),
    "a data set with a state": lambda: (Remembering(), {"batch_size": 3}),
    "a DataLoader of one": lambda: (DataLoader(Remembering(), batch_size=6), {}),
    "a loader with a state": lambda: (RememberingLoader(), {}),
}
WITH_A_STATE = [kind for kind in KINDS if "state" in kind or "of one" in kind]


class Net(nn.Module):
    """Notes the numbers of the examples that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[int] = []
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.noted += x[:, 0].int().tolist()
        return self.layers(x / 20)


def train(data: Any, stop: int, run: Path | None, **settings: Any) -> dict[str, Any]:
    """Train to a step; return every bit of the state, the rows but for the clock, and the examples in order."""
    torch.manual_seed(0)
    model = Net()
    options = {
        "loss": "classification", "optimizer": trainfn.optim.adamw(lr=0.01), "accumulate": 2, "log_every": 1,
        "device": "cpu", "compile": "eager", "progress": False, "resume": "auto" if run else None,
    } | settings  # fmt: skip
    result = trainfn.fit(model, data, max_steps=stop, out_dir=run, **options)
    rows = [{name: value for name, value in row.items() if name not in CLOCK} for row in result.history]
    return {"digest": digest(result.state), "rows": rows, "order": model.noted}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, steps, folder = sys.argv[1:]
    made, given = KINDS[kind]()
    print(json.dumps(train(made, int(steps), Path(folder), **given)))
