"""Collators by name: what ``fit(collate="text")`` and a task look up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainfn.batch import TARGET_NAMES, Batch
from trainfn.data.collate import Collator, default, stacked
from trainfn.data.images import image
from trainfn.data.padding import mlm, text
from trainfn.errors import ConfigError, DataError, check_options, suggest
from trainfn.tree import describe

Collate = Callable[[list[Any]], Batch]
"""Makes one batch of a list of items: a :class:`Collator`, or any function."""


def table(*, columns: list[str] | tuple[str, ...] | None = None) -> Collator:
    """Return the collator that makes one row of numbers of an item's columns: ``features``, float32 [B, columns].

    An item is a dict of numbers, one of which may be the target; it is called ``labels`` in the batch. A dict of whole
    columns [N] is treated likewise. Where an input is a row of numbers already, a batch is left as it is.

    Args:
        columns: which ones are features, in this order; None for all but the target, in the order of their names.

    Raises:
        DataError: (from the collator) a column that is missing or holds no numbers.

    >>> table()([{"wide": 2, "long": 3.5, "y": 1}, {"wide": 4, "long": 1.5, "y": 0}])
    {'features': tensor([[3.5000, 2.0000],
            [1.5000, 4.0000]]), 'labels': tensor([1, 0])}
    """
    return Collator(stack=stacked, finish=partial(_columns, columns=None if columns is None else tuple(columns)))


_COLLATORS: dict[str, Callable[..., Collator]] = {
    "default": default,
    "image": image,
    "mlm": mlm,
    "table": table,
    "text": text,
}


def register_collator(name: str, make: Callable[..., Collator]) -> None:
    """Make ``collate=name`` mean ``make()``, and its options ``make``'s keywords, from now on in this process.

    Raises:
        ConfigError: the name is taken.

    >>> register_collator("lists", lambda: Collator(stack=lambda items: torch.tensor(items)))
    >>> "lists" in collator_names()
    True
    """
    if name in _COLLATORS:
        raise ConfigError("A collator of this name is registered already.", where=f"collate={name!r}")
    _COLLATORS[name] = make


def collator_names() -> list[str]:
    """Return the names of all registered collators, sorted.

    >>> "text" in collator_names()
    True
    """
    return sorted(_COLLATORS)


def collator(name: str, **options: Any) -> Collator:
    """Return the collator of this name.

    Args:
        name: one of :func:`collator_names`.
        **options: keywords of the function that makes it.

    Raises:
        ConfigError: an unknown name or option, with the nearest known one; an option that is out of range or missing.

    >>> collator("text", sid="left")
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: The collator 'text' has no such option.
      got: sid
      try: did you mean 'side'?
    """
    if name not in _COLLATORS:
        raise ConfigError("There is no collator of this name.", got=repr(name), hint=suggest(name, collator_names()))
    make = _COLLATORS[name]
    parameters = inspect.signature(make).parameters
    check_options(f"collator {name!r}", options, parameters)
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in options]
    if missing:
        raise ConfigError(
            f"The collator {name!r} needs options.",
            expected=", ".join(missing),
            hint=f"collate=trainfn.data.collator({name!r}, {', '.join(f'{key}=...' for key in missing)})",
        )
    return make(**options)


def choose_collator(
    manual: str | Collate | None, configured: Collate | None = None, usual: Collate | None = None
) -> Collate | None:
    """Return the collator in use: the one passed by hand, else the one a task is configured with, else its kind's own.

    Raises:
        ConfigError: ``manual`` is neither a name nor a function.

    >>> choose_collator(None, None, list) is list, choose_collator(None, set, list) is set
    (True, True)
    """
    if isinstance(manual, str):
        return collator(manual)
    if manual is not None and not callable(manual):
        raise ConfigError(
            "The collator is neither a name nor a function.",
            expected=f"one of {', '.join(collator_names())}, or a function of a list of items",
            got=repr(manual),
        )
    return next((each for each in (manual, configured, usual) if each is not None), None)


def _columns(batch: Batch, *, columns: tuple[str, ...] | None) -> Batch:
    if not isinstance(batch, Mapping):
        return batch  # (X, y): the rows are there
    targets = {name: batch[name] for name in TARGET_NAMES if name in batch}
    inputs = [value for name, value in batch.items() if name not in targets]
    if columns is None and any(isinstance(value, Tensor) and value.ndim != 1 for value in inputs):
        return batch  # likewise
    if len(targets) > 1:
        raise DataError("A table has one target.", expected="one of its columns", got=", ".join(targets))
    names = sorted(set(batch) - set(targets)) if columns is None else columns
    missing = [name for name in names if name not in batch]
    if missing:
        raise DataError(
            "A column is missing.", expected=", ".join(names), got=describe(batch), hint=suggest(missing[0], batch)
        )
    wrong = [name for name in names if not isinstance(batch[name], Tensor) or batch[name].ndim != 1]
    if wrong:
        got = describe({name: batch[name] for name in wrong})
        raise DataError("A column does not hold one number a row.", expected="numbers", got=got)
    features = torch.stack([batch[name].float() for name in names], dim=1)  # (B, columns)
    return {"features": features, **({"labels": next(iter(targets.values()))} if targets else {})}
