"""Rows of epochs: sums over all of their steps, divided once, whatever the rows of steps and the cuts are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainfn
from tests.strategies import of_bad_numbers
from trainfn.result import CLOCK

X = torch.randn(22, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def train(data: Any = (X, Y), **settings: Any) -> trainfn.FitResult:
    """Batches of 5, 5, 5, 5 and 2 examples."""
    torch.manual_seed(0)
    options = {"loss": "classification", "batch_size": 5, "device": "cpu", "progress": False, "log_every": 3}
    return trainfn.fit(nn.Linear(4, 2), data, **(options | settings))


def without_clock(rows: list[dict[str, Any]]) -> str:
    return repr([{name: value for name, value in row.items() if name not in CLOCK} for row in rows])


def test_an_epoch_is_the_weighted_mean_over_its_steps() -> None:
    steps: list[tuple[float, float, float]] = []

    def note(state: trainfn.TrainState) -> None:
        report = state.report
        steps.append((float(report.loss), float(report.weight), float(report.grad_norm)))

    result = train(max_epochs=2, observers=note, val_data=(X, Y))
    assert [(row["epoch"], row["step"], row["steps"], row["examples"]) for row in result.epochs] == [
        (0, 5, 5, 22), (1, 10, 5, 22),
    ]  # fmt: skip
    for row, part in zip(result.epochs, (steps[:5], steps[5:]), strict=True):
        weights = [weight for _, weight, _ in part]
        assert sorted(weights) == [2, 5, 5, 5, 5]
        assert row["loss"] == pytest.approx(sum(loss * weight for loss, weight, _ in part) / 22, rel=1e-12)
        norms = [norm for *_, norm in part]
        assert (row["grad_norm_max"], row["grad_norm_min"]) == (max(norms), min(norms))
        assert row["grad_norm_mean"] == pytest.approx(sum(norms) / 5, rel=1e-12)
        assert row["val_loss"] == next(r["val_loss"] for r in result.history if r["step"] == row["step"])
        assert row["examples_per_second"] > 0
        assert row["seconds"] >= 0
    means = sum(loss for loss, _, _ in steps[:5]) / 5
    assert result.epochs[0]["loss"] != pytest.approx(means, rel=1e-6)  # control: the mean of means is another


@pytest.mark.parametrize("cuts", [(3,), (5,), (2, 4, 9), (1, 6, 7, 8)])
def test_an_epoch_that_spans_cuts_has_the_same_row(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    lr = trainfn.optim.adamw(lr=0.01)
    whole = train(max_steps=12, optimizer=lr, out_dir=tmp_path / "whole", log_every=4)
    for stop in (*cuts, 12):
        part = train(max_steps=stop, optimizer=lr, out_dir=tmp_path / "cut", resume="auto")
    assert without_clock(part.epochs) == without_clock(whole.epochs)
    assert len(part.epochs) == 2
    lines = [json.loads(line) for line in (tmp_path / "cut" / "history.jsonl").read_text().splitlines()]
    assert [line for line in lines if line.get("kind") == "epoch"] == part.epochs


def test_control_an_epoch_without_what_the_checkpoint_says_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(max_steps=5)
    train(max_steps=3, out_dir=tmp_path)
    monkeypatch.setattr("trainfn.recorder.SO_FAR", "forgotten")
    assert without_clock(train(max_steps=5, out_dir=tmp_path, resume="auto").epochs) != without_clock(whole.epochs)


def test_a_run_that_goes_on_elsewhere_still_has_the_whole_epoch(tmp_path: Path) -> None:
    lr = trainfn.optim.adamw(lr=0.01)
    whole = train(max_steps=5, optimizer=lr)
    train(max_steps=3, optimizer=lr, out_dir=tmp_path / "a")
    moved = train(max_steps=5, optimizer=lr, out_dir=tmp_path / "b", resume=tmp_path / "a" / "step_00000003")
    assert without_clock(moved.epochs) == without_clock(whole.epochs)
    assert moved.history[-1]["seconds"] >= json.loads((tmp_path / "a" / "history.jsonl").read_text())["seconds"]


@of_bad_numbers
def test_steps_that_were_refused_are_counted_and_do_not_count() -> None:
    spoilt = X.clone()
    spoilt[7] = float("nan")
    (row,) = train((spoilt, Y), max_epochs=1, check_data=False).epochs
    assert (row["steps"], row["steps_skipped"]) == (5, 1)
    assert row["weight"] in (17, 20)
    assert row["loss"] == row["loss"]


def test_throughput_leaves_out_what_is_not_training() -> None:
    import time

    class Slow:
        def on_eval(self, state: trainfn.TrainState, row: dict[str, Any]) -> None:
            time.sleep(0.3)

    result = train(max_epochs=3, observers=Slow(), val_data=(X, Y), log_every=1)
    assert result.history[-1]["seconds"] > 0.6
    assert sum(row["seconds"] for row in result.epochs) < 0.3
    for row in result.epochs:
        assert row["examples_per_second"] == pytest.approx(22 / row["seconds"], rel=0.5)


def test_batches_of_a_function_have_no_epochs() -> None:
    torch.manual_seed(0)
    result = trainfn.fit(
        nn.Linear(4, 2), lambda index: (X, Y), loss="classification", max_steps=4, log_every=2, progress=False
    )
    assert result.epochs == []
    assert "examples_per_second" not in result.history[-1]
    assert result.history[-1]["counted_per_second"] > 0


@of_bad_numbers
@pytest.mark.filterwarnings("ignore:The run has diverged:trainfn.health.HealthWarning")
@pytest.mark.filterwarnings("ignore:.*far above its recent past:trainfn.health.HealthWarning")
def test_an_epoch_counts_no_step_that_was_undone_and_a_cut_changes_that_not(tmp_path: Path) -> None:
    from tests.test_rollback import ROLLS_BACK, spoilt
    from tests.test_rollback import train as train_back

    settings = ROLLS_BACK | {"max_steps": 12}
    whole = train_back(spoilt(17), tmp_path / "whole", **settings)
    (row,) = whole.epochs
    assert (row["steps"], row["steps_skipped"]) == (8, 0)  # of ten, without batches 3 and 4
    for stop in (6, 12):
        cut = train_back(spoilt(17), tmp_path / "cut", **settings | {"max_steps": stop, "resume": "auto"})
    assert without_clock(cut.epochs) == without_clock(whole.epochs)


@pytest.mark.parametrize("point", ["on_row", "on_eval", "on_epoch"])
def test_an_epoch_at_whose_end_something_fails_has_its_row_and_the_next_one_begins_anew(
    tmp_path: Path, point: str
) -> None:
    whole = train(max_epochs=2, val_data=(X, Y))

    def fail(state: trainfn.TrainState, row: dict[str, Any]) -> None:
        if state.cursor == 5:
            raise KeyError("at the end of an epoch")

    failing = type("Failing", (), {point: staticmethod(fail)})()
    with pytest.raises(KeyError):
        train(max_epochs=2, val_data=(X, Y), out_dir=tmp_path, observers=failing)
    cut = train(max_epochs=2, val_data=(X, Y), out_dir=tmp_path, resume="auto")
    columns = ("step", "epoch", "steps", "examples", "loss")
    assert [[row[name] for name in columns] for row in cut.epochs] == [
        [row[name] for name in columns] for row in whole.epochs
    ]


@of_bad_numbers
@pytest.mark.filterwarnings("ignore:The run has diverged:trainfn.health.HealthWarning")
def test_a_window_that_ends_with_an_epoch_leaves_its_number_and_the_totals_right(tmp_path: Path) -> None:
    def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X * (math.nan if index == 7 else 1.0), Y

    result = trainfn.fit(
        nn.Linear(4, 2), batch, loss="classification", device="cpu", progress=False, max_steps=16, log_every=4,
        limit_train_batches=4, check_data=False, on_divergence="rollback", halt_after=1, out_dir=tmp_path,
    )  # fmt: skip
    assert [(row["step"], row["epoch"], row["steps"]) for row in result.epochs] == [
        (4, 0, 4), (8, 1, 0), (12, 2, 4), (16, 3, 4),
    ]  # fmt: skip
    before, after = (row for row in result.history if row["step"] == 8)
    assert (before["rolled_back_to"], before["applied"], before["skipped"]) == (0, 7, 1)
    assert (after["applied"], after["skipped"], after["seen"]) == (0, 0, 0)
