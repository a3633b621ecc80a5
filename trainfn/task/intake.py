"""What ``fit`` was given, made into what a plan is made of: the forms of data, and what a task chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import attrs
from torch.utils.data import DataLoader

from trainfn.data import Batched, is_stream, read_frame
from trainfn.data.collators import Collate, choose_collator
from trainfn.data.forms import is_frame, read_data_loader
from trainfn.data.passes import is_loader
from trainfn.data.source import is_function, kind_of
from trainfn.errors import ConfigError, DataError
from trainfn.loss import Loss
from trainfn.metric import Metric
from trainfn.task.config import TrainConfig
from trainfn.task.sets import named_sets
from trainfn.task.spec import TaskSpec, make_task


@attrs.frozen(kw_only=True, eq=False)
class Intake:
    """What a run is made of, decided.

    Attributes:
        config: the settings, with those of a ``DataLoader`` filled in.
        data: what is trained on, and ``collate`` what its items are collated with; None stacks.
        ask_collate: what data is collated with that is to be predicted of, and may lack the target.
        val_data: the sets that are evaluated on, by what their columns begin with: data, and what collates it.
        loss: the loss, by name or as a function.
        loss_name: what it is called, None if it has no name.
        metrics: what is measured.
        task: the task, None if there is none.
    """

    config: TrainConfig
    data: Any
    collate: Collate | None
    ask_collate: Collate | None
    val_data: dict[str, tuple[Any, Collate | None]]
    loss: str | Loss
    loss_name: str | None
    metrics: Sequence[str | Metric]
    task: TaskSpec | None


def take_in(
    config: TrainConfig,
    given: Mapping[str, Any],
    *,
    data: object,
    val_data: object,
    collate: str | Collate | None,
    loss: str | Loss | None,
    metrics: Sequence[str | Metric],
    task: str | TaskSpec | None,
) -> Intake:
    """Return what a run is made of.

    What is passed by hand comes before what a task is configured with, and that before what its kind chooses: so
    ``loss=`` beside ``task=`` is the loss, and ``metrics=`` the metrics.

    Args:
        config: the settings.
        given: those that were passed, by name, which nothing may contradict.
        data, val_data, collate, loss, metrics, task: as for :func:`trainfn.fit`.

    Raises:
        ConfigError: neither a loss nor a task; settings that contradict a ``DataLoader`` or a function of batches.
        DataError: a form of data that cannot be read.

    >>> taken = take_in(TrainConfig(max_steps=1), {}, data=DataLoader([1, 2], batch_size=2), val_data=None,
    ...                 collate=None, loss="mse", metrics=(), task=None)
    >>> taken.data, taken.config.batch_size, taken.config.shuffle
    ([1, 2], 2, False)
    """
    spec = None if task is None else make_task(task)
    if loss is None and spec is None:
        raise ConfigError(
            "It is not said what to train for.",
            expected="loss= or task=",
            hint='for example loss="classification", or task="vision_classification"',
        )
    data, sets, spec_for_data = _frames(data, named_sets(val_data, data), spec)
    by_hand = collate
    if is_stream(data):
        _check_stream(data, config, given)
    elif isinstance(data, DataLoader):
        config, data, by_hand = _from_loader(config, given, data, collate)
    if is_function(data):
        _check_function(config, given)
    usual = None if spec_for_data is None else spec_for_data.make_collator()
    asking = None if spec_for_data is None else spec_for_data.make_collator(predicting=True)
    evaluated = {name: _evaluated(each, collate) for name, each in sets.items()}
    loss_name = loss if isinstance(loss, str) else None
    if loss is None:
        chosen = cast(TaskSpec, spec)
        loss_name, loss = chosen.loss_in_use, chosen.make_loss()
    if spec is not None and not metrics and (sets or config.overfit_batches is not None):
        metrics = spec.metrics_in_use
    return Intake(
        config=config,
        data=data,
        collate=choose_collator(by_hand, usual),
        ask_collate=choose_collator(by_hand, asking),
        val_data={name: (each, choose_collator(hand, usual)) for name, (each, hand) in evaluated.items()},
        loss=loss,
        loss_name=loss_name,
        metrics=metrics,
        task=spec,
    )


def _frames(
    data: object, sets: dict[str, Any], spec: TaskSpec | None
) -> tuple[object, dict[str, Any], TaskSpec | None]:
    """Read frames by the task's target, whose fields have the names of :func:`trainfn.data.read_frame` from then on."""
    if spec is None or spec.target is None or not is_frame(data):
        return data, sets, spec
    features = list(spec.inputs) or None
    table = read_frame(data, target=spec.target, features=features)
    same: dict[str, Any] = {"target": spec.target, "features": list(table.columns), "classes": table.classes}
    read = {name: read_frame(each, **same) if is_frame(each) else each for name, each in sets.items()}
    return table, read, spec.evolve(inputs={}, target=None)


def _from_loader(
    config: TrainConfig, given: Mapping[str, Any], loader: DataLoader[Any], collate: str | Collate | None
) -> tuple[TrainConfig, Any, str | Collate | None]:
    read = read_data_loader(loader)
    settings = read.settings
    wrong = [
        f"{name}: {settings[name]} in the DataLoader, {given[name]} in fit"
        for name in settings
        if name in given and given[name] != settings[name]
    ]
    if read.collate is not None and collate is not None:
        wrong.append("collate: the DataLoader has a collate_fn, and collate= is another")
    if wrong:
        raise ConfigError(
            "The DataLoader and the settings contradict each other.",
            got="; ".join(wrong),
            hint="leave them out in fit, or pass the DataLoader's data set: data=loader.dataset",
        )
    return attrs.evolve(config, **settings), read.dataset, collate if read.collate is None else read.collate


def _evaluated(data: Any, collate: str | Collate | None) -> tuple[Any, str | Collate | None]:
    """Return the data to evaluate on, of a loader its data set: all of it, in its own order, in batches of any size."""
    if is_function(data):
        raise DataError(
            "A function of batches has no end, so there is no evaluating on it.",
            where="val_data",
            hint="val_data=[...] or tensors",
        )
    if is_stream(data):
        _check_val_stream(data)
    if not isinstance(data, DataLoader) or is_stream(data):
        return data, collate
    read = read_data_loader(data)
    if read.settings["drop_last"]:
        raise ConfigError(
            "An evaluation is over all examples.", where="val_data", got="a DataLoader with drop_last=True"
        )
    return read.dataset, collate if read.collate is None else read.collate


def _check_stream(data: object, config: TrainConfig, given: Mapping[str, Any]) -> None:
    decided = ["shuffle", "group_by_length", "overfit_batches"]
    if is_loader(data):
        decided += ["batch_size", "drop_last", "workers", "worker_timeout"]
    wrong = [f"{name}={given[name]}" for name in decided if given.get(name)]
    if config.max_epochs is not None and config.limit_train_batches is None:
        wrong.append(f"max_epochs={config.max_epochs}: how long an epoch is, nobody knows before it has ended")
    if wrong:
        raise ConfigError(
            "A stream is read in its own order, and does not say how long it is.",
            where=f"data, {kind_of(data)}",
            got="; ".join(wrong),
            hint="say max_steps= (and eval_every=), or limit_train_batches=, which many batches are an epoch then; "
            "what can be shuffled, a data set shuffles itself",
        )


def _check_val_stream(data: object) -> None:
    if hasattr(type(data.data if isinstance(data, Batched) else data), "__next__"):
        raise DataError(
            "An iterator can be gone through once, and evaluations are many.",
            where="val_data",
            got=kind_of(data),
            hint="pass what can be iterated over again: an object with __iter__, or the generator function itself",
        )


def _check_function(config: TrainConfig, given: Mapping[str, Any]) -> None:
    names = ("batch_size", "shuffle", "drop_last", "max_epochs", "group_by_length")
    decided = [name for name in names if given.get(name) is not None]
    if decided:
        raise ConfigError(
            "Batches that a function makes are taken as they are, without end.",
            got=", ".join(f"{name}={given[name]}" for name in decided),
            hint="leave these out, and say how long to train with max_steps or max_seconds",
        )
