"""``TrainConfig``: every setting of ``fit`` that is plain data, as one frozen value."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import attrs

from trainfn.attention import Attention
from trainfn.errors import ConfigError
from trainfn.precision import POLICIES
from trainfn.task.difference import ConfigDiff, compare
from trainfn.task.files import Filed
from trainfn.task.names import answer, renamed
from trainfn.task.presets import PRESETS, preset
from trainfn.task.settings import (
    as_path,
    as_patterns,
    at_least,
    is_bool,
    is_number,
    is_path,
    is_patterns,
    is_word,
    mistake,
    one_of,
    positive,
    setting,
)
from trainfn.task.written import Form, Migration

OF_THE_RECORD = frozenset({"stop", "threads", "hardware", "compile_mode", "rollbacks", "position"})
"""What the record of a run says besides its settings, and what is told elsewhere."""

OF_WHOLE_RUNS = (
    *("max_steps", "max_epochs", "out_dir", "resume", "fast_dev_run"),
    *("on_divergence", "rollback_lr_factor", "max_rollbacks"),
    *("eval_every", "monitor", "early_stopping_patience", "min_delta"),
)
"""What has no meaning for a few steps that are taken to find something out, and would be a mistake for some of them."""


@attrs.frozen(kw_only=True)
class TrainConfig(Filed):
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
        limit_train_batches: end an epoch after this many steps; the next one has the next order, and of a function of
            batches the next ones.
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
        group_by_length: put examples of like length in one batch, so that less of it is padding; each is looked at once
            before the run.
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
        rollback_lr_factor: what the learning rate is multiplied by each time, in (0, 1].
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

    max_steps: int | None = setting(None, "an int >= 1", at_least(1), optional=True, bits=False)
    max_epochs: int | None = setting(None, "an int >= 1", at_least(1), optional=True, bits=False)
    max_seconds: float | None = setting(None, "a number > 0", positive, optional=True, bits=False)
    early_stopping_patience: int | None = setting(None, "an int >= 1", at_least(1), optional=True, bits=False)
    min_delta: float = setting(0.0, "a number >= 0", at_least(0.0, (int, float)), bits=False)
    overfit_batches: int | None = setting(None, "an int >= 1", at_least(1), optional=True)
    limit_train_batches: int | None = setting(None, "an int >= 1", at_least(1), optional=True)
    limit_eval_batches: int | None = setting(None, "an int >= 1", at_least(1), optional=True, bits=False)
    batch_size: int = setting(32, "an int >= 1", at_least(1))
    accumulate: int = setting(1, "an int >= 1", at_least(1))
    lr: float = setting(1e-3, "a number > 0", positive)
    warmup_steps: int | None = setting(None, "an int >= 0", at_least(0), optional=True)
    clip_norm: float | None = setting(1.0, "a number > 0", positive, optional=True)
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = one_of("32-true", *POLICIES)
    ema: float | None = setting(None, "a number in [0, 1)", lambda v: is_number(v) and 0 <= v < 1, optional=True)
    eval_every: int | None = setting(None, "an int >= 1", at_least(1), optional=True, bits=False)
    log_every: int = setting(10, "an int >= 1", at_least(1), bits=False)
    save_every: int | None = setting(1000, "an int >= 1", at_least(1), optional=True, bits=False)
    save_every_minutes: float | None = setting(None, "a number > 0", positive, optional=True, bits=False)
    save_async: bool = setting(True, "a bool", is_bool, bits=False, volatile=True)
    on_save_error: Literal["stop", "warn"] = one_of("stop", "warn", bits=False)
    keep_last: int | None = setting(2, "an int >= 1", at_least(1), optional=True, bits=False)
    keep_best: int = setting(1, "an int >= 0", at_least(0), bits=False)
    keep_every: int | None = setting(None, "an int >= 1", at_least(1), optional=True, bits=False)
    monitor: str | None = setting(None, "a name", lambda v: isinstance(v, str), optional=True, bits=False)
    mode: Literal["auto", "min", "max"] = one_of("auto", "min", "max", bits=False)
    out_dir: str | os.PathLike[str] | None = setting(
        None, "a path", is_path, optional=True, convert=as_path, bits=False, volatile=True
    )
    resume: str | os.PathLike[str] | None = setting(
        None, '"auto" or a path', is_path, optional=True, convert=as_path, bits=False, volatile=True
    )
    seed: int = setting(0, "an int in [0, 2**63)", lambda v: at_least(0)(v) and v < 2**63)
    shuffle: bool = setting(True, "a bool", is_bool)
    group_by_length: bool = setting(False, "a bool", is_bool)
    drop_last: bool = setting(False, "a bool", is_bool)
    workers: int = setting(0, "an int >= 0", at_least(0), bits=False, volatile=True)
    check_data: bool = setting(True, "a bool", is_bool, bits=False)
    worker_timeout: float | None = setting(None, "a number > 0", positive, optional=True, bits=False, volatile=True)
    device: str = setting("auto", '"auto" or the name of a device', lambda v: isinstance(v, str), volatile=True)
    compile: Literal["auto", "eager", "graph", "split", "accum"] = one_of("auto", "eager", "graph", "split", "accum")
    cuda_graph: Literal["auto"] | bool = setting(
        False,
        '"auto" or a bool',
        lambda v: is_bool(v) or is_word(v, "auto"),
        bits=False,
        volatile=True,
    )
    checkpoint: str | tuple[str, ...] | None = setting(
        None, "a pattern for names of modules, or several", is_patterns, optional=True, convert=as_patterns
    )
    attention: Attention = one_of(*get_args(Attention))
    halt_after: int = setting(3, "an int >= 1", at_least(1))
    on_divergence: Literal["halt", "rollback"] = one_of("halt", "rollback", bits=False)
    max_rollbacks: int = setting(3, "an int >= 1", at_least(1), bits=False)
    rollback_lr_factor: float = setting(1.0, "a number in (0, 1]", lambda v: positive(v) and v <= 1, bits=False)
    on_spike: Literal["off", "warn", "skip", "halt"] = one_of("warn", "off", "skip", "halt")
    health_every: int | None = setting(100, "an int >= 1", at_least(1), optional=True, bits=False)
    noise_scale_every: int | None = setting(None, "an int >= 1", at_least(1), optional=True, bits=False)
    peak_flops: float | None = setting(None, "a number > 0", positive, optional=True, bits=False, volatile=True)
    progress: bool = setting(True, "a bool", is_bool, bits=False, volatile=True)
    fast_dev_run: bool = setting(False, "a bool", is_bool, bits=False)

    form: ClassVar[Form] = Form(
        what="The settings",
        version=1,
        migrations={0: Migration(name="names of other trainers", change=renamed)},
        answer=answer,
    )

    @classmethod
    def mistakes(cls, fields: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the values of settings, each for itself and together; a line each."""
        of = {field.name: fields.get(field.name, field.default) for field in attrs.fields(cls)}
        wrong = [text for field in attrs.fields(cls) if (text := mistake(field, of[field.name]))]
        if of["max_steps"] is None and of["max_epochs"] is None and of["max_seconds"] is None:
            wrong.append("max_steps, max_epochs and max_seconds all missing: say how long to train")
        if of["early_stopping_patience"] is None and is_number(of["min_delta"]) and of["min_delta"] > 0:
            wrong.append("min_delta without early_stopping_patience: nothing is compared with it")
        if of["overfit_batches"] is not None and of["limit_train_batches"] is not None:
            wrong.append("overfit_batches and limit_train_batches: both say which batches to train on")
        lowers = is_number(of["rollback_lr_factor"]) and of["rollback_lr_factor"] != 1
        if lowers and not is_word(of["on_divergence"], "rollback"):
            wrong.append('rollback_lr_factor without on_divergence="rollback": the rate would never be lowered')
        if of["out_dir"] is None:
            if is_word(of["resume"], "auto"):
                wrong.append('resume="auto" without out_dir: there is nowhere to look')
            if is_word(of["on_divergence"], "rollback") and of["fast_dev_run"] is not True:
                wrong.append('on_divergence="rollback" without out_dir: there are no checkpoints to go back to')
        return wrong

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return the settings of a preset, with some of them changed; see :mod:`trainfn.task.presets`.

        Raises:
            ConfigError: there is no such preset; or what other settings are refused for.

        >>> TrainConfig.preset("baseline", max_epochs=3).compile
        'eager'
        """
        return cls(**preset(name) | changes)

    def chosen(self) -> dict[str, Any]:
        """Return the settings that are not at their defaults.

        >>> TrainConfig(max_steps=10, lr=0.1, batch_size=32).chosen()
        {'max_steps': 10, 'lr': 0.1}
        """
        defaults = {field.name: field.default for field in attrs.fields(type(self))}
        return {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}

    def diff(self, newer: TrainConfig) -> ConfigDiff:
        """Return in what newer settings differ from these.

        >>> str(TrainConfig(max_steps=10).diff(TrainConfig(max_steps=10, ema=0.9)))
        'ema None -> 0.9'
        """
        return differences(self.to_json(), newer.to_json())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> ConfigDiff:
    """Return in what the settings of two runs differ, as :meth:`TrainConfig.to_json` or the record of a run has them.

    >>> str(differences({"max_steps": 10, "optimizer": "sgd"}, {"max_steps": 10, "optimizer": "adamw"}))
    'optimizer sgd -> adamw'
    """
    then, now = ({name: each[name] for name in each if name not in OF_THE_RECORD} for each in (old, new))
    return compare(then, now, attrs.fields(TrainConfig))


def make_config(settings: Mapping[str, Any], *, also: tuple[str, ...] = ()) -> TrainConfig:
    """Return the configuration that keyword arguments describe.

    Args:
        settings: keyword arguments.
        also: other names that the caller takes, for suggestions.

    Raises:
        ConfigError: unknown names, each with the right or nearest one, and values that cannot be used, all together.

    >>> make_config({"max_steps": 10, "learning_rate": 1e-3})
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: The settings cannot be used.
      got: learning_rate (here it is called 'lr')
    """
    return TrainConfig.of(settings, also=also)


def given_settings(
    config: TrainConfig | str | os.PathLike[str] | None, settings: Mapping[str, Any], *, aside: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the settings that a caller has chosen: by hand, and before that by a configuration or a file of one.

    What a configuration leaves at its default counts as not chosen: a ``DataLoader`` may then decide it. What it says
    of the names in ``aside`` is left aside.

    Raises:
        ConfigError: it is neither, or the file cannot be used.

    >>> given_settings(TrainConfig(max_steps=10, lr=0.1), {"lr": 0.2})
    {'max_steps': 10, 'lr': 0.2}
    """
    if config is None:
        return dict(settings)
    if isinstance(config, str) and config in PRESETS and not os.path.exists(config):
        raise ConfigError(
            "A preset is a value, and no file.", got=f"config={config!r}", hint=f'config=TrainConfig.preset("{config}")'
        )
    if isinstance(config, (str, os.PathLike)):
        config = TrainConfig.load(config)
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            "The configuration is none.",
            expected="config=TrainConfig(...), or the path of a file",
            got=repr(config)[:80],
        )
    return {name: value for name, value in config.chosen().items() if name not in set(aside)} | dict(settings)
