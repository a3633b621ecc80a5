"""``FitResult``: what a run leaves behind."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from trainfn.errors import ConfigError
from trainfn.state import TrainState
from trainfn.store import Retention, cursor_of, steps

Row = dict[str, Any]
"""One row of the history: ``step``, ``epoch``, ``loss``, ``grad_norm``, ``lr``, ... and ``val_loss`` when evaluated."""

CLOCK = ("seconds", "examples_per_second", "counted_per_second", "mfu")
"""The columns that no two runs agree in. All others of a run that was cut are those of the run that was not."""


@attrs.frozen(kw_only=True, eq=False)
class FitResult:
    """What a run leaves behind.

    Attributes:
        state: the last state.
        history: rows by step; see :data:`trainfn.result.Row`.
        epochs: a row for each epoch: ``loss`` (over all of its steps), ``grad_norm_mean``, ``_max`` and ``_min``,
            ``steps``, ``examples``, what was evaluated at its end, ... In ``history.jsonl`` they are among the others,
            with ``"kind": "epoch"``.
        best: the row with the best of what is monitored (the lowest ``val_loss``, or ``loss`` without evaluation data),
            or None if there is no such row.
        checkpoint: the directory of the last checkpoint, or None without ``out_dir``.
        best_checkpoint: the directory of the checkpoint that was saved at ``best``, or None if there is none.
        seconds: wall time of this call.
        ended_by: why it ended: ``"max_steps"``, ``"max_epochs"``, ``"max_seconds"``, ``"early_stopping_patience"``, or
            the name of a signal.
    """

    state: TrainState
    history: list[Row]
    epochs: list[Row]
    best: Row | None
    checkpoint: Path | None
    best_checkpoint: Path | None
    seconds: float
    ended_by: str
    _model: nn.Module = attrs.field(alias="_model", repr=False)

    def model(self, *, ema: bool | None = None) -> nn.Module:
        """Write the trained weights and buffers into the module that was given to ``fit``; return it, set to evaluate.

        Args:
            ema: take the moving average of the parameters; if None, whenever the run kept one.

        Raises:
            ConfigError: the run kept no average.
        """
        if ema and self.state.ema is None:
            raise ConfigError("The run kept no moving average.", got="model(ema=True)", hint="train with ema=0.999")
        averaged = self.state.ema or {}
        values = self.state.params | (averaged if ema is None or ema else {}) | self.state.buffers
        with torch.no_grad():
            for name, tensor in [*self._model.named_parameters(), *self._model.named_buffers()]:
                tensor.copy_(values[name])
        return self._model.eval()


def best_row(rows: list[Row], retention: Retention) -> Row | None:
    """Return the row with the best monitored number; the first of several; None if none is finite."""
    scored = [row for row in rows if math.isfinite(retention.score(row))]
    return min(scored, key=retention.score, default=None)


def checkpoint_at(out_dir: str | os.PathLike[str] | None, row: Row | None) -> Path | None:
    """Return the checkpoint that was saved at a row's step, if there is one."""
    if out_dir is None or row is None:
        return None
    return next((path for path in steps(out_dir) if cursor_of(path) == row["step"]), None)
