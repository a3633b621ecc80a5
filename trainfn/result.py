"""``FitResult``: what a run leaves behind."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from trainfn.generate import generate
from trainfn.predict import Reader, chosen_params, predict_read
from trainfn.state import TrainState
from trainfn.step import Step
from trainfn.store import Retention, cursor_of, steps

Row = dict[str, Any]
"""One row of the history: ``step``, ``epoch``, ``loss``, ``grad_norm``, ``lr``, ... and ``val_loss`` when evaluated."""

CLOCK = ("seconds", "examples_per_second", "counted_per_second", "mfu")
"""The columns that no two runs agree in. All others of a run that was cut are those of the run that was not."""


def _counted(rows: list[Row]) -> str:
    return f"<{len(rows)} row{'' if len(rows) == 1 else 's'}>"


def _named(state: TrainState) -> str:
    return f"<{type(state).__name__.lstrip('_')}>"


@attrs.frozen(kw_only=True, eq=False)
class FitResult:
    """What a run leaves behind. Printed, it is a few lines: the state and the rows are named, and not written out.

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
        ended_by: why it ended: ``"max_steps"``, ``"max_epochs"``, ``"max_seconds"``, ``"early_stopping_patience"``,
            ``"data"`` that came to its end, or the name of a signal.
    """

    state: TrainState = attrs.field(repr=_named)
    history: list[Row] = attrs.field(repr=_counted)
    epochs: list[Row] = attrs.field(repr=_counted)
    best: Row | None
    checkpoint: Path | None
    best_checkpoint: Path | None
    seconds: float
    ended_by: str
    _step: Step = attrs.field(alias="_step", repr=False)
    _reader: Reader = attrs.field(alias="_reader", repr=False)

    def model(self, *, ema: bool | None = None) -> nn.Module:
        """Write the trained weights and buffers into the module that was given to ``fit``; return it, set to evaluate.

        Args:
            ema: take the moving average of the parameters; if None, whenever the run kept one.

        Raises:
            ConfigError: the run kept no average.
        """
        module, values = self._step.model, chosen_params(self.state, ema) | self.state.buffers
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                tensor.copy_(values[name])
        return module.eval()

    def predict(self, data: object, *, batch_size: int | None = None, ema: bool | None = None) -> Any:
        """Return the trained model's outputs for a batch, or for data of any form that ``fit`` takes.

        Items are collated, and columns of a frame read, as the run's data was; there may be targets or none. The module
        that was given to ``fit`` is not changed. See :func:`trainfn.predict` for what is concatenated, and how.

        Args:
            data: a batch, or data.
            batch_size: examples at a time; the run's if None.
            ema: use the moving average of the parameters; if None, whenever the run kept one.

        Raises:
            ConfigError, DataError, ModelError: as for :func:`trainfn.predict`.

        >>> import trainfn
        >>> x, y = torch.ones(8, 2), torch.zeros(8, dtype=torch.long)
        >>> result = trainfn.fit(nn.Linear(2, 3), (x, y), loss="classification", max_steps=1, progress=False)
        >>> result.predict(x).shape
        torch.Size([8, 3])
        """
        reader = self._reader if batch_size is None else attrs.evolve(self._reader, batch_size=batch_size)
        return predict_read(self._step, self.state, reader.loader(data), ema=ema)

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Return a prompt, or each of several, with what the trained language model continues it with.

        Args:
            prompt: a text (with ``tokenizer=``), ids, or several of either.
            **options: ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``, ``seed``, ``stop``, ``context``,
                ``tokenizer``, ``ema``; see :func:`trainfn.generate`.

        Raises:
            ConfigError, DataError, ModelError: as for :func:`trainfn.generate`.

        >>> import trainfn
        >>> ids = torch.arange(12).repeat(4, 1) % 3
        >>> model = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 3))
        >>> result = trainfn.fit(model, ids, task="language_modeling", lr=0.1, max_steps=50, progress=False)
        >>> result.generate([0, 1], max_new_tokens=4, temperature=0)
        tensor([0, 1, 2, 0, 1, 2])
        """
        return generate(self._step, self.state, prompt, **options)


def best_row(rows: list[Row], retention: Retention) -> Row | None:
    """Return the row with the best monitored number; the first of several; None if none is finite."""
    scored = [row for row in rows if math.isfinite(retention.score(row))]
    return min(scored, key=retention.score, default=None)


def checkpoint_at(out_dir: str | os.PathLike[str] | None, row: Row | None) -> Path | None:
    """Return the checkpoint that was saved at a row's step, if there is one."""
    if out_dir is None or row is None:
        return None
    return next((path for path in steps(out_dir) if cursor_of(path) == row["step"]), None)
