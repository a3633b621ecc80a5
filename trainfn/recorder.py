"""The history of a run: reports become rows, of some steps and of an epoch.

A report stays on the device until a row is due. Then all of them are read, in one copy, in the order of their steps;
what an epoch has come to is added up in that order, too. These sums are in every checkpoint, so an epoch that is cut
has, at its end, the row that it would have had.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from trainfn.errors import listed, warn
from trainfn.health import ALARMING, REFUSED, HealthWarning, Verdict
from trainfn.limits import seconds_of
from trainfn.plan import Plan
from trainfn.reports import EpochSums, read_reports, summary, tensor_health
from trainfn.result import Row
from trainfn.state import Report, TrainState
from trainfn.store import CheckpointWarning, CheckpointWriteError, History, Place, cut, rows

_BY_CODE = {float(verdict): verdict for verdict in Verdict}  # to call Verdict takes longer, and there are thousands

SO_FAR = "epoch_so_far"
"""Under this name, what an epoch has come to is among the metrics in a manifest."""


class Recorder:
    """Turns reports into rows: one for every ``log_every`` steps, evaluation and checkpoint, and one for every epoch.

    A row's ``loss`` is the weighted mean over all applied steps since the row before; its ``verdict`` is the first of
    these steps' that is not ok; ``applied``, ``skipped``, ``micro_batches`` and ``seen`` (tokens, labels, examples) are
    totals of the run, and so is ``seconds``, its wall time. ``examples_per_second`` and ``counted_per_second`` are over
    the time that the steps took, without evaluating, saving and compiling; ``mfu`` is in :mod:`trainfn.flops`.

    Attributes:
        rows: of steps, those before a resume included.
        epochs: of epochs, likewise; in the file, they have ``"kind": "epoch"``.
    """

    def __init__(self, plan: Plan) -> None:
        self.rows: list[Row] = []
        self.epochs: list[Row] = []
        self._plan = plan
        self._reports: list[Tensor] = []  # since the last row of the history, each in a row
        self._lines: list[list[float]] = []  # what has been read of them
        self._totals: Row = {}
        self._lr = math.nan
        self._history: History | None = None
        if plan.config.out_dir is not None:
            path = Path(plan.config.out_dir, "history.jsonl")
            cut(path, plan.state.cursor)
            self._history, self._place = History(path), Place(path.parent)
            for row in rows(path):
                (self.epochs if row.get("kind") == "epoch" else self.rows).append(row)
        before = {} if plan.previous is None else plan.previous.metrics
        self.seconds_before = seconds_of(before)
        self._began = self._lap_began = time.perf_counter()
        self._compiled = plan.step.compile_seconds
        self._spent = 0.0  # by the steps since the last row, as far as they have been read
        self._row_began = self._read_to = plan.state.cursor
        self._sums = self._sums_of(before, plan.state.cursor)

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier parts of it included."""
        return self.seconds_before + time.perf_counter() - self._began

    @property
    def so_far(self) -> dict[str, Any]:
        """What a checkpoint has to say so that this epoch's row will be right."""
        return {SO_FAR: attrs.asdict(self._sums)}

    def go_on(self, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Go on, back at a checkpoint with these metrics, after a batch that may be the last one of its epoch."""
        self._sums, self._totals = self._sums_of(metrics, state.cursor - 1), {}

    def step(self, state: TrainState) -> None:
        """Remember the report of a step."""
        self._reports.append(state.report.row)

    def last_refused(self, state: TrainState) -> tuple[int, Report]:
        """Return the batch that made the run halt, by number, and the report on its step; since the last row."""
        self.read(state)
        refused = [number for number, verdict in self._verdicts(state).items() if verdict in REFUSED]
        return refused[-1], Report.of(self._reports[refused[-1] - state.cursor])

    def read(self, state: TrainState) -> None:
        """Read the reports that have not been read yet: this waits for the device."""
        if self._read_to == state.cursor and self._totals:
            return
        table, self._totals = read_reports(self._reports[len(self._lines) :], state)
        self._lines += table
        self._lr = table[-1][3] if table else self._lr
        spent, examples = self._lap(), self._plan.loader.count(self._read_to, state.cursor)
        self._read_to = state.cursor
        self._spent += spent
        self._sums.seconds += spent
        self._sums.examples += examples
        for line in table:
            self._sums.add(line)

    def row(self, state: TrainState, metrics: Mapping[str, float]) -> Row:
        """Write and return the row that the reports since the last one and the metrics make."""
        self.read(state)
        row: Row = {"step": state.cursor, "epoch": self._plan.loader.epoch(state.cursor - 1)}
        if self._lines:
            verdicts = self._verdicts(state)
            row |= summary(self._lines, list(verdicts.values()))
            examples = self._plan.loader.count(self._row_began, state.cursor)
            row |= self._rates(len(self._lines), examples, row["weight"], self._spent)
            self._warn(verdicts)
            self._reports, self._lines, self._spent, self._row_began = [], [], 0.0, state.cursor
        row |= self._totals
        every = self._plan.config.health_every
        if every is not None and state.cursor % every == 0:
            row |= tensor_health(state)
        row |= {**metrics, "seconds": round(self.seconds, 3)}
        self.rows.append(row)
        self._append(row)
        return row

    def epoch(self, state: TrainState, metrics: Mapping[str, float]) -> Row:
        """Write and return the row of the epoch that ends with this step."""
        self.read(state)
        sums = self._sums
        row: Row = {"kind": "epoch", "step": state.cursor, "epoch": sums.epoch, **sums.row()}
        row |= {"lr": self._lr, **self._rates(sums.steps, sums.examples, sums.weight, sums.seconds)}
        row |= {**metrics, "seconds": round(sums.seconds, 3)}
        self._sums = EpochSums(epoch=sums.epoch + 1)
        self.epochs.append(row)
        self._append(row)
        return row

    def close_epoch(self, state: TrainState) -> None:
        """Write the row of the epoch that ends with this step, if it has not been written: something came between."""
        number, rest = divmod(state.cursor, self._plan.loader.batches_per_epoch)
        if not rest and self._sums.epoch < number:
            self.epoch(state, {})

    @property
    def has_rest(self) -> bool:
        """Whether there are steps since the last row."""
        return bool(self._reports)

    def start_lap(self) -> None:
        """Let the time since the last reading count for nothing: it was not spent on steps."""
        self._lap()

    def _sums_of(self, metrics: Mapping[str, Any], batch: int) -> EpochSums:
        """Return what the epoch of this batch had come to at a checkpoint with these metrics; that is 0 of another."""
        known = metrics.get(SO_FAR) or {}
        same = known and known["epoch"] >= batch // self._plan.loader.batches_per_epoch
        return EpochSums(**known) if same else EpochSums(epoch=self._plan.loader.epoch(batch))

    def _lap(self) -> float:
        now, compiled = time.perf_counter(), self._plan.step.compile_seconds
        spent = now - self._lap_began - (compiled - self._compiled)
        self._lap_began, self._compiled = now, compiled
        return max(spent, 0.0)

    def _rates(self, steps: int, examples: int, counted: float, seconds: float) -> Row:
        if not seconds:
            return {}
        rates = {"examples_per_second": examples / seconds} if examples else {}
        rates["counted_per_second"] = counted / seconds
        if self._plan.roofline is not None:
            rates["mfu"] = self._plan.roofline.utilisation(steps, seconds)
        return {name: float(f"{rate:.6g}") for name, rate in rates.items()}

    def _append(self, row: Row) -> None:
        if self._history is None:
            return
        try:
            self._place.check()
            self._history.append(row)
        except CheckpointWriteError as error:
            if self._plan.config.on_save_error == "stop":
                raise
            warn(f"A row of the history was not written, and the run goes on: {error}", CheckpointWarning)

    def _verdicts(self, state: TrainState) -> dict[int, Verdict]:
        """Return the verdicts since the last row, by number of batch."""
        return dict(enumerate([_BY_CODE[line[-1]] for line in self._lines], state.cursor - len(self._lines)))

    def _warn(self, verdicts: Mapping[int, Verdict]) -> None:
        """Warn of what should not be overlooked: once for each kind, with the examples of the first step."""
        found = set(verdicts.values())
        for kind in [kind for kind in ALARMING if kind in found]:
            steps = [number for number, verdict in verdicts.items() if verdict is kind]
            more = f", and in {len(steps) - 1} more" if len(steps) > 1 else ""
            examples = listed(self._plan.loader.indices(steps[0]).tolist())
            text = f"In the step over batch {steps[0]} (examples [{examples}]){more}, {kind.sentence}."
            warn(text, HealthWarning)
