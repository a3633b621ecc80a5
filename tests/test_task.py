"""``TaskSpec``: every kind trains by its name alone, and a task goes through JSON and back."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from trainfn import TaskSpec
from trainfn.errors import ConfigError, DataError
from trainfn.header import header
from trainfn.store import inspect
from trainfn.task import kinds, make_task
from trainfn.tree import digest

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=GENERATOR)
Y = torch.arange(24) % 3
IMAGES = torch.randint(0, 256, (24, 1, 2, 2), generator=GENERATOR, dtype=torch.uint8)
IDS = torch.randint(4, 20, (24, 6), generator=GENERATOR)


class Flat(nn.Module):
    """Numbers of any shape to three."""

    def __init__(self, outputs: int = 3, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.float().flatten(1))
        return out


class Words(nn.Module):
    def __init__(self, outputs: int = 20) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, outputs))

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.layers(input_ids)
        return out


class Pooled(Words):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).mean(1)


MODELS: dict[str, Any] = {
    "language_modeling": Words,
    "masked_language_modeling": Words,
    "seq2seq": Words,
    "text_classification": lambda: Pooled(3),
    "vision_classification": lambda: Flat(3, 3 * 32 * 32),
    "segmentation": lambda: nn.Conv2d(3, 5, 1),
    "multi_label": lambda: Flat(2, 8),
    "regression": lambda: Flat(1, 8),
    "tabular": lambda: Flat(3, 8),
}


def plan(data: Any, model: Any, task: Any, **settings: Any) -> trainfn.Plan:
    torch.manual_seed(0)
    return trainfn.plan(model(), data, task=task, device="cpu", **({"max_steps": 3, "batch_size": 8} | settings))


def fit(data: Any, model: Any, task: Any = None, **settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    options = {"max_steps": 3, "batch_size": 8, "device": "cpu", "progress": False} | settings
    return trainfn.fit(model(), data, task=task, **options)


# --- presets


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_trains_by_its_name_alone(kind: str) -> None:
    task = TaskSpec(kind=kind)
    data = task.example(16)
    result = fit(data, MODELS[kind], kind, val_data=data, max_steps=4, lr=0.1)
    assert result.state.cursor == 4
    last = result.history[-1]
    assert last["val_loss"] < 10
    assert {f"val_{name}" for name in task.metrics_in_use} <= set(last)
    items = [{name: leaf[i] for name, leaf in data.items()} for i in range(16)]
    assert digest(fit(items, MODELS[kind], kind, max_steps=4, lr=0.1).state.params) == digest(result.state.params)


def test_no_kind_is_without_a_model_to_test_it() -> None:
    assert set(MODELS) == set(kinds())


def test_masked_language_modeling_makes_its_labels_of_the_tokens() -> None:
    task = TaskSpec(kind="masked_language_modeling", special_tokens={"mask": 1}, collate_options={"vocab_size": 20})
    result = fit([row.tolist() for row in IDS], Words, task, log_every=1, max_steps=20, lr=0.05)
    weights = [row["weight"] for row in result.history]
    assert 3 < sum(weights) / len(weights) < 12, "15 % of 48 tokens"
    assert len(set(weights)) > 1
    with pytest.raises(DataError, match="no target"):
        fit({"input_ids": IDS}, Words, "masked_language_modeling")
    with pytest.raises(ConfigError, match="vocab_size"):
        fit({"input_ids": IDS}, Words, task.evolve(collate_options={}))


# --- where it is said


def test_the_task_is_in_the_header_and_in_the_checkpoint(tmp_path: Any) -> None:
    task = TaskSpec(kind="tabular", name="irises")
    planned = plan((X, Y), Flat, task, val_data=(X, Y))
    (line,) = [line for line in header(planned) if line.startswith("task")]
    assert line.split(maxsplit=1)[1] == (
        "irises (tabular), table: loss classification, collator table, ignoring label -100, measuring accuracy"
    )
    fit((X, Y), Flat, task, out_dir=tmp_path)
    assert TaskSpec.from_json(inspect(tmp_path).config["task"]) == task
    assert "task" not in plan((X, Y), Flat, None, loss="classification").record["config"]


# --- what comes before what


def test_what_is_passed_comes_before_the_task() -> None:
    planned = plan((X, Y), Flat, "tabular", loss="low_precision_safe(classification)", val_data=(X, Y), metrics=["f1"])
    assert planned.record["config"]["loss"] == "low_precision_safe(classification)"
    assert [metric.name for metric in planned.metrics] == ["f1"]
    assert plan((X, Y), Flat, TaskSpec(kind="tabular", metrics=()), val_data=(X, Y)).metrics == ()

    def own(outputs: Any, batch: Any) -> Tensor:
        return outputs.square().mean()  # type: ignore[no-any-return]

    by_hand, by_task = (fit((X, Y), Flat, "tabular", **given) for given in ({"loss": own}, {}))
    assert digest(by_hand.state.params) != digest(by_task.state.params)
    assert digest(by_hand.state.params) == digest(fit((X, Y), Flat, loss=own).state.params)
    with pytest.raises(ConfigError, match="does not fit the loss"):
        plan((X, X[:, :3]), Flat, "tabular", loss="mse", val_data=(X, X[:, :3]))


def test_neither_a_loss_nor_a_task() -> None:
    with pytest.raises(ConfigError, match="what to train for"):
        fit((X, Y), Flat)


# --- fields by name

NAMED = {"a": X, "b": X + 1, "right": Y, "wrong": 2 - Y}


def test_fields_are_chosen_and_renamed_in_items_tensors_and_tuples() -> None:
    task = TaskSpec(kind="tabular", inputs={"a": "x"}, target="right")
    items = [{name: leaf[i] for name, leaf in NAMED.items()} for i in range(24)]
    want = digest(fit((X, Y), Flat, loss="classification").state.params)
    for data in (NAMED, items):
        assert digest(fit(data, Flat, task).state.params) == want
    assert digest(fit((X, Y), Flat, TaskSpec(kind="tabular", inputs=["x"])).state.params) == want
    assert set(plan((X, Y), Flat, TaskSpec(kind="tabular", inputs=["x"])).loader.batch(0)) == {"x", "labels"}


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        (NAMED, {"inputs": ["aa"]}, "did you mean 'a'"),
        (NAMED, {"inputs": ["a"], "target": "rigt"}, "did you mean 'right'"),
        ((X, Y), {"target": "y"}, "no fields by name"),
        ((X, X, X, Y), {"inputs": ["x"]}, "no fields by name"),
        ((X, Y), {"shapes": {"x": (4,), "z": (1,)}}, "field that is not there"),
    ],
)
def test_fields_that_are_not_there(data: Any, fields: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit(data, Flat, TaskSpec(kind="tabular", **fields))


def test_an_image_of_another_shape_is_refused() -> None:
    task = TaskSpec(kind="vision_classification", shapes={"image": (1, None, 2)})
    assert fit((IMAGES, Y), Flat, task).state.cursor == 3
    data = [(IMAGES[i] if i < 23 else IMAGES[i, :, :, :1].repeat(1, 1, 3), int(Y[i])) for i in range(24)]
    with pytest.raises(DataError, match=r"\[1, 2, 3\]"):
        fit(data, Flat, task, batch_size=1, shuffle=False)


# --- what is not learned


def test_tokens_that_are_not_learned_do_not_count() -> None:
    """Text that comes padded and without a mask: as many labels as there are words after the first."""
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]] * 4)
    task = TaskSpec(kind="language_modeling", special_tokens={"pad": 0}, ignore="pad")
    counted = {}
    for name, spec in {"pad": task, "none": task.evolve(ignore=())}.items():
        for data in (ids, {"input_ids": ids}, {"input_ids": ids, "labels": ids}, [{"input_ids": row} for row in ids]):
            counted.setdefault(name, set()).add(fit(data, Words, spec, max_steps=1, log_every=1).history[0]["weight"])
    assert counted == {"pad": {4 * (2 + 1.0)}, "none": {4 * (4 + 4.0)}}
    masked = {"input_ids": ids, "attention_mask": (torch.arange(5) < 2).expand(8, 5).long()}
    assert fit(masked, Words, task, max_steps=1, log_every=1).history[0]["weight"] == 8.0
    with pytest.raises(DataError, match="no labels in which tokens could be ignored"):
        fit({"tokens": ids}, Words, task)
    with pytest.raises(ConfigError, match=r"ignore=bos, eos \(no such special token"):
        task.evolve(ignore=["bos", "eos"])


# --- mistakes, and JSON


def test_all_mistakes_of_a_task_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        TaskSpec(
            kind="regresion",
            modality="txt",
            collate="imgae",
            ignore_index=1.5,  # type: ignore[arg-type]
            inputs=["a", "b"],
            target="a",
            special_tokens={"pad": -1},
            shapes={"x": (-1,)},
        )
    for word in ("'regression'", "'text'", "'image'", "1.5", "special_tokens={'pad': -1}", "shapes={'x': (-1,)}"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match=r"one of the inputs\n.*gives two fields one name"):
        TaskSpec(kind="regression", inputs={"a": "x", "b": "x"}, target="a")
    with pytest.raises(ConfigError, match=r"los \(did you mean 'loss'\?\)\n *kind='mlm' \(here it is called"):
        TaskSpec(kind="mlm", los="l1")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="kind is missing"):
        TaskSpec.from_json({"version": 1})


junk: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([X, object(), b""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
FIELDS = [field.name for field in attrs.fields(TaskSpec)]


@given(st.dictionaries(st.sampled_from([*FIELDS, "losss"]), junk, max_size=4))
def test_whatever_is_not_refused_goes_through_json_and_back(fields: dict[str, Any]) -> None:
    try:
        task = TaskSpec(**{"kind": "tabular"} | fields)
        written = json.loads(json.dumps(task.to_json()))
    except ConfigError:
        return
    assert repr(TaskSpec.from_json(written)) == repr(task), "repr, because NaN is not NaN"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("vision_clasification", "did you mean 'vision_classification'"),
        ("mlm", "here it is called 'masked_language_modeling'"),
        ({"kind": "regression", "los": "l1"}, r"los \(did you mean 'loss'"),
        (3, "neither a kind nor a TaskSpec"),
        (TaskSpec(kind="regression", loss="msee"), "did you mean 'mse'"),
        (TaskSpec(kind="regression", loss_options={"detla": 1.0}), "no such option"),
        (TaskSpec(kind="tabular", collate_options={"column": []}), "did you mean 'columns'"),
    ],
)
def test_tasks_that_are_none(task: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit((X, Y), Flat, task)


words = st.text("abc_", min_size=1, max_size=5)
specs = st.builds(
    TaskSpec,
    kind=st.sampled_from(kinds()),
    name=st.text(max_size=8),
    modality=st.none() | st.sampled_from(["text", "image", "table"]),
    inputs=st.lists(words, unique=True, max_size=3) | st.dictionaries(words, st.just("x"), max_size=1),
    target=st.none() | st.just("the target"),
    loss=st.none() | words,
    loss_options=st.dictionaries(words, st.floats(allow_nan=False) | st.integers() | st.booleans(), max_size=2),
    metrics=st.none() | st.lists(words, max_size=2),
    ignore_index=st.integers(-200, 200),
    ignore=st.just(()) | st.just("pad"),
    collate=st.none() | st.sampled_from(["text", "default"]),
    collate_options=st.dictionaries(words, st.integers(), max_size=2),
    special_tokens=st.dictionaries(words, st.integers(0, 9), max_size=2).map(lambda tokens: tokens | {"pad": 0}),
    shapes=st.dictionaries(words, st.lists(st.none() | st.integers(0, 9), max_size=3), max_size=2),
)


@given(specs)
def test_a_task_goes_through_json_and_back(task: TaskSpec) -> None:
    there = json.loads(json.dumps(task.to_json()))
    assert TaskSpec.from_json(there) == task
    assert there["version"] == 1
    assert make_task(task) is task
    assert task.evolve() == task


def test_a_task_of_another_version_is_refused() -> None:
    written = TaskSpec(kind="regression").to_json()
    for version in (0, 2, None, "1"):
        with pytest.raises(ConfigError, match="version 1"):
            TaskSpec.from_json(written | {"version": version})
    with pytest.raises(ConfigError, match=r"0 to 1, kinds by other names \(kind mlm -> masked_language_modeling\)"):
        TaskSpec.from_json({"version": 0, "kind": "mlm"})
    assert TaskSpec.from_json({"version": 0, "kind": "mlm"}, migrate=True) == TaskSpec(kind="masked_language_modeling")
    with pytest.raises(ConfigError, match="metricss"):
        TaskSpec.from_json(written | {"metricss": []})


def test_a_task_cannot_be_written_to() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        TaskSpec(kind="regression").loss = "l1"  # type: ignore[misc]
