"""``fit``: everything is decided by a plan, and carried out by a loop."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import attrs
from torch import nn

from trainfn.batch import Batch
from trainfn.loop import Loop
from trainfn.loss import Loss
from trainfn.metric import Metric
from trainfn.observers import Observer, Observers
from trainfn.optim import Transform
from trainfn.plan import Plan, decide, plan
from trainfn.progress import Progress
from trainfn.result import FitResult
from trainfn.signals import OnSignal
from trainfn.task import TaskSpec, TrainConfig
from trainfn.task.config import given_settings


def fit(
    model: nn.Module,
    data: object,
    *,
    loss: str | Loss | None = None,
    task: str | TaskSpec | None = None,
    val_data: object = None,
    metrics: Sequence[str | Metric] = (),
    optimizer: Transform | None = None,
    collate: str | Callable[[list[Any]], Batch] | None = None,
    observers: Observer | Sequence[Observer] = (),
    on_signal: OnSignal | None = None,
    config: TrainConfig | str | os.PathLike[str] | None = None,
    **settings: Any,
) -> FitResult:
    """Train a model.

    Everything is decided and checked first and said in the run header. Then the step is folded over the data; a step
    with a non-finite loss or gradient changes nothing, and ``halt_after`` of them in a row end the run. With
    ``out_dir`` there are a history, flushed as it goes, and checkpoints to resume from, bit for bit.

    SIGTERM and SIGINT (Ctrl-C) end the run between two steps, after saving: by a SystemExit of 143 and a
    KeyboardInterrupt, which both have the ``result`` so far as an attribute. A second signal does not wait. Off the
    main thread, signals are not listened to.

    Args:
        model: any module. Its own tensors are not changed; ``result.model()`` writes the trained ones into it.
        data: a tensor or NumPy array, a tuple ``(inputs, target)`` or a dict of them, a map-style data set, a
            ``torch.utils.data.DataLoader`` (its data set, batch size, shuffling, collate function and workers are
            read), a pandas frame with a ``task`` that says the target, or a function ``batch(index)`` with
            ``max_steps``.
        loss: a registered name, or a function ``loss(outputs, batch)`` that returns a ``LossSum`` or a mean. It may be
            left out where there is a ``task``, and comes before the task's where there are both.
        task: what kind of problem it is, by name (``"vision_classification"``) or as a :class:`trainfn.TaskSpec`: it
            chooses what is not passed of loss, collator and metrics.
        val_data: data to evaluate on, with the same loss and weighting; or several sets by name,
            ``{"clean": (x, y), "noisy": other}``, whose columns are ``val_clean_loss``, ... A dict is several sets if
            each of its values is a data set and no tensor, array or list of numbers (:mod:`trainfn.task.sets`).
        metrics: measured on ``val_data`` besides the loss: names such as ``"accuracy"``, or values from
            :mod:`trainfn.metric`; those of the task if there are none. They are in the history as ``val_accuracy``.
        optimizer: a Transform; if None, AdamW that spares norms and biases its decay, with warm-up and a cosine to 0.
        collate: makes a batch of a list of a data set's items: a function, or the name of a collator (``"text"`` pads).
        observers: functions called with the state after every step, and objects with any of the methods in
            :mod:`trainfn.observers`.
        on_signal: called with the signal and the checkpoint (None without ``out_dir``) once that is safe, before the
            run ends. With it, SIGUSR1 is listened to as well; if it then returns True, the run goes on.
        config: settings as a value, ``TrainConfig.preset("quick")``, or as a file, ``"runs/gpt/config.toml"``; those
            that are passed by hand come before it.
        **settings: the fields of :class:`trainfn.TrainConfig`; one of ``max_steps``, ``max_epochs`` and
            ``max_seconds`` is needed.

    Returns:
        The last state, the history, the best row, the last checkpoint's path.

    Raises:
        ConfigError, DataError, ModelError, CheckpointError: before the first step; see :func:`trainfn.plan`.
        DivergenceError: too many steps in a row gave non-finite numbers. The last good state is saved first, and the
            error tells, by a replay, which example, module or parameter they came from. Or the state itself is no
            longer finite, because of an update or a forward; it is not saved. With ``on_divergence="rollback"``, only
            after ``max_rollbacks`` (:mod:`trainfn.rollback`).
        RunLockedError: somebody else is writing into ``out_dir``.
        CheckpointWriteError: a checkpoint or a row could not be written, with ``on_save_error="stop"``.
        StepMemoryError: there is no memory for a step; the error says what to lower.
        Anything else that observers, data or evaluation raise: the state before it is saved, and a note says where.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(64, 2)
    >>> result = fit(nn.Linear(2, 2), (x, (x[:, 0] > 0).long()), loss="classification", lr=0.1, batch_size=16,
    ...              max_steps=100, progress=False, device="cpu")
    >>> result.history[-1]["loss"] < 0.2
    True
    """
    given = (loss, task, val_data, metrics, optimizer, collate)
    Observers(observers)  # what is wrong with them is said before data and model are looked at
    with contextlib.ExitStack() as held:
        planned = decide(held, model, data, *given, settings=given_settings(config, settings))
        return carry_out(planned, observers, on_signal)


def carry_out(
    planned: Plan, observers: Observer | Sequence[Observer] = (), on_signal: OnSignal | None = None
) -> FitResult:
    """Run a plan to its end, recording, showing, evaluating and saving on the way; what ``fit`` does after ``plan``."""
    own = [Progress(planned)] if planned.config.progress else []
    watching = observers if isinstance(observers, (list, tuple)) else [observers]
    return Loop(planned, Observers([*own, *watching]), on_signal).carry_out()


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
