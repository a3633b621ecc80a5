"""A run that can be cut, drawn from small choices, in this process or as a program of its own.

python -m tests.laws.exact_case SEED STOP RUN [KILL]      # prints what came of it, as JSON
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import trainfn
from trainfn import optim
from trainfn.result import CLOCK
from trainfn.tree import digest

OPTIMIZERS: dict[str, Callable[[Any], optim.Transform]] = {
    "sgd": lambda lr: optim.sgd(lr=lr, momentum=0.9),
    "nesterov": lambda lr: optim.sgd(lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda lr: optim.adam(lr=lr),
    "adamw": lambda lr: optim.adamw(lr=lr, weight_decay=0.1, decay=optim.matrices_only),
    "nadam": lambda lr: optim.nadam(lr=lr),
    "radam": lambda lr: optim.radam(lr=lr),
    "rmsprop": lambda lr: optim.rmsprop(lr=lr),
    "adagrad": lambda lr: optim.adagrad(lr=lr),
    "adafactor": lambda lr: optim.adafactor(lr=lr),
    "lion": lambda lr: optim.lion(lr=lr),
    "lamb": lambda lr: optim.lamb(lr=lr),
    "muon": lambda lr: optim.partition(
        optim.matrices_and_others, {"matrices": optim.muon(lr=lr), "others": optim.adamw(lr=lr)}
    ),
}
NORMS = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


@attrs.frozen
class Case:
    optimizer: str
    scheduled: bool
    norm: str
    dropout: float
    accumulate: int
    batch_size: int
    examples: int
    stop: int
    shuffle: bool
    drop_last: bool
    ema: float | None
    log_every: int
    evaluated: bool
    precision: str
    cuts: tuple[int, ...]


def make_case(choose: Callable[[Sequence[Any]], Any]) -> Case:
    """Return a case; ``choose`` picks one of several."""
    norm = choose(list(NORMS))
    accumulate, batch_size = choose([1, 2, 3]), choose([2, 3, 5])
    window = accumulate * batch_size
    stop = choose(range(3, 15))
    return Case(
        optimizer=choose(list(OPTIMIZERS)),
        scheduled=choose([False, True]),
        norm=norm,
        dropout=choose([0.0, 0.4]),
        accumulate=accumulate,
        batch_size=batch_size,
        examples=window + choose(range(4 * window)),
        stop=stop,
        shuffle=choose([True, True, False]),
        drop_last=norm == "batch" or choose([True, False]),  # BatchNorm refuses a batch of one
        ema=choose([None, 0.9]),
        log_every=choose([1, 2, 5]),
        evaluated=choose([False, True]),
        precision=choose(["32-true", "32-true", "bf16-mixed", "16-mixed"]),
        cuts=tuple(sorted({choose(range(1, stop)) for _ in range(choose([1, 2, 3]))})),
    )


class Net(nn.Module):
    """Notes which examples it is trained on, in order; their number is the last feature."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.noted: list[int] = []
        self.layers = nn.Sequential(
            nn.Linear(4, 6), NORMS[case.norm](6), nn.ReLU(), nn.Dropout(case.dropout), nn.Linear(6, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.noted += x[:, 4].int().tolist()
        return self.layers(x[:, :4])


def train(case: Case, stop: int, run: Path | None, **settings: Any) -> dict[str, Any]:
    """Train to a step; return every bit of the state, the rows but for the clock, the losses, the examples in order."""
    own = torch.Generator().manual_seed(5)
    x = torch.cat([torch.randn(case.examples, 4, generator=own), torch.arange(case.examples).float()[:, None]], 1)
    y = torch.randint(0, 3, (case.examples,), generator=own)
    torch.manual_seed(1)
    model = Net(case)
    lr = optim.warmup_cosine(0.02, warmup=2, total=15) if case.scheduled else 0.02
    losses: list[Any] = []

    def note(state: trainfn.TrainState) -> None:
        losses.append([state.cursor, repr(float(state.report.loss)), repr(float(state.report.grad_norm))])

    observers = [note, *settings.pop("observers", [])]
    result = trainfn.fit(
        model, (x, y), loss="classification", optimizer=OPTIMIZERS[case.optimizer](lr), max_steps=stop,
        val_data=(x[:7], y[:7]) if case.evaluated else None, eval_every=3 if case.evaluated else None,
        batch_size=case.batch_size, accumulate=case.accumulate, shuffle=case.shuffle, drop_last=case.drop_last,
        ema=case.ema, log_every=case.log_every, precision=case.precision, device="cpu", compile="eager",
        progress=False, out_dir=run, resume="auto" if run else None, keep_last=1, keep_best=0, observers=observers,
        **settings,
    )  # fmt: skip
    rows, epochs = (
        [{name: value for name, value in row.items() if name not in CLOCK} for row in kind]
        for kind in (result.history, result.epochs)
    )
    return {"digest": digest(result.state), "rows": rows, "epochs": epochs, "losses": losses, "order": model.noted}


def by_seed(seed: int) -> Case:
    return make_case(random.Random(seed).choice)


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, last, folder, *kill = sys.argv[1:]

    def die(state: trainfn.TrainState) -> None:
        if kill and state.cursor == int(kill[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    print(json.dumps(train(by_seed(int(number)), int(last), Path(folder), save_every=2, observers=[die])))
