"""``history.jsonl``: what happened, one JSON object per line, appended as it happens.

A row is there once its newline is. A process that dies in mid-write leaves a torn last line, which readers pass over
and the next writer removes. Non-finite numbers are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` in the
file (see :mod:`trainfn.store.strict_json`) and floats again in :func:`rows`.

Rows are handed to the operating system one by one, so they survive the process; they are not fsynced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path

import attrs

from trainfn.errors import CheckpointError
from trainfn.store import disk
from trainfn.store.strict_json import Json, line, loads


@attrs.frozen
class History:
    """The writing end of a history file. It holds no open file, so there is nothing to close.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     history = History(Path(home, "history.jsonl"))
    ...     history.append({"step": 1, "loss": 2.5})
    ...     history.append({"step": 2, "loss": float("nan")})
    ...     list(rows(history.path))
    [{'step': 1, 'loss': 2.5}, {'step': 2, 'loss': nan}]
    """

    path: Path = attrs.field(converter=Path)

    def append(self, row: Mapping[str, Json]) -> None:
        """Add one row; when this returns, other processes can read it. The directory is made if it is absent.

        Raises:
            CheckpointError: a value is not JSON (a tensor, say).
            CheckpointWriteError: the disk is full, failing, or read-only.
        """
        rest = line(dict(row))
        with disk.reporting(self.path, len(rest)):
            os.makedirs(self.path.parent, exist_ok=True)
            with open(self.path, "ab+", buffering=0) as file:
                _drop_torn_line(file)
                while rest:
                    rest = rest[file.write(rest) :]


def rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Json]]:
    """Yield the rows of a history file, oldest first; none if there is no such file yet. A torn last line is left out.

    Raises:
        CheckpointError: a line before the last is not a JSON object.
    """
    return (row for _, row in _lines(Path(path)))


def cut(path: str | os.PathLike[str], cursor: int) -> None:
    """Drop the rows whose ``"step"`` is greater than ``cursor``, and a torn last line, by atomic replacement.

    A run that resumes from batch ``cursor`` writes those rows again. Rows without a ``"step"`` stay, and so do the
    bytes of every row that stays.

    Raises:
        CheckpointError: a line before the last is not a JSON object.
        CheckpointWriteError: the disk is full, failing, or read-only. The file is as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     history = History(Path(home, "history.jsonl"))
    ...     for step in range(1, 5):
    ...         history.append({"step": step})
    ...     cut(history.path, 2)
    ...     list(rows(history.path))
    [{'step': 1}, {'step': 2}]
    """
    path = Path(path)
    kept = b"".join(raw for raw, row in _lines(path) if not _is_after(row, cursor))
    if path.exists() and len(kept) != path.stat().st_size:
        disk.replace(path, kept)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Json]]]:
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                row = loads(raw)
            except ValueError as error:
                row = error
            if not isinstance(row, dict):
                raise CheckpointError(
                    "A line of the history cannot be read.",
                    where=f"{path}, line {number}",
                    expected="a JSON object",
                    got=repr(row)[:80],
                    hint="remove the line, or move the file aside",
                )
            yield raw, row


def _is_after(row: dict[str, Json], cursor: int) -> bool:
    step = row.get("step")
    return isinstance(step, (int, float)) and step > cursor


def _drop_torn_line(file: FileIO) -> None:
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.readall().rfind(b"\n") + 1)
