"""A run that diverges and goes back: the same bits as without the data that it diverged over, and not for ever."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn
from tests.strategies import Loud, of_bad_numbers
from trainfn.errors import ConfigError, DivergenceError
from trainfn.health import HealthWarning
from trainfn.optim import adamw, sgd
from trainfn.store import rows, steps
from trainfn.tree import digest, evolve

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
ROLLS_BACK = {"on_divergence": "rollback", "halt_after": 1}

pytestmark = [
    of_bad_numbers,
    pytest.mark.filterwarnings("ignore:The run has diverged:trainfn.health.HealthWarning"),
    pytest.mark.filterwarnings("ignore:.*far above its recent past:trainfn.health.HealthWarning"),
]


def spoilt(*examples: int) -> tuple[Tensor, Tensor]:
    x = X.clone()
    x[list(examples), 2] = math.nan
    return x, Y


def options(**settings: Any) -> dict[str, Any]:
    """Batches of four in the data's order, ten an epoch; BatchNorm, dropout and an average besides."""
    return {
        "loss": "classification", "optimizer": adamw(lr=0.01), "batch_size": 4, "shuffle": False, "save_every": 3,
        "log_every": 1, "ema": 0.9, "device": "cpu", "compile": "eager", "progress": False, "max_steps": 9,
        "check_data": False,
    } | settings  # fmt: skip


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def train(data: Any, out_dir: Path | None, **settings: Any) -> trainfn.FitResult:
    return trainfn.fit(make_model(), data, out_dir=out_dir, **options(**settings))


def by_hand(data: Any, *, skipped: tuple[int, int], stop: int = 9, **settings: Any) -> trainfn.TrainState:
    """The fold over the same stream of batches, without those of the window."""
    made = trainfn.plan(make_model(), data, **options(max_steps=stop, **settings))
    step, state = made.step, made.state
    for cursor in range(stop):
        if skipped[0] <= cursor < skipped[1]:
            continue
        state = step(evolve(state, cursor=cursor), made.loader.batch(cursor))
    return state


def seen_by(loss: str = "classification") -> tuple[list[int], Any]:
    """A model's inputs as numbers of batches, noted by the last feature."""
    noted: list[int] = []

    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, x: Tensor) -> Tensor:
            noted.append(next(n for n in range(10) if torch.equal(x[:, 0], X[4 * n : 4 * n + 4, 0])))
            return self.inner(x)

    return noted, Noting()


def test_a_run_goes_back_and_is_the_run_without_the_window(tmp_path: Path) -> None:
    with pytest.warns(HealthWarning, match=r"from .*step_00000003, without batches 3 to 4: rollback 1 of 3") as told:
        result = train(spoilt(17), tmp_path, **ROLLS_BACK)
    assert [note.filename for note in told if "rollback" in str(note.message)] == [__file__]
    assert digest(result.state) == digest(by_hand(spoilt(17), skipped=(3, 5), halt_after=1))
    assert digest(result.state) == digest(by_hand((X, Y), skipped=(3, 5), halt_after=1))
    (row,) = [row for row in rows(tmp_path / "history.jsonl") if "rolled_back_to" in row]
    assert (row["step"], row["rolled_back_to"], row["verdict"]) == (5, 3, "non_finite_loss")
    assert result.history[-1]["applied"] == 7
    assert trainfn.inspect(result.checkpoint).config["rollbacks"] == [[3, 5]]


def test_control_without_it_the_run_halts_and_with_the_window_the_bits_differ(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError) as raised:
        train(spoilt(17), tmp_path, halt_after=1)
    assert not hasattr(raised.value, "__notes__")
    assert digest(by_hand((X, Y), skipped=(3, 5))) != digest(by_hand((X, Y), skipped=(4, 5)))


def test_the_window_is_never_seen_again_but_its_examples_come_in_the_next_epoch(tmp_path: Path) -> None:
    noted, model = seen_by()
    trainfn.fit(model, spoilt(17), out_dir=tmp_path, **options(max_steps=16, **ROLLS_BACK))
    first = noted.index(4)
    assert noted[first + 1 :].count(4) == 1  # batch 14, which is refused, too; batch 4 is not taken again
    assert noted[1:] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5]  # batch 0 once more at the plan
    assert trainfn.inspect(tmp_path).config["rollbacks"] == [[3, 5], [12, 15]]


def test_before_the_first_checkpoint_it_goes_back_to_the_beginning(tmp_path: Path) -> None:
    result = train(spoilt(1), tmp_path, **ROLLS_BACK)
    assert digest(result.state) == digest(by_hand((X, Y), skipped=(0, 1), halt_after=1))


def test_a_window_at_the_very_end(tmp_path: Path) -> None:
    result = train(spoilt(33), tmp_path, val_data=(X, Y), eval_every=3, **ROLLS_BACK)
    assert (result.state.cursor, int(result.state.step)) == (9, 6)
    assert digest(trainfn.load(tmp_path, like=result.state)) == digest(result.state)
    assert [row["step"] for row in result.history][-2:] == [9, 9]
    assert math.isfinite(result.history[-1]["val_loss"])
    assert trainfn.inspect(result.checkpoint).cursor == 9


def test_a_run_in_which_nothing_is_finite_ends_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="3 steps in a row") as raised:
        train((torch.full_like(X, math.nan), Y), tmp_path, on_divergence="rollback", max_steps=30)
    (note,) = raised.value.__notes__
    assert note == "It has gone back 3 times, without batches 0 to 2, 3 to 5, 6 to 8; max_rollbacks allows no more."
    assert raised.value.diagnosis is not None
    assert trainfn.inspect(tmp_path).config["rollbacks"] == [[0, 3], [3, 6], [6, 9]]
    with pytest.raises(DivergenceError):  # a resumed run has used them up
        train((torch.full_like(X, math.nan), Y), tmp_path, on_divergence="rollback", max_steps=30, resume="auto")
    assert trainfn.inspect(tmp_path).cursor == 15


@pytest.mark.parametrize("cut", [6, 9, 12])
def test_a_resumed_run_knows_what_was_skipped(tmp_path: Path, cut: int) -> None:
    settings = {"max_rollbacks": 2, **ROLLS_BACK}
    whole = train(spoilt(17, 33), tmp_path / "whole", max_steps=14, **settings)
    train(spoilt(17, 33), tmp_path / "cut", max_steps=cut, **settings)
    again = train(spoilt(17, 33), tmp_path / "cut", max_steps=14, resume="auto", **settings)
    assert digest(again.state) == digest(whole.state)
    for run in ("whole", "cut"):
        assert trainfn.inspect(tmp_path / run).config["rollbacks"] == [[3, 5], [6, 9]], run
    with pytest.raises(DivergenceError) as raised:
        train(spoilt(17, 33), tmp_path / "cut", max_steps=20, resume="auto", **settings)
    assert "gone back 2 times, without batches 3 to 4, 6 to 8" in raised.value.__notes__[0]


def test_a_cut_leaves_a_checkpoint_that_is_gone_back_to(tmp_path: Path) -> None:
    train((X, Y), tmp_path, max_steps=7)
    result = train(spoilt(33), tmp_path, resume="auto", **ROLLS_BACK)
    assert trainfn.inspect(result.checkpoint).config["rollbacks"] == [[7, 9]]


def test_a_run_killed_between_going_back_and_the_next_checkpoint_does_it_again(tmp_path: Path) -> None:
    def dies(state: trainfn.TrainState) -> None:
        if state.cursor == 6:
            raise KeyboardInterrupt

    whole = train(spoilt(17), tmp_path / "whole", save_every=4, **ROLLS_BACK)
    with pytest.raises(KeyboardInterrupt):
        train(spoilt(17), tmp_path / "cut", save_every=4, observers=[dies], **ROLLS_BACK)
    again = train(spoilt(17), tmp_path / "cut", save_every=4, resume="auto", **ROLLS_BACK)
    assert digest(again.state) == digest(whole.state)
    assert [row["step"] for row in again.history] == [row["step"] for row in whole.history]


def test_unhealthy_and_damaged_checkpoints_are_not_gone_back_to(tmp_path: Path) -> None:
    """Batches 4 to 6 are bad. What is saved after 5 has no finite loss; what was saved after 4 is damaged."""

    def damage(state: trainfn.TrainState) -> None:
        if state.cursor == 6:
            os.truncate(tmp_path / "step_00000004" / "state.safetensors", 100)

    with pytest.warns(HealthWarning, match="step_00000003, without batches 3 to 6"):
        train(
            spoilt(17, 21, 25), tmp_path, on_divergence="rollback", save_every=1, keep_last=None, save_async=False,
            observers=[damage],
        )  # fmt: skip


def test_a_halting_spike_sends_a_run_back_too(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(1)
    x = torch.stack([torch.randn(400, generator=own), torch.ones(400)], 1)
    x[320, 1] = 300.0
    torch.manual_seed(0)
    with pytest.warns(HealthWarning, match="without batches 70 to 80"):
        result = trainfn.fit(
            Loud(), (x, torch.randn(400, 1, generator=own)), loss="regression", optimizer=sgd(0.01), on_spike="halt",
            on_divergence="rollback", batch_size=4, shuffle=False, save_every=35, max_epochs=1, out_dir=tmp_path,
            progress=False, device="cpu",
        )  # fmt: skip
    assert (result.state.cursor, int(result.state.step)) == (100, 89)


def test_a_state_that_is_spoilt_by_an_update_is_gone_back_from(tmp_path: Path) -> None:
    """An infinite rate at one update: the update is undone, and comes again, and so the run ends after all."""
    rate = sgd(lambda step: torch.where(step == 4, math.inf, 0.1).double())
    with (
        pytest.warns(HealthWarning, match="step_00000003, without batches 3 to 5"),
        pytest.raises(DivergenceError, match="no longer finite") as raised,
    ):
        train((X, Y), tmp_path, on_divergence="rollback", optimizer=rate, max_steps=30, halt_after=9, ema=None)
    assert "gone back 3 times" in raised.value.__notes__[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiled_runs_go_back_without_compiling_again(tmp_path: Path) -> None:
    result = train(spoilt(17), tmp_path, compile="graph", **ROLLS_BACK)  # to compile twice is warned of
    assert digest(result.state) == digest(by_hand((X, Y), skipped=(3, 5), compile="graph", halt_after=1))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["graph", "accum"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_lower_rate_is_no_other_program(mode: str, tmp_path: Path) -> None:
    whole = train(spoilt(17), tmp_path / "whole", compile=mode, **LOWERS)  # to compile twice is warned of
    for cut in (6, 9):
        again = train(spoilt(17), tmp_path / "cut", compile=mode, max_steps=cut, resume="auto", **LOWERS)
    assert digest(again.state) == digest(whole.state)
    assert [row["lr"] for row in whole.history if "lr" in row][-1] == 0.005


# --- a lower learning rate


LOWERS = ROLLS_BACK | {"rollback_lr_factor": 0.5, "max_rollbacks": 4}


def lowered_by_hand(*windows: tuple[int, int], stop: int, lr: float = 0.01, **settings: Any) -> trainfn.TrainState:
    """The fold without the windows, by an optimizer that has half the rate after each: halves are exact."""
    state, end = None, 0
    for begin, after in (*windows, (stop, stop)):
        made = trainfn.plan(make_model(), (X, Y), **options(max_steps=stop, optimizer=adamw(lr=lr), **settings))
        if state is None:  # a factor of 1, and so the same kernels
            state = evolve(made.state, lr_factor=torch.ones((), dtype=torch.float64))
        for cursor in range(end, begin):
            state = made.step(evolve(state, cursor=cursor), made.loader.batch(cursor))
        end, lr = after, lr / 2
    return state


def test_the_learning_rate_is_lowered_each_time_and_that_is_kept(tmp_path: Path) -> None:
    whole = train(spoilt(17, 33), tmp_path / "whole", max_steps=14, **LOWERS)
    (found,) = trainfn.inspect(tmp_path / "whole").config["rollbacks"][1:]
    by_hand_state = lowered_by_hand((3, 5), tuple(found), stop=14, halt_after=1)
    assert digest(whole.state.params) == digest(by_hand_state.params)
    assert digest(whole.state.opt) == digest(by_hand_state.opt)
    assert float(whole.state.lr_factor) == 0.25
    told = {row["step"]: row["lr_factor"] for row in whole.history if "lr_factor" in row}
    assert told == {5: 0.5, 9: 0.25}
    assert [row["lr"] for row in whole.history if row["step"] in (3, 6, 14)] == [0.01, 0.005, 0.0025]
    for cut in (4, 7, 11, 14):
        again = train(spoilt(17, 33), tmp_path / "cut", max_steps=cut, resume="auto", **LOWERS)
    assert float(again.state.lr_factor) == 0.25
    assert [row["lr"] for row in again.history if row["step"] == 14] == [0.0025]


def test_a_run_that_lowered_it_and_was_cut_is_the_run_that_was_not(tmp_path: Path) -> None:
    whole = train(spoilt(17), tmp_path / "whole", **LOWERS)
    for cut in (3, 6, 7, 9):
        again = train(spoilt(17), tmp_path / "cut", max_steps=cut, resume="auto", **LOWERS)
    assert digest(again.state) == digest(whole.state)
    kept = train(spoilt(17), tmp_path / "cut", max_steps=10, resume="auto")  # asked for no more, and kept
    assert float(kept.state.lr_factor) == 0.5


def test_control_it_is_what_makes_the_difference_and_costs_nothing_otherwise(tmp_path: Path) -> None:
    plain = train(spoilt(17), tmp_path / "plain", **ROLLS_BACK)
    assert plain.state.lr_factor is None
    assert "lr_factor" not in trainfn.inspect(tmp_path / "plain").tensors
    assert not any("lr_factor" in row for row in plain.history)
    assert digest(plain.state.params) != digest(train(spoilt(17), tmp_path / "lower", **LOWERS).state.params)


def test_a_run_without_it_may_be_resumed_with_it(tmp_path: Path) -> None:
    train((X, Y), tmp_path, max_steps=4)
    result = train(spoilt(33), tmp_path, resume="auto", max_steps=10, **LOWERS)
    assert float(result.state.lr_factor) == 0.5
    with pytest.raises(ConfigError, match="rollback_lr_factor without on_divergence"):
        train((X, Y), None, rollback_lr_factor=0.5)


def test_it_needs_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoints to go back to"):
        train((X, Y), None, on_divergence="rollback")
    assert train((X, Y), tmp_path, on_divergence="rollback", fast_dev_run=True).state.cursor == 2


def test_where_no_healthy_checkpoint_is_left_the_run_halts(tmp_path: Path) -> None:
    def all_gone(state: trainfn.TrainState) -> None:
        if state.cursor == 5:
            for step in steps(tmp_path):
                os.truncate(step / "state.safetensors", 100)

    with pytest.raises(DivergenceError) as raised:
        train(spoilt(17), tmp_path, observers=[all_gone], save_async=False, **ROLLS_BACK)
    assert "there is no healthy checkpoint" in raised.value.__notes__[0]
