"""Losses by name: what ``fit(loss="language_modeling")`` looks up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from trainfn.errors import ConfigError, suggest
from trainfn.loss.base import Loss
from trainfn.loss.classification import classification, segmentation, vision_classification
from trainfn.loss.distillation import distillation
from trainfn.loss.language_modeling import language_modeling, masked_language_modeling, seq2seq
from trainfn.loss.multi_label import multi_label
from trainfn.loss.regression import regression

_LOSSES: dict[str, Callable[[], Loss]] = {
    "classification": classification,
    "distillation": distillation,
    "huber": partial(regression, kind="huber"),
    "l1": partial(regression, kind="l1"),
    "language_modeling": language_modeling,
    "masked_language_modeling": masked_language_modeling,
    "mse": partial(regression, kind="mse"),
    "multi_label": multi_label,
    "regression": regression,
    "segmentation": segmentation,
    "seq2seq": seq2seq,
    "vision_classification": vision_classification,
}


def register(name: str, make: Callable[[], Loss]) -> None:
    """Make ``loss=name`` mean ``make()``, from now on in this process.

    Raises:
        ConfigError: the name is taken.

    >>> register("mean_output", lambda: lambda outputs, batch: outputs.mean())
    >>> "mean_output" in names()
    True
    """
    if name in _LOSSES:
        raise ConfigError("A loss of this name is registered already.", where=f"loss={name!r}")
    _LOSSES[name] = make


def names() -> list[str]:
    """Return the names of all registered losses, sorted."""
    return sorted(_LOSSES)


def resolve(loss: str | Loss) -> Loss:
    """Return the loss that a name stands for; a function is returned as it is.

    Raises:
        ConfigError: the name is unknown (the nearest known one is given), or the value is neither.

    >>> resolve("clasification")
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: There is no loss of this name.
      got: 'clasification'
      try: did you mean 'classification'?
    """
    if isinstance(loss, str):
        if loss not in _LOSSES:
            raise ConfigError("There is no loss of this name.", got=repr(loss), hint=suggest(loss, names()))
        return _LOSSES[loss]()
    if not callable(loss):
        raise ConfigError(
            "The loss is neither a name nor a function.",
            expected=f"one of {', '.join(names())}, or a function loss(outputs, batch)",
            got=repr(loss),
        )
    return loss
