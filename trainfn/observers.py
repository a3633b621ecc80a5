"""What watches a run: the history it leaves and what it shows. Observers read states; none of them changes one."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from trainfn.header import header
from trainfn.health import Verdict
from trainfn.plan import Plan
from trainfn.state import Report, TrainState
from trainfn.store import History, cut, rows

Row = dict[str, Any]
"""One row of the history: ``step``, ``epoch``, ``loss``, ``grad_norm``, ``lr``, ... and ``val_loss`` when evaluated."""

Observer = Callable[[TrainState], object]
"""A function that is called with the state after every step. It may keep it only until the next one."""


class Recorder:
    """Turns reports into rows: one for every ``log_every`` steps, evaluation and checkpoint.

    Reports stay on the device until a row is due; then they are read together. A row's ``loss`` is the weighted mean
    over all applied steps since the row before.
    """

    def __init__(self, plan: Plan) -> None:
        self.rows: list[Row] = []
        self._plan, self._began = plan, time.perf_counter()
        self._pending: list[Report] = []
        self._history: History | None = None
        if plan.config.out_dir is not None:
            path = Path(plan.config.out_dir, "history.jsonl")
            cut(path, plan.state.cursor)
            self._history, self.rows = History(path), list(rows(path))

    def step(self, state: TrainState) -> None:
        """Remember the report of a step."""
        self._pending.append(state.report)

    def row(self, state: TrainState, metrics: Mapping[str, float]) -> Row:
        """Read the pending reports, and write and return the row that they and the metrics make."""
        seconds = time.perf_counter() - self._began
        row: Row = {"step": state.cursor, "epoch": (state.cursor - 1) // self._plan.loader.batches_per_epoch}
        if self._pending:
            row |= _summary(self._pending)
            self._pending = []
        row |= {"skipped": int(state.health.skipped), **metrics, "seconds": round(seconds, 3)}
        self.rows.append(row)
        if self._history is not None:
            self._history.append(row)
        return row


class Progress:
    """The run header, then a progress bar; plain lines where standard error is not a terminal."""

    def __init__(self, plan: Plan, stream: TextIO | None = None) -> None:
        from tqdm.auto import tqdm

        self._plan, self._stream = plan, stream or sys.stderr
        self._bar: Any = None
        self._shown, self._began, self._first = 0, time.perf_counter(), plan.state.cursor
        if not plan.config.progress:
            return
        print(*header(plan), sep="\n", file=self._stream, flush=True)
        if plan.state.cursor < plan.stop and (self._stream.isatty() or "ipykernel" in sys.modules):
            self._bar = tqdm(total=plan.stop, initial=plan.state.cursor, file=self._stream, dynamic_ncols=True)

    def step(self, state: TrainState) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(1)

    def row(self, row: Row) -> None:
        """Show a row: beside the bar, or as a line, about twenty a run and each one with an evaluation."""
        if not self._plan.config.progress:
            return
        names = ("loss", "val_loss", "grad_norm", "lr")
        shown = [f"{name} {row[name]:.4g}" for name in names if name in row]
        shown += [f"skipped {row['skipped']}"] if row["skipped"] else []
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(shown))
        elif "val_loss" in row or row["step"] - self._shown >= self._plan.stop / 20 or row["step"] == self._plan.stop:
            self._shown = row["step"]
            rate = (row["step"] - self._first) / max(time.perf_counter() - self._began, 1e-9)
            line = f"step {row['step']}/{self._plan.stop}  {'  '.join(shown)}  {rate:.1f} steps/s"
            print(line, file=self._stream, flush=True)

    def end(self, text: str) -> None:
        """Close the bar and say how it ended."""
        if self._bar is not None:
            self._bar.close()
        if self._plan.config.progress:
            print(text, file=self._stream, flush=True)


def _summary(reports: list[Report]) -> Row:
    """Read reports from the device, one copy a field, and sum them up."""

    def read(name: str) -> list[float]:
        values: list[float] = torch.stack([getattr(report, name) for report in reports]).tolist()
        return values

    verdicts = read("verdict")
    good = [index for index, verdict in enumerate(verdicts) if verdict == Verdict.OK]
    losses, weights, norms, lrs = read("loss"), read("weight"), read("grad_norm"), read("lr")
    weight = sum(weights[index] for index in good)
    return {
        "loss": sum(losses[index] * weights[index] for index in good) / weight if good else math.nan,
        "weight": weight,
        "grad_norm": norms[-1],
        "lr": lrs[-1],
        "verdict": Verdict(int(next((v for v in verdicts if v != Verdict.OK), Verdict.OK))).name.lower(),
    }
