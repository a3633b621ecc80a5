"""A run that has to stop: when, what its error names, what it keeps, and how that is taken again."""

from __future__ import annotations

import math
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn
from tests.strategies import Loud, of_bad_numbers
from trainfn.diagnose import Diagnosis
from trainfn.diagnose.diagnosis import Part
from trainfn.errors import CheckpointError, ConfigError, DivergenceError
from trainfn.health import HealthWarning, Verdict
from trainfn.optim import adamw, sgd
from trainfn.plan import plan
from trainfn.recorder import Recorder
from trainfn.tree import digest, evolve

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=GENERATOR)
Y = (X[:, 0] > 0).long()


class Root(nn.Module):
    """The square root, NaN below 0; or, mended, of what is at least 0."""

    def __init__(self, mended: bool = False) -> None:
        super().__init__()
        self.mended = mended

    def forward(self, x: Tensor) -> Tensor:
        return (x.clamp(min=1e-6) if self.mended else x).sqrt()


def make_model(middle: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), middle or Root()), nn.Linear(8, 3))


def halted(model: nn.Module, data: Any = (X, Y), **settings: Any) -> DivergenceError:
    options = {"loss": "classification", "max_steps": 30, "batch_size": 10, "device": "cpu", "progress": False}
    with pytest.raises(DivergenceError) as caught:
        trainfn.fit(model, data, check_data=False, **(options | settings))
    return caught.value


def spoilt(*rows: int) -> tuple[Tensor, Tensor]:
    x = X.clone()
    x[list(rows), 2] = math.nan
    return x, Y


@of_bad_numbers
@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2}, pytest.param({"compile": "graph"}, marks=pytest.mark.slow), {"ema": 0.9}],
    ids=str,
)
def test_the_error_names_the_module_and_the_step_is_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    error = halted(make_model(), out_dir=tmp_path, **settings)
    found = error.diagnosis
    assert (found.cause, found.module, found.parameter) == ("module", Part("1.1", "Root"), "2.weight")
    for words in ("3 steps in a row", "step 3, examples [", "the output of 1.1 (Root) is not finite", "2.weight"):
        assert words in str(error)
    assert error.capsule == tmp_path / "capsule_00000002"
    assert "step_00000003" in str(error)
    options = {"loss": "classification", "optimizer": adamw(), "accumulate": settings.get("accumulate", 1)}
    step = trainfn.make_step(make_model(), **options)
    before = digest(dict(step.model.state_dict()))
    assert trainfn.replay(error.capsule, step).lines == found.lines
    assert trainfn.replay(error.capsule, trainfn.compile(step, mode="eager")).lines == found.lines
    assert digest(dict(step.model.state_dict())) == before
    mended = trainfn.make_step(make_model(Root(mended=True)), **options)
    assert trainfn.replay(error.capsule, mended).cause == "none"


@of_bad_numbers
def test_bad_examples_are_named_as_the_data_set_knows_them(tmp_path: Path) -> None:
    error = halted(make_model(nn.Tanh()), spoilt(7, 23), batch_size=40, out_dir=tmp_path)
    (bad,) = [one for one in error.diagnosis.spoilt if one.to_blame]
    order = trainfn.data.Loader(X, batch_size=40, seed=0).indices(2).tolist()
    assert bad.name == "batch.0"
    assert {order[row] for row in bad.rows} == {7, 23}
    assert "these rows are examples " + ", ".join(str(order[row]) for row in bad.rows) in str(error)
    assert "mend these examples" in str(error)


@of_bad_numbers
def test_a_compiled_16_bit_run_is_explained_too(tmp_path: Path) -> None:
    error = halted(make_model(), precision="16-mixed", compile="graph", out_dir=tmp_path)
    assert error.diagnosis.module == Part("1.1", "Root")
    step = trainfn.make_step(make_model(), loss="classification", optimizer=adamw(), precision="16-mixed")
    assert trainfn.replay(error.capsule, step).lines == error.diagnosis.lines


@of_bad_numbers
def test_what_cannot_be_replayed_is_answered(tmp_path: Path) -> None:
    capsule = halted(make_model(), accumulate=2, out_dir=tmp_path).capsule
    step = trainfn.make_step(make_model(), loss="classification", optimizer=adamw(), precision="bf16-mixed")
    with pytest.raises(
        ConfigError, match=r"precision='32-true', accumulate=2[\s\S]*precision='bf16-mixed', accumulate=1"
    ):
        trainfn.replay(capsule, step)
    other = trainfn.make_step(nn.Linear(4, 3), loss="classification", optimizer=adamw(), accumulate=2)
    with pytest.raises(CheckpointError, match="does not fit"):
        trainfn.replay(capsule, other)
    (capsule / "batch.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="wrong size"):
        trainfn.replay(capsule, trainfn.make_step(make_model(), loss="classification", optimizer=adamw(), accumulate=2))


@of_bad_numbers
def test_neither_a_full_disk_nor_a_failing_replay_hides_why_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Path:
        raise CheckpointError("The disk refused: No space left on device.")

    def broken(*_: Any) -> Diagnosis:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("trainfn.halt.save_capsule", full)
    error = halted(make_model(), out_dir=tmp_path)
    assert error.capsule is None
    assert "the step could not be kept: The disk refused" in str(error)
    monkeypatch.setattr("trainfn.halt.diagnose", broken)
    error = halted(make_model())
    assert error.diagnosis is None
    assert "could not be replayed: RuntimeError: on purpose" in str(error)
    assert "3 steps in a row" in str(error)


@of_bad_numbers
def test_the_error_travels_between_processes() -> None:
    error = halted(make_model())
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.diagnosis.lines) == (str(error), error.diagnosis.lines)


def test_a_skipped_step_is_said_with_its_examples() -> None:
    with pytest.warns(HealthWarning, match=r"over batch \d+ \(examples \[.*\b7\b.*\]\), the loss is NaN or infinite"):
        trainfn.fit(
            make_model(nn.Tanh()),
            spoilt(7),
            loss="classification",
            max_epochs=1,
            batch_size=10,
            check_data=False,
            progress=False,
        )


@of_bad_numbers
def test_the_step_to_explain_is_the_last_that_was_refused() -> None:
    """On a GPU the verdicts are read late: steps in which nothing counted may have come after the bad one."""
    x, y = torch.ones(5, 4), torch.zeros(5, dtype=torch.long)
    x[2] = math.nan
    y[3:] = -100
    made = plan(
        nn.Linear(4, 3),
        (x, y),
        loss="classification",
        max_steps=5,
        batch_size=1,
        shuffle=False,
        device="cpu",
        halt_after=9,
        check_data=False,
    )
    recorder, state = Recorder(made), made.state
    for state in trainfn.run(made):
        recorder.step(state)
    assert (int(state.health.streak), state.cursor) == (1, 5)
    number, report = recorder.last_refused(state)
    assert (number, int(report.verdict)) == (2, Verdict.NON_FINITE_LOSS)


# --- spikes -----------------------------------------------------------------------------------------------------------


def loud_data(*loud: int) -> tuple[Tensor, Tensor]:
    own = torch.Generator().manual_seed(1)
    x = torch.stack([torch.randn(400, generator=own), torch.ones(400)], 1)
    x[list(loud), 1] = 300.0
    return x, torch.randn(400, 1, generator=own)


def run_with_a_spike(on_spike: str, **settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    options = {"batch_size": 4, "shuffle": False, "progress": False, "device": "cpu", "log_every": 1, "max_epochs": 1}
    return trainfn.fit(
        Loud(), loud_data(320), loss="regression", optimizer=sgd(0.01), on_spike=on_spike, **(options | settings)
    )


def test_a_spike_is_warned_of_and_applied() -> None:
    with pytest.warns(HealthWarning, match=r"over batch 80 \(examples \[320, 321, 322, 323\]\), the loss is far above"):
        result = run_with_a_spike("warn")
    assert [row["step"] for row in result.history if row["verdict"] != "ok"] == [81]
    assert (result.history[-1]["applied"], result.history[-1]["skipped"]) == (100, 0)


def test_a_spike_is_skipped() -> None:
    with pytest.warns(HealthWarning, match="step was skipped"):
        result = run_with_a_spike("skip")
    assert result.history[80]["verdict"] == "loss_spike_skipped"
    assert (result.history[-1]["applied"], result.history[-1]["skipped"]) == (99, 1)


def test_a_spike_halts_and_is_explained(tmp_path: Path) -> None:
    with (
        pytest.warns(HealthWarning, match="step was skipped"),
        pytest.raises(DivergenceError, match="a step stood out") as caught,
    ):
        run_with_a_spike("halt", out_dir=tmp_path)
    assert caught.value.diagnosis.cause == "none"
    assert caught.value.diagnosis.largest[0][1] > 1e3
    assert "the loss is far above its recent past" in str(caught.value)
    assert re.search(r"it has loss \S+, gradient norm \S+, where loss \d\S+, gradient norm \S+ are", str(caught.value))
    assert "step 81, examples [320, 321, 322, 323]" in str(caught.value)
    again = trainfn.replay(caught.value.capsule, trainfn.make_step(Loud(), loss="regression", optimizer=sgd(0.01)))
    assert again.lines == caught.value.diagnosis.lines


def test_spikes_may_be_nobodys_business() -> None:
    result = run_with_a_spike("off")  # a warning would be an error
    assert {row["verdict"] for row in result.history} == {"ok"}


def test_a_baseline_survives_a_cut(tmp_path: Path) -> None:
    """Another 50 steps of warm-up after a resume would let the spike pass."""
    for stop in (70, 100):
        settings = {"max_steps": stop, "max_epochs": None, "out_dir": tmp_path, "resume": "auto"}
        if stop == 100:
            with pytest.warns(HealthWarning, match="over batch 80"):
                run_with_a_spike("warn", **settings)
        else:
            run_with_a_spike("warn", **settings)


def test_control_a_forgotten_baseline_lets_the_spike_pass() -> None:
    made = plan(
        Loud(),
        loud_data(320),
        loss="regression",
        optimizer=sgd(0.01),
        batch_size=4,
        shuffle=False,
        max_epochs=1,
        device="cpu",
    )
    fresh, state, verdicts = made.state.health, made.state, []
    step = made.step.step
    for batch in made.loader.batches(0, 100):
        state = step(evolve(state, health=fresh) if state.cursor == 70 else state, batch)
        verdicts.append(int(state.report.verdict))
    assert verdicts[80] == 0


# --- when, exactly ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_from_the_step_on_that_ends_the_run_nothing_is_applied(mode: Any) -> None:
    """The loop on a GPU looks late; the state that it then finds is the one that the bad steps were refused on."""
    model, optimizer = nn.Linear(4, 3), sgd(0.1)
    plain = trainfn.make_step(model, loss="classification", optimizer=optimizer, halt_after=2)
    step, state = trainfn.compile(plain, mode=mode, backend="aot_eager"), trainfn.init(model, optimizer)
    good, bad = (X[:8], Y[:8]), (torch.full((8, 4), math.nan), Y[:8])
    found = []
    for batch in (bad, good, bad, bad, good, good):
        state = step(state, batch)
        found.append((Verdict(int(state.report.verdict)).name, bool(state.health.halted), int(state.step)))
    lost, ok = "NON_FINITE_LOSS", "OK"
    assert found == [
        (lost, False, 0),
        (ok, False, 1),
        (lost, False, 1),
        (lost, True, 1),
        ("HALTED", True, 1),
        ("HALTED", True, 1),
    ]


@of_bad_numbers
def test_who_goes_on_after_a_halt_has_a_streak_of_his_own(tmp_path: Path) -> None:
    bad, ignored = (torch.full_like(X, math.nan), Y), (X, torch.full_like(Y, -100))
    halted(make_model(nn.Tanh()), bad, out_dir=tmp_path)
    settings = {"loss": "classification", "batch_size": 10, "device": "cpu", "progress": False, "resume": "auto"}
    settings["check_data"] = False
    assert str(halted(make_model(nn.Tanh()), bad, out_dir=tmp_path, resume="auto")).count("3 steps in a row") == 1
    made = plan(make_model(nn.Tanh()), bad, max_steps=30, out_dir=tmp_path, **settings)
    assert (made.state.cursor, int(made.state.health.streak), bool(made.state.health.halted)) == (6, 0, False)
    state = made.step.step(made.state, (ignored[0][:10], ignored[1][:10]))
    assert not bool(state.health.halted)


@of_bad_numbers
def test_a_state_that_cannot_be_saved_does_not_hide_why_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise CheckpointError("The disk refused: No space left on device.")

    monkeypatch.setattr(sys.modules["trainfn.loop"], "save", full)
    assert "intact, but could not be saved: The disk refused" in str(halted(make_model(), out_dir=tmp_path))


class Cubed(nn.Module):
    """A finite loss and finite gradients, and a statistic that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("mask", torch.full((2,), -math.inf))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.copy_(x.pow(3).max())
        return self.dense(x.tanh())


@pytest.mark.parametrize(
    ("make", "settings", "names"),
    [
        (lambda: nn.Linear(4, 3), {"optimizer": sgd(lambda step: (1.0 - step).sqrt())}, "params.weight"),
        (lambda: nn.Linear(4, 3), {"optimizer": adamw(eps=0.0)}, "params.weight"),
        (Cubed, {}, "buffers.largest"),
    ],
    ids=["schedule", "eps", "buffer"],
)
def test_a_state_that_is_spoilt_without_a_bad_gradient_is_named_and_never_saved(
    make: Any, settings: dict[str, Any], names: str, tmp_path: Path
) -> None:
    x = X.clone()
    x[:, 1] = 1e30 if make is Cubed else 0.0
    with pytest.raises(DivergenceError, match=rf"no longer finite[\s\S]*{names}[\s\S]*not saved"):
        trainfn.fit(
            make(),
            (x, Y),
            loss="classification",
            max_steps=9,
            save_every=1,
            device="cpu",
            progress=False,
            out_dir=tmp_path,
            **settings,
        )
    for path in trainfn.store.steps(tmp_path):
        like = trainfn.init(make(), settings.get("optimizer") or adamw())
        saved = trainfn.load(path, like=like)
        assert all(param.isfinite().all() for param in saved.params.values())
