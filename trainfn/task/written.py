"""``Written``: a frozen value of fields that goes to JSON and back, knows its version, and answers names it has not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import attrs

from trainfn.errors import ConfigError


@attrs.frozen(kw_only=True)
class Migration:
    """The way from one version of a form to the next.

    Attributes:
        name: what it is called in the error that a value of the older version is refused with.
        change: maps the fields of the older version to those of the newer one, and a list of what was done.
    """

    name: str
    change: Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]]


@attrs.frozen(kw_only=True)
class Form:
    """How values of a class are written.

    Attributes:
        what: what one is called in an error: "The settings".
        version: of the form that is written now.
        migrations: by version, the way from it to the next one; all from 0 to the present one.
        answer: what is said about a name that is no field, given those that are.
    """

    what: str
    version: int
    migrations: Mapping[int, Migration]
    answer: Callable[[str, Iterable[str]], str]


class Written:
    """A frozen value of fields, for ``attrs`` classes that say their ``form`` and check themselves in ``mistakes``."""

    __slots__ = ()
    form: ClassVar[Form]

    def __new__(cls, **fields: Any) -> Self:
        """Answer unknown names together with wrong values; attrs' own ``__init__`` would raise a bare TypeError."""
        cls.check_names(fields)
        return super().__new__(cls)

    def __attrs_post_init__(self) -> None:
        if wrong := type(self).mistakes({name: getattr(self, name) for name in field_names(type(self))}):
            raise self.refusal(wrong)

    @classmethod
    def mistakes(cls, fields: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the values of fields, some of which may be missing; a line each."""
        raise NotImplementedError

    @classmethod
    def check_names(cls, fields: Mapping[str, Any], *, also: Iterable[str] = ()) -> None:
        """Raise for names that are no field, and for wrong values with them; ``also`` are other names that exist."""
        known = field_names(cls)
        unknown = [f"{name} ({cls.form.answer(name, [*known, *also])})" for name in fields if name not in known]
        if unknown:
            rest = {name: value for name, value in fields.items() if name in known}
            raise cls.refusal([*unknown, *cls.mistakes(rest)])

    @classmethod
    def of(cls, fields: Mapping[str, Any], *, also: Iterable[str] = ()) -> Self:
        """Return the value with these fields.

        Args:
            fields: by name.
            also: other names that could be meant.

        Raises:
            ConfigError: names that are no field, fields that are missing, and wrong values, all together.

        >>> from trainfn import TrainConfig
        >>> TrainConfig.of({"max_steps": 10}).max_steps
        10
        """
        cls.check_names(fields, also=also)
        missing = [f.name for f in fields_of(cls) if f.default is attrs.NOTHING and f.name not in fields]
        if missing:
            raise cls.refusal([*(f"{name} is missing" for name in missing), *cls.mistakes(fields)])
        return cls(**fields)

    @classmethod
    def refusal(cls, wrong: list[str]) -> ConfigError:
        """Return the error that says all that is wrong."""
        return ConfigError(
            f"{cls.form.what} cannot be used.", got=wrong[0] if len(wrong) == 1 else "\n    ".join(["", *wrong])
        )

    def evolve(self, **changes: Any) -> Self:
        """Return the value with some fields changed.

        Raises:
            ConfigError: as for a new one: unknown names and wrong values, all together.

        >>> from trainfn import TrainConfig
        >>> TrainConfig(max_steps=10).evolve(lr=0.1).lr
        0.1
        """
        return type(self)(**{name: getattr(self, name) for name in field_names(type(self))} | changes)

    def to_json(self) -> dict[str, Any]:
        """Return the value as a JSON object, with the version of its form.

        Raises:
            ConfigError: a field holds something that JSON has not.

        >>> from trainfn import TrainConfig
        >>> TrainConfig(max_steps=10).to_json()["max_steps"]
        10
        """
        fields: dict[str, Any] = {"version": self.form.version}
        wrong = []
        for name in field_names(type(self)):
            try:
                fields[name] = json.loads(json.dumps(getattr(self, name)))
            except (TypeError, ValueError) as error:
                wrong.append(f"{name}: {error}")
        if wrong:
            raise ConfigError(f"{self.form.what} cannot be written as JSON.", got="; ".join(wrong))
        return fields

    @classmethod
    def from_json(cls, written: Mapping[str, Any], *, migrate: bool = False) -> Self:
        """Return the value that :meth:`to_json` wrote.

        Args:
            written: the JSON object.
            migrate: take one of an older version through the migrations to the present one.

        Raises:
            ConfigError: no version, or one that is not known; an older one without ``migrate``, with what the migration
                would do; or what a new value is refused for.

        >>> from trainfn import TrainConfig
        >>> TrainConfig.from_json({"version": 0, "max_steps": 10, "learning_rate": 0.1})
        Traceback (most recent call last):
            ...
        trainfn.errors.ConfigError: The settings are written in an older form.
          expected: version 1
          got: version 0
          try: migrate=True takes them there: 0 to 1, names of other trainers (learning_rate -> lr)
        >>> TrainConfig.from_json({"version": 0, "max_steps": 10, "learning_rate": 0.1}, migrate=True).lr
        0.1
        """
        form = cls.form
        if not isinstance(written, Mapping) or not all(isinstance(name, str) for name in written):
            raise ConfigError(f"{form.what} are no JSON object.", expected="names and values", got=repr(written)[:80])
        fields = dict(written)
        version = fields.pop("version", None)
        if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= form.version:
            raise ConfigError(
                f"{form.what} are written in a form that is not known.",
                expected=f"version {form.version}",
                got="no version" if version is None else f"version {version!r}",
                hint=f"version = {form.version} says that they are meant for the present form"
                if version is None
                else "read them with the trainfn that wrote them",
            )
        told = []
        for old in range(version, form.version):
            fields, done = form.migrations[old].change(fields)
            told.append(f"{old} to {old + 1}, {form.migrations[old].name} ({', '.join(done) or 'nothing to change'})")
        if told and not migrate:
            raise ConfigError(
                f"{form.what} are written in an older form.",
                expected=f"version {form.version}",
                got=f"version {version}",
                hint=f"migrate=True takes them there: {'; '.join(told)}",
            )
        return cls.of(fields)


def fields_of(cls: type) -> tuple[attrs.Attribute[Any], ...]:
    """Return the fields of an ``attrs`` class, in order."""
    found: tuple[attrs.Attribute[Any], ...] = attrs.fields(cls)
    return found


def field_names(cls: type) -> list[str]:
    """Return their names."""
    return [field.name for field in fields_of(cls)]
