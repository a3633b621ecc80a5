"""Strict JSON that gives back what it was given, non-finite floats included.

JSON has no NaN and no infinities, and a file that holds Python's spelling of them is refused by most readers. Here they
are the strings of the protobuf JSON mapping, ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which the number parsers of
Python, JavaScript and data-frame libraries understand. They come back as floats, so a string so spelt cannot be stored.
"""

from __future__ import annotations

import json
from typing import Any

from trainfn.errors import CheckpointError

Json = Any
"""None, bool, int, float, str, or a list or string-keyed dict of these."""

_SPELLING = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_NON_FINITE = {spelling: float(name) for name, spelling in _SPELLING.items()}


def canonical(value: Json) -> bytes:
    """Return the one serialisation of a JSON value: in ASCII, keys sorted, indented for people to read and compare.

    Raises:
        CheckpointError: something in it is not JSON; every such place is named.

    >>> canonical({"b": 1, "a": [float("inf")]})
    b'{\\n "a": [\\n  "Infinity"\\n ],\\n "b": 1\\n}\\n'
    """
    return json.dumps(_strict(value), sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"


def line(value: Json) -> bytes:
    """Return a JSON value as one line, keys in the order in which they were written.

    Raises:
        CheckpointError: something in it is not JSON; every such place is named.

    >>> line({"step": 3, "loss": float("nan")})
    b'{"step": 3, "loss": "NaN"}\\n'
    """
    return json.dumps(_strict(value), allow_nan=False).encode("ascii") + b"\n"


def loads(data: bytes) -> Json:
    """Return the value that ``canonical`` or ``line`` turned into ``data``; what was a tuple is a list.

    Raises:
        ValueError: not JSON, or nested deeper than Python can follow.

    >>> loads(b'{"step": 3, "loss": "NaN"}')
    {'step': 3, 'loss': nan}
    """
    try:
        return _revive(json.loads(data))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _strict(value: Json) -> Json:
    """Return ``value`` as JSON data: tuples become lists, non-finite floats strings."""
    wrong: list[str] = []
    made = _plain(value, "", wrong)
    if wrong:
        raise CheckpointError(
            "Some values cannot be stored as JSON.",
            expected="None, bool, int, float, str, and lists and string-keyed dicts of these",
            got="; ".join(wrong),
            hint="convert them first: float(tensor), str(path)",
        )
    return made


def _plain(value: Json, where: str, wrong: list[str]) -> Json:
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _plain(child, f"{where}.{key}", wrong) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child, f"{where}.{index}", wrong) for index, child in enumerate(value)]
    if isinstance(value, float):  # numpy's float64 is one too
        return _SPELLING.get(repr(float(value)), float(value))
    if value is None or type(value) in (bool, int) or (type(value) is str and value not in _NON_FINITE):
        return value  # a subclass, such as an Enum, would come back as something else
    wrong.append(f"{where.lstrip('.') or 'the value'}: {type(value).__name__} {value!r:.80}")
    return None


def _revive(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _revive(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_revive(child) for child in value]
    return _NON_FINITE.get(value, value) if type(value) is str else value
