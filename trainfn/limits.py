"""What ends a run before its last step: time that is used up, and patience.

Patience is the number of evaluations in a row without a new best one (of epochs, where nothing is evaluated):

    s : the monitored number, turned so that smaller is better
    s < best - min_delta  ->  best = s, waited = 0;    else  waited = waited + 1

A NaN is no new best. What has been waited for is in every checkpoint, and an evaluation that is made only because the
run ends is not counted: so a run that was cut stops at the step where it would have stopped.

Time is wall time of the run, its earlier parts included, as the steps of ``max_steps`` are; so a run that has used up
its ``max_seconds`` is complete, and goes on with a larger one.

References:
    L. Prechelt, "Early Stopping - But When?", in Neural Networks: Tricks of the Trade, 1998.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

from trainfn.errors import ConfigError
from trainfn.store import Retention
from trainfn.task import TrainConfig

PATIENCE = "patience"
"""Under this name, what has been waited for is among the metrics in a manifest."""


@attrs.define
class Patience:
    """How long a run has waited for a better number.

    Attributes:
        limit: evaluations without a new best that end the run; None for no end.
        min_delta: by how much a new best has to be better.
        monitor: the name of the number.
        best: the best so far, turned so that smaller is better.
        waited: evaluations since then.

    >>> patience = Patience(limit=2, min_delta=0.1, monitor="val_loss")
    >>> for score in (1.0, 0.95, 0.85, 0.9, float("inf")):
    ...     patience.look(score)
    >>> patience.best, patience.waited, patience.is_over
    (0.85, 2, True)
    """

    limit: int | None
    min_delta: float
    monitor: str
    best: float = math.inf
    waited: int = 0

    @property
    def is_over(self) -> bool:
        """Whether the run is to end."""
        return self.limit is not None and self.waited >= self.limit

    @property
    def by_epoch(self) -> bool:
        """Whether it looks at epochs, and not at evaluations."""
        return self.limit is not None and not self.monitor.startswith("val_")

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint has to say, so that the run will stop where it would have."""
        if self.limit is None:
            return {}
        best = self.best if math.isfinite(self.best) else None
        return {PATIENCE: {"monitor": self.monitor, "best": best, "waited": self.waited}}

    def look(self, score: float) -> None:
        """Look at the monitored number, turned so that smaller is better."""
        if score < self.best - self.min_delta:
            self.best, self.waited = score, 0
        else:
            self.waited += 1

    def go_on(self, metrics: Mapping[str, Any]) -> None:
        """Go on from a checkpoint with these metrics, if the number that was monitored then is the same."""
        known = metrics.get(PATIENCE) or {}
        same = known.get("monitor") == self.monitor
        self.best = known["best"] if same and known["best"] is not None else math.inf
        self.waited = known["waited"] if same else 0


def make_patience(config: TrainConfig, retention: Retention, metrics: Mapping[str, Any], *, epochs: bool) -> Patience:
    """Return the patience that a run begins with.

    Args:
        config: the settings.
        retention: what is monitored.
        metrics: those of the checkpoint that it goes on from.
        epochs: whether there are epochs to look at.

    Raises:
        ConfigError: what is monitored is in no evaluation and in no epoch.
    """
    patience = Patience(config.early_stopping_patience, config.min_delta, retention.monitor)
    if patience.by_epoch and not (patience.monitor == "loss" and epochs):
        raise ConfigError(
            "There is nothing to lose patience about.",
            where=f"early_stopping_patience={config.early_stopping_patience}",
            expected="evaluations, or epochs and their loss",
            got=f"monitor={retention.monitor!r}",
            hint="pass val_data=, and a monitor that starts with val_",
        )
    patience.go_on(metrics)
    return patience


def seconds_of(metrics: Mapping[str, Any]) -> float:
    """Return the wall time of a run up to a checkpoint with these metrics.

    >>> seconds_of({"seconds": 1.5}), seconds_of({})
    (1.5, 0.0)
    """
    return float(metrics.get("seconds") or 0.0)


def why_over(config: TrainConfig, patience: Patience, *, cursor: int, stop: int, seconds: float) -> str | None:
    """Return the setting that a run is over by, or None.

    Args:
        config: the settings.
        patience: what has been waited for.
        cursor, stop: steps taken, and the number of them at which it ends.
        seconds: wall time of the run.

    >>> config = TrainConfig(max_epochs=3, max_seconds=60)
    >>> why_over(config, Patience(None, 0.0, "loss"), cursor=5, stop=9, seconds=61.0)
    'max_seconds'
    """
    if cursor >= stop:
        return "max_steps" if config.max_steps == stop else "max_epochs"
    if config.max_seconds is not None and seconds >= config.max_seconds:
        return "max_seconds"
    return "early_stopping_patience" if patience.is_over else None
