"""What a trained model says of data: as a loop by hand has it, over any form of data, with targets and without."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import trainfn
from trainfn.errors import ConfigError, DataError, ModelError
from trainfn.tree import digest

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(23, 4, generator=GENERATOR), torch.arange(23) % 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def fit(model: nn.Module | None = None, data: Any = (X, Y), **settings: Any) -> trainfn.FitResult:
    options: dict[str, Any] = {"loss": "classification", "max_steps": 3, "batch_size": 5, "device": "cpu", "lr": 0.1}
    return trainfn.fit(model or net(), data, progress=False, **(options | settings))


@pytest.fixture(scope="module")
def result() -> trainfn.FitResult:
    return fit(ema=0.5)


def by_hand(result: trainfn.FitResult, *, ema: bool = True) -> Tensor:
    model = net()
    values = result.state.params | ((result.state.ema or {}) if ema else {}) | result.state.buffers
    model.load_state_dict({name: value.detach() for name, value in values.items()})
    with torch.no_grad():
        return model.eval()(X)


FORMS: dict[str, Any] = {
    "a tensor": X,
    "inputs and target": (X, Y),
    "inputs alone": (X,),
    "a dict": {"input": X},
    "a dict with a target": {"input": X, "labels": Y},
    "arrays": X.numpy(),
    "items": [(x, y) for x, y in zip(X, Y, strict=True)],
    "items without targets": list(X),
    "lists of numbers": X.tolist(),
    "a data set": TensorDataset(X, Y),
    "a DataLoader": DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_is_predicted_of_as_by_hand(result: trainfn.FitResult, form: str) -> None:
    torch.testing.assert_close(result.predict(FORMS[form]), by_hand(result), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_the_size_of_batches_changes_nothing(result: trainfn.FitResult, batch_size: int) -> None:
    found = result.predict(X, batch_size=batch_size)
    torch.testing.assert_close(found, by_hand(result), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad


def test_the_average_is_used_where_there_is_one(result: trainfn.FitResult) -> None:
    torch.testing.assert_close(result.predict(X, ema=False), by_hand(result, ema=False))
    assert not torch.allclose(by_hand(result), by_hand(result, ema=False))
    with pytest.raises(ConfigError, match="no moving average"):
        fit().predict(X, ema=True)


def test_nothing_is_changed_by_looking() -> None:
    model = net()
    result = fit(model)
    model.train()
    model[1].eval()
    before = digest([result.state, dict(model.state_dict())])
    drawn = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype("int64")), random.getstate()]
    one, two = result.predict(X), result.predict([(x, 0) for x in X])
    assert torch.equal(one, two)
    assert digest([result.state, dict(model.state_dict())]) == before
    assert [module.training for module in model] == [True, False, True, True]
    after = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype("int64")), random.getstate()]
    assert torch.equal(drawn[0], after[0])
    assert torch.equal(drawn[1], after[1])
    assert drawn[2] == after[2]


def test_the_precision_is_the_runs() -> None:
    found = fit(precision="bf16-mixed").predict(X)
    assert found.dtype == torch.bfloat16


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor | None


class Forms(nn.Module):
    def __init__(self, form: Any) -> None:
        super().__init__()
        self.head, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(x))


@pytest.mark.parametrize(
    "form",
    [
        lambda y: (y, None, (y * 2,)),
        lambda y: {"logits": y, "more": [y * 2]},
        lambda y: Pair(y, None),
        lambda y: SimpleNamespace(logits=y, hidden=None),
    ],
)
def test_outputs_of_any_form_are_joined_in_that_form(form: Any) -> None:
    torch.manual_seed(0)
    result = fit(Forms(form))
    with torch.no_grad():
        right = result.model()(X)
    found = result.predict(X, batch_size=4)
    assert type(found) is type(right)
    plain = vars if isinstance(right, SimpleNamespace) else lambda value: value
    torch.testing.assert_close(plain(found), plain(right))


def test_numbers_over_a_batch_are_listed() -> None:
    result = fit(Forms(lambda y: {"logits": y, "mean": y.mean(), "name": "a"}))
    found = result.predict(X, batch_size=10)
    assert found["name"] == ["a", "a", "a"]
    parts = [float(found["logits"][at : at + 10].mean()) for at in (0, 10, 20)]
    assert [float(mean) for mean in found["mean"]] == pytest.approx(parts, rel=1e-5)
    assert result.predict(X, batch_size=30)["mean"].ndim == 0


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(left * right)


def test_two_inputs_with_a_target_and_without() -> None:
    result = fit(Both(), (X, X, Y))
    both = result.predict({"left": X, "right": X})
    assert torch.equal(result.predict((X, X, Y)), both)
    assert torch.equal(result.predict((X, X)), both)
    with pytest.raises(ModelError, match=r"does not take what the batch holds[^$]*left, right"):
        result.predict(X)


def test_what_a_task_chooses_holds_for_data_without_its_target() -> None:
    rows = [{"words": [1, 2, 3][: 1 + at % 3], "stars": at % 2, "by": "me"} for at in range(12)]
    task = trainfn.TaskSpec(kind="text_classification", inputs={"words": "input"}, target="stars", collate="default")
    rows = [row | {"words": [1.0, 2.0, float(at)]} for at, row in enumerate(rows)]
    result = fit(nn.Linear(3, 2), rows, task=task, loss=None, check_data=False)
    asked = [{"words": row["words"]} for row in rows]
    assert result.predict(asked).shape == (12, 2)
    assert torch.equal(result.predict(asked), result.predict(rows))
    with pytest.raises(DataError, match=r"no such field[^$]*words"):
        result.predict([{"word": [1.0, 2.0, 3.0]}])


def test_masks_are_for_learning() -> None:
    torch.manual_seed(0)
    task = trainfn.TaskSpec(
        kind="masked_language_modeling",
        special_tokens={"mask": 1, "pad": 0},
        collate_options={"vocab_size": 9, "probability": 0.9},
    )
    ids = [[5, 6, 7, 8, 2, 3]] * 8
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    result = fit(model, ids, task=task, loss=None)
    with torch.no_grad():
        right = result.model()(torch.tensor(ids))
    assert torch.equal(result.predict(ids), right)


class Frame(dict):  # type: ignore[type-arg]
    """What is used of a pandas frame."""

    columns = property(list)
    iloc = to_numpy = None


def test_the_columns_of_a_frame_are_those_of_training() -> None:
    train = Frame(b=np.arange(6.0), a=np.arange(6.0) ** 2, kind=np.array(["no", "yes"] * 3))
    task = trainfn.TaskSpec(kind="tabular", target="kind")
    result = fit(nn.Linear(2, 2), train, task=task, loss=None)
    asked = Frame(other=np.zeros(6), a=train["a"], b=train["b"])
    right = result.predict(torch.tensor(np.stack([train["b"], train["a"]], 1)).float())
    assert torch.equal(result.predict(asked), right)
    with pytest.raises(DataError, match=r"lacks columns[^$]*expected: b"):
        result.predict(Frame(a=train["a"]))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)


def test_texts_of_other_lengths_are_not_joined() -> None:
    texts = [[1, 2, 0]] * 5 + [[1, 2]] * 5
    result = fit(Tokens(), texts, loss="language_modeling", collate="text", check_data=False, batch_size=10)
    assert result.predict(texts, batch_size=10).shape == (10, 3, 3)
    with pytest.raises(DataError, match=r"another shape[^$]*batch by batch"):
        result.predict(texts, batch_size=5)


def test_what_cannot_be_predicted_of_is_said() -> None:
    result = fit()
    with pytest.raises(ModelError, match=r"does not go through the model[^$]*float32\[5, 7\]"):
        result.predict(torch.ones(8, 7))
    with pytest.raises(DataError, match="has no end"):
        result.predict(lambda index: X)
    with pytest.raises(DataError, match="empty"):
        result.predict([])
    step, state = result._step, result.state
    for asked in ((nn.Linear(4, 3), state), (state, step), (step, None)):
        with pytest.raises(ConfigError, match=r"in this order[^$]*result\.predict"):
            trainfn.predict(*asked, X)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"in this order[^$]*result\.generate"):
            trainfn.generate(*asked, [1])  # type: ignore[arg-type]


class Judge(nn.Linear):
    def forward(self, input: Tensor, labels: Tensor | None = None) -> Any:
        out = super().forward(input)
        return {"logits": out} | ({} if labels is None else {"loss": nn.functional.cross_entropy(out, labels)})


def test_a_model_with_a_loss_of_its_own_is_asked_without_targets() -> None:
    result = fit(Judge(4, 3), {"input": X, "labels": Y}, loss="own")
    assert set(result.predict({"input": X, "labels": Y})) == {"logits"}
