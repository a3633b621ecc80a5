"""Operations of a step, and what a device can do; the table of parameters; profiles of steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainfn
from trainfn.errors import ConfigError
from trainfn.flops import FlopsWarning, _peak, count_flops
from trainfn.header import header

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
STEP = 2 * 4 * (6 * 8 + 8 * 2) * 2 + 2 * 4 * 8 * 2  # products of two layers, and by the weights; by the inputs of one


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def train(**settings: Any) -> trainfn.FitResult:
    options = {"loss": "classification", "batch_size": 4, "device": "cpu", "progress": False, "max_epochs": 2}
    return trainfn.fit(make_model(), (X, Y), **(options | settings))


# --- operations -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).split(8, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_is_counted_on_a_cpu_too() -> None:
    model, optimizer = Attention(), trainfn.optim.sgd(lr=0.1)
    step = trainfn.make_step(model, loss="mse", optimizer=optimizer)
    batch = (torch.randn(3, 5, 8), torch.randn(3, 5, 8))
    project, attend = 2 * 3 * 5 * 8 * 24, 2 * 3 * 5 * 5 * 8  # of one product each
    expected = project * 2 + attend * 2 * 3  # the data need no gradient; of two products, four backward
    assert count_flops(step, trainfn.init(model, optimizer), batch) == expected


def test_counting_changes_nothing_and_what_is_recomputed_does_not_count() -> None:
    plain, optimizer = make_model(), trainfn.optim.sgd(lr=0.1)
    before, draws = trainfn.tree.digest(dict(plain.named_parameters())), torch.get_rng_state()
    for names in (None, "0"):
        step = trainfn.make_step(plain, loss="classification", optimizer=optimizer, checkpoint=names)
        assert count_flops(step, trainfn.init(plain, optimizer), (X[:4], Y[:4])) == STEP
    assert trainfn.tree.digest(dict(plain.named_parameters())) == before
    assert torch.equal(torch.get_rng_state(), draws)


def test_the_history_and_the_header_say_how_much_of_the_peak_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    result = train(peak_flops=1e9, progress=True, log_every=3)
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("roofline"))
    size = f"{STEP / 1e3:.3g}"
    assert said == f"roofline  {size} kFLOP a step (counted), peak 1 GFLOP/s (given): at least {size} us a step"
    for row in (*result.history, *result.epochs):
        assert row["mfu"] == pytest.approx(row["examples_per_second"] / 4 * STEP / 1e9, rel=1e-3)
    assert "mfu" not in train().history[-1]  # control: nobody knows what this machine can do
    accumulated = train(peak_flops=1e9, accumulate=3, batch_size=4)
    row = accumulated.epochs[-1]
    assert row["mfu"] == pytest.approx(row["examples_per_second"] / 4 * STEP / 1e9, rel=1e-3)


def test_a_model_whose_operations_cannot_be_counted_is_trained_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise RuntimeError("no such mode")

    monkeypatch.setattr("trainfn.flops.count_flops", refuse)
    with pytest.warns(FlopsWarning, match="not counted: no such mode"):
        assert train(peak_flops=1e9).state.cursor == 12


@pytest.mark.parametrize(
    ("title", "precision", "teraflops", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4, 3350),
        ("NVIDIA H100 PCIe", "32-true", 51, 2000),
        ("NVIDIA A100-SXM4-40GB", "16-mixed", 312, 1555),
        ("Tesla T4", "16-mixed", 65, 320),
        ("Tesla T4", "bf16-mixed", 0, 320),
        ("NVIDIA L40S", "bf16-true", 362, 864),
        ("NVIDIA L40", "bf16-true", 0, None),
        ("NVIDIA RTX A1000", "32-true", 0, None),
    ],
)
def test_peaks_are_those_of_the_named_device(
    title: str, precision: str, teraflops: float, gigabytes: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: title)
    peak, bandwidth, _ = _peak(torch.device("cuda"), precision)
    assert (peak, bandwidth) == (teraflops * 1e12, None if gigabytes is None else gigabytes * 1e9)


# --- parameters -------------------------------------------------------------------------------------------------------


def test_the_table_says_what_is_trained_and_the_gradient_norms() -> None:
    freeze = trainfn.optim.freeze(lambda name, param: name.startswith("0."))
    optimizer = trainfn.optim.chain(freeze, trainfn.optim.sgd(lr=0.1))
    result = train(optimizer=optimizer, health_every=3)
    lines = trainfn.summary(result).splitlines()
    cells = {line.split()[0]: line.split() for line in lines[1:-1]}
    norms = result.history[-1]["grad_norms"]
    assert cells["0.weight"] == ["0.weight", "8", "x", "6", "float32", "48", "frozen"]
    assert cells["2.bias"] == ["2.bias", "2", "float32", "2", "yes", f"{norms['2.bias']:.4g}"]
    assert lines[-1] == "74 parameters in 4 tensors, 18 trained, 56 frozen"
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    assert trainfn.summary(result, depth=1).splitlines()[2].split()[-2:] == ["18", f"{whole:.4g}"]
    plain = trainfn.summary(make_model())
    assert "frozen\n" not in plain
    assert plain.endswith("74 trained, 0 frozen")
    with pytest.raises(ConfigError, match="no summary of this"):
        trainfn.summary(3)  # type: ignore[arg-type]
    for depth in (0, "1"):
        with pytest.raises(ConfigError, match="counts names"):
            trainfn.summary(make_model(), depth=depth)  # type: ignore[arg-type]


# --- profiles ---------------------------------------------------------------------------------------------------------


def test_a_profile_is_of_the_steps_of_the_run(tmp_path: Path) -> None:
    model = make_model()
    before = trainfn.tree.digest(dict(model.named_parameters()))
    found = trainfn.profile(
        model, (X, Y), loss="classification", batch_size=4, steps=3, warmup=1, trace=tmp_path / "new" / "trace.json",
        device="cpu", max_steps=50, compile="eager", out_dir=tmp_path / "run", resume="auto",
    )  # fmt: skip
    assert trainfn.tree.digest(dict(model.named_parameters())) == before
    assert not (tmp_path / "run").exists()
    assert found.trace is not None
    events = json.loads(found.trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "trainfn step" and event.get("ph") == "X" for event in events) == 3
    assert "aten::addmm" in str(found)
    assert 0 < found.seconds < 5
    with pytest.raises(ConfigError, match="shorter than"):
        trainfn.profile(model, (X, Y), loss="classification", max_steps=2, device="cpu")
    with pytest.raises(ConfigError, match=r"A trace is a file[^$]*trace\.json"):
        trainfn.profile(model, (X, Y), loss="classification", trace=found.trace.parent)
    for steps in (0, "5"):
        with pytest.raises(ConfigError, match="needs steps"):
            trainfn.profile(model, (X, Y), loss="classification", steps=steps)  # type: ignore[arg-type]


def test_a_profile_is_of_the_run_that_a_configuration_describes() -> None:
    options: dict[str, Any] = {"loss": "classification", "device": "cpu", "steps": 1, "warmup": 1}
    config = trainfn.TrainConfig.preset("production", max_steps=9, out_dir="never_made", eval_every=4)
    assert trainfn.profile(make_model(), (X, Y), config=config, **options).seconds > 0
    assert not Path("never_made").exists()
    with pytest.raises(ConfigError, match=r"shorter than[^$]*got: 1"):  # it is as long as the configuration says
        trainfn.profile(make_model(), (X, Y), config=config.evolve(max_steps=1), **options)


def test_the_header_of_a_plan_has_no_roofline_unless_it_is_known() -> None:
    made = trainfn.plan(make_model(), (X, Y), loss="classification", max_steps=1, device="cpu")
    assert not any(line.startswith("roofline") for line in header(made))
