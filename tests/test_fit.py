"""``fit``, ``run`` and ``evaluate``: what they leave, say and refuse."""

from __future__ import annotations

import io
import json
import sys

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainfn
from tests.strategies import of_bad_numbers
from trainfn.errors import DivergenceError, DonatedStateError
from trainfn.fit import carry_out
from trainfn.header import header
from trainfn.progress import Progress
from trainfn.tree import digest

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(50, 4, generator=GENERATOR)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def train(model=None, data=(X, Y), **settings):
    options = {"loss": "classification", "batch_size": 10, "device": "cpu", "progress": False} | settings
    return trainfn.fit(model or make_model(), data, **options)


def test_it_learns_and_leaves_the_model_as_it_was():
    model = make_model()
    before = digest(dict(model.named_parameters()))
    result = train(model, max_steps=150, lr=0.02)
    assert result.history[0]["loss"] > 0.9
    assert result.history[-1]["loss"] < 0.4
    assert digest(dict(model.named_parameters())) == before
    trained = result.model()
    assert trained is model
    assert not model.training
    assert (model(X).argmax(1) == Y).float().mean() > 0.9


def test_a_printed_result_names_the_state_and_does_not_write_it_out():
    result = train(max_steps=20, log_every=10)
    assert "state=<TrainState>, history=<2 rows>, epochs=<4 rows>" in repr(result)
    assert "ended_by='max_steps'" in repr(result)
    assert "tensor(" not in repr(result)
    step = trainfn.make_step(make_model(), loss="classification", optimizer=trainfn.optim.adamw())
    trainfn.compile(step, mode="eager", donate=True)(result.state, (X, Y))
    assert "state=<ConsumedState>" in repr(result)


def test_ema_is_evaluated_and_returned():
    result = train(max_steps=60, ema=0.5, val_data=(X, Y), eval_every=60)
    raw = {name: p.detach().clone() for name, p in result.model(ema=False).named_parameters()}
    averaged = dict(result.model().named_parameters())
    assert any((raw[name] - averaged[name]).abs().max() > 1e-6 for name in raw)
    with torch.no_grad():
        loss = F.cross_entropy(result.model()(X), Y)
    assert result.history[-1]["val_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_history_on_disk_is_the_history_returned(tmp_path):
    result = train(max_steps=25, log_every=10, eval_every=5, val_data=(X, Y), out_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line for line in lines if line.get("kind") == "epoch"] == result.epochs
    lines = [line for line in lines if "kind" not in line]
    assert lines == result.history
    assert [row["step"] for row in lines] == [5, 10, 15, 20, 25]
    assert all({"loss", "val_loss", "grad_norm", "lr", "epoch", "skipped"} <= set(row) for row in lines)
    assert result.best == min(lines, key=lambda row: row["val_loss"])
    assert [row["epoch"] for row in lines] == [0, 1, 2, 3, 4]


def test_history_is_written_as_it_goes(tmp_path):
    seen = []
    train(
        max_steps=30,
        out_dir=tmp_path,
        observers=[lambda state: seen.append((tmp_path / "history.jsonl").read_text().count("verdict"))
                   if state.cursor in (11, 21) else None],
    )  # fmt: skip
    assert seen == [1, 2]


def test_rows_are_weighted_means_over_their_steps():
    reports = []
    result = train(max_steps=12, log_every=6, batch_size=15, observers=[lambda state: reports.append(state.report)])
    weights = [float(report.weight) for report in reports]
    assert set(weights) == {15.0, 5.0}  # 50 examples: the last batch of an epoch is short
    for row, part in zip(result.history, (slice(0, 6), slice(6, 12)), strict=True):
        total = sum(float(report.loss) * float(report.weight) for report in reports[part])
        assert row["loss"] == pytest.approx(total / sum(weights[part]))
    mean_of_means = sum(float(report.loss) for report in reports[:6]) / 6
    assert result.history[0]["loss"] != pytest.approx(mean_of_means)


def test_a_complete_run_says_so_and_a_longer_one_goes_on(tmp_path, capsys):
    first = train(max_steps=10, out_dir=tmp_path, progress=True)
    assert "step 0 of 10" in capsys.readouterr().err
    again = train(max_steps=10, out_dir=tmp_path, resume="auto", progress=True)
    assert "this run is complete: step 10 of 10" in capsys.readouterr().err
    assert digest(again.state) == digest(first.state)
    assert again.history == first.history
    assert again.checkpoint == first.checkpoint
    longer = train(max_steps=15, out_dir=tmp_path, resume="auto", progress=True)
    said = capsys.readouterr().err
    assert "step 10 of 15, resumed from" in said
    assert "max_steps 10 -> 15" in said
    assert longer.state.cursor == 15
    assert longer.checkpoint == tmp_path / "step_00000015"


def test_checkpoints_are_where_asked_and_load(tmp_path):
    result = train(max_steps=25, save_every=10, keep_last=None, out_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_000000{n}" for n in (10, 20, 25)]
    optimizer = trainfn.optim.adamw()
    like = trainfn.init(make_model(), optimizer)
    assert digest(trainfn.load(tmp_path, like=like)) == digest(result.state)


def test_the_header_says_what_was_decided(capsys):
    train(max_steps=3, accumulate=2, clip_norm=0.7, progress=True, val_data=(X[:9], Y[:9]))
    said = capsys.readouterr().err
    for word in (
        torch.__version__, "Sequential, 131 parameters", "float32", "50 examples, 3 steps an epoch",
        "9 to evaluate on", "cpu", "20 examples (10 x 2)", "clip to norm 0.7", "seed 0", "adamw(lr=warmup_cosine",
        "eager: 3 steps would not earn back", "nothing is saved", "step 3/3", "val_loss", "done: step 3 of 3",
    ):  # fmt: skip
        assert word in said, word


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    made = trainfn.plan(make_model(), (X, Y), loss="classification", max_steps=3, device="cpu")
    screen = Terminal()
    done = carry_out(attrs.evolve(made, config=attrs.evolve(made.config, progress=False)), [Progress(made, screen)])
    assert done.state.cursor == 3
    assert "3/3" in screen.getvalue()
    assert "done: step 3 of 3" in screen.getvalue()


def test_fast_dev_run_is_short_and_writes_nothing(tmp_path):
    result = train(max_steps=1000, fast_dev_run=True, out_dir=tmp_path / "run", val_data=(X, Y), compile="graph")
    assert result.state.cursor == 2
    assert "val_loss" in result.history[-1]
    assert not (tmp_path / "run").exists()


def test_max_epochs_and_the_limit_that_comes_first():
    assert train(max_epochs=3).state.cursor == 15
    assert train(max_epochs=3, max_steps=7).state.cursor == 7
    assert train(max_epochs=1, max_steps=7).state.cursor == 5
    assert train(max_epochs=2, batch_size=15, drop_last=True).state.cursor == 6
    assert train(max_epochs=2, batch_size=15).state.cursor == 8


@of_bad_numbers
def test_bad_batches_are_skipped_and_a_streak_halts(tmp_path):
    spoilt = X.clone()
    spoilt[7] = float("nan")
    result = train(data=(spoilt, Y), max_steps=20, log_every=1, check_data=False)
    assert result.history[-1]["skipped"] == 4  # once an epoch
    assert int(result.state.step) == 16
    assert result.state.cursor == 20
    assert all(torch.isfinite(param).all() for param in result.state.params.values())
    assert {row["verdict"] for row in result.history} == {"ok", "non_finite_loss"}

    with pytest.raises(DivergenceError, match="3 steps in a row") as caught:
        train(data=(torch.full_like(X, float("inf")), Y), max_steps=20, out_dir=tmp_path)
    assert "step 3, examples [" in str(caught.value)
    assert "step_00000003" in str(caught.value)
    saved = trainfn.load(tmp_path, like=trainfn.init(make_model(), trainfn.optim.adamw()))
    assert digest(saved.params) == digest(trainfn.init(make_model(), trainfn.optim.adamw()).params)
    with pytest.raises(DivergenceError, match="5 steps in a row"):
        train(data=(torch.full_like(X, float("inf")), Y), max_steps=20, halt_after=5)


def test_run_yields_every_state_and_closes_when_left():
    made = trainfn.plan(make_model(), (X, Y), loss="classification", max_steps=9, device="cpu")
    cursors = []
    for state in trainfn.run(made):
        cursors.append(state.cursor)
        if state.cursor == 4:
            break
    assert cursors == [1, 2, 3, 4]


def test_a_state_kept_past_its_step_is_refused_not_wrong():
    kept = []
    train(max_steps=3, observers=[kept.append])
    with pytest.raises(DonatedStateError, match="batch 2"):
        _ = kept[1].params


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_evaluation_does_not_depend_on_the_batching(batch_size):
    optimizer = trainfn.optim.sgd(lr=0.1)
    model = make_model()
    step = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    state = trainfn.init(model, optimizer)
    ignored = torch.where(torch.arange(50) < 20, -100, Y)  # whole batches count for nothing
    rng = torch.get_rng_state()
    model.train()
    found = trainfn.evaluate(step, state, (X, ignored), batch_size=batch_size)
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        whole = F.cross_entropy(model.eval()(X[20:]), Y[20:])
    assert found["loss"] == pytest.approx(float(whole), rel=1e-5)
    assert found["weight"] == 30.0


def test_workers_give_the_same_run():
    assert digest(train(max_steps=6, workers=2).state) == digest(train(max_steps=6).state)


def test_scalar_losses_are_means_over_examples():
    def mean_loss(outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    by_name, by_hand = train(max_steps=5, batch_size=15), train(max_steps=5, batch_size=15, loss=mean_loss)
    for name, param in by_name.state.params.items():
        torch.testing.assert_close(by_hand.state.params[name], param)


def test_help_lists_every_setting():
    import inspect

    listed = inspect.signature(trainfn.fit).parameters
    assert {"max_steps", "batch_size", "accumulate", "resume", "compile"} <= set(listed)
    assert "settings" not in listed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_runs_on_a_gpu():
    result = train(max_steps=30, device="cuda", compile="graph", drop_last=True, val_data=(X, Y))
    assert result.state.step.is_cuda
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("mode", ["graph", "split", "accum", "eager"])
def test_every_mode_may_be_asked_for_and_says_what_it_cost(mode, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    planned = trainfn.plan(
        make_model(), (X, Y), loss="classification", batch_size=10, max_steps=5, device="cpu", compile=mode
    )
    planned.step.backend = "eager"
    found = carry_out(planned)
    lines = stream.getvalue().splitlines()
    assert found.state.cursor == 5
    assert next(line for line in lines if line.startswith("compile ")).split()[1] == f"{mode}:"
    said = [line for line in lines if line.startswith(f"compiled  {mode}, at step 1; ")]
    assert len(said) == (mode != "eager")


def test_what_is_recomputed_is_said_and_the_mode_of_a_run_without_it_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["trainfn.engine.choice"], "_missing_tool", lambda device: None)
    kept = {"loss": "classification", "batch_size": 10, "device": "cpu", "out_dir": tmp_path, "resume": "auto"}
    first = trainfn.plan(make_model(), (X, Y), max_steps=2, compile="graph", progress=False, **kept)
    first.step.backend = "eager"
    carry_out(first)
    again = trainfn.plan(make_model(), (X, Y), max_steps=10_000, **kept)
    assert again.step.mode == "graph"
    again = trainfn.plan(make_model(), (X, Y), max_steps=10_000, checkpoint=["0", "3"], **kept)
    lines = header(again)
    assert "memory    activations of 2 modules are recomputed: 0, 3" in lines
    assert any(line.startswith("compile   split: ") for line in lines)
