"""What ends a run before its last step, and runs on a part of the data."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainfn
from tests.test_epochs import without_clock
from trainfn.errors import ConfigError
from trainfn.header import header
from trainfn.limits import Patience
from trainfn.recorder import Recorder
from trainfn.store import inspect
from trainfn.tree import digest

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
FEW = (X[:8], Y[:8])


def train(data: Any = (X, Y), **settings: Any) -> trainfn.FitResult:
    """Five steps an epoch, with a learning rate that makes the evaluation get worse sooner or later."""
    torch.manual_seed(0)
    options = {"loss": "classification", "batch_size": 8, "device": "cpu", "progress": False, "compile": "eager"}
    options |= {"optimizer": trainfn.optim.sgd(lr=2.0, momentum=0.95), "log_every": 3}
    return trainfn.fit(nn.Linear(4, 2), data, **(options | settings))


def said(**settings: Any) -> str:
    options = {"loss": "classification", "batch_size": 8, "device": "cpu"}
    return "\n".join(header(trainfn.plan(nn.Linear(4, 2), (X, Y), **(options | settings))))


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_run_ends_at_the_step_at_which_its_time_is_over(tmp_path: Path) -> None:
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        result = train(max_seconds=0.3, out_dir=tmp_path, val_data=FEW, progress=True, optimizer=None, lr=0.01)
    assert (result.ended_by, result.checkpoint) == ("max_seconds", tmp_path / f"step_{result.state.cursor:08d}")
    assert 0.3 <= result.history[-1]["seconds"] < 5
    assert "val_loss" in result.history[-1]
    shown = stream.getvalue()
    assert "limits    the run ends after 0.3 s" in shown
    assert f"done: step {result.state.cursor}, " in shown
    assert "ended by max_seconds=0.3" in shown
    assert str(2**62) not in shown
    assert "compile   eager: a run of 0.3 s may not earn back" in said(max_seconds=0.3)
    assert result.history[-1]["lr"] == (0.01 if result.state.cursor > 100 else result.history[-1]["lr"])


@pytest.mark.parametrize("limit", range(1, 20))
def test_a_run_that_is_over_by_time_has_a_row_that_says_so(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the clock passes the limit; every look at it takes a second here."""
    looks = itertools.count(1)
    monkeypatch.setattr(Recorder, "seconds", property(lambda recorder: float(next(looks))))
    result = train(max_seconds=limit, val_data=FEW)
    assert result.ended_by == "max_seconds"
    assert result.history[-1]["seconds"] >= limit


def test_time_is_that_of_all_parts_of_a_run(tmp_path: Path) -> None:
    first = train(max_seconds=0.2, out_dir=tmp_path)
    again = train(max_seconds=0.2, out_dir=tmp_path, resume="auto")
    assert again.state.cursor == first.state.cursor
    assert again.ended_by == "max_seconds"
    assert "a larger max_seconds continues it" in said(
        max_seconds=0.2, out_dir=tmp_path, resume="auto", optimizer=trainfn.optim.sgd(lr=2.0, momentum=0.95)
    )
    longer = train(max_steps=first.state.cursor + 7, max_seconds=1000, out_dir=tmp_path, resume="auto")
    assert longer.ended_by == "max_steps"
    assert digest(longer.state) == digest(train(max_steps=longer.state.cursor).state)


def test_a_function_of_batches_is_called_until_the_time_is_over() -> None:
    options: dict[str, Any] = {"loss": "classification", "max_seconds": 0.1, "device": "cpu", "progress": False}
    result = trainfn.fit(nn.Linear(4, 2), lambda index: FEW, **options)
    assert result.ended_by == "max_seconds"
    assert result.state.cursor > 1


# --- patience ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "sign"), [("min", 1.0), ("max", -1.0)])
def test_it_stops_after_so_many_evaluations_without_a_better_one(tmp_path: Path, mode: str, sign: float) -> None:
    result = train(
        max_steps=200, val_data=FEW, eval_every=4, early_stopping_patience=3, min_delta=0.01, monitor="val_loss",
        mode=mode, out_dir=tmp_path,
    )  # fmt: skip
    assert result.ended_by == "early_stopping_patience"
    assert result.state.cursor < 200
    best, waited, stops = float("inf"), 0, []
    for row in result.history:
        if "val_loss" in row:
            better = sign * row["val_loss"] < best - 0.01
            best, waited = (sign * row["val_loss"], 0) if better else (best, waited + 1)
            stops += [row["step"]] if waited == 3 else []
    assert stops == [result.state.cursor]
    assert result.checkpoint == tmp_path / f"step_{result.state.cursor:08d}"
    assert result.best_checkpoint is not None
    again = train(
        max_steps=200, val_data=FEW, eval_every=4, early_stopping_patience=3, min_delta=0.01, monitor="val_loss",
        mode=mode, out_dir=tmp_path, resume="auto",
    )  # fmt: skip
    assert (again.state.cursor, again.ended_by) == (result.state.cursor, "early_stopping_patience")


EARLY: dict[str, Any] = {"early_stopping_patience": 4, "val_data": FEW, "eval_every": 4}
BY_EPOCH: dict[str, Any] = {"early_stopping_patience": 2}


@pytest.mark.parametrize("settings", [EARLY, BY_EPOCH], ids=["evaluations", "epochs"])
@pytest.mark.parametrize("cuts", [(8, 9), (4, 10, 13)])
def test_a_run_that_was_cut_stops_where_it_would_have(
    tmp_path: Path, settings: dict[str, Any], cuts: tuple[int, ...]
) -> None:
    whole = train(max_steps=200, **settings)
    assert 14 < whole.state.cursor < 200
    for stop in (*cuts, 200):
        part = train(max_steps=stop, out_dir=tmp_path, resume="auto", **settings)
    assert digest(part.state) == digest(whole.state)
    assert part.ended_by == "early_stopping_patience"
    assert without_clock(part.epochs) == without_clock(whole.epochs)
    manifest = inspect(tmp_path)
    assert manifest.metrics["patience"]["waited"] == settings["early_stopping_patience"]


def test_it_goes_on_elsewhere_with_what_it_has_waited(tmp_path: Path) -> None:
    whole = train(max_steps=200, **EARLY)
    train(max_steps=10, out_dir=tmp_path / "a", **EARLY)
    moved = train(max_steps=200, out_dir=tmp_path / "b", resume=tmp_path / "a", **EARLY)
    assert moved.state.cursor == whole.state.cursor


def test_control_a_run_that_forgets_what_it_has_waited_stops_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(max_steps=200, **BY_EPOCH)
    train(max_steps=whole.state.cursor - 2, out_dir=tmp_path, **BY_EPOCH)
    monkeypatch.setattr("trainfn.limits.PATIENCE", "forgotten")
    assert train(max_steps=200, out_dir=tmp_path, resume="auto", **BY_EPOCH).state.cursor > whole.state.cursor


def test_nan_is_no_better_and_the_first_number_is() -> None:
    patience = Patience(limit=2, min_delta=0.0, monitor="val_loss")
    for score, waited in ((float("inf"), 1), (3.0, 0), (3.0, 1), (2.0, 0), (float("inf"), 1), (2.5, 2)):
        assert not patience.is_over
        patience.look(score)
        assert patience.waited == waited
    assert patience.is_over


# --- parts of the data ------------------------------------------------------------------------------------------------


def test_overfitting_trains_on_the_first_batches_and_evaluates_on_them() -> None:
    result = train(max_steps=6, overfit_batches=2, accumulate=2, batch_size=4, metrics=["accuracy"], val_data=FEW)
    direct = train((X[:16], Y[:16]), max_steps=6, accumulate=2, batch_size=4, shuffle=False, val_data=(X[:16], Y[:16]))
    assert digest(result.state.params) == digest(direct.state.params)
    assert [row["step"] for row in result.epochs] == [2, 4, 6]
    assert result.history[-1]["val_loss"] == direct.history[-1]["val_loss"]
    assert "val_accuracy" in result.history[-1]
    assert "the first 2 batches, unshuffled, which are evaluated on, too" in said(max_steps=1, overfit_batches=2)


def test_a_limited_epoch_has_so_many_steps_and_then_another_order() -> None:
    result = train(max_epochs=3, limit_train_batches=2)
    assert (result.state.cursor, [row["examples"] for row in result.epochs]) == (6, [16, 16, 16])
    loader = trainfn.plan(
        nn.Linear(4, 2), (X, Y), loss="classification", batch_size=8, max_steps=1, limit_train_batches=2, device="cpu"
    ).loader
    whole = trainfn.plan(nn.Linear(4, 2), (X, Y), loss="classification", batch_size=8, max_steps=1, device="cpu").loader
    for epoch in range(3):
        for number in range(2):
            assert torch.equal(loader.indices(2 * epoch + number), whole.indices(5 * epoch + number))
    together = list(loader.batches(0, 6))
    assert all(torch.equal(batch[0], loader.batch(number)[0]) for number, batch in enumerate(together))
    assert "an epoch ends after 2 steps" in said(max_steps=1, limit_train_batches=2)


def test_a_limited_evaluation_is_one_over_the_first_batches() -> None:
    result = train(max_steps=3, val_data=(X, Y), limit_eval_batches=2)
    assert result.history[-1]["val_loss"] == train(max_steps=3, val_data=(X[:16], Y[:16])).history[-1]["val_loss"]
    assert "over the first 2 batches" in said(max_steps=1, val_data=(X, Y), limit_eval_batches=2)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "max_steps, max_epochs and max_seconds all missing"),
        ({"max_steps": 1, "min_delta": 0.1}, "min_delta without early_stopping_patience"),
        ({"max_steps": 1, "overfit_batches": 1, "limit_train_batches": 1}, "both say which batches"),
        ({"max_steps": 1, "early_stopping_patience": 2, "monitor": "grad_norm"}, "nothing to lose patience about"),
        ({"max_steps": 1, "monitor": "val_loss"}, "(?s)Nothing of this name.*val_loss"),
        ({"max_steps": 1, "monitor": "lr"}, "smaller or a greater"),
        ({"max_seconds": 0}, "max_seconds=0 .expected a number > 0"),
    ],
)
def test_mistakes_are_answered_before_the_run(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(**settings)


def test_a_run_that_may_not_go_on_from_other_batches_says_so(tmp_path: Path) -> None:
    train(max_steps=3, out_dir=tmp_path)
    with pytest.raises(trainfn.errors.CheckpointError, match="limit_train_batches: None then, 2 now"):
        train(max_steps=6, out_dir=tmp_path, resume="auto", limit_train_batches=2)


@pytest.mark.parametrize(
    ("setting", "expected"), [("limit_train_batches", [0, 1, 2, 3, 4]), ("overfit_batches", [0, 1, 0, 1, 0])]
)
def test_a_function_of_batches_goes_on_after_an_epoch_and_repeats_only_to_overfit(
    setting: str, expected: list[int]
) -> None:
    made = trainfn.plan(
        nn.Linear(4, 2), lambda index: (X + index, Y), loss="classification", max_steps=5, device="cpu", **{setting: 2}
    )
    numbers = [round(float((x - X).mean())) for x, _ in made.loader.batches(0, 5)]
    assert numbers == expected
    assert [made.loader.epoch(cursor) for cursor in range(5)] == [0, 0, 1, 1, 2]
