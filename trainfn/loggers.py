"""Loggers: observers that write the rows of a run where other tools read them.

    fit(model, data, observers=[CSV("runs/gpt/history.csv"), TensorBoard("runs/gpt/board")], ...)

| logger | needs | where it writes |
|---|---|---|
| ``JSONL(path)`` | | a file, one object a line; ``out_dir`` has one anyway, ``history.jsonl`` |
| ``CSV(path)`` | | a table with one column for each number |
| ``TensorBoard(folder)`` | ``tensorboard`` | event files |
| ``WandB(project, ...)`` | ``wandb`` | a run of Weights & Biases, offline unless ``mode="online"`` |
| ``MLflow(uri, ...)`` | ``mlflow`` | a run in a store, such as a database or a folder |

All of them get plain numbers (of a row, not of a state), so none makes a device wait. Numbers are logged at the step of
their row, those of an epoch under ``epochs/``. A resumed run goes on in the same files; W&B and MLflow get a new run,
unless ``WandB(id=...)`` says which.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
from pathlib import Path
from typing import Any

from trainfn.errors import ConfigError, MissingPackageError
from trainfn.plan import Plan
from trainfn.result import FitResult, Row
from trainfn.state import TrainState
from trainfn.store import History, cut


class JSONL:
    """Appends rows to a file, as ``history.jsonl`` in a run directory is: for runs without one, or for a second place.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     JSONL(home + "/rows.jsonl").on_row(None, {"step": 1, "loss": 0.5})
    ...     Path(home, "rows.jsonl").read_text()
    '{"step": 1, "loss": 0.5}\\n'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._history = History(Path(path))

    def on_start(self, plan: Plan) -> None:
        """Drop the rows after the step that the run goes on from."""
        cut(self._history.path, plan.state.cursor)

    def on_row(self, state: TrainState | None, row: Row) -> None:
        """Append the row."""
        self._history.append(row)

    on_epoch = on_row


class CSV:
    """Writes the numbers of rows to a file with a column for each; of the rows of epochs, with ``epochs=True``.

    A row goes to the end of the file; one with a new column has the file written anew.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     table = CSV(home + "/rows.csv")
    ...     table.on_row(None, {"step": 1, "loss": 0.5})
    ...     table.on_row(None, {"step": 2, "loss": 0.25, "val_loss": 1.0})
    ...     Path(home, "rows.csv").read_text().splitlines()
    ['step,loss,val_loss', '1,0.5,', '2,0.25,1.0']
    """

    def __init__(self, path: str | os.PathLike[str], *, epochs: bool = False) -> None:
        self._path, self._epochs = Path(path), epochs
        self._rows: list[dict[str, Any]] = []
        self._columns: dict[str, None] = {}

    def on_start(self, plan: Plan) -> None:
        """Read the rows that are there, without those after the step that the run goes on from.

        Raises:
            ConfigError: the file has no such rows, or the path is a directory.
        """
        self._rows, self._columns = [], {}
        if self._path.is_dir():
            raise ConfigError("A directory cannot be written to.", where=str(self._path), expected="the path of a file")
        if not self._path.exists() or not plan.state.cursor:
            return
        with open(self._path, newline="") as file:
            rows = list(csv.DictReader(file))
        try:
            self._rows = [row for row in rows if int(row["step"]) <= plan.state.cursor]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "The file is not one of this logger's, so it cannot be gone on with.",
                where=str(self._path),
                expected="a column called step, with a number in every row",
                hint="move it aside, or choose another path",
            ) from error
        self._columns = dict.fromkeys(name for row in self._rows for name in row)
        self._write()

    def on_row(self, state: TrainState | None, row: Row) -> None:
        """Write a row of steps."""
        if not self._epochs:
            self._add(row)

    def on_epoch(self, state: TrainState | None, row: Row) -> None:
        """Write a row of an epoch."""
        if self._epochs:
            self._add(row)

    def _add(self, row: Row) -> None:
        flat = {name: value for name, value in row.items() if isinstance(value, (int, float, str)) and name != "kind"}
        self._rows.append(flat)
        if flat.keys() <= self._columns.keys():
            with open(self._path, "a", newline="") as file:
                csv.DictWriter(file, list(self._columns)).writerow(flat)
        else:
            self._columns |= dict.fromkeys(flat)
            self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self._columns))
            writer.writeheader()
            writer.writerows(self._rows)


class TensorBoard:
    """Writes rows as scalars, for ``tensorboard --logdir``; after a resume, later ones of before are hidden.

    Args:
        folder: for the event files.

    Raises:
        MissingPackageError: there is no ``tensorboard``.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder, self._board = os.fspath(folder), _package("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = None

    def on_start(self, plan: Plan) -> None:
        """Begin a file, and note the settings."""
        self._writer = self._board.SummaryWriter(self._folder, purge_step=plan.state.cursor + 1)
        self._writer.add_text("config", f"```\n{json.dumps(plan.record['config'], indent=1)}\n```", plan.state.cursor)

    def on_row(self, state: TrainState | None, row: Row) -> None:
        """Write the numbers of a row."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    on_epoch = on_row

    def on_end(self, result: FitResult | None) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Logs rows to a run of Weights & Biases; without a network unless ``mode="online"``.

    Args:
        project: its name.
        mode: ``"offline"``, ``"online"`` or ``"disabled"``.
        **settings: for ``wandb.init``: ``dir``, ``name``, ``id``, ...

    Raises:
        MissingPackageError: there is no ``wandb``.
    """

    def __init__(self, project: str, *, mode: str = "offline", **settings: Any) -> None:
        self._wandb, self._settings = _package("wandb"), {"project": project, "mode": mode} | settings
        self._run: Any = None

    def on_start(self, plan: Plan) -> None:
        """Begin a run, with the settings as its configuration."""
        self._run = self._wandb.init(**{"config": plan.record["config"]} | self._settings)

    def on_row(self, state: TrainState | None, row: Row) -> None:
        """Log the numbers of a row."""
        self._run.log(_numbers(row), step=row["step"])

    on_epoch = on_row

    def on_end(self, result: FitResult | None) -> None:
        """End the run; as failed, if an error has ended it."""
        if self._run is not None:
            self._run.finish(exit_code=0 if result is not None else 1)


class MLflow:
    """Logs rows to a run of MLflow.

    Args:
        uri: of the store, such as ``"sqlite:///mlflow.db"``, or a folder, ``"file:mlruns"``, for which MLflow 3 wants
            the environment to say ``MLFLOW_ALLOW_FILE_STORE=true``; what MLflow itself would take if None.
        experiment: its name.
        name: of the run; MLflow makes one up if None.

    Raises:
        MissingPackageError: there is no ``mlflow``.
    """

    def __init__(self, uri: str | None = None, *, experiment: str = "trainfn", name: str | None = None) -> None:
        self._client = _package("mlflow").MlflowClient(tracking_uri=uri)
        self._experiment, self._name = experiment, name
        self._id: str | None = None

    def on_start(self, plan: Plan) -> None:
        """Begin a run, with the settings as its parameters."""
        found = self._client.get_experiment_by_name(self._experiment)
        number = self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        self._id = self._client.create_run(number, run_name=self._name).info.run_id
        for name, value in plan.record["config"].items():
            self._client.log_param(self._id, name, str(value)[:500])

    def on_row(self, state: TrainState | None, row: Row) -> None:
        """Log the numbers of a row."""
        for name, value in _numbers(row).items():
            self._client.log_metric(self._id, name, value, step=row["step"])

    on_epoch = on_row

    def on_end(self, result: FitResult | None) -> None:
        """End the run; as failed, if an error has ended it."""
        if self._id is not None:
            self._client.set_terminated(self._id, "FAILED" if result is None else "FINISHED")


def _numbers(row: Row) -> dict[str, float]:
    """Return the numbers of a row, those of each tensor under its name, those of an epoch under ``epochs/``."""
    prefix = "epochs/" if row.get("kind") == "epoch" else ""
    flat = {f"{name}/{inner}": number for name, value in row.items() if isinstance(value, dict)
            for inner, number in value.items()}  # fmt: skip
    return {f"{prefix}{name}": value for name, value in (row | flat).items() if isinstance(value, (int, float))}


def _package(module: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"This logger needs the package {package or module}.", hint=f"pip install {package or module}"
        ) from error
