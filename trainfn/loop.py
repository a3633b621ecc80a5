"""``run``, the fold of a step over batches, and ``Loop``, all that ``fit`` does between two of its steps."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from trainfn.data import CopyStream, prefetched
from trainfn.due import Due, next_due, what_is_due
from trainfn.engine import collecting_at_rows
from trainfn.errors import CheckpointError, DivergenceError
from trainfn.evaluation import check_noise, evaluate_plan, noise_columns
from trainfn.faults import Rescue, is_out_of_memory, memory_error
from trainfn.halt import divergence, make_finite_check, make_halt_check
from trainfn.limits import why_over
from trainfn.observers import Observers
from trainfn.plan import Plan
from trainfn.progress import ending
from trainfn.recorder import Recorder
from trainfn.result import FitResult, Row, best_row, checkpoint_at
from trainfn.rollback import Course, Rollback
from trainfn.signals import OnSignal, leave, listening, until_told
from trainfn.state import TrainState
from trainfn.store import Saver, save, steps


def run(planned: Plan) -> Iterator[TrainState]:
    """Yield the state after each step of a plan: the fold itself, without history, evaluation or checkpoints.

    A state may be used until the next one is asked for: the step that makes it writes into the memory of the last.

    >>> import torch, trainfn
    >>> x, y = torch.ones(8, 2), torch.zeros(8, dtype=torch.long)
    >>> made = trainfn.plan(torch.nn.Linear(2, 2), (x, y), loss="classification", max_steps=3, device="cpu")
    >>> [int(state.step) for state in run(made)]
    [1, 2, 3]
    """
    state = planned.state
    batches = planned.loader.batches(state.cursor, max(planned.stop, state.cursor))
    if planned.device.type == "cuda":
        batches = prefetched(batches, CopyStream(planned.device))
    try:
        for batch in batches:
            try:
                state = planned.step(state, planned.to_device(batch))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                sizes = planned.config.batch_size, planned.config.accumulate
                raise memory_error(error, f"step {state.cursor + 1}", batch, *sizes) from error
            yield state
    finally:
        batches.close()


class Loop:
    """A run being carried out: after each step it is recorded, shown and observed, and what is due is done.

    In this order: the step's report is remembered; observers see the state; a run that has to halt ends, or goes back;
    then, where they are due, evaluation, the row, the epoch's row, the checkpoint; last, a signal that was heard is
    answered.
    """

    def __init__(self, planned: Plan, observers: Observers, on_signal: OnSignal | None = None) -> None:
        self._began = self._saved_at = time.perf_counter()
        check_noise(planned)
        config = self._config = planned.config
        self._planned, self._observers, self._on_signal = planned, observers, on_signal
        self._recorder = Recorder(planned)
        self._must_halt, self._spoilt_by = make_halt_check(planned), make_finite_check(planned)
        self._rollback, self._course = Rollback(planned), Course(planned, run)
        self._saver = Saver(
            config.out_dir or "",
            planned.retention,
            background=config.save_async,
            on_error=config.on_save_error,
            last=planned.resumed_from,
        )
        self._state, self._told_of = planned.state, planned.resumed_from
        self._unsaved = False
        self._patience, self._over_by = attrs.evolve(planned.patience), planned.over_by
        self._by_time = not (config.max_seconds is None and config.save_every_minutes is None)
        self._next = next_due(planned, planned.state.cursor)  # before that, only what is not counted in steps is due

    def carry_out(self) -> FitResult:
        """Take the steps, and return what they leave behind; what ``fit`` does after ``plan``."""
        try:
            left = self._steps()
            result = self._result((self._over_by or "data") if left is None else left.name)
        except BaseException as error:
            self._end(None, error)
            raise
        self._end(result)
        if left is not None:
            leave(left, ending(self._planned, result), result)
        return result

    def _steps(self) -> signal.Signals | None:
        """Take the steps; return the signal that has ended them, if one has."""
        left: signal.Signals | None = None
        listened, taken = listening(usr1=self._on_signal is not None), contextlib.closing(self._course)
        with listened as listener, self._saver, taken, collecting_at_rows() as collect, Rescue(self._rescue):
            self._observers("on_start", self._planned)
            if self._rollback.wanted and not steps(self._config.out_dir or ""):
                self._checkpoint()
            self._recorder.start_lap()
            for state in () if self._over_by else until_told(self._course, listener):
                self._state = state
                self._recorder.step(state)
                self._observers("on_step", state, after=state.cursor)
                self._see_to_checkpoints(self._saver.check)
                told = listener.heard
                if self._between(told is not None):
                    collect()
                if told is not None:
                    if not self._answer(told):
                        left = told
                        break
                    listener.heard = None
                if self._over_by:
                    break
            if left is None and listener.heard is not None:  # in the last step, or there was no other batch
                left = listener.heard
                self._save_the_rest()
                self._answer(left)
            self._see_to_checkpoints(self._saver.drain)
        return left

    def _between(self, told: bool) -> bool:
        """Do what is due between the last step and the next one; return whether a row was."""
        if self._state.cursor < self._next and not (told or self._by_time or self._must_halt(self._state, False)):
            self._unsaved = True
            return False
        self._next = next_due(self._planned, self._state.cursor)
        minutes = self._config.save_every_minutes
        late = minutes is not None and time.perf_counter() - self._saved_at >= 60 * minutes
        seconds = self._recorder.seconds  # looked at once: a run that is over by them has a row that says so
        self._over_by = self._why_over(seconds)
        due = what_is_due(self._planned, self._state.cursor, now=told or late, end=self._over_by is not None)
        self._keep_sound(due)
        if not (due.row or due.epoch):
            self._unsaved = True
            return False
        self._recorder.read(self._state)
        wanted = due.checkpoint
        metrics = self._measure(due)
        row, epoch = Row(), Row()
        if due.row:
            row = self._row(metrics)
            wanted |= due.evaluation and self._planned.retention.among_best(self._recorder.rows[:-1], row)
        if due.epoch:
            epoch = self._recorder.epoch(self._state, metrics if due.scheduled else {})
            self._observers("on_epoch", self._state, epoch, after=self._state.cursor)
        if due.epoch if self._patience.by_epoch else due.scheduled:
            self._patience.look(self._planned.retention.score(epoch if self._patience.by_epoch else row))
            self._over_by = self._over_by or self._why_over(seconds)
            wanted |= self._over_by is not None
        self._unsaved = True
        if wanted:
            self._checkpoint()
        self._recorder.start_lap()
        return True

    def _why_over(self, seconds: float) -> str | None:
        cursor, stop = self._state.cursor, self._planned.stop
        return why_over(self._config, self._patience, cursor=cursor, stop=stop, seconds=seconds)

    def _measure(self, due: Due) -> dict[str, float]:
        metrics = evaluate_plan(self._planned, self._state) if due.evaluation else {}
        return metrics | (noise_columns(self._planned, self._state, self._recorder.rows) if due.noise else {})

    def _row(self, metrics: Mapping[str, float]) -> Row:
        """Write a row, and show it."""
        row = self._recorder.row(self._state, metrics)
        self._observers("on_row", self._state, row, after=self._state.cursor)
        if any(name.startswith("val_") for name in metrics):
            self._observers("on_eval", self._state, row, after=self._state.cursor)
        return row

    def _see_to_checkpoints(self, look: Callable[[], object]) -> None:
        """Look whether a checkpoint is safe by now, and tell observers of a new one."""
        look()
        if self._saver.last is not self._told_of:
            self._told_of = self._saver.last
            self._observers("on_checkpoint", self._told_of, after=self._state.cursor)

    def _end(self, result: FitResult | None, error: BaseException | None = None) -> None:
        """Tell observers that the run is over; what they raise does not hide an error that has ended it."""
        try:
            self._observers("on_end", result, after=self._state.cursor)
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"Besides, an observer failed at the end: {type(failure).__name__}: {failure}")

    def _keep_sound(self, due: Due) -> None:
        """Where the run has to halt, send it back to a healthy checkpoint, or raise what ends it."""
        halted = self._must_halt(self._state, due.row)
        looked_at = (due.evaluation or due.checkpoint) and not halted
        spoilt = self._spoilt_by(self._state, self._saver.newest) if looked_at else None
        if not halted and spoilt is None:
            return
        refused = self._recorder.last_refused(self._state) if halted else None
        back = self._rollback.back(self._state, self._saver.drain) if self._rollback.wanted else None
        self._row(self._rollback.row(back) if back else {})
        if back is None:
            error = divergence(self._planned, self._state, *refused, self._save_now) if refused else spoilt
            assert error is not None
            self._rollback.explain(error)
            raise error
        self._state = self._course.go_on(back)
        self._recorder.go_on(self._state, self._rollback.metrics)
        self._patience.go_on(self._rollback.metrics)

    def _checkpoint(self) -> None:
        """Have the state saved beside the training, if the run has a directory."""
        if self._config.out_dir is not None:
            self._see_to_checkpoints(self._saver.drain)  # before the next one takes its place
            self._saver.save(self._state, **self._known(self._state.cursor))
            self._saved_at, self._unsaved = time.perf_counter(), False

    def _save_the_rest(self) -> None:
        """Save the steps since the last checkpoint, if there are any, and somewhere to save them."""
        if self._unsaved and self._config.out_dir is not None:
            if spoilt := self._spoilt_by(self._state, self._saver.newest):
                raise spoilt
            self._row({})
            self._checkpoint()

    def _save_now(self, state: TrainState) -> Path | None:
        self._saver.drain()
        self._recorder.close_epoch(state)
        return (
            save(state, self._config.out_dir, **self._known(state.cursor)) if self._config.out_dir is not None else None
        )

    def _rescue(self, error: Exception) -> None:
        """Save the last state before an error that came between two steps ends the run."""
        here = self._course.state
        if self._config.out_dir is None or here is None or isinstance(error, (DivergenceError, CheckpointError)):
            return
        try:
            if self._spoilt_by(here, self._saver.newest) is None:
                if self._recorder.has_rest:
                    self._tell_the_rest(here, error)
                error.add_note(f"The state after step {here.cursor} is saved in {self._save_now(here)}.")
        except CheckpointError as failure:  # which must not hide why the run ends
            error.add_note(f"The state after step {here.cursor} could not be saved: {failure.what}")

    def _tell_the_rest(self, here: TrainState, error: Exception) -> None:
        row = self._recorder.row(here, {})
        try:
            self._observers("on_row", here, row, after=here.cursor)
        except Exception as failure:  # maybe the one that has failed already
            error.add_note(f"Besides, an observer failed: {type(failure).__name__}: {failure}")

    def _answer(self, told: signal.Signals) -> bool:
        """Tell the caller of a signal; return whether the run goes on."""
        return (
            self._on_signal is not None and bool(self._on_signal(told, self._saver.drain())) and told == signal.SIGUSR1
        )

    def _known(self, cursor: int) -> dict[str, Any]:
        """Return what the checkpoint after so many steps says about the run."""
        row = self._recorder.rows[-1] if self._recorder.rows else {}
        metrics: dict[str, Any] = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        metrics |= self._recorder.so_far | self._patience.record
        record = self._planned.record
        config = record["config"] | {"compile_mode": self._planned.step.mode} | self._rollback.record
        return record | {"config": config | self._planned.position(cursor), "metrics": metrics}

    def _result(self, ended_by: str) -> FitResult:
        best = best_row(self._recorder.rows, self._planned.retention)
        return FitResult(
            state=self._state,
            history=self._recorder.rows,
            epochs=self._recorder.epochs,
            best=best,
            checkpoint=self._saver.drain(),
            best_checkpoint=checkpoint_at(self._config.out_dir, best),
            seconds=time.perf_counter() - self._began,
            ended_by=ended_by,
            _step=self._planned.step.step,
            _reader=self._planned.reader,
        )
