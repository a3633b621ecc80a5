"""The settings of this room's builders: what range each may have, and how they are written in a name.

A range is a :class:`Rule`, its words beside its test, so that a message can state what a check has checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

from trainfn.errors import ConfigError


class Rule(NamedTuple):
    """What a setting has to be.

    Attributes:
        words: follows the setting's name in a message, as in "eps >= 0".
        holds: whether a value obeys; called with whatever the user passed.
    """

    words: str
    holds: Callable[[Any], bool]


Rules = dict[str, tuple[Any, Rule]]
"""Values and what they have to be, by setting."""


def check(builder: str, settings: Rules) -> None:
    """Raise unless every value obeys its rule.

    Raises:
        ConfigError: some do not; all of them are listed.

    >>> check("adamw", {"eps": (-1.0, NON_NEGATIVE), "betas[0]": (0.9, FRACTION), "betas[1]": (2, FRACTION)})
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: A setting of adamw is out of range.
      expected: eps >= 0, betas[1] in [0, 1)
      got: eps=-1.0, betas[1]=2
    """
    wrong = {name: (value, rule) for name, (value, rule) in settings.items() if not rule.holds(value)}
    if wrong:
        raise ConfigError(
            f"A setting of {builder} is out of range.",
            expected=", ".join(f"{name} {rule.words}" for name, (_, rule) in wrong.items()),
            got=", ".join(f"{name}={value!r}" for name, (value, _) in wrong.items()),
        )


def call(builder: str, *values: Any, **settings: Any) -> str:
    """Return the call that makes something, as its name. Functions go by their names; None is left out.

    >>> call("lion", lr=0.1, betas=(0.9, 0.99), decay=None)
    'lion(lr=0.1, betas=(0.9, 0.99))'
    """
    written = [describe(value) for value in values]
    written += [f"{name}={describe(value)}" for name, value in settings.items() if value is not None]
    return f"{builder}({', '.join(written)})"


def describe(value: Any) -> str:
    """Return a function's qualified name, and the ``repr`` of anything else; a tuple's entries one by one.

    NumPy's float64 is written as the float that it is.

    >>> describe((0.9, max, None))
    '(0.9, max, None)'
    """
    if isinstance(value, tuple):
        return f"({', '.join(map(describe, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, float):
        return float.__repr__(value)
    return getattr(value, "__qualname__", None) or repr(value)


def or_schedule(rule: Rule) -> Rule:
    """Return the rule for a hyper-parameter that may change: a number that obeys ``rule``, or a schedule.

    What a schedule returns is a tensor of the step, and is not checked.

    >>> rule = or_schedule(FRACTION)
    >>> rule.words, rule.holds(0.9), rule.holds(1.0), rule.holds(lambda step: step / 10)
    ('in [0, 1), or a schedule', True, False, True)
    """
    return Rule(f"{rule.words}, or a schedule", lambda value: callable(value) or rule.holds(value))


def one_of(*choices: str) -> Rule:
    """Return the rule that a setting is one of these words."""
    return Rule(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a real number and no bool.

    >>> is_number(1), is_number(0.5), is_number(True), is_number("1")
    (True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def pair_of_shares(name: str, values: Any) -> Rules:
    """Return the rules of two decay rates, each in [0, 1) or a schedule.

    >>> list(pair_of_shares("betas", (0.9, 0.99))), pair_of_shares("betas", 0.9)["betas"][1].words
    (['betas[0]', 'betas[1]'], 'two decay rates')
    """
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        return {name: (values, Rule("two decay rates", lambda value: False))}
    return {f"{name}[{index}]": (value, SHARE) for index, value in enumerate(values)}


NON_NEGATIVE = Rule(">= 0", lambda value: is_number(value) and 0.0 <= value < math.inf)
POSITIVE = Rule("> 0", lambda value: is_number(value) and 0.0 < value < math.inf)
FRACTION = Rule("in [0, 1)", lambda value: is_number(value) and 0.0 <= value < 1.0)
COUNT = Rule("an int >= 0", lambda value: _is_count(value) and value >= 0)
POSITIVE_COUNT = Rule("an int >= 1", lambda value: _is_count(value) and value >= 1)
# The ranges of hyper-parameters, which may be schedules.
RATE = or_schedule(NON_NEGATIVE)
LIMIT = or_schedule(POSITIVE)
SHARE = or_schedule(FRACTION)
PREDICATE = Rule("a function of (name, parameter), or None", lambda value: value is None or callable(value))
