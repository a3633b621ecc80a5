"""What a run writes down besides its loss: metrics, totals, the health of each tensor, the noise of its gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainfn
from trainfn.errors import ConfigError, ModelError
from trainfn.evaluation import evaluate
from trainfn.optim import sgd

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(50, 4, generator=GENERATOR)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def train(model: nn.Module | None = None, data: Any = (X, Y), **settings: Any) -> trainfn.FitResult:
    options = {"loss": "classification", "batch_size": 10, "device": "cpu", "progress": False} | settings
    return trainfn.fit(model or make_model(), data, **options)


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [7, 50])
def test_metrics_are_measured_on_what_is_evaluated(batch_size: int) -> None:
    ignored = torch.where(torch.arange(50) < 20, -100, Y)
    result = train(
        val_data=(X, ignored),
        metrics=["accuracy", trainfn.metric.top_k(2)],
        max_steps=20,
        lr=0.02,
        ema=0.9,
        batch_size=batch_size,
        eval_every=20,
    )
    with torch.no_grad():
        logits = result.model()(X)[20:]
    row = result.history[-1]
    assert row["val_accuracy"] == float((logits.argmax(1) == Y[20:]).double().mean())
    assert row["val_top_2_accuracy"] == float((logits.topk(2).indices == Y[20:, None]).any(1).double().mean())
    assert row["val_loss"] == pytest.approx(float(F.cross_entropy(logits, Y[20:])), rel=1e-5)
    with torch.no_grad():
        raw = F.cross_entropy(result.model(ema=False)(X)[20:], Y[20:])
    assert float(raw) != pytest.approx(row["val_loss"], rel=1e-4)  # the average it is


def test_evaluate_measures_them_too() -> None:
    model, optimizer = make_model(), sgd(0.1)
    step = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    state = trainfn.init(model, optimizer)
    found = evaluate(step, state, (X, Y), metrics=["accuracy", "perplexity", "ece", "confidence", "f1"], batch_size=8)
    assert found["accuracy"] == float((model(X).argmax(1) == Y).double().mean())
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-5)
    assert {"ece", "confidence", "top_5_mass", "entropy", "f1"} <= set(found)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"metrics": ["accuracy"]}, "no data to measure them on"),
        ({"metrics": ["acuracy"], "val_data": (X, Y)}, "did you mean 'accuracy'"),
        ({"metrics": ["r2"], "val_data": (X, Y)}, "does not fit the loss"),
        ({"metrics": ["accuracy", "accuracy"], "val_data": (X, Y)}, "names of their own"),
    ],
)
def test_metrics_that_do_not_fit_are_answered_before_the_first_step(settings: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        train(max_steps=1, **settings)


# --- totals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", ["eager", pytest.param("graph", marks=pytest.mark.slow)])
def test_totals_of_the_run(compile: Any, tmp_path: Path) -> None:
    labels = torch.where(torch.arange(50) % 5 == 0, -100, Y)
    settings = {"data": (X, labels), "batch_size": 5, "accumulate": 2, "compile": compile}
    settings |= {"out_dir": tmp_path, "resume": "auto"}
    train(max_steps=4, **settings)
    row = train(max_steps=10, **settings).history[-1]  # two epochs
    assert (row["applied"], row["skipped"], row["micro_batches"], row["seen"]) == (10, 0, 20, 80.0)


def test_steps_that_are_skipped_are_counted_apart() -> None:
    labels = torch.cat([torch.full((10,), -100), Y[10:]])
    row = train(data=(X, labels), max_epochs=2, shuffle=False).history[-1]
    assert (row["applied"], row["skipped"], row["seen"]) == (8, 2, 80.0)


def test_the_loss_scale_is_in_the_history() -> None:
    result = train(max_steps=4, precision="16-mixed", log_every=1)
    assert [row["scale"] for row in result.history] == [65536.0] * 4
    assert "scale" not in train(max_steps=1).history[-1]


# --- the health of each tensor ----------------------------------------------------------------------------------------


class Ailing(nn.Module):
    """One layer in a good state, one whose gradient is tiny, one huge, one zero, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.faint, self.loud = nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.dead, self.frozen = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.good(x) + 1e-9 * self.faint(x) + 1e3 * self.loud(x) + self.frozen(x)
        return out + self.dead(x).clamp(min=1e6) - 1e6


@pytest.mark.parametrize("compile", ["eager", pytest.param("graph", marks=pytest.mark.slow)])
def test_tensors_that_ail_are_named_every_so_often(compile: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    result = train(
        Ailing(), max_steps=7, health_every=3, log_every=100, lr=1e-6, compile=compile, progress=True, on_spike="off"
    )
    assert [row["step"] for row in result.history if "grad_norms" in row] == [3, 6]
    row = result.history[-2]
    assert (row["vanishing"], row["exploding"], row["dead"]) == (
        ["faint.weight"],
        ["loud.weight"],
        ["dead.weight", "dead.bias"],
    )
    assert list(row["grad_norms"]) == [name for name in result.state.params if not name.startswith("frozen")]
    whole = math.sqrt(sum(norm**2 for norm in row["grad_norms"].values()))
    assert row["grad_norm"] == pytest.approx(whole, rel=1e-3)
    said = capsys.readouterr().err
    assert "gradient norm of each tensor every 3 steps" in said


def test_a_gradient_norm_is_that_of_the_mean_gradient_of_its_tensor() -> None:
    model, optimizer = make_model(), sgd(0.1)
    step = trainfn.make_step(model, loss="classification", optimizer=optimizer, accumulate=3, clip_norm=1e-3)
    after = step(trainfn.init(model, optimizer), (X, Y))
    F.cross_entropy(model(X), Y).backward()
    right = [float(param.grad.norm()) for param in model.parameters() if param.grad is not None]
    assert after.report.grad_norms.tolist() == pytest.approx(right, rel=1e-5)


def test_the_health_of_tensors_may_be_left_out() -> None:
    assert not any("grad_norms" in row for row in train(max_steps=4, health_every=None, log_every=1).history)


# --- gradient noise ---------------------------------------------------------------------------------------------------


def test_the_noise_scale_is_the_ratio_of_sums() -> None:
    result = train(max_steps=12, noise_scale_every=4, log_every=100, batch_size=25)
    rows = [row for row in result.history if "noise_scale" in row]
    assert [row["step"] for row in rows] == [4, 8, 12]
    trace, norm = (sum(row[f"noise_{name}"] for row in rows) for name in ("trace", "squared_norm"))
    assert rows[-1]["noise_scale"] == pytest.approx(trace / norm, nan_ok=True)
    assert all(row["noise_weight"] == pytest.approx(24.0) for row in rows)


def test_the_noise_of_a_net_with_batch_norm_is_refused_before_the_first_step() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ModelError, match="mixes examples"):
        train(model, max_steps=2, noise_scale_every=2)


# --- evaluation leaves no trace ---------------------------------------------------------------------------------------


class Remembering(nn.Module):
    """Writes what it sees into its buffer, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.sum(0)
        return self.dense(x)


def test_to_evaluate_more_often_changes_nothing() -> None:
    often, once = (train(Remembering(), val_data=(X + 5, Y), max_steps=6, eval_every=every) for every in (1, 6))
    torch.testing.assert_close(often.state.buffers["seen"], once.state.buffers["seen"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_every": 5}, "nothing to evaluate on"),
        ({"loss": nn.CrossEntropyLoss()}, 'loss="classification"'),
        ({"loss": F.mse_loss}, 'loss="mse"'),
        ({"loss": trainfn.loss.classification}, "call it: classification"),
    ],
)
def test_what_beginners_write_is_answered(settings: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        train(max_steps=1, **settings)


def test_a_warm_up_longer_than_a_trial_run_is_no_mistake() -> None:
    assert train(max_steps=1000, warmup_steps=100, fast_dev_run=True).state.cursor == 2


def test_an_average_that_was_not_kept_is_not_made_up() -> None:
    result = train(max_steps=2)
    with pytest.raises(ConfigError, match="no moving average"):
        result.model(ema=True)


def test_evaluations_that_are_all_nan_have_no_best() -> None:
    result = train(val_data=(torch.full_like(X, math.nan), Y), max_steps=2, check_data=False)
    assert result.best is None
