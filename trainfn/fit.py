"""``fit``: observers over ``run``, which is the fold of a step over batches."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from trainfn.batch import Batch
from trainfn.data import Loader
from trainfn.engine import CompiledStep
from trainfn.errors import DivergenceError
from trainfn.health import Verdict
from trainfn.loss import Loss
from trainfn.observers import Observer, Progress, Recorder, Row
from trainfn.optim import Transform
from trainfn.optim.transform import wide
from trainfn.plan import Plan, plan, to_device
from trainfn.state import TrainState
from trainfn.step import Step
from trainfn.store import save
from trainfn.task import TrainConfig


@attrs.frozen(kw_only=True, eq=False)
class FitResult:
    """What a run leaves behind.

    Attributes:
        state: the last state.
        history: rows by step; see :data:`trainfn.observers.Row`.
        best: the row with the lowest ``val_loss`` (``loss`` without evaluation data), or None if there is no such row.
        checkpoint: the directory of the last checkpoint, or None without ``out_dir``.
        seconds: wall time of this call.
    """

    state: TrainState
    history: list[Row]
    best: Row | None
    checkpoint: Path | None
    seconds: float
    _model: nn.Module = attrs.field(alias="_model", repr=False)

    def model(self, *, ema: bool | None = None) -> nn.Module:
        """Write the trained weights and buffers into the module that was given to ``fit``; return it, set to evaluate.

        Args:
            ema: take the moving average of the parameters; if None, whenever the run kept one.
        """
        averaged = self.state.ema or {}
        values = self.state.params | (averaged if ema is None or ema else {}) | self.state.buffers
        with torch.no_grad():
            for name, tensor in [*self._model.named_parameters(), *self._model.named_buffers()]:
                tensor.copy_(values[name])
        return self._model.eval()


def fit(
    model: nn.Module,
    data: object,
    *,
    loss: str | Loss,
    val_data: object = None,
    optimizer: Transform | None = None,
    collate: Callable[[list[Any]], Batch] | None = None,
    observers: Sequence[Observer] = (),
    **settings: Any,
) -> FitResult:
    """Train a model.

    Everything is decided and checked first and said in the run header. Then the step is folded over the data; a step
    with a non-finite loss or gradient changes nothing, and ``halt_after`` of them in a row end the run. With
    ``out_dir`` there are a history, flushed as it goes, and checkpoints to resume from, bit for bit.

    Args:
        model: any module. Its own tensors are not changed; ``result.model()`` writes the trained ones into it.
        data: a tensor, a tuple of tensors ``(inputs, target)``, a dict of tensors, or a map-style data set.
        loss: a registered name, or a function ``loss(outputs, batch)`` that returns a ``LossSum`` or a mean.
        val_data: data to evaluate on, with the same loss and weighting.
        optimizer: a Transform; if None, AdamW that spares norms and biases its decay, with warm-up and a cosine to 0.
        collate: makes a batch of a list of a data set's items.
        observers: functions called with the state after every step.
        **settings: the fields of :class:`trainfn.TrainConfig`; ``max_steps`` or ``max_epochs`` is needed.

    Returns:
        The last state, the history, the best row, the last checkpoint's path.

    Raises:
        ConfigError, DataError, ModelError, CheckpointError: before the first step; see :func:`trainfn.plan`.
        DivergenceError: too many steps in a row gave non-finite numbers. The last good state is saved first.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(64, 2)
    >>> result = fit(nn.Linear(2, 2), (x, (x[:, 0] > 0).long()), loss="classification", lr=0.1, batch_size=16,
    ...              max_steps=100, progress=False, device="cpu")
    >>> result.history[-1]["loss"] < 0.2
    True
    """
    planned = plan(model, data, loss=loss, val_data=val_data, optimizer=optimizer, collate=collate, **settings)
    return carry_out(planned, observers)


def carry_out(planned: Plan, observers: Sequence[Observer] = ()) -> FitResult:
    """Run a plan to its end, recording, showing, evaluating and saving on the way; what ``fit`` does after ``plan``."""
    began = time.perf_counter()
    state, config = planned.state, planned.config
    recorder, progress = Recorder(planned), Progress(planned)
    checkpoint = planned.resumed_from
    last = {"val_loss": math.nan}

    def keep(state: TrainState) -> Path | None:
        if config.out_dir is None:
            return None
        metrics = {name: value for name, value in recorder.rows[-1].items() if isinstance(value, (int, float))}
        record = planned.record | {"config": planned.record["config"] | {"compile_mode": planned.step.mode}}
        return save(state, config.out_dir, metrics=metrics, **record)

    for state in run(planned):
        recorder.step(state)
        progress.step(state)
        for observer in observers:
            observer(state)
        due = _due(planned, state.cursor)
        if _must_halt(planned, state, due):
            recorder.row(state, {})
            raise _divergence(planned, state, keep(state))
        if due.row:
            metrics = _evaluate(planned, state) if due.evaluation else {}
            last |= metrics
            progress.row(recorder.row(state, metrics))
        if due.checkpoint:
            checkpoint = keep(state)
    seconds = time.perf_counter() - began
    progress.end(_ending(planned, state, seconds, last["val_loss"], checkpoint))
    return FitResult(
        state=state,
        history=recorder.rows,
        best=_best(recorder.rows),
        checkpoint=checkpoint,
        seconds=seconds,
        _model=planned.model,
    )


def run(planned: Plan) -> Iterator[TrainState]:
    """Yield the state after each step of a plan: the fold itself, without history, evaluation or checkpoints.

    A state may be used until the next one is asked for: the step that makes it writes into the memory of the last.

    >>> x, y = torch.ones(8, 2), torch.zeros(8, dtype=torch.long)
    >>> made = plan(nn.Linear(2, 2), (x, y), loss="classification", max_steps=3, device="cpu")
    >>> [int(state.step) for state in run(made)]
    [1, 2, 3]
    """
    state = planned.state
    batches = planned.loader.batches(state.cursor, max(planned.stop, state.cursor))
    try:
        for batch in batches:
            state = planned.step(state, planned.to_device(batch))
            yield state
    finally:
        batches.close()


def evaluate(
    step: Step | CompiledStep,
    state: TrainState,
    data: object,
    *,
    batch_size: int = 32,
    collate: Callable[[list[Any]], Batch] | None = None,
    ema: bool = False,
) -> dict[str, float]:
    """Return the loss over a data set: one sum over all of it, divided once by one weight.

    In evaluation mode and without gradients; the module's modes and the global random generators are as before.

    Args:
        step: what the state is trained with; its model and loss are used.
        state: read, not changed.
        data: anything that ``fit`` takes, or a :class:`trainfn.data.Loader`.
        batch_size: examples at a time. Changes memory, not meaning.
        collate: as for ``fit``.
        ema: use the moving average of the parameters.

    Returns:
        ``{"loss": ..., "weight": ...}``; the loss is NaN when nothing counted.

    >>> import trainfn
    >>> model, optimizer = nn.Linear(2, 2), trainfn.optim.sgd(lr=0.1)
    >>> step = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    >>> state = trainfn.init(model, optimizer)
    >>> evaluate(step, state, (torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)), batch_size=2)["weight"]
    5.0
    """
    loader = data if isinstance(data, Loader) else Loader(data, batch_size=batch_size, shuffle=False, collate=collate)
    return _mean_loss(step, state, loader, loader.batches_per_epoch, ema=ema)


@attrs.frozen
class _Due:
    evaluation: bool
    checkpoint: bool
    row: bool


def _due(planned: Plan, cursor: int) -> _Due:
    config, end = planned.config, cursor >= planned.stop
    evaluation = planned.val_loader is not None and (
        end or cursor % (config.eval_every or planned.loader.batches_per_epoch) == 0
    )
    checkpoint = config.out_dir is not None and (
        end or (config.save_every is not None and cursor % config.save_every == 0)
    )
    # A checkpoint closes a row, so that a run that resumes from it writes the rows it would have written anyway.
    return _Due(evaluation, checkpoint, evaluation or checkpoint or end or cursor % config.log_every == 0)


def _evaluate(planned: Plan, state: TrainState) -> dict[str, float]:
    assert planned.val_loader is not None
    limit = 2 if planned.config.fast_dev_run else planned.val_loader.batches_per_epoch
    found = _mean_loss(planned.step, state, planned.val_loader, limit, ema=state.ema is not None)
    return {"val_loss": found["loss"]}


def _mean_loss(
    step: Step | CompiledStep, state: TrainState, loader: Loader, limit: int, *, ema: bool
) -> dict[str, float]:
    total = weight = wide(torch.zeros((), device=state.step.device))
    for batch in loader.batches(0, min(limit, loader.batches_per_epoch)):
        found = step.evaluate(state, to_device(batch, state.step.device), params=state.ema if ema else None)
        total, weight = total + found.total, weight + found.weight
    return {"loss": float(total / weight), "weight": float(weight)}


def _must_halt(planned: Plan, state: TrainState, due: _Due) -> bool:
    # Reading the streak is free on a CPU and a sync on a GPU, where it waits for the next row. Nothing is lost by
    # that: the device has refused the bad steps already.
    return (planned.device.type == "cpu" or due.row) and int(state.health.streak) >= planned.config.halt_after


def _divergence(planned: Plan, state: TrainState, checkpoint: Path | None) -> DivergenceError:
    kept = f"it is saved in {checkpoint}" if checkpoint else "pass out_dir= to have it saved"
    return DivergenceError(
        f"Training was halted: {int(state.health.streak)} steps in a row gave non-finite numbers.",
        where=f"step {state.cursor}, examples {planned.loader.indices(state.cursor - 1).tolist()}",
        got=f"in the last one {Verdict(int(state.report.verdict)).sentence}",
        hint=f"look for NaN in these examples; lower lr; lower clip_norm. The state before them is intact: {kept}",
    )


def _best(rows: list[Row]) -> Row | None:
    for name in ("val_loss", "loss"):
        finite = [row for row in rows if math.isfinite(row.get(name, math.nan))]
        if finite:
            return min(finite, key=lambda row: float(row[name]))
    return None


def _ending(planned: Plan, state: TrainState, seconds: float, val_loss: float, checkpoint: Path | None) -> str:
    parts = [f"done: step {state.cursor} of {planned.stop}, {seconds:.1f} s"]
    if planned.step.compiles:
        parts[0] += f" ({planned.step.compile_seconds:.1f} s of it compiling)"
    if math.isfinite(val_loss):
        parts.append(f"val_loss {val_loss:.4f}")
    if checkpoint is not None:
        parts.append(f"checkpoint {checkpoint}")
    return ", ".join(parts)


def _show_settings() -> None:
    """Let ``help(fit)`` and completion list the settings, which are written down once, in TrainConfig."""
    functions: tuple[Any, ...] = (fit, plan)
    for function in functions:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        settings = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in attrs.fields(TrainConfig)
        ]
        function.__signature__ = signature.replace(parameters=[*kept, *settings])


_show_settings()
