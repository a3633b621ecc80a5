"""Metrics by name: what ``fit(loss="language_modeling", metrics=["accuracy"])`` looks up.

A name alone does not say which labels are meant; the loss does, by its mark (:class:`trainfn.loss.Reading`). So
``"accuracy"`` beside a language-modelling loss is that of next tokens, and beside a segmentation loss with
``ignore_index=255`` it leaves out the same pixels. A metric that is given by value is taken as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from trainfn.errors import ConfigError, suggest
from trainfn.loss.reading import Reading, Target, reading_of
from trainfn.loss.registry import resolve as resolve_loss
from trainfn.metric.accuracy import accuracy, top_k
from trainfn.metric.base import Metric
from trainfn.metric.calibration import confidence, ece
from trainfn.metric.confusion import f1
from trainfn.metric.multi_label import multi_label_accuracy, multi_label_f1
from trainfn.metric.perplexity import perplexity
from trainfn.metric.regression import mean_absolute_error, r2, root_mean_squared_error

Make = Callable[[Reading], Metric]


def _classes(build: Callable[..., Metric]) -> tuple[Target | None, Make]:
    return "classes", lambda reading: build(
        ignore_index=reading.ignore_index, shift=reading.shift, pooling=reading.pooling
    )


def _labels(build: Callable[..., Metric]) -> tuple[Target | None, Make]:
    return "labels", lambda reading: build(ignore_index=reading.ignore_index)


def _numbers(build: Callable[..., Metric]) -> tuple[Target | None, Make]:
    return "numbers", lambda _: build()


_METRICS: dict[str, tuple[Target | None, Make]] = {
    "accuracy": _classes(accuracy),
    "confidence": _classes(confidence),
    "ece": _classes(ece),
    "f1": _classes(f1),
    "f1_micro": _classes(partial(f1, average="micro")),
    "f1_per_class": _classes(partial(f1, average=None)),
    "mean_absolute_error": _numbers(mean_absolute_error),
    "multi_label_accuracy": _labels(multi_label_accuracy),
    "multi_label_f1": _labels(multi_label_f1),
    "perplexity": _classes(perplexity),
    "r2": _numbers(r2),
    "root_mean_squared_error": _numbers(root_mean_squared_error),
    "top_5_accuracy": _classes(top_k),
}
_TOP_K = re.compile(r"top_([1-9]\d{0,5})_accuracy")
_OTHER_WORDS = {
    "acc": "accuracy",
    "calibration": "ece",
    "entropy": "confidence",
    "f1_macro": "f1",
    "mae": "mean_absolute_error",
    "ppl": "perplexity",
    "rmse": "root_mean_squared_error",
    "top_5": "top_5_accuracy",
    "top_k": "top_5_accuracy",
    "top5": "top_5_accuracy",
}


def register(name: str, make: Make) -> None:
    """Make ``metrics=[name]`` mean ``make(reading)``, from now on in this process.

    Args:
        name: a name that is not taken.
        make: it is given the reading of the loss: which labels are ignored, and whether they are shifted.

    Raises:
        ConfigError: the name is taken.

    >>> register("accuracy_of_mine", lambda reading: accuracy(ignore_index=reading.ignore_index))
    >>> "accuracy_of_mine" in names()
    True
    """
    if name in _METRICS or _TOP_K.fullmatch(name):
        raise ConfigError("A metric of this name is registered already.", where=f"metrics={name!r}")
    _METRICS[name] = (None, make)


def names() -> list[str]:
    """Return the names of all registered metrics, sorted. ``top_5_accuracy`` stands for any other number too.

    >>> "perplexity" in names()
    True
    """
    return sorted(_METRICS)


def resolve(metric: str | Metric, loss: Any = None) -> Metric:
    """Return the metric that a name stands for beside a loss; one that is given by value is returned as it is.

    Args:
        metric: a registered name, or a Metric.
        loss: the loss that is trained, by name or as a function; None, or a function without a mark, has its labels
            aligned with its logits and ignores -100.

    Raises:
        ConfigError: the name is unknown (the nearest known one is given), the metric is of another kind of target than
            the loss, or the value is neither a name nor a metric.

    >>> import torch
    >>> tokens = torch.tensor([[3, 1, 2]])
    >>> copy = torch.nn.functional.one_hot(tokens, 4).float()          # repeats what it reads
    >>> metric = resolve("accuracy", loss="language_modeling")
    >>> metric.result(metric.measure(copy, {"input_ids": tokens}))
    {'accuracy': 0.0}
    """
    if isinstance(metric, Metric):
        return metric
    if not isinstance(metric, str):
        raise ConfigError(
            "The metric is neither a name nor a Metric.",
            expected=f"one of {', '.join(names())}, or a trainfn.metric.Metric",
            got=repr(metric),
        )
    kind, make = _find(metric)
    reading = None if loss is None else reading_of(resolve_loss(loss))
    if reading is not None and kind not in (None, reading.target):
        fitting = [name for name in names() if _METRICS[name][0] == reading.target]
        raise ConfigError(
            "The metric does not fit the loss.",
            where=f"metrics={metric!r}",
            expected=f"a metric over {reading.target}, as the loss is",
            got=f"one over {kind}",
            hint=f"one of {', '.join(fitting)}",
        )
    return make(reading or Reading())


def _find(name: str) -> tuple[Target | None, Make]:
    if name in _METRICS:
        return _METRICS[name]
    if found := _TOP_K.fullmatch(name):
        return _classes(partial(top_k, int(found[1])))
    if name == "confusion":
        raise ConfigError(
            "A confusion matrix has no name, because it needs the number of classes.",
            where="metrics='confusion'",
            hint="metrics=[trainfn.metric.confusion(10)], for 10 classes",
        )
    meant = _OTHER_WORDS.get(name.lower())
    raise ConfigError(
        "There is no metric of this name.",
        got=repr(name),
        hint=f"did you mean {meant!r}?" if meant else suggest(name, names()),
    )
