"""What watches a run: the history it leaves and what it shows. Observers read states; none of them changes one."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from trainfn.errors import listed, warn
from trainfn.header import header
from trainfn.health import AILMENTS, ALARMING, REFUSED, HealthWarning, Verdict, ailing
from trainfn.plan import Plan
from trainfn.result import Row
from trainfn.state import NUMBERS, Report, TrainState, trainable
from trainfn.store import CheckpointWarning, CheckpointWriteError, History, Place, cut, rows

Observer = Callable[[TrainState], object]
"""A function that is called with the state after every step. It may keep it only until the next one."""


def observe(observers: Sequence[Observer], state: TrainState) -> None:
    """Call observers with a state. An error of one of them gets a note that says which."""
    for observer in observers:
        try:
            observer(state)
        except Exception as error:
            name = getattr(observer, "__qualname__", type(observer).__qualname__)
            error.add_note(f"It was raised by the observer {name}, after step {state.cursor}.")
            raise


class Recorder:
    """Turns reports into rows: one for every ``log_every`` steps, evaluation and checkpoint.

    Reports stay on the device until a row is due; then they are read together, in one copy. A row's ``loss`` is the
    weighted mean over all applied steps since the row before; its ``verdict`` is the first of these steps' that is not
    ok; ``applied``, ``skipped``, ``micro_batches`` and ``seen`` (tokens, labels, examples) are totals of the run.
    """

    def __init__(self, plan: Plan) -> None:
        self.rows: list[Row] = []
        self._plan, self._began = plan, time.perf_counter()
        self._pending: list[Report] = []
        self._history: History | None = None
        if plan.config.out_dir is not None:
            path = Path(plan.config.out_dir, "history.jsonl")
            cut(path, plan.state.cursor)
            self._history, self._place, self.rows = History(path), Place(path.parent), list(rows(path))

    def step(self, state: TrainState) -> None:
        """Remember the report of a step."""
        self._pending.append(state.report)

    def last_refused(self, state: TrainState) -> tuple[int, Report]:
        """Return the batch that made the run halt, by number, and the report on its step; since the last row."""
        refused = [number for number, verdict in self._verdicts(state).items() if verdict in REFUSED]
        return refused[-1], self._pending[refused[-1] - state.cursor]

    def row(self, state: TrainState, metrics: Mapping[str, float]) -> Row:
        """Read the pending reports, and write and return the row that they and the metrics make."""
        seconds = time.perf_counter() - self._began
        row: Row = {"step": state.cursor, "epoch": (state.cursor - 1) // self._plan.loader.batches_per_epoch}
        table, totals = _read(self._pending, state)
        if self._pending:
            verdicts = dict(enumerate((Verdict(int(line[-1])) for line in table), state.cursor - len(table)))
            row |= _summary(table, list(verdicts.values()))
            self._warn(verdicts)
            self._pending = []
        row |= totals
        every = self._plan.config.health_every
        if every is not None and state.cursor % every == 0:
            row |= _tensor_health(state)
        row |= {**metrics, "seconds": round(seconds, 3)}
        self.rows.append(row)
        if self._history is not None:
            self._append(self._history, row)
        return row

    def rest(self, state: TrainState) -> None:
        """Write a row of the steps since the last one, if there are any."""
        if self._pending:
            self.row(state, {})

    def _append(self, history: History, row: Row) -> None:
        try:
            self._place.check()
            history.append(row)
        except CheckpointWriteError as error:
            if self._plan.config.on_save_error == "stop":
                raise
            text = f"A row of the history was not written, and the run goes on: {error}"
            warn(text, CheckpointWarning)

    def _verdicts(self, state: TrainState) -> dict[int, Verdict]:
        """Read the pending verdicts, by number of batch."""
        codes = torch.stack([report.verdict for report in self._pending]).tolist()
        return dict(enumerate(map(Verdict, codes), state.cursor - len(codes)))

    def _warn(self, verdicts: Mapping[int, Verdict]) -> None:
        """Warn of what should not be overlooked: once for each kind, with the examples of the first step."""
        for kind in ALARMING:
            steps = [number for number, verdict in verdicts.items() if verdict is kind]
            if steps:
                more = f", and in {len(steps) - 1} more" if len(steps) > 1 else ""
                examples = listed(self._plan.loader.indices(steps[0]).tolist())
                text = f"In the step over batch {steps[0]} (examples [{examples}]){more}, {kind.sentence}."
                warn(text, HealthWarning)


class Progress:
    """The run header, then a progress bar; plain lines where standard error is not a terminal."""

    def __init__(self, plan: Plan, stream: TextIO | None = None) -> None:
        from tqdm.auto import tqdm

        self._plan, self._stream = plan, stream or sys.stderr
        self._bar: Any = None
        self._shown, self._began, self._first = 0, time.perf_counter(), plan.state.cursor
        self._compiles = 0
        if not plan.config.progress:
            return
        print(*header(plan), sep="\n", file=self._stream, flush=True)
        if plan.state.cursor < plan.stop and (self._stream.isatty() or "ipykernel" in sys.modules):
            self._bar = tqdm(total=plan.stop, initial=plan.state.cursor, file=self._stream, dynamic_ncols=True)

    def step(self, state: TrainState) -> None:
        """Move the bar; say what a compilation has cost."""
        step = self._plan.step
        if step.compiles > self._compiles and self._plan.config.progress:
            self._compiles = step.compiles
            text = f"compiled  {step.mode}, at step {state.cursor}; {step.compile_seconds:.1f} s of compiling so far"
            if self._bar is None:
                print(text, file=self._stream, flush=True)
            else:
                self._bar.write(text, file=self._stream)
        if self._bar is not None:
            self._bar.update(1)

    def row(self, row: Row) -> None:
        """Show a row: beside the bar, or as a line, about twenty a run and each one with an evaluation."""
        if not self._plan.config.progress:
            return
        names = ["loss", *(name for name in row if name.startswith("val_")), "grad_norm", "lr"]
        shown = [f"{name} {row[name]:.4g}" for name in names if name in row]
        shown += [f"skipped {row['skipped']}"] if row["skipped"] else []
        shown += [f"{ail} {', '.join(row[ail])}" for ail in AILMENTS if ail in row]
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


def _read(reports: list[Report], state: TrainState) -> tuple[list[list[float]], Row]:
    """Return loss, weight, gradient norm, rate and verdict of each report, and what all steps have added up."""
    stats, scale = state.stats, state.scale
    cells = [cell for report in reports for cell in (*(getattr(report, name) for name in NUMBERS), report.verdict)]
    totals = [stats.seen, stats.micro_batches, stats.outcomes] + ([] if scale is None else [scale.factor])
    numbers = fetched([*cells, *totals])
    width = len(NUMBERS) + 1
    table = [numbers[start : start + width] for start in range(0, width * len(reports), width)]
    seen, micro, outcomes, *factor = numbers[len(cells) :]
    row: Row = {
        "applied": int(sum(outcomes[verdict] for verdict in Verdict if verdict.applied)),
        "skipped": int(sum(outcomes[verdict] for verdict in Verdict if not verdict.applied)),
        "micro_batches": int(micro),
        "seen": seen,
    }
    return table, (row | {"scale": factor[0]} if factor else row)


def fetched(values: Sequence[Tensor]) -> list[Any]:
    """Return the numbers in tensors of one device; from a GPU by one copy into page-locked memory, waited for alone.

    >>> fetched([torch.tensor(3), torch.tensor([0.5, 1.0])])
    [3, [0.5, 1.0]]
    """
    if not values[0].is_cuda:
        return [value.tolist() for value in values]
    row = torch.cat([value.reshape(-1).to(torch.float64) for value in values])
    landed = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
    landed.copy_(row, non_blocking=True)
    torch.cuda.current_stream(row.device).record_event().synchronize()
    return taken_apart(landed, values)


def taken_apart(row: Tensor, values: Sequence[Tensor]) -> list[Any]:
    """Return the numbers in a row of all elements, one after another, in the shapes of ``values``.

    >>> taken_apart(torch.arange(3.0), [torch.tensor(3), torch.tensor([1, 1])])
    [0.0, [1.0, 2.0]]
    """
    parts = torch.split(row, [value.numel() for value in values])
    return [part.view(value.shape).tolist() for part, value in zip(parts, values, strict=True)]


def _summary(table: list[list[float]], verdicts: list[Verdict]) -> Row:
    good = [line for line, verdict in zip(table, verdicts, strict=True) if verdict.applied]
    weight = sum(line[1] for line in good)
    return {
        "loss": sum(line[0] * line[1] for line in good) / weight if good else math.nan,
        "weight": weight,
        "grad_norm": table[-1][2],
        "lr": table[-1][3],
        "verdict": next((v for v in verdicts if v != Verdict.OK), Verdict.OK).name.lower(),
    }


def _tensor_health(state: TrainState) -> Row:
    """Read the gradient norm of each tensor at the last step, and say which ones ail."""
    norms = dict(zip(trainable(state.params), state.report.grad_norms.tolist(), strict=True))
    return {"grad_norms": {name: float(f"{value:.4g}") for name, value in norms.items()}, **ailing(norms)}
