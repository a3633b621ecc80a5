"""Every field of ``TrainConfig`` and of ``TaskSpec`` acts: changing it changes the run, or what is said of it.

The fields are collected from the classes. A new one fails here until it has a line in ``SETTINGS`` or ``TASKS``:

    "max_seconds": Change(1e-9, "rows"),

the other value, and which part of ``RUN`` must then differ. A third argument holds what both runs are given besides: a
setting or an argument of ``fit``, a ``model``, and for tasks the other fields of the ``task``. A function in place of
the value is called with an empty directory.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing.process
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor, nn

import trainfn
from tests.strategies import Loud
from trainfn import TaskSpec, TrainConfig
from trainfn.errors import TrainfnError
from trainfn.header import header
from trainfn.health import HealthWarning
from trainfn.result import CLOCK
from trainfn.store import CheckpointWarning, rows
from trainfn.tree import digest

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(10, 4, generator=GENERATOR)
Y = torch.arange(10) % 3
IMAGES = torch.randint(0, 256, (10, 1, 2, 2), generator=GENERATOR, dtype=torch.uint8)
IDS = torch.randint(4, 20, (10, 6), generator=GENERATOR)
SPIKE = torch.stack([torch.randn(240, generator=GENERATOR), torch.ones(240)], 1)
SPIKE[220, 1] = 300.0

RUN = {
    "params": "the trained parameters, to the bit",
    "rows": "the history, but for seconds and throughput",
    "best": "the step of the best row",
    "files": "what lies in the run directory",
    "header": "what is said before the first step",
    "warnings": "warnings of the house",
    "error": "the error that ends the run",
    "helpers": "threads and processes that were started",
}
BASE = {"loss": "classification", "batch_size": 4, "max_steps": 4, "lr": 0.05, "log_every": 1, "device": "cpu"}


class Flat(nn.Module):
    """Numbers of any shape to three, with dropout, so that the seed matters more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(nn.functional.dropout(x.float().flatten(1), 0.1, self.training))
        return out


class Attending(Flat):
    def forward(self, x: Tensor) -> Tensor:
        heads = x[:, None, :, None]  # (B, 1, 4, 1)
        return super().forward(nn.functional.scaled_dot_product_attention(heads, heads, heads))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.layers(input_ids)
        return out


class Lengthy(list[Any]):
    """Examples that say how long they are."""

    lengths = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)


class Change(NamedTuple):
    """Another value of a field, which part of the run it shows in, and what both runs are given besides."""

    value: Any
    shows: str
    given: Mapping[str, Any] = {}


def earlier(home: Path) -> Path:
    """A run of two steps, to resume from."""
    look(home / "earlier", max_steps=2)
    return home / "earlier"


def taken_away(state: trainfn.TrainState) -> None:
    """An observer: after the second step, the disk refuses."""
    if state.cursor == 2:
        HOMES[-1].rename(HOMES[-1].with_suffix(".gone"))


def bad(*examples: int) -> tuple[Tensor, Tensor]:
    x = X.clone()
    x[list(examples)] = torch.nan
    return x, Y


NUMB = {"data": bad(*range(10)), "check_data": False}  # nothing is finite
SAVED = {"save_every": 1, "keep_last": 1, "keep_best": 0}
JUDGED = {"save_every": 1, "keep_last": 1, "eval_every": 1}
BACK = {"on_divergence": "rollback", "halt_after": 1, "save_every": 1, "max_steps": 12}
IF_CUDA = "header" if torch.cuda.is_available() else "error"
LATER = {"compile": "eager", "begin": False}  # decided and said, but not run: compilers take seconds

SETTINGS: dict[str, Change] = {
    "max_steps": Change(3, "params"),
    "max_epochs": Change(1, "params"),
    "max_seconds": Change(1e-9, "rows"),
    "early_stopping_patience": Change(1, "rows", {"mode": "max", "eval_every": 1}),
    "min_delta": Change(100.0, "rows", {"early_stopping_patience": 1, "eval_every": 1}),
    "overfit_batches": Change(1, "params"),
    "limit_train_batches": Change(1, "params"),
    "limit_eval_batches": Change(1, "rows"),
    "batch_size": Change(3, "params"),
    "accumulate": Change(2, "params"),
    "lr": Change(0.01, "params"),
    "warmup_steps": Change(2, "params"),
    "clip_norm": Change(0.01, "rows", {"optimizer": trainfn.optim.sgd(lr=0.1)}),
    "precision": Change("bf16-mixed", "params"),
    "ema": Change(0.5, "rows"),
    "eval_every": Change(1, "rows"),
    "log_every": Change(2, "rows"),
    "save_every": Change(1, "files", {"keep_last": None}),
    "save_every_minutes": Change(1e-9, "files", {"keep_last": None}),
    "save_async": Change(False, "helpers"),
    "on_save_error": Change("warn", "error", {"save_every": 1, "observers": [taken_away]}),
    "keep_last": Change(2, "files", SAVED),
    "keep_best": Change(0, "files", JUDGED | {"mode": "max"}),
    "keep_every": Change(3, "files", SAVED),
    "monitor": Change("loss", "best", {"mode": "max"}),
    "mode": Change("max", "files", JUDGED),
    "out_dir": Change(None, "files"),
    "resume": Change(earlier, "rows"),
    "seed": Change(1, "params"),
    "shuffle": Change(False, "params"),
    "group_by_length": Change(True, "params", {"data": Lengthy(zip(X, Y, strict=True))}),
    "drop_last": Change(True, "params"),
    "workers": Change(1, "helpers"),
    "check_data": Change(False, "error", {"data": bad(9)}),
    "worker_timeout": Change(60, "helpers", {"workers": 1}),
    "device": Change("cuda", IF_CUDA, LATER),
    "compile": Change("graph", "header", LATER),
    "cuda_graph": Change(True, IF_CUDA, LATER | {"device": "auto"}),
    "checkpoint": Change("layer", "header"),
    "attention": Change("math", "header", {"model": Attending}),
    "halt_after": Change(2, "rows", NUMB),
    "on_divergence": Change("rollback", "error", {"data": bad(0), "check_data": False, "halt_after": 1}),
    "max_rollbacks": Change(1, "rows", NUMB | BACK),
    "rollback_lr_factor": Change(0.5, "rows", NUMB | BACK),
    "on_spike": Change(
        "skip",
        "params",
        {"model": Loud, "data": (SPIKE, SPIKE[:, :1]), "loss": "mse", "shuffle": False, "max_steps": 57},
    ),
    "health_every": Change(2, "rows"),
    "noise_scale_every": Change(2, "rows"),
    "peak_flops": Change(1e9, "header"),
    "progress": Change(False, "header"),
    "fast_dev_run": Change(True, "files"),
}

NAMED = {"a": X, "b": X + 1, "right": Y, "wrong": 2 - Y}
BY_NAME = {"data": NAMED, "task": {"kind": "tabular", "inputs": ["a"], "target": "right"}}
TABLE = {"task": {"kind": "tabular"}}
PHOTOS = {"data": (IMAGES, Y), "task": {"kind": "vision_classification"}}
SEVERAL = (X, torch.stack([X[:, 0] > 0] * 3, 1).float())
PADDED = {"data": IDS, "model": Words, "task": {"kind": "language_modeling", "special_tokens": {"pad": int(IDS[0, 0])}}}
MASKED = {
    "data": {"input_ids": IDS},
    "model": Words,
    "task": {
        "kind": "masked_language_modeling",
        "special_tokens": {"mask": 1},
        "collate_options": {"vocab_size": 20, "probability": 0.5},
    },
}

TASKS: dict[str, Change] = {
    "kind": Change("multi_label", "params", {"data": SEVERAL, "task": {"kind": "regression"}}),
    "name": Change("irises", "header", TABLE),
    "modality": Change("table", "params", PHOTOS),
    "inputs": Change({"b": "x"}, "params", BY_NAME),
    "target": Change("wrong", "params", BY_NAME),
    "loss": Change("l1", "params", {"data": SEVERAL, "task": {"kind": "regression"}}),
    "loss_options": Change({"label_smoothing": 0.3}, "params", TABLE),
    "metrics": Change(("accuracy", "f1"), "rows", TABLE),
    "ignore_index": Change(2, "params", TABLE),
    "ignore": Change(("pad",), "params", PADDED),
    "collate": Change("default", "params", PHOTOS),
    "collate_options": Change({"mean": 0.5, "std": 0.5}, "params", PHOTOS),
    "special_tokens": Change({"mask": 1, "cls": 7, "sep": 8}, "params", MASKED),
    "shapes": Change({"x": (5,)}, "error", {"task": {"kind": "tabular", "shapes": {"x": (4,)}}}),
}

TABLES: dict[type, tuple[str, dict[str, Change]]] = {TrainConfig: ("SETTINGS", SETTINGS), TaskSpec: ("TASKS", TASKS)}
FIELDS = [(owner, field.name) for owner in TABLES for field in attrs.fields(owner)]  # type: ignore[misc]
HOMES: list[Path] = []


# --- looking at a run -------------------------------------------------------------------------------------------------


def look(home: Path, *, model: Callable[[], nn.Module] = Flat, begin: bool = True, **given: Any) -> dict[str, Any]:
    """Return what a run leaves, part by part as in ``RUN``."""
    HOMES.append(home)
    torch.manual_seed(0)
    data = given.pop("data", (X, Y))
    options = BASE | {"out_dir": home, "val_data": data} | given
    if options.get("optimizer") is not None:
        del options["lr"]
    if "task" in options:
        del options["loss"]
        options["task"] = TaskSpec(**options["task"])
    seen: dict[str, Any] = dict.fromkeys(RUN)
    said = io.StringIO()
    with watched() as seen["helpers"], told() as seen["warnings"], contextlib.redirect_stderr(said):
        try:
            if begin:
                result = trainfn.fit(model(), data, **options)
                best = result.best and result.best["step"]
                seen |= {"params": digest(result.state.params), "rows": result.history, "best": best}
            else:
                options.pop("observers", None)
                print(*header(trainfn.plan(model(), data, **options)), sep="\n", file=said)
        except TrainfnError as error:
            seen["error"] = f"{type(error).__name__}: {error.what}"
            seen["rows"] = list(rows(home / "history.jsonl")) if (home / "history.jsonl").exists() else []
    seen["rows"] = [{name: value for name, value in row.items() if name not in CLOCK} for row in seen["rows"] or []]
    seen["files"] = sorted(path.name for path in home.iterdir()) if home.exists() else []
    before_steps = said.getvalue().partition("\nstart ")
    seen["header"] = [line.replace(str(home), "HOME") for line in before_steps[0].splitlines()]
    return seen


@contextlib.contextmanager
def watched() -> Any:
    """Note the threads and processes that are started."""
    names: list[str] = []

    def noting(kind: type) -> Callable[[Any], None]:
        start = kind.start  # type: ignore[attr-defined]

        def noted(self: Any) -> None:
            names.append(f"{kind.__name__} {'' if kind is multiprocessing.process.BaseProcess else self.name}")
            start(self)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for kind in (threading.Thread, multiprocessing.process.BaseProcess):
            patch.setattr(kind, "start", noting(kind))
        yield names


@contextlib.contextmanager
def told() -> Any:
    """Note the house's warnings; any other one is an error, as everywhere."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        for kind in (HealthWarning, CheckpointWarning):
            warnings.simplefilter("always", kind)
        yield texts
    texts += [str(each.message) for each in caught]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that all changes without further needs are compared with."""
    return look(tmp_path_factory.mktemp("baseline") / "run")


# --- the law ----------------------------------------------------------------------------------------------------------


def acts(owner: type, field: str, change: Change | None, home: Path, baseline: dict[str, Any]) -> None:
    """Hold that changing a field changes that part of the run which its entry names."""
    table = TABLES[owner][0]
    if change is None:
        pytest.fail(
            f"{owner.__name__}.{field} has no entry: add a line to {table} in tests/test_fields.py, "
            f'"{field}": Change(another value, one of {", ".join(map(repr, RUN))})'
        )
    value = change.value(home) if callable(change.value) else change.value
    given = dict(change.given)
    changed = given | ({field: value} if owner is TrainConfig else {"task": given.get("task", {}) | {field: value}})
    then = look(home / "then", **given) if given else baseline
    now = look(home / "now", **changed)
    assert now[change.shows] != then[change.shows], (
        f"{owner.__name__}.{field}={value!r} changes nothing in {change.shows} ({RUN[change.shows]}): "
        f"{now[change.shows]}; it changes {[part for part in RUN if now[part] != then[part]] or 'nothing'}"
    )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("owner", "field"), FIELDS, ids=[f"{owner.__name__}.{field}" for owner, field in FIELDS])
def test_every_field_acts(owner: type, field: str, tmp_path: Path, baseline: dict[str, Any]) -> None:
    acts(owner, field, TABLES[owner][1].get(field), tmp_path, baseline)


def test_no_entry_is_without_a_field() -> None:
    assert {(owner, name) for owner, (_, table) in TABLES.items() for name in table} == set(FIELDS)


# --- controls ---------------------------------------------------------------------------------------------------------


def test_control_the_same_run_twice_is_the_same(tmp_path: Path, baseline: dict[str, Any]) -> None:
    assert look(tmp_path / "run") == baseline
    assert all(baseline[part] for part in RUN if part not in ("warnings", "error"))
    assert (baseline["warnings"], baseline["error"]) == ([], None)


def test_control_a_field_without_an_entry_is_found_out(tmp_path: Path, baseline: dict[str, Any]) -> None:
    with pytest.raises(pytest.fail.Exception, match=r'add a line to SETTINGS in .*, "idle": Change'):
        acts(TrainConfig, "idle", SETTINGS.get("idle"), tmp_path, baseline)


def test_control_a_field_that_does_nothing_is_found_out(
    tmp_path: Path, baseline: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @attrs.frozen(kw_only=True)
    class Idle(TrainConfig):
        idle: int = attrs.field(default=0, metadata=attrs.fields_dict(TrainConfig)["seed"].metadata)

    monkeypatch.setattr(sys.modules[TrainConfig.__module__], "TrainConfig", Idle)
    with pytest.raises(AssertionError, match=r"idle=1 changes nothing in params.*; it changes nothing"):
        acts(TrainConfig, "idle", Change(1, "params"), tmp_path, baseline)


# --- what does not change the bits ------------------------------------------------------------------------------------


def bits(home: Path, **given: Any) -> dict[int, str]:
    """The states of steps 3 and 4 of a run that goes on after its second step, with other settings, to the bit."""
    seen: dict[int, str] = {}
    shutil.copytree(home.parent / "begun", home)
    optimizer = given.pop("optimizer", trainfn.optim.adamw(lr=0.05))
    watch = {"observers": [lambda state: seen.update({state.cursor: digest(state.params)})], "optimizer": optimizer}
    found = look(home, **{"resume": "auto"} | given | watch)
    assert found["error"] is None
    return seen


ENDS_AT_ONCE = ("max_seconds", "fast_dev_run", "out_dir", "resume")
HARMLESS = [
    field.name
    for field in attrs.fields(TrainConfig)
    if not field.metadata["bits"] and field.name not in ENDS_AT_ONCE and field.name in SETTINGS
    if not {"data", "observers", "begin"} & SETTINGS[field.name].given.keys()
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("field", [*HARMLESS, "clip_norm"])
def test_a_run_goes_on_bit_for_bit_where_a_setting_says_so(field: str, tmp_path: Path) -> None:
    change, is_control = SETTINGS[field], field not in HARMLESS
    optimizer = change.given.get("optimizer", trainfn.optim.adamw(lr=0.05))
    plain = {name: value for name, value in change.given.items() if name in SETTINGS}
    look(tmp_path / "begun", max_steps=2, optimizer=optimizer, **plain)
    then, now = bits(tmp_path / "then", **change.given), bits(tmp_path / "now", **{**change.given, field: change.value})
    common = then.keys() & now.keys()
    assert common
    assert ({step: then[step] for step in common} != {step: now[step] for step in common}) == is_control
