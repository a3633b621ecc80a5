"""Evaluation of several named sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainfn
from trainfn.errors import ConfigError, DataError
from trainfn.task.sets import named_sets

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
NOISY = X + torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
SETS = {"clean": (X[:20], Y[:20]), "noisy": TensorDataset(NOISY, Y)}


def train(**settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    options = {"loss": "classification", "batch_size": 8, "device": "cpu", "progress": False, "max_steps": 10}
    return trainfn.fit(nn.Linear(4, 2), (X, Y), **(options | settings))


def test_each_set_has_columns_of_its_own_that_are_those_of_the_set_alone() -> None:
    row = train(val_data=SETS, metrics=["accuracy"]).history[-1]
    for name, data in SETS.items():
        alone = train(val_data=data, metrics=["accuracy"]).history[-1]
        assert row[f"val_{name}_loss"] == alone["val_loss"]
        assert row[f"val_{name}_accuracy"] == alone["val_accuracy"]
    assert row["val_clean_loss"] != row["val_noisy_loss"]
    assert "val_loss" not in row


def test_any_of_them_can_be_monitored_and_the_first_is_if_none_is_named() -> None:
    def monitored(**settings: Any) -> str:
        options = {"loss": "classification", "max_steps": 1, "device": "cpu", "val_data": SETS}
        return trainfn.plan(nn.Linear(4, 2), (X, Y), **(options | settings)).retention.monitor

    assert monitored() == "val_clean_loss"
    assert monitored(monitor="val_noisy_accuracy", metrics=["accuracy"]) == "val_noisy_accuracy"
    with pytest.raises(ConfigError, match=r"(?s)Nothing of this name.*val_loss"):
        monitored(monitor="val_loss")
    result = train(val_data=SETS, monitor="val_noisy_loss", eval_every=2)
    assert result.best == min(result.history, key=lambda row: row["val_noisy_loss"])


def test_the_header_and_the_ending_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    train(val_data=SETS, progress=True)
    told = capsys.readouterr().err
    assert "20 clean, 40 noisy to evaluate on" in told
    assert told.splitlines()[-1].count("val_clean_loss") == told.splitlines()[-1].count("val_noisy_loss") == 1


class Items:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


@pytest.mark.parametrize(
    "one", [(X, Y), {"x": X, "y": Y}, Items(), TensorDataset(X, Y), DataLoader(Items()), [(X[0], 1)], [{"x": X[0]}]],
    ids=["tuple", "dict", "items", "dataset", "loader", "list of tuples", "list of dicts"],
)  # fmt: skip
def test_a_dict_of_data_sets_is_several(one: Any) -> None:
    assert list(named_sets({"a": one, "b": one}, (X, Y))) == ["val_a", "val_b"]


@pytest.mark.parametrize(
    "field", [X, X.numpy(), [1, 2, 3], ["words"], [[1], [2]]], ids=lambda field: type(field).__name__
)
def test_control_a_dict_of_fields_is_one(field: Any) -> None:
    assert list(named_sets({"x": field, "y": (X, Y)}, (X, Y))) == ["val"]
    assert list(named_sets({"x": field}, (X, Y))) == ["val"]


def test_a_dict_like_the_training_data_is_one_whatever_is_in_it() -> None:
    nested = {"left": {"x": X}, "right": {"x": X}}
    assert list(named_sets(nested, nested)) == ["val"]
    assert list(named_sets(nested, (X, Y))) == ["val_left", "val_right"]


def test_names_have_to_be_names() -> None:
    with pytest.raises(DataError, match=r"(?s)needs a name.*'a b', 3"):
        named_sets({"a b": (X, Y), 3: (X, Y)}, (X, Y))


def test_a_set_that_is_none_is_named() -> None:
    with pytest.raises(DataError, match=r"nothing in a set[^$]*val_data\['b'\][^$]*leave the name out"):
        train(val_data={"a": (X, Y), "b": None})


def test_evaluation_of_an_all_padding_batch_is_harmless_in_any_set() -> None:
    ignored = torch.cat([torch.full((8,), -100), Y[8:]])
    row = train(val_data={"a": (X, ignored), "b": (X[8:], Y[8:])}).history[-1]
    assert row["val_a_loss"] == pytest.approx(row["val_b_loss"], rel=1e-12)


def test_streams_are_sets_too() -> None:
    def examples() -> Any:
        yield from zip(X[:20], Y[:20], strict=True)

    row = train(val_data={"clean": examples, "marked": trainfn.data.Batched([(X, Y)])}).history[-1]
    alone = train(val_data=(X[:20], Y[:20])).history[-1]
    assert row["val_clean_loss"] == alone["val_loss"]
    assert "val_marked_loss" in row
