"""``ConfigDiff``: in what two configurations differ; the one notion of it, for people, resuming and the run header."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class ConfigDiff:
    """In what one configuration differs from an older one, by name.

    A setting that one of the two has not, because it was written before there was such a setting, counts as its default
    there. What is volatile says where and by what a run is carried out (``out_dir``, ``device``, ``workers``), and not
    what the run is; it is kept apart.

    Attributes:
        changed: the values then and now.
        added: what only the newer one says.
        removed: what only the older one says.
        volatile: the values then and now of settings that do not make it another run.
        inexact: names among the first three for which a run that goes on may have other bits in its states.

    >>> from trainfn import TrainConfig
    >>> found = TrainConfig(max_steps=10).diff(TrainConfig(max_steps=20, lr=0.1, workers=2))
    >>> print(found)
    max_steps 10 -> 20; lr 0.001 -> 0.1
    >>> found.volatile, found.inexact
    ({'workers': (0, 2)}, ('lr',))
    """

    changed: dict[str, tuple[Any, Any]]
    added: dict[str, Any]
    removed: dict[str, Any]
    volatile: dict[str, tuple[Any, Any]]
    inexact: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether it is another run."""
        return bool(self.changed or self.added or self.removed)

    def __str__(self) -> str:
        """What differs, in a line; nothing of what is volatile."""
        said = [f"{name} {old} -> {new}" for name, (old, new) in self.changed.items()]
        said += [f"{name} {new} is new" for name, new in self.added.items()]
        return "; ".join([*said, *(f"{name} {old} is gone" for name, old in self.removed.items())])


def compare(old: Mapping[str, Any], new: Mapping[str, Any], fields: Iterable[attrs.Attribute[Any]]) -> ConfigDiff:
    """Return in what two mappings differ.

    Args:
        old, new: settings as :meth:`to_json` writes them, and whatever else is known about a run by name.
        fields: the settings that there are.

    >>> str(compare({"task": "a", "loss": "mse"}, {"task": "b"}, ()))
    'task a -> b; loss mse is gone'
    """
    known = {field.name: field for field in fields}
    defaults = {name: field.default for name, field in known.items()}
    old, new = ({name: value for name, value in each.items() if name != "version"} for each in (old, new))
    names = [name for name in {**new, **old} if old.get(name, defaults.get(name)) != new.get(name, defaults.get(name))]
    told = [name for name in names if name not in known or not known[name].metadata["volatile"]]
    moved = [name for name in told if name not in known or known[name].metadata["bits"]]

    def both(name: str) -> tuple[Any, Any]:
        return old.get(name, defaults.get(name)), new.get(name, defaults.get(name))

    return ConfigDiff(
        changed={name: both(name) for name in told if name in known or (name in old and name in new)},
        added={name: new[name] for name in told if name not in known and name not in old},
        removed={name: old[name] for name in told if name not in known and name not in new},
        volatile={name: both(name) for name in names if name not in told},
        inexact=tuple(moved),
    )
