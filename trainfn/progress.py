"""What a run shows: its header, then a progress bar, or plain lines where standard error is not a terminal."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, TextIO

from trainfn.header import header
from trainfn.health import AILMENTS
from trainfn.plan import Plan
from trainfn.result import FitResult, Row
from trainfn.state import TrainState


class Progress:
    """An observer that shows the run header, what a compilation cost, rows, and how the run has ended."""

    def __init__(self, plan: Plan, stream: TextIO | None = None) -> None:
        from tqdm.auto import tqdm

        self._plan, self._stream, self._tqdm = plan, stream or sys.stderr, tqdm
        self._bar: Any = None
        self._shown, self._began, self._first = 0, time.perf_counter(), plan.state.cursor
        self._compiles = 0
        self._often = plan.stop / 20 if plan.of_stop else 100

    def on_start(self, plan: Plan) -> None:
        """Show the header, and the bar where there is a terminal."""
        print(*header(plan), sep="\n", file=self._stream, flush=True)
        if plan.state.cursor < plan.stop and (self._stream.isatty() or "ipykernel" in sys.modules):
            total = plan.stop if plan.of_stop else None
            self._bar = self._tqdm(total=total, initial=plan.state.cursor, file=self._stream, dynamic_ncols=True)

    def on_step(self, state: TrainState) -> None:
        """Move the bar; say what a compilation has cost."""
        step = self._plan.step
        if step.compiles > self._compiles:
            self._compiles = step.compiles
            text = f"compiled  {step.mode}, at step {state.cursor}; {step.compile_seconds:.1f} s of compiling so far"
            if self._bar is None:
                print(text, file=self._stream, flush=True)
            else:
                self._bar.write(text, file=self._stream)
        if self._bar is not None:
            self._bar.update(1)

    def on_row(self, state: TrainState, row: Row) -> None:
        """Show a row: beside the bar, or as a line, about twenty a run and each one with an evaluation."""
        evaluated = [name for name in row if name.startswith("val_")]
        names = ["loss", *evaluated, "grad_norm", "lr"]
        shown = [f"{name} {row[name]:.4g}" for name in names if name in row]
        shown += [f"skipped {row['skipped']}"] if row["skipped"] else []
        shown += [f"{ail} {', '.join(row[ail])}" for ail in AILMENTS if ail in row]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(shown))
        elif evaluated or row["step"] - self._shown >= self._often or row["step"] == self._plan.stop:
            self._shown = row["step"]
            rate = (row["step"] - self._first) / max(time.perf_counter() - self._began, 1e-9)
            stop = f"/{self._plan.stop}" if self._plan.of_stop else ""
            line = f"step {row['step']}{stop}  {'  '.join(shown)}  {rate:.1f} steps/s"
            print(line, file=self._stream, flush=True)

    def on_end(self, result: FitResult | None) -> None:
        """Close the bar and say how it ended."""
        if self._bar is not None:
            self._bar.close()
        if result is not None:
            print(ending(self._plan, result), file=self._stream, flush=True)


def ending(plan: Plan, result: FitResult) -> str:
    """Return the sentence that says how a run has ended."""
    cursor = result.state.cursor
    if result.ended_by.startswith("SIG"):
        return f"stopped by {result.ended_by} after step {cursor}, checkpoint {result.checkpoint}"
    parts = [f"done: step {cursor}{plan.of_stop}, {result.seconds:.1f} s"]
    if plan.step.compiles:
        parts[0] += f" ({plan.step.compile_seconds:.1f} s of it compiling)"
    if result.ended_by in ("max_seconds", "early_stopping_patience"):
        parts.append(f"ended by {result.ended_by}={getattr(plan.config, result.ended_by)}")
    if result.ended_by == "early_stopping_patience" and result.best is not None:
        monitor = plan.retention.monitor
        parts[-1] += f" (best {monitor} {result.best[monitor]:.4g} at step {result.best['step']})"
    row = result.history[-1] if result.history else {}
    parts += [f"{name} {value:.4f}" for name, value in row.items() if _is_val_loss(name) and math.isfinite(value)]
    steps = [row for row in result.history if row.get("counted_per_second")]
    parts += [f"{steps[-1]['counted_per_second']:,.0f} counted by the loss a second"] if steps else []
    parts += [f"checkpoint {result.checkpoint}"] if result.checkpoint is not None else []
    return ", ".join(parts)


def _is_val_loss(name: str) -> bool:
    return name.startswith("val_") and name.endswith("_loss")
