"""Losses by name: what ``fit(loss="language_modeling")`` looks up."""

from __future__ import annotations

from collections.abc import Callable

from trainfn.errors import ConfigError, suggest
from trainfn.loss.base import Loss
from trainfn.loss.classification import classification
from trainfn.loss.language_modeling import language_modeling

_LOSSES: dict[str, Callable[[], Loss]] = {
    "classification": classification,
    "language_modeling": language_modeling,
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
