"""Loggers: each writes the numbers of the rows, at their steps, as its own reader reads them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainfn
from trainfn.errors import ConfigError, MissingPackageError
from trainfn.loggers import CSV, JSONL, MLflow, TensorBoard, WandB

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def train(*loggers: Any, **settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    options = {"loss": "classification", "batch_size": 4, "device": "cpu", "progress": False, "max_epochs": 2}
    options |= {"val_data": (X, Y), "log_every": 2, "health_every": 4}
    return trainfn.fit(nn.Linear(4, 2), (X, Y), observers=list(loggers), **(options | settings))


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows]


def test_jsonl_is_the_history_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "rows.jsonl"

    def fail(state: trainfn.TrainState) -> None:
        if state.cursor == 7:
            (run / "step_00000006").rename(tmp_path / "lost")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        train(JSONL(file), fail, out_dir=run, save_every=2, keep_last=None, save_async=False)
    train(JSONL(file), out_dir=run, resume="auto")
    assert file.read_text() == (run / "history.jsonl").read_text()


def test_csv_has_a_column_for_each_number_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    table, epochs = tmp_path / "rows.csv", tmp_path / "epochs.csv"
    train(CSV(table), out_dir=tmp_path / "run", max_epochs=1)
    result = train(CSV(table), CSV(epochs, epochs=True), out_dir=tmp_path / "run", resume="auto")
    with open(table, newline="") as file:
        read = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["loss"])) for row in read] == losses(result.history)
    assert [row["val_loss"] for row in read if row["val_loss"]] == [
        str(row["val_loss"]) for row in result.history if "val_loss" in row
    ]
    with open(epochs, newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["grad_norm_max"]) == result.epochs[-1]["grad_norm_max"]


def test_a_table_is_of_one_run(tmp_path: Path) -> None:
    logger = CSV(tmp_path / "rows.csv")
    for _ in range(2):  # another run with the same logger begins anew, as with another logger
        result = train(logger)
    with open(tmp_path / "rows.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [row["step"] for row in result.history]
    train(out_dir=tmp_path / "run", max_epochs=1)
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"not one of this logger's[^$]*mine\.csv[^$]*a column called step"):
        train(CSV(tmp_path / "mine.csv"), out_dir=tmp_path / "run", resume="auto")
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
    with pytest.raises(ConfigError, match="A directory cannot be written to"):
        train(CSV(tmp_path))


def test_tensorboard_reads_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(TensorBoard(tmp_path))
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(each.step, each.value) for each in read.Scalars("loss")] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in losses(result.history)
    ]
    assert [each.step for each in read.Scalars("epochs/loss")] == [6, 12]
    assert {"val_loss", "grad_norms/weight", "examples_per_second"} <= set(read.Tags()["scalars"])


def test_wandb_offline_holds_the_numbers(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    train(WandB("tests", dir=str(tmp_path), settings=wandb.Settings(console="off", silent=True)))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for word in (b"val_loss", b"epochs/grad_norm_max", b"examples_per_second", b"batch_size"):
        assert word in written


def test_mlflow_reads_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}"
    result = train(MLflow(uri, name="mine"))
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("trainfn").experiment_id])
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")] == losses(
        result.history
    )
    assert (run.info.status, run.data.params["batch_size"]) == ("FINISHED", "4")
    assert run.data.metrics["epochs/steps"] == 6


def test_without_its_package_a_logger_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str, *rest: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", absent)
    makers: dict[str, Callable[[], object]] = {
        "tensorboard": lambda: TensorBoard(tmp_path), "wandb": lambda: WandB("p"), "mlflow": MLflow,
    }  # fmt: skip
    for package, make in makers.items():
        with pytest.raises(MissingPackageError, match=rf"needs the package {package}(?s:.*)pip install {package}"):
            make()


class Failing:
    def on_epoch(self, state: trainfn.TrainState, row: dict[str, Any]) -> None:
        raise KeyError("mine")


def test_an_error_ends_the_log_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for wandb: what it is called with."""
    calls: list[Any] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            json.dumps(numbers)
            calls.append((step, set(numbers)))

        def finish(self, exit_code: int) -> None:
            calls.append(exit_code)

    class Wandb:
        def init(self, **settings: Any) -> Run:
            calls.append(settings["mode"])
            return Run()

    monkeypatch.setattr("importlib.import_module", lambda name: Wandb())
    with pytest.raises(KeyError):
        train(WandB("p"), Failing())
    assert calls[0] == "offline"
    assert calls[-1] == 1
    assert [each[0] for each in calls[1:-1]] == [2, 4, 6, 6]
    calls.clear()
    train(WandB("p"))
    assert calls[-1] == 0
