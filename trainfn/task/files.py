"""Settings as files that people read and write: TOML and JSON, written whole or not at all.

TOML has no null. A field whose default is None is left out where it is None; where None is said against another default
(``clip_norm=None``) it is written, and read, as ``"none"``.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any, Self

from trainfn.errors import ConfigError
from trainfn.store import replace, reporting
from trainfn.task.written import Written, fields_of

CONFIG_FILE = "config.toml"
"""What the settings of a run are called in its directory."""

_NONE = "none"
_MAX_BYTES = 1 << 20


class Filed(Written):
    """A :class:`Written` value of plain settings, which is a file as well."""

    __slots__ = ()

    def to_toml(self) -> str:
        """Return the value as TOML, all fields in order; what is not the default is marked.

        Raises:
            ConfigError: a text in it has no UTF-8.

        >>> from trainfn import TrainConfig
        >>> text = TrainConfig(max_steps=10, clip_norm=None).to_toml()
        >>> [line for line in text.splitlines() if line.startswith(("version", "max", "clip"))]
        ['version = 1', 'max_steps = 10', 'clip_norm = "none"  # 1.0 by default', 'max_rollbacks = 3']
        """
        lines = [f"version = {self.form.version}"]
        for field in fields_of(type(self)):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            mark = f"  # {_toml(field.default)} by default" if field.default not in (value, None) else ""
            lines.append(f"{field.name} = {_toml(value)}{mark}")
        text = "\n".join([*lines, ""])
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError("The settings cannot be written as TOML.", got=str(error)) from error
        return text

    @classmethod
    def from_toml(cls, text: str, *, migrate: bool = False) -> Self:
        """Return the value that :meth:`to_toml`, or a person, wrote; what is left out has its default.

        Args:
            text: TOML with a ``version`` and fields.
            migrate: as for :meth:`from_json`.

        Raises:
            ConfigError: it is no TOML, or as for :meth:`from_json`.

        >>> from trainfn import TrainConfig
        >>> TrainConfig.from_toml('version = 1\\nmax_steps = 10\\nclip_norm = "none"').clip_norm is None
        True
        """
        try:
            fields = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError("The settings are no TOML.", got=str(error)) from error
        absent = {field.name for field in fields_of(cls) if field.default is not None}
        return cls.from_json(
            {name: None if value == _NONE and name in absent else value for name, value in fields.items()},
            migrate=migrate,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the value to a file: at every moment, also after power loss, it holds the old or the new one.

        Args:
            path: a file that ends in ``.toml`` or ``.json``; its directory is made if it is absent.

        Raises:
            ConfigError: another ending.
            CheckpointWriteError: the disk refused.

        >>> import tempfile
        >>> from trainfn import TrainConfig
        >>> with tempfile.TemporaryDirectory() as home:
        ...     TrainConfig(max_steps=10).save(f"{home}/run.json")
        ...     TrainConfig.load(f"{home}/run.json").max_steps
        10
        """
        file = Path(path)
        text = self.to_toml() if _is_toml(file) else json.dumps(self.to_json(), indent=2) + "\n"
        with reporting(file, len(text)):
            file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, migrate: bool = False) -> Self:
        """Return the value in a file, or in a run directory.

        Args:
            path: a file that ends in ``.toml`` or ``.json``, or a directory with a ``config.toml``.
            migrate: as for :meth:`from_json`.

        Raises:
            ConfigError: there is none, it cannot be read, or as for :meth:`from_json`.

        >>> from trainfn import TrainConfig
        >>> TrainConfig.load("nowhere.toml")
        Traceback (most recent call last):
            ...
        trainfn.errors.ConfigError: There are no settings to be read.
          where: nowhere.toml
          expected: a file in TOML or JSON, or a directory with a config.toml
        """
        file = Path(path) / CONFIG_FILE if Path(path).is_dir() else Path(path)
        text = _read(file)
        try:
            return (
                cls.from_toml(text, migrate=migrate) if _is_toml(file) else cls.from_json(_json(text), migrate=migrate)
            )
        except ConfigError as error:
            told = {"expected": error.expected, "got": error.got, "hint": error.hint}
            raise ConfigError(error.what, where=file, **told) from error.__cause__  # type: ignore[arg-type]


def _is_toml(file: Path) -> bool:
    if file.suffix not in (".toml", ".json"):
        raise ConfigError("A file of settings is TOML or JSON.", expected=".toml or .json", got=str(file))
    return file.suffix == ".toml"


def _read(file: Path) -> str:
    """Return the text of a regular file of a size that settings may have."""
    try:
        if file.is_file():
            with open(file, "rb") as opened:
                raw = opened.read(_MAX_BYTES + 1)
            if len(raw) <= _MAX_BYTES:
                return raw.decode()
            raise ConfigError("The file is too long for settings.", where=file, expected=f"at most {_MAX_BYTES} bytes")
    except (OSError, ValueError) as error:  # also of bytes that are no UTF-8, and of a path that holds a NUL
        raise ConfigError("The settings cannot be read.", where=file, got=str(error)) from error
    raise ConfigError(
        "There are no settings to be read.",
        where=file,
        expected=f"a file in TOML or JSON, or a directory with a {CONFIG_FILE}",
    )


def _json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError("The settings are no JSON.", got=str(error)) from error


def _toml(value: Any) -> str:
    """Return a plain value, or a row of them, in TOML."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # JSON escapes what TOML does, but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int):
        return str(int(value))
    return _toml(_NONE) if value is None else repr(float(value))
