"""One family of exceptions: what happened, where, what was expected, what came instead, and what to try.

Every mistake a caller can make is answered with a subclass of :class:`TrainfnError`. Each subclass also derives from
the builtin a Python programmer would expect (``ValueError``, ``ImportError``, ...), so that ``except ValueError``
keeps working. Mistakes of one kind are collected first and raised together.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class TrainfnError(Exception):
    """A caller's mistake or a failed run, told in up to five lines.

    Args:
        what: one sentence, what is wrong.
        where: the path, tensor name, batch field or step it concerns.
        expected: what would have been right.
        got: what was found instead.
        hint: what to do about it.

    >>> print(ConfigError("max_steps must be positive.", expected="an int >= 1", got=-3, hint="pass max_steps=1000"))
    max_steps must be positive.
      expected: an int >= 1
      got: -3
      try: pass max_steps=1000
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.hint = what, where, expected, got, hint
        lines = [what]
        for label, value in (("where", where), ("expected", expected), ("got", got), ("try", hint)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with the joined message only; worker processes pickle exceptions.
        fields = {"where": self.where, "expected": self.expected, "got": self.got, "hint": self.hint}
        return _rebuild, (type(self), self.what, fields), self.__dict__


class ConfigError(TrainfnError, ValueError):
    """A setting is missing, unknown, out of range, or contradicts another."""


class DataError(TrainfnError, ValueError):
    """A data set or a batch does not have the form that the model or the loss needs."""


class ModelError(TrainfnError, ValueError):
    """A model's forward, output or parameters do not fit what is asked of them."""


class CompileError(TrainfnError, RuntimeError):
    """A step could not be compiled as one program."""


class DonatedStateError(TrainfnError, RuntimeError):
    """A state was used after a donating step had consumed it."""


class CheckpointError(TrainfnError, RuntimeError):
    """A checkpoint is absent, damaged, or does not fit the state it is loaded into."""


class DivergenceError(TrainfnError, ArithmeticError):
    """Training was halted because steps kept producing non-finite numbers, or one stood out from its recent past.

    Attributes:
        diagnosis: a :class:`trainfn.diagnose.Diagnosis` of the step that was refused; None if it could not be replayed.
        capsule: where that step is kept for :func:`trainfn.replay`; None if it is not.
    """

    diagnosis: Any = None
    capsule: Path | None = None


class StepMemoryError(TrainfnError, MemoryError):
    """There is not enough memory for a step. The allocator's own error is the ``__cause__``."""


class MissingPackageError(TrainfnError, ImportError):
    """An optional package is needed; the message holds the command that installs it."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the hint for a misspelt ``name``: the nearest known name, or all of them.

    >>> suggest("langauge_modeling", ["classification", "language_modeling"])
    "did you mean 'language_modeling'?"
    >>> suggest("x", ["classification", "language_modeling"])
    'one of classification, language_modeling'
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of {', '.join(names)}"


def check_options(maker: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise for the first option that a maker of losses or collators does not take, with the nearest that it takes.

    Raises:
        ConfigError: there is one.

    >>> check_options("loss 'huber'", ["delta"], ["delta"])
    """
    names = list(known)
    for option in options:
        if option not in names:
            hint = suggest(option, names) if names else None
            raise ConfigError(f"The {maker} has no such option.", got=option, hint=hint)


def listed(values: Sequence[object], most: int = 64) -> str:
    """Return values in a row, for a message; of a long row, the beginning.

    >>> listed([3, 1, 2], most=2)
    '3, 1, ...'
    """
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")


def warn(text: str, category: type[Warning]) -> None:
    """Warn of something at the place outside this package that led to it, such as the call of ``fit``.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True, action="always") as told:
    ...     warn("It goes on.", UserWarning)
    >>> "trainfn" in told[0].filename
    False
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "trainfn":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def _rebuild(cls: type[TrainfnError], what: str, fields: dict[str, object]) -> TrainfnError:
    return cls(what, **fields)  # type: ignore[arg-type]
