"""What a setting is written down with: its default, its range in words and as a test, and what a change of it means."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, cast

import attrs

from trainfn.errors import suggest


def setting(
    default: Any,
    expected: str,
    fits: Callable[[Any], bool],
    *,
    optional: bool = False,
    convert: Callable[[Any], Any] | None = None,
    bits: bool = True,
    volatile: bool = False,
    words: tuple[str, ...] = (),
) -> Any:
    """Return a field of :class:`trainfn.TrainConfig`.

    Args:
        default: its value where nothing is said.
        expected: what fits, in words, for the error.
        fits: whether a value fits; called with anything.
        optional: whether None fits as well.
        convert: turns one way to write a value into the one that is kept; leaves alone what it does not know.
        bits: whether a run that goes on with another value may have other bits in its states.
        volatile: whether it says where and by what a run is carried out, and not what it is.
        words: those that it may be, for near names.

    >>> @attrs.frozen
    ... class Settings:
    ...     steps: int = setting(3, "an int >= 1", at_least(1))
    >>> mistake(attrs.fields(Settings).steps, 0)
    'steps=0 (expected an int >= 1)'
    """

    def accepts(value: Any) -> bool:
        return (optional and value is None) or fits(value)

    text = f"{expected}, or None" if optional else expected
    metadata = {"expected": text, "fits": accepts, "bits": bits, "volatile": volatile, "words": words}
    return attrs.field(default=default, converter=convert, metadata=metadata)


def one_of(default: str, *others: str, bits: bool = True) -> Any:
    """Return a field that takes one of some words."""
    words = tuple(dict.fromkeys((default, *others)))
    expected = f"one of {', '.join(map(repr, words))}"
    return setting(default, expected, lambda value: isinstance(value, str) and value in words, bits=bits, words=words)


def mistake(field: attrs.Attribute[Any], value: Any) -> str | None:
    """Return what is wrong with a value of a field, with the nearest word that would do; None if it fits."""
    if field.metadata["fits"](value):
        return None
    near = suggest(value, field.metadata["words"]) if isinstance(value, str) and field.metadata["words"] else ""
    hint = f"; {near}" if near.startswith("did you mean") else ""
    return f"{field.name}={short(value)} (expected {field.metadata['expected']}{hint})"


def short(value: Any) -> str:
    """Return a value in one line of at most 80 characters.

    >>> len(short("x" * 1000))
    80
    """
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else shown[:77] + "..."


def at_least(least: float, kind: type | tuple[type, ...] = int) -> Callable[[Any], bool]:
    """Return a test for finite numbers of a kind that are not smaller.

    >>> [at_least(1)(value) for value in (1, 0, True, 1.5)]
    [True, False, False, False]
    """

    def fits(value: Any) -> bool:
        return is_number(value, kind) and bool(least <= value)

    return fits


def is_number(value: Any, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Return whether it is a finite number that a float can hold."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(cast(float, value))
    except OverflowError:
        return False


def positive(value: Any) -> bool:
    """Return whether it is a finite number greater than 0."""
    return is_number(value) and value > 0


def is_bool(value: Any) -> bool:
    """Return whether it is True or False."""
    return isinstance(value, bool)


def is_word(value: Any, *words: str) -> bool:
    """Return whether it is one of the words; also of values that cannot be compared."""
    return isinstance(value, str) and value in words


def is_patterns(value: Any) -> bool:
    """Return whether it is a pattern for names, or a tuple of some."""
    several = isinstance(value, tuple) and bool(value) and all(isinstance(each, str) for each in value)
    return isinstance(value, str) or several


def is_path(value: Any) -> bool:
    """Return whether it is a path, as text; see :func:`as_path`."""
    return isinstance(value, str) and bool(value) and "\0" not in value


def as_path(value: Any) -> Any:
    """Return a path as text, and anything else as it is.

    >>> from pathlib import Path
    >>> as_path(Path("runs", "gpt"))
    'runs/gpt'
    """
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def as_patterns(value: Any) -> Any:
    """Return a list as a tuple, and anything else as it is."""
    return tuple(value) if isinstance(value, list) else value
