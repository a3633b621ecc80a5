"""Retention: which checkpoints of a run are kept, as a pure function of their manifests, and the removal of the others.

Kept are the last n, the best k by a monitored number, every multiple of some number of steps, the newest healthy one,
and, whatever else is said, the newest. Checkpoints are chosen by identity: of two with one score, the earlier is the
better, and a score that is NaN or absent is never among the best.

A removal can be cut anywhere: the step is renamed to a hidden name first, so that no reader ever finds half of one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import attrs

from trainfn.errors import CheckpointError
from trainfn.store import disk
from trainfn.store.checkpoint import RunPath, cursor_of, glance, steps
from trainfn.store.strict_json import Json

_LEFT_BEHIND = re.compile(r"\.(tmp|trash)-((step|capsule)_[0-9]{8,}|history\.jsonl|config\.toml)-[0-9a-f]{8}")


@attrs.frozen(kw_only=True)
class Retention:
    """What to keep; the union of what each field asks for.

    Attributes:
        last: the newest so many; None for all.
        best: the so many best by ``monitor``.
        monitor: a name in the manifests' metrics.
        mode: whether a smaller or a greater number is better.
        every: those whose step is a multiple of this, for ever; None for none of them.
    """

    last: int | None = None
    best: int = 0
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    every: int | None = None

    def score(self, metrics: Mapping[str, Json]) -> float:
        """Return the monitored number, turned so that smaller is better; infinity if it is NaN or absent.

        >>> Retention(monitor="val_accuracy", mode="max").score({"val_accuracy": 0.5}), Retention().score({})
        (-0.5, inf)
        """
        value = metrics.get(self.monitor)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            return math.inf
        return float(value) if self.mode == "min" else -float(value)

    def among_best(self, earlier: Iterable[Mapping[str, Json]], metrics: Mapping[str, Json]) -> bool:
        """Return whether ``metrics`` would be one of the best so many, after all ``earlier`` ones.

        >>> policy = Retention(best=1)
        >>> [policy.among_best([{"val_loss": 2.0}], {"val_loss": value}) for value in (1.0, 2.0, float("nan"))]
        [True, False, False]
        """
        own = self.score(metrics)
        return own < math.inf and sum(self.score(other) <= own for other in earlier) < self.best


@attrs.frozen(kw_only=True)
class Entry:
    """What retention knows of a checkpoint: its cursor, and what was measured when it was saved."""

    cursor: int
    metrics: Mapping[str, Json]

    @property
    def healthy(self) -> bool:
        """Whether no loss that was measured then was NaN or infinite."""
        evaluated = (name for name in self.metrics if name.startswith("val_") and name.endswith("_loss"))
        losses = (self.metrics.get(name) for name in ("loss", *evaluated))
        return all(math.isfinite(loss) for loss in losses if isinstance(loss, (int, float)))


def keep(entries: Iterable[Entry], policy: Retention) -> set[int]:
    """Return the cursors of the checkpoints to keep; a pure function.

    >>> entries = [Entry(cursor=n, metrics={"val_loss": loss}) for n, loss in enumerate([3.0, 1.0, 2.0, 2.5])]
    >>> sorted(keep(entries, Retention(last=1, best=1)))
    [1, 3]
    """
    newest_first = sorted(entries, key=lambda entry: -entry.cursor)
    if policy.last is None:
        return {entry.cursor for entry in newest_first}
    kept = {entry.cursor for entry in newest_first[: max(policy.last, 1)]}
    kept |= {entry.cursor for entry in [entry for entry in newest_first if entry.healthy][:1]}
    if policy.every is not None:
        kept |= {entry.cursor for entry in newest_first if entry.cursor % policy.every == 0}
    scored = sorted((policy.score(entry.metrics), entry.cursor) for entry in newest_first)
    return kept | {cursor for score, cursor in scored[: policy.best] if score < math.inf}


def prune(run: RunPath, policy: Retention, *, newest: int, known: dict[int, Entry] | None = None) -> list[Path]:
    """Remove the checkpoints of a run that ``policy`` does not keep; return which. For the run's one writer.

    Neither looked at nor removed are steps after ``newest`` (of a run that was continued from before them), and those
    whose manifest cannot be read or whose files are not of the right size: what cannot be judged is not removed, and
    does not count as one of the last.

    Args:
        run: the run directory.
        policy: what to keep.
        newest: cursor of the checkpoint that has just been committed.
        known: what earlier calls have read, which this one adds to.

    Raises:
        CheckpointWriteError: a step could not be removed. It is whole, or no step any more.
    """
    if policy.last is None:
        return []
    known = {} if known is None else known
    there: dict[int, Path] = {}
    for step in steps(run):
        cursor = cursor_of(step)
        if cursor <= newest and (cursor in known or _learn(step, cursor, known)):
            there[cursor] = step
    kept = keep([known[cursor] for cursor in there], policy)
    doomed = [step for cursor, step in there.items() if cursor not in kept]
    for step in doomed:
        disk.remove(step)
        known.pop(cursor_of(step))
    return doomed


def clean(run: RunPath) -> list[Path]:
    """Remove what a writer that died has left in a run directory under a hidden name; return which.

    Only names that this package makes are touched. For the run's one writer: no other is at work then.

    >>> clean("/nonexistent")
    []
    """
    try:
        names = sorted(name for name in os.listdir(run) if _LEFT_BEHIND.fullmatch(name))
    except FileNotFoundError:
        return []
    found = [Path(run, name) for name in names]
    for path in found:
        disk.discard(path)
    return found


def _learn(step: Path, cursor: int, known: dict[int, Entry]) -> bool:
    try:
        known[cursor] = Entry(cursor=cursor, metrics=glance(step).metrics)
    except CheckpointError:
        return False
    return True
