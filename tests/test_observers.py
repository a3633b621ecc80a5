"""Observers: the points they are called at, in which order, with what; and what is said about those that fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn
from trainfn.errors import ConfigError
from trainfn.observers import POINTS
from trainfn.store import verify

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def train(*observers: Any, **settings: Any) -> trainfn.FitResult:
    """Six steps an epoch."""
    torch.manual_seed(0)
    options = {"loss": "classification", "batch_size": 4, "device": "cpu", "progress": False, "max_epochs": 2}
    return trainfn.fit(nn.Linear(4, 2), (X, Y), observers=list(observers), **(options | settings))


class Watcher:
    """Notes every point that it is called at, with what it is given."""

    def __init__(self, only: tuple[str, ...] = POINTS) -> None:
        self.seen: list[tuple[str, tuple[Any, ...]]] = []
        for point in only:
            setattr(self, point, self.noting(point))

    def noting(self, point: str) -> Callable[..., None]:
        def note(*values: Any) -> None:
            self.seen.append((point, tuple(v.cursor if isinstance(v, trainfn.TrainState) else v for v in values)))

        return note

    @property
    def points(self) -> list[str]:
        return [point for point, _ in self.seen]


def test_the_points_come_in_order_with_plain_numbers(tmp_path: Path) -> None:
    watcher = Watcher()
    result = train(watcher, out_dir=tmp_path, log_every=3, val_data=(X, Y), save_async=False, keep_best=0)
    assert set(watcher.points) == set(POINTS)
    step = ["on_step"]
    epoch = [*step, *step, *step, "on_row", *step, *step, *step, "on_row", "on_eval", "on_epoch"]
    assert watcher.points == ["on_start", *epoch, *epoch, "on_checkpoint", "on_end"]
    given = {point: [values for name, values in watcher.seen if name == point] for point in POINTS}
    assert isinstance(given["on_start"][0][0], trainfn.Plan)
    assert [cursor for (cursor,) in given["on_step"]] == list(range(1, 13))
    assert [row for _, row in given["on_row"]] == result.history
    assert [row for _, row in given["on_epoch"]] == result.epochs
    assert [(cursor, row["val_loss"]) for cursor, row in given["on_eval"]] == [
        (row["step"], row["val_loss"]) for row in result.history if "val_loss" in row
    ]
    assert given["on_checkpoint"] == [(result.checkpoint,)]
    assert given["on_end"] == [(result,)]
    assert not any(isinstance(value, Tensor) for row in result.history + result.epochs for value in row.values())


@pytest.mark.parametrize("point", POINTS)
def test_any_one_of_them_will_do_and_is_named_when_it_fails(point: str, tmp_path: Path) -> None:
    watcher = Watcher((point,))
    settings: dict[str, Any] = {"out_dir": tmp_path / "a", "val_data": (X, Y), "max_epochs": 1}
    train(watcher, **settings)
    assert set(watcher.points) == {point}

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    setattr(watcher, point, fail)
    with pytest.raises(KeyError, match="mine") as raised:
        train(watcher, **settings | {"out_dir": tmp_path / "b", "save_every": 2})
    assert f"the observer Watcher in {point}" in raised.value.__notes__[0]
    if point != "on_start":
        verify(tmp_path / "b")


def test_at_the_end_an_observer_hears_of_an_error_and_of_a_signal() -> None:
    def fail(state: trainfn.TrainState) -> None:
        raise KeyError("mine")

    def stop(state: trainfn.TrainState) -> None:
        if state.cursor == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = Watcher(("on_end",))
    with pytest.raises(KeyError):
        train(watcher, fail)
    with pytest.raises(SystemExit):
        train(watcher, stop)
    assert watcher.seen[0] == ("on_end", (None,))
    (ended,) = watcher.seen[1][1]
    assert (ended.ended_by, ended.state.cursor) == ("SIGTERM", 3)


def test_what_fails_at_the_end_does_not_hide_the_error() -> None:
    class Closing:
        def on_end(self, result: trainfn.FitResult | None) -> None:
            raise OSError("closed already")

    def fail(state: trainfn.TrainState) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as raised:
        train(Closing(), fail)
    assert "closed already" in raised.value.__notes__[-1]
    with pytest.raises(OSError, match="closed already"):
        train(Closing())


def test_a_checkpoint_is_told_of_when_it_is_safe(tmp_path: Path) -> None:
    told: list[int] = []

    class Uploading:
        def on_checkpoint(self, path: Path) -> None:
            told.append(verify(path).cursor)

    train(Uploading(), out_dir=tmp_path, save_every=4, keep_last=None)
    assert told == [4, 8, 12]
    train(
        Uploading(), out_dir=tmp_path, resume="auto", max_epochs=3, save_every=4
    )  # not of the one that it goes on from
    assert told == [4, 8, 12, 16, 18]


def test_mistakes_are_answered_before_the_run() -> None:
    class Lightning:
        def on_train_start(self) -> None: ...
        def on_stpe(self) -> None: ...

    wrong = r"(?s)on_stpe \(did you mean 'on_step'.*on_train_start.*int, which cannot.*Watcher, a class"
    with pytest.raises(ConfigError, match=wrong):
        train(Lightning(), 3, Watcher)
    assert trainfn.fit(
        nn.Linear(4, 2), (X, Y), loss="classification", observers=Watcher(("on_end",)), max_steps=1, progress=False
    )


def test_an_observer_that_looks_at_everything_changes_nothing() -> None:
    from trainfn.tree import digest

    assert digest(train(Watcher()).state) == digest(train().state)
