"""Losses by name: what ``fit(loss="language_modeling")`` looks up.

A wrapper is called by name like a function: ``"peft_aware(language_modeling)"``, nested as deep as you like.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch.nn.modules.loss import _Loss

from trainfn.errors import ConfigError, check_options, suggest
from trainfn.loss.base import Loss
from trainfn.loss.classification import classification, segmentation, vision_classification
from trainfn.loss.distillation import distillation
from trainfn.loss.language_modeling import language_modeling, masked_language_modeling, seq2seq
from trainfn.loss.multi_label import multi_label
from trainfn.loss.own import own
from trainfn.loss.regression import regression

_CHUNK = 4096  # tokens: with 50,000 words, 800 MB of float32 logits; the whole of a large batch takes ten times that

_LOSSES: dict[str, Callable[..., Loss]] = {
    "chunked_language_modeling": partial(language_modeling, chunk_size=_CHUNK),
    "classification": classification,
    "distillation": distillation,
    "huber": partial(regression, kind="huber"),
    "l1": partial(regression, kind="l1"),
    "language_modeling": language_modeling,
    "masked_language_modeling": masked_language_modeling,
    "mse": partial(regression, kind="mse"),
    "multi_label": multi_label,
    "own": own,
    "regression": regression,
    "segmentation": segmentation,
    "seq2seq": seq2seq,
    "vision_classification": vision_classification,
}


_FUNCTIONS: tuple[tuple[object, str], ...] = (
    (F.binary_cross_entropy_with_logits, "BCEWithLogitsLoss"),
    (F.cross_entropy, "CrossEntropyLoss"),
    (F.huber_loss, "HuberLoss"),
    (F.l1_loss, "L1Loss"),
    (F.mse_loss, "MSELoss"),
)
_INSTEAD = {
    "BCEWithLogitsLoss": 'loss="multi_label"',
    "CrossEntropyLoss": 'loss="classification", "language_modeling" or "segmentation"',
    "HuberLoss": 'loss="huber"',
    "L1Loss": 'loss="l1"',
    "MSELoss": 'loss="mse"',
}


def register(name: str, make: Callable[[], Loss]) -> None:
    """Make ``loss=name`` mean ``make()``, from now on in this process.

    Raises:
        ConfigError: the name is taken, or it holds brackets, which are for wrappers.

    >>> register("mean_output", lambda: lambda outputs, batch: outputs.mean())
    >>> "mean_output" in names()
    True
    """
    if "(" in name or ")" in name:
        raise ConfigError("A loss cannot have brackets in its name.", got=repr(name), hint="they call wrappers")
    if name in _LOSSES or name in wrappers():
        raise ConfigError("A loss of this name is registered already.", where=f"loss={name!r}")
    _LOSSES[name] = make


def names() -> list[str]:
    """Return the names of all registered losses, sorted.

    >>> "mse" in names()
    True
    """
    return sorted(_LOSSES)


def wrappers() -> list[str]:
    """Return the names of the wrappers, which take a loss by name: ``"peft_aware(mse)"``.

    >>> wrappers()
    ['low_precision_safe', 'peft_aware']
    """
    return sorted(_wrappers())


def resolve(loss: str | Loss) -> Loss:
    """Return the loss that a name stands for; a function is returned as it is.

    Args:
        loss: a registered name, a wrapper around one (``"peft_aware(mse)"``), or a function ``loss(outputs, batch)``.

    Raises:
        ConfigError: the name is unknown (the nearest known one is given) or malformed, or the value is neither.

    >>> resolve("clasification")
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: There is no loss of this name.
      got: 'clasification'
      try: did you mean 'classification'?
    """
    if isinstance(loss, str):
        return _by_name(loss)
    if not callable(loss):
        raise ConfigError(
            "The loss is neither a name nor a function.",
            expected=f"one of {', '.join(names())}, or a function loss(outputs, batch)",
            got=repr(loss),
        )
    factory: object = loss
    made = next((name for name, make in _LOSSES.items() if make is factory), None)
    if made is not None:
        hint = f'call it: {made}(), or pass its name, "{made}"'
        raise ConfigError("This makes a loss; it is not one.", got=f"trainfn.loss.{made}", hint=hint)
    theirs = type(loss).__name__ if isinstance(loss, _Loss) else None
    theirs = next((name for function, name in _FUNCTIONS if loss is function), theirs)
    if theirs is not None:
        raise ConfigError(
            "PyTorch's losses take a prediction and a target; here a loss takes outputs and the whole batch.",
            got=theirs,
            hint=f"pass {_INSTEAD.get(theirs, 'a function of your own: loss(outputs, batch)')}",
        )
    return loss


def make(name: str, **options: Any) -> Loss:
    """Return the loss of this name, made with options: the keywords of the function that makes it.

    Raises:
        ConfigError: the name or an option is unknown (the nearest known one is given), or an option is out of range.

    >>> make("huber", delt=2.0)
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: The loss 'huber' has no such option.
      got: delt
      try: did you mean 'delta'?
    """
    if not options:
        return resolve(name)
    if name not in _LOSSES:
        _by_name(name)  # raises, unless it is a wrapper
        raise ConfigError("A wrapper has no options.", got=f"{name!r} with {', '.join(options)}")
    check_options(f"loss {name!r}", options, inspect.signature(_LOSSES[name]).parameters)
    return _LOSSES[name](**options)


def _by_name(name: str) -> Loss:
    if name in _LOSSES:
        return _LOSSES[name]()
    call = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", name)
    if call is not None:
        wrapper, inner = call[1], call[2].strip()
        if wrapper not in _wrappers():
            raise ConfigError("There is no wrapper of this name.", got=repr(name), hint=suggest(wrapper, wrappers()))
        if inner:
            return _wrappers()[wrapper](_by_name(inner))
    if call is not None or "(" in name or ")" in name or name in wrappers():
        raise ConfigError(
            "A wrapper is called around the name of a loss.",
            expected=f"wrapper(loss), with one of {', '.join(wrappers())} around one of {', '.join(names())}",
            got=repr(name),
            hint='for example loss="peft_aware(language_modeling)"',
        )
    raise ConfigError("There is no loss of this name.", got=repr(name), hint=suggest(name, names()))


def _wrappers() -> dict[str, Callable[[Loss], Loss]]:
    # Imported late, because wrappers take names too and so import this module.
    from trainfn.loss.low_precision import low_precision_safe
    from trainfn.loss.peft import peft_aware

    return {"low_precision_safe": low_precision_safe, "peft_aware": peft_aware}
