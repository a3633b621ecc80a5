"""``TrainConfig``: every setting of ``fit`` that is plain data, as one frozen value."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import attrs

from trainfn.attention import Attention
from trainfn.errors import ConfigError, suggest
from trainfn.precision import POLICIES

_OTHER_NAMES = {  # what Lightning, Hugging Face and Keras call our settings: answered, never accepted in silence
    "accumulate_grad_batches": "accumulate",
    "max_time": "max_seconds",
    "patience": "early_stopping_patience",
    "early_stopping_min_delta": "min_delta",
    "early_stopping_threshold": "min_delta",
    "limit_val_batches": "limit_eval_batches",
    "gradient_accumulation_steps": "accumulate",
    "epochs": "max_epochs",
    "num_train_epochs": "max_epochs",
    "gradient_clip_val": "clip_norm",
    "max_grad_norm": "clip_norm",
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "num_workers": "workers",
    "dataloader_num_workers": "workers",
    "timeout": "worker_timeout",
    "default_root_dir": "out_dir",
    "output_dir": "out_dir",
    "resume_from_checkpoint": "resume",
    "ckpt_path": "resume",
    "logging_steps": "log_every",
    "log_every_n_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_last",
    "save_top_k": "keep_best",
    "metric_for_best_model": "monitor",
    "greater_is_better": 'mode="max"',
    "val_dataset": "val_data",
    "eval_dataset": "val_data",
    "callbacks": "observers",
    "compute_metrics": "metrics",
    "mixed_precision": "precision",
    "attn_implementation": "attention",
    "gradient_checkpointing": "checkpoint",
    "activation_checkpointing": "checkpoint",
    "bf16": 'precision="bf16-mixed"',
    "fp16": 'precision="16-mixed"',
}


def _at_least(least: float, kind: type | tuple[type, ...] = int) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and bool(least <= cast(float, value) < math.inf)

    return fits


def _setting(default: Any, expected: str, fits: Callable[[Any], bool], *, optional: bool = False) -> Any:
    def accepts(value: Any) -> bool:
        return (optional and value is None) or fits(value)

    text = f"{expected}, or None" if optional else expected
    return attrs.field(default=default, metadata={"expected": text, "fits": accepts})


def _one_of(default: str, *others: str) -> Any:
    words = tuple(dict.fromkeys((default, *others)))
    return _setting(default, f"one of {', '.join(map(repr, words))}", lambda value: value in words)


def _positive(value: Any) -> bool:
    return _at_least(0.0, (int, float))(value) and value > 0


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_patterns(value: Any) -> bool:
    several = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, str) for each in value)
    return isinstance(value, str) or several


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(os.fspath(value))


@attrs.frozen(kw_only=True)
class TrainConfig:
    """The settings of :func:`trainfn.fit` that are plain data. Steps are counted in batches consumed.

    Attributes:
        max_steps: stop after this many steps in all, those before a resume included.
        max_epochs: stop after this many passes over the data; whichever limit comes first.
        max_seconds: stop between two steps once the run has taken this long, the parts before a resume included. What
            is due at the end comes on top. Alone, it leaves the learning rate constant after the warm-up.
        early_stopping_patience: stop after this many evaluations in a row without a new best ``monitor``; epochs by
            their ``loss``, where nothing is evaluated. See :mod:`trainfn.limits`.
        min_delta: by how much a new best has to be better for that.
        overfit_batches: train on the first so many steps' batches, over and over in the same order, and evaluate on
            their examples: a model and a loss that can learn at all bring the loss near 0.
        limit_train_batches: end an epoch after this many steps, with the next order.
        limit_eval_batches: evaluate on the first so many batches of ``batch_size`` only.
        batch_size: examples in a micro-batch.
        accumulate: micro-batches in a step; a step sees ``batch_size * accumulate`` examples.
        lr: peak learning rate of the default optimizer: AdamW, warm-up, then a cosine to 0.
        warmup_steps: steps of warm-up; 5 % of the run and at most 100 if None.
        clip_norm: largest norm of the mean gradient; None for no clipping.
        precision: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"`` or ``"bf16-true"``; see :mod:`trainfn.precision`.
        ema: decay of a moving average of the parameters, which is then what is evaluated and returned.
        eval_every: steps between evaluations; once an epoch if None. There is always one at the end.
        log_every: steps between rows of the history.
        save_every: steps between checkpoints; only the one at the end if None. There is also one at each evaluation
            whose result is among the ``keep_best`` so far.
        save_every_minutes: minutes after which another checkpoint is due, counted from the last one.
        save_async: write checkpoints beside the training, from a copy; see :mod:`trainfn.store.saver`.
        on_save_error: ``"stop"`` the run when a checkpoint cannot be written, or ``"warn"`` and go on without it.
        keep_last: how many of the newest checkpoints to keep; None for all. The newest one whose losses were finite
            is kept in any case.
        keep_best: how many of the best checkpoints to keep besides.
        keep_every: keep the checkpoints whose step is a multiple of this for ever.
        monitor: what the best is chosen by, a name in the history; ``"val_loss"`` if None, or ``"loss"`` where nothing
            is evaluated.
        mode: whether ``"min"`` or ``"max"`` of it is best; ``"auto"`` knows for losses, errors and accuracies.
        out_dir: the run directory; nothing is written if None.
        resume: ``"auto"`` continues what is in ``out_dir`` if anything is, a path continues from there.
        seed: what the order of the data and every random draw is derived from.
        shuffle: a new order of the training data every epoch.
        drop_last: leave out the short step at the end of an epoch.
        workers: processes that fetch batches.
        check_data: look at a sample of the data before the first step, for labels and ids out of range, NaN and
            sequences that are too short; see :mod:`trainfn.task.guard`.
        worker_timeout: seconds to wait for a batch from them before the run ends with an error; None for ever.
        device: ``"auto"`` (a GPU if there is one) or a torch device.
        compile: ``"auto"``, ``"eager"``, ``"graph"``, ``"split"`` or ``"accum"``; see :func:`trainfn.compile`.
        cuda_graph: replay each step as one CUDA graph: ``"auto"`` where timed steps show that it is faster, True always
            (or it is an error); see :func:`trainfn.compile`.
        checkpoint: one or more patterns for names of modules, such as ``"blocks.*"``, whose activations are recomputed
            in the backward: less memory, more time, the same numbers; see :mod:`trainfn.recompute`.
        attention: the kernel that ``scaled_dot_product_attention`` runs by: ``"auto"``, ``"flash"``, ``"efficient"``,
            ``"math"`` or ``"cudnn"``; see :mod:`trainfn.attention`. The run header says which one it is.
        halt_after: stop the run after this many steps in a row with non-finite numbers.
        on_divergence: what to do where the run has to stop: ``"halt"``, or ``"rollback"`` to the last healthy
            checkpoint in ``out_dir`` and go on without the batches since; see :mod:`trainfn.rollback`.
        max_rollbacks: how often, resumed parts of the run included, before it stops after all.
        on_spike: what to do about a loss or gradient norm far above its recent past: ``"warn"``, ``"skip"`` the step,
            ``"halt"`` the run, or ``"off"``; see :mod:`trainfn.health`.
        health_every: steps between rows with the gradient norm of each tensor, and which of them vanish (below 1e-7),
            explode (above 10) or are dead (0); never if None.
        noise_scale_every: steps between estimates of the gradient noise scale, in examples, each of which costs a
            gradient per example of one micro-batch; never if None. See :mod:`trainfn.per_sample`.
        peak_flops: operations a second that the device can do at most in this precision: the history then has the share
            of it that is used, as ``mfu``. Known for some GPUs; to count a step's operations takes a micro-batch.
        progress: show the run header and a progress bar, or plain lines where there is no terminal.
        fast_dev_run: two eager steps, two evaluation batches, nothing written: does it run at all?
    """

    max_steps: int | None = _setting(None, "an int >= 1", _at_least(1), optional=True)
    max_epochs: int | None = _setting(None, "an int >= 1", _at_least(1), optional=True)
    max_seconds: float | None = _setting(None, "a number > 0", _positive, optional=True)
    early_stopping_patience: int | None = _setting(None, "an int >= 1", _at_least(1), optional=True)
    min_delta: float = _setting(0.0, "a number >= 0", _at_least(0.0, (int, float)))
    overfit_batches: int | None = _setting(None, "an int >= 1", _at_least(1), optional=True)
    limit_train_batches: int | None = _setting(None, "an int >= 1", _at_least(1), optional=True)
    limit_eval_batches: int | None = _setting(None, "an int >= 1", _at_least(1), optional=True)
    batch_size: int = _setting(32, "an int >= 1", _at_least(1))
    accumulate: int = _setting(1, "an int >= 1", _at_least(1))
    lr: float = _setting(1e-3, "a number > 0", _positive)
    warmup_steps: int | None = _setting(None, "an int >= 0", _at_least(0), optional=True)
    clip_norm: float | None = _setting(1.0, "a number > 0", _positive, optional=True)
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = _one_of("32-true", *POLICIES)
    ema: float | None = _setting(
        None, "a number in [0, 1)", lambda v: _at_least(0.0, (int, float))(v) and v < 1, optional=True
    )
    eval_every: int | None = _setting(None, "an int >= 1", _at_least(1), optional=True)
    log_every: int = _setting(10, "an int >= 1", _at_least(1))
    save_every: int | None = _setting(1000, "an int >= 1", _at_least(1), optional=True)
    save_every_minutes: float | None = _setting(None, "a number > 0", _positive, optional=True)
    save_async: bool = _setting(True, "a bool", _is_bool)
    on_save_error: Literal["stop", "warn"] = _one_of("stop", "warn")
    keep_last: int | None = _setting(2, "an int >= 1", _at_least(1), optional=True)
    keep_best: int = _setting(1, "an int >= 0", _at_least(0))
    keep_every: int | None = _setting(None, "an int >= 1", _at_least(1), optional=True)
    monitor: str | None = _setting(None, "a name", lambda v: isinstance(v, str), optional=True)
    mode: Literal["auto", "min", "max"] = _one_of("auto", "min", "max")
    out_dir: str | os.PathLike[str] | None = _setting(None, "a path", _is_path, optional=True)
    resume: str | os.PathLike[str] | None = _setting(None, '"auto" or a path', _is_path, optional=True)
    seed: int = _setting(0, "an int in [0, 2**63)", lambda v: _at_least(0)(v) and v < 2**63)
    shuffle: bool = _setting(True, "a bool", _is_bool)
    drop_last: bool = _setting(False, "a bool", _is_bool)
    workers: int = _setting(0, "an int >= 0", _at_least(0))
    check_data: bool = _setting(True, "a bool", _is_bool)
    worker_timeout: float | None = _setting(None, "a number > 0", _positive, optional=True)
    device: str = _setting("auto", '"auto" or the name of a device', lambda v: isinstance(v, str))
    compile: Literal["auto", "eager", "graph", "split", "accum"] = _one_of("auto", "eager", "graph", "split", "accum")
    cuda_graph: Literal["auto"] | bool = _setting(False, '"auto" or a bool', lambda v: v == "auto" or _is_bool(v))
    checkpoint: str | Sequence[str] | None = _setting(
        None, "a pattern for names of modules, or several", _is_patterns, optional=True
    )
    attention: Attention = _one_of(*get_args(Attention))
    halt_after: int = _setting(3, "an int >= 1", _at_least(1))
    on_divergence: Literal["halt", "rollback"] = _one_of("halt", "rollback")
    max_rollbacks: int = _setting(3, "an int >= 1", _at_least(1))
    on_spike: Literal["off", "warn", "skip", "halt"] = _one_of("warn", "off", "skip", "halt")
    health_every: int | None = _setting(100, "an int >= 1", _at_least(1), optional=True)
    noise_scale_every: int | None = _setting(None, "an int >= 1", _at_least(1), optional=True)
    peak_flops: float | None = _setting(None, "a number > 0", _positive, optional=True)
    progress: bool = _setting(True, "a bool", _is_bool)
    fast_dev_run: bool = _setting(False, "a bool", _is_bool)

    def __attrs_post_init__(self) -> None:
        wrong = [
            f"{field.name}={getattr(self, field.name)!r} (expected {field.metadata['expected']})"
            for field in attrs.fields(type(self))
            if not field.metadata["fits"](getattr(self, field.name))
        ]
        if self.max_steps is None and self.max_epochs is None and self.max_seconds is None:
            wrong.append("max_steps, max_epochs and max_seconds all missing: say how long to train")
        if self.min_delta and self.early_stopping_patience is None:
            wrong.append("min_delta without early_stopping_patience: nothing is compared with it")
        if self.overfit_batches is not None and self.limit_train_batches is not None:
            wrong.append("overfit_batches and limit_train_batches: both say which batches to train on")
        if self.resume == "auto" and self.out_dir is None:
            wrong.append('resume="auto" without out_dir: there is nowhere to look')
        if self.on_divergence == "rollback" and self.out_dir is None and not self.fast_dev_run:
            wrong.append('on_divergence="rollback" without out_dir: there are no checkpoints to go back to')
        if wrong:
            raise ConfigError("The settings cannot be used.", got="\n    ".join(["", *wrong]))

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object.

        >>> TrainConfig(max_steps=10).to_json()["batch_size"]
        32
        """
        raw = attrs.asdict(self)
        return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in raw.items()}


def make_config(settings: Mapping[str, Any], *, also: tuple[str, ...] = ()) -> TrainConfig:
    """Return the configuration that keyword arguments describe.

    Args:
        settings: keyword arguments.
        also: other names that the caller takes, for suggestions.

    Raises:
        ConfigError: unknown names, each with the nearest right one; or values that cannot be used, all together.

    >>> make_config({"max_steps": 10, "learning_rate": 1e-3})
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: There is no such setting.
      got: learning_rate (here it is called 'lr')
    """
    known = [field.name for field in attrs.fields(TrainConfig)]
    unknown = [name for name in settings if name not in known]
    if unknown:

        def answer(name: str) -> str:
            if name in _OTHER_NAMES:
                return f"{name} (here it is called {_OTHER_NAMES[name]!r})"
            return f"{name} ({suggest(name, [*known, *also])})"

        raise ConfigError("There is no such setting.", got="; ".join(answer(name) for name in unknown))
    return TrainConfig(**settings)
