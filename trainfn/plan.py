"""``plan``: everything that is decided before a run's first step, and every mistake that can be found by then."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from trainfn.batch import Batch
from trainfn.data import Feed, Loader, make_feed, to_device
from trainfn.directory import POSITION, check_writable, machine, make_retention, resume, write_config
from trainfn.engine import CompiledStep, compile
from trainfn.errors import ConfigError
from trainfn.flops import Roofline, make_roofline
from trainfn.limits import Patience, make_patience, seconds_of, why_over
from trainfn.loss import Loss
from trainfn.metric import Metric, resolve
from trainfn.optim import Transform, adamw, matrices_only, warmup_constant, warmup_cosine
from trainfn.precision import check_precision
from trainfn.predict import Reader
from trainfn.state import TrainState, init
from trainfn.step import make_step
from trainfn.store import Manifest, Retention, clean, writing
from trainfn.task import Intake, TaskSpec, TrainConfig, take_in
from trainfn.task.config import given_settings, make_config
from trainfn.tree import evolve
from trainfn.trial import first_loss

WITHOUT_END = 2**62
"""The number of steps of a run that no number of steps ends."""

_LEAST_SECONDS = 600.0  # heuristic: a run that may end sooner does not earn back its compilation
_ARGUMENTS = ("loss", "task", "val_data", "metrics", "optimizer", "collate", "observers", "on_signal", "config")


@attrs.frozen(kw_only=True, eq=False)
class Plan:
    """A run, decided but not begun. Made by :func:`plan`, carried out by :func:`trainfn.run`.

    Attributes:
        config: the settings, those that were given and those that were filled in.
        model: the module that is trained; its own tensors are not touched.
        optimizer: the Transform in use.
        step: the step in use; it donates.
        state: where the run starts.
        loader: the training data; batch number ``state.cursor`` comes next.
        val_loaders: the evaluation data, by what the columns of each set begin with: ``{"val": ...}`` for one set,
            ``{"val_clean": ..., "val_noisy": ...}`` for several.
        metrics: what is measured on it besides the loss.
        stop: the run ends when the cursor is here.
        device: where the state is.
        counted: the loss's weight of the first micro-batch (tokens, labels, examples).
        resumed_from: the checkpoint's directory, or None for a fresh start.
        previous: that checkpoint's manifest, or None.
        task: what kind of problem it is, or None if that was not said.
        record: what every checkpoint of this run says about it.
        retention: which checkpoints are kept, and what the best one is.
        reader: how data is read that is to be predicted of.
        kernels: which kernels of attention the first forward has called, and how often; see :mod:`trainfn.attention`.
        patience: how long it has waited for a better one where it starts.
        roofline: what a step has to do, against what the device can do; None if that is not known.
    """

    config: TrainConfig
    model: nn.Module
    optimizer: Transform
    step: CompiledStep
    state: TrainState
    loader: Feed
    val_loaders: dict[str, Feed]
    metrics: tuple[Metric, ...]
    stop: int
    device: torch.device
    counted: float
    resumed_from: Path | None
    previous: Manifest | None
    task: TaskSpec | None
    record: dict[str, Any]
    retention: Retention
    reader: Reader
    kernels: dict[str, int]
    patience: Patience
    roofline: Roofline | None

    @property
    def of_stop(self) -> str:
        """The words ``" of 100"`` after a number of steps; none where only the clock ends the run."""
        return f" of {self.stop}" if self.stop < WITHOUT_END else ""

    @property
    def is_short(self) -> bool:
        """Whether the run may be over before its compilation has been earned back."""
        return _is_short(self.config)

    @property
    def over_by(self) -> str | None:
        """The setting that the run is over by where it starts; None if there are steps to take."""
        seconds = 0.0 if self.previous is None else seconds_of(self.previous.metrics)
        return why_over(self.config, self.patience, cursor=self.state.cursor, stop=self.stop, seconds=seconds)

    def to_device(self, batch: Batch) -> Batch:
        """Return the batch with its tensors on the run's device."""
        return to_device(batch, self.device)

    def position(self, cursor: int) -> dict[str, Any]:
        """Return where the data are, as a field of a checkpoint's settings; nothing where the number says it."""
        found = self.loader.position(cursor)
        return {POSITION: found} if found else {}


def plan(
    model: nn.Module,
    data: object,
    *,
    loss: str | Loss | None = None,
    task: str | TaskSpec | None = None,
    val_data: object = None,
    metrics: Sequence[str | Metric] = (),
    optimizer: Transform | None = None,
    collate: str | Callable[[list[Any]], Batch] | None = None,
    config: TrainConfig | str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Plan:
    """Decide everything about a run and check what can be checked, one batch through model and loss included.

    Args: as for :func:`trainfn.fit`.

    Raises:
        ConfigError: settings that are unknown, out of range, or contradict each other; an unusable ``out_dir``.
        CompileError: ``cuda_graph=True`` without a GPU.
        DataError, ModelError: data, model and loss do not go together.
        StepMemoryError: the first micro-batch does not fit into memory.
        CheckpointError: there is a checkpoint, and it cannot be continued from.

    >>> made = plan(nn.Linear(2, 2), (torch.ones(8, 2), torch.zeros(8, dtype=torch.long)),
    ...             loss="classification", max_epochs=3, batch_size=4, device="cpu")
    >>> made.stop, made.state.cursor
    (6, 0)
    """
    given = (loss, task, val_data, metrics, optimizer, collate)
    return decide(contextlib.ExitStack(), model, data, *given, locks=False, settings=given_settings(config, settings))


def decide(
    held: contextlib.ExitStack,
    model: nn.Module,
    data: object,
    loss: str | Loss | None,
    task: str | TaskSpec | None,
    val_data: object,
    metrics: Sequence[str | Metric],
    optimizer: Transform | None,
    collate: str | Callable[[list[Any]], Batch] | None,
    *,
    locks: bool = True,
    settings: dict[str, Any],
) -> Plan:
    """Return the plan; what the run holds from then on (its directory's lock, if ``locks``) is put into ``held``."""
    taken = take_in(
        make_config(settings, also=_ARGUMENTS),
        settings,
        data=data,
        val_data=val_data,
        collate=collate,
        loss=loss,
        metrics=metrics,
        task=task,
    )
    config, loss, val_data, metrics = taken.config, taken.loss, taken.val_data, taken.metrics
    asked = config
    if config.fast_dev_run:
        few: dict[str, Any] = {"max_steps": 2, "limit_eval_batches": 2, "log_every": 1}
        config = attrs.evolve(config, **few, out_dir=None, resume=None, compile="eager")
    if optimizer is not None and not {"lr", "warmup_steps"}.isdisjoint(settings):
        raise ConfigError(
            "The learning rate is given twice.",
            got=f"optimizer={optimizer.name} and lr or warmup_steps",
            hint="leave out lr and warmup_steps: they are settings of the default optimizer",
        )
    if config.eval_every is not None and not val_data and config.overfit_batches is None:
        raise ConfigError(
            "There is nothing to evaluate on.", got=f"eval_every={config.eval_every}", hint="pass val_data="
        )
    if config.overfit_batches is not None:
        val_data = {"val": (taken.data, taken.collate)}  # what is trained on
    measured = _metrics(metrics, loss, val_data)
    retention = make_retention(config, [metric.name for metric in measured], list(val_data))
    device = _device(config.device)
    loader, val_loaders = _loaders(config, taken, device)
    stop = _stop(config, loader)
    if optimizer is None:
        optimizer = adamw(lr=_default_schedule(asked, _stop(asked, loader)), decay=matrices_only)
    step = make_step(
        model,
        loss=loss,
        optimizer=optimizer,
        accumulate=config.accumulate,
        clip_norm=config.clip_norm,
        ema=config.ema,
        precision=config.precision,
        on_spike=config.on_spike,
        halt_after=config.halt_after,
        checkpoint=config.checkpoint,
        attention=config.attention,
    )
    state = init(
        model, optimizer, seed=config.seed, ema=config.ema is not None, precision=config.precision, device=device
    )
    if config.rollback_lr_factor != 1:
        state = evolve(state, lr_factor=torch.ones_like(state.report.lr))
    check_precision(model, config.precision)
    looked_at = {"data": loader} | {name.replace("val", "val_data", 1): each for name, each in val_loaders.items()}
    batch = to_device(loader.batch(0), device)
    first, kernels = first_loss(step, state, batch, looked_at if config.check_data else {})
    record: dict[str, Any] = {
        "config": config.to_json()
        | {"loss": taken.loss_name or _name(loss), "stop": stop}
        | ({} if taken.task is None else {"task": taken.task.to_json()})
        | machine(device),
        "optimizer": optimizer.name,
        "data": loader.fingerprint(),
        "tied": _tied(model),
    }
    check_writable(config.out_dir)
    if config.out_dir is not None and locks:
        held.enter_context(writing(config.out_dir))
        clean(config.out_dir)
    if config.out_dir is not None:
        loader.check_position()
    state, resumed_from, manifest = resume(config, state, record)
    if manifest is not None and state.cursor < stop:
        loader.seek(state.cursor, manifest.config.get(POSITION, {}))
    if config.out_dir is not None and locks:
        write_config(config)
    has_epochs = loader.batches_per_epoch < WITHOUT_END
    patience = make_patience(config, retention, {} if manifest is None else manifest.metrics, epochs=has_epochs)
    steps = 0 if _is_short(config) else stop
    compiled = compile(step, mode=_mode(config, manifest), donate=True, cuda_graph=config.cuda_graph, steps=steps)
    if config.cuda_graph is True:
        compiled.settle(state)  # raises where there can be none
    return Plan(
        config=config,
        model=model,
        optimizer=optimizer,
        step=compiled,
        state=state,
        loader=loader,
        val_loaders=val_loaders,
        metrics=measured,
        stop=stop,
        device=device,
        counted=float(first.weight),
        resumed_from=resumed_from,
        previous=manifest,
        task=taken.task,
        record=record,
        retention=retention,
        kernels=kernels,
        reader=Reader(
            collate=taken.ask_collate, columns=getattr(taken.data, "columns", None), batch_size=config.batch_size
        ),
        patience=patience,
        roofline=make_roofline(step, state, batch, config.peak_flops),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds shapes and no numbers")
        return device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "The device cannot be used.", got=f"device={name!r} ({str(error).splitlines()[0]})", hint='device="auto"'
        ) from error


def _loaders(config: TrainConfig, taken: Intake, device: torch.device) -> tuple[Feed, dict[str, Feed]]:
    """Return what is trained on, and what is evaluated on; where the settings say so, only so many batches of it."""
    pin, few = device.type == "cuda", config.overfit_batches
    loader = make_feed(
        taken.data,
        batch_size=config.batch_size * config.accumulate,
        seed=config.seed,
        shuffle=config.shuffle and few is None,
        drop_last=config.drop_last,
        workers=config.workers,
        timeout=config.worker_timeout,
        pin=pin,
        collate=taken.collate,
        group_by_length=config.group_by_length,
        keep=config.log_every if pin else 1,  # on a GPU it is seen at a row that a run has to halt
    )
    loader.batches_per_epoch = min(loader.batches_per_epoch, few or config.limit_train_batches or WITHOUT_END)
    if few is not None and isinstance(loader, Loader):
        loader.restarts = True  # of a function, too: its first batches over and over

    def evaluated(data: Any, collate: Any, limit: int | None) -> Feed:
        found = make_feed(
            data,
            batch_size=config.batch_size,
            shuffle=False,
            workers=config.workers,
            timeout=config.worker_timeout,
            pin=pin,
            collate=collate,
        )
        found.batches_per_epoch = min(found.batches_per_epoch, limit or WITHOUT_END)
        return found

    if few is not None:
        parts = 1 if loader.endless else config.accumulate
        return loader, {"val": evaluated(taken.data, taken.collate, few * parts)}
    limit = config.limit_eval_batches
    return loader, {name: evaluated(*each, limit) for name, each in taken.val_data.items()}


def _is_short(config: TrainConfig) -> bool:
    return (config.max_seconds or math.inf) < _LEAST_SECONDS


def _stop(config: TrainConfig, loader: Feed) -> int:
    return min(config.max_steps or WITHOUT_END, (config.max_epochs or WITHOUT_END) * loader.batches_per_epoch)


def _default_schedule(config: TrainConfig, stop: int) -> Any:
    if stop >= WITHOUT_END:
        return warmup_constant(config.lr, warmup=100 if config.warmup_steps is None else config.warmup_steps)
    warmup = min(100, stop // 20) if config.warmup_steps is None else config.warmup_steps
    if warmup >= stop:
        raise ConfigError(
            "The warm-up does not fit into the run.",
            expected=f"warmup_steps < {stop}, the number of steps",
            got=f"warmup_steps={warmup}",
        )
    return warmup_cosine(config.lr, warmup=warmup, total=stop)


def _metrics(metrics: Sequence[str | Metric], loss: str | Loss, val_data: object) -> tuple[Metric, ...]:
    chosen = [metrics] if isinstance(metrics, (str, Metric)) else list(metrics)
    if chosen and not val_data:
        raise ConfigError("There are metrics, and no data to measure them on.", hint="pass val_data=")
    found = tuple(resolve(metric, loss) for metric in chosen)
    names = [metric.name for metric in found]
    if len({"loss", *names}) <= len(names):
        raise ConfigError("Metrics need names of their own.", expected="each one once, none called loss", got=names)
    return found


def _mode(config: TrainConfig, manifest: Manifest | None) -> Any:
    """A run keeps the mode it was begun in: another one would be right, but not bit for bit the same."""
    if config.compile == "auto" and manifest is not None:
        mode = manifest.config.get("compile_mode", "auto")
        return "auto" if config.checkpoint and mode in ("graph", "accum") else mode  # those do not recompute
    return config.compile


def _tied(model: nn.Module) -> dict[str, list[str]]:
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in first:
            tied.setdefault(first[id(param)], []).append(name)
        else:
            first[id(param)] = name
    return tied


def _name(fn: object) -> str:
    return getattr(fn, "__qualname__", type(fn).__qualname__)
