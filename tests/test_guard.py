"""The look at the data before the first step: what is refused, how often it occurs, and what is left alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn
from trainfn.data import Loader, collator
from trainfn.errors import DataError, ModelError
from trainfn.health import HealthWarning
from trainfn.task.guard import EXAMPLES, DataWarning
from trainfn.tree import digest

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(200, 4, generator=GENERATOR), torch.arange(200) % 3
IDS = torch.randint(0, 20, (200, 6), generator=GENERATOR)


class Positions(nn.Module):
    """Reads tokens, and the places they are in."""

    def __init__(self, tokens: int = 20, places: int = 8, words: int | None = None) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, 4), nn.Embedding(places, 4)
        self.head = nn.Linear(4, words or tokens)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        out: Tensor = self.head(self.tokens(input_ids) + self.places(places))
        return out


def fit(data: Any = (X, Y), model: nn.Module | None = None, **settings: Any) -> trainfn.FitResult:
    options: dict[str, Any] = {"loss": "classification", "max_steps": 2, "batch_size": 8, "device": "cpu"}
    return trainfn.fit(model or nn.Linear(4, 3), data, progress=False, **(options | settings))


def put(values: Tensor, at: Any, value: Any) -> Tensor:
    changed = values.clone()
    changed[at] = value
    return changed


LM = {"loss": "language_modeling"}
EVERY = {"batch_size": 200}  # the sample is all of the data then
REFUSED: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "a label too large": ((X, put(Y, [5, 9], 3)), EVERY, ("classes 0 to 2", "3; 2 of 200 labels", "0.01")),
    "a label below 0": ((X, put(Y, 5, -1)), EVERY, ("classes 0 to 2", "-1; 1 of 200")),
    "labels from 1 on": ((X, Y + 1), {}, ("classes 0 to 2", "3; ", "number the classes from 0")),
    "only in the evaluation": ((X, Y), EVERY | {"val_data": (X, put(Y, 5, 7))}, ("val_data", "7; 1 of 200")),
    "float labels": ((X, Y.float()), {}, ("labels have the wrong dtype", "labels.long()")),
    "labels by name": ({"x": X, "labels": put(Y, 5, 9)}, EVERY, ("9; 1 of 200",)),
    "pixels": (
        (torch.zeros(8, 3, 4, 4), torch.full((8, 4, 4), 7)),
        {"loss": "segmentation", "model": nn.Conv2d(3, 5, 1)},
        ("classes 0 to 4", "7; 128 of 128"),
    ),
    "half a label": ((X, torch.full((200, 3), 2.0)), {"loss": "multi_label"}, ("0 and 1", "2.0; ")),
    "NaN targets": (
        (X, put(X[:, :1], 5, math.nan)),
        {"loss": "mse", "model": nn.Linear(4, 1)} | EVERY,
        ("Targets are NaN", "1 of 200"),
    ),
    "NaN features": ((put(X, (5, 2), math.nan), Y), EVERY, ("data, input 0", "1 of 200 examples", "check_data=False")),
    "NaN in a field": ({"x": put(X, [1, 2, 3], math.nan), "y": Y}, EVERY, ("data, x", "3 of 200")),
    "NaN in the evaluation": ((X, Y), EVERY | {"val_data": (put(X, 0, math.nan), Y)}, ("val_data, input 0",)),
    "ids beyond the embedding": (
        {"input_ids": put(IDS, (7, 2), 25)},
        LM | EVERY | {"model": Positions()},
        ("Ids are beyond", "data, input_ids; tokens has 20 rows", "ids 0 to 19", "25; 1 of 1,200 ids", "vocabulary"),
    ),
    "ids of a tensor": (put(IDS, 3, -1), LM | EVERY | {"model": Positions()}, ("data, input", "-1; 6 of 1,200")),
    "ids beyond the head": (
        IDS,
        LM | EVERY | {"model": Positions(words=10)},
        ("Labels are out of range", "classes 0 to 9", "float32[200, 6, 10]"),
    ),
    "longer than the positions": (
        torch.zeros(8, 12, dtype=torch.long),
        LM | {"model": Positions()},
        ("places (Embedding)", "0 to 11", "too long"),
    ),
    "too short for a next token": (
        IDS[:, :1],
        LM | EVERY | {"model": Positions()},
        ("too short for the task", "200 of 200 sequences", "Packed"),
    ),
    "padded to one token": (
        {"input_ids": IDS, "attention_mask": torch.arange(6).expand(200, 6) < 1},
        LM | EVERY | {"model": Positions()},
        ("too short for the task", "200 of 200 sequences"),
    ),
}


def items_of(data: Any) -> list[Any]:
    if isinstance(data, dict):
        return [{name: leaf[i] for name, leaf in data.items()} for i in range(len(next(iter(data.values()))))]
    if isinstance(data, tuple):
        return [tuple(leaf[i] for leaf in data) for i in range(len(data[0]))]
    return [{"input": row} for row in data]


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("form", ["tensors", "items"])
def test_what_would_spoil_a_run_is_refused_before_it(case: str, form: str) -> None:
    data, settings, words = REFUSED[case]
    if form == "items":
        data = items_of(data)
    taken: list[Any] = []
    with pytest.raises(DataError) as caught:
        fit(data, observers=[taken.append], **settings)
    assert not taken
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in\n{caught.value}"


def test_control_what_is_right_is_left_alone() -> None:
    for data, settings in (
        ((X, Y), {}),
        ((X, put(Y, slice(0, 50), -100)), {}),
        ({"x": X, "y": Y}, {"val_data": {"x": X, "y": Y}}),
        ((X, X > 0), {"loss": "multi_label", "model": nn.Linear(4, 4)}),
        ((X, put((X > 0).float(), (0, 0), -100)), {"loss": "multi_label", "model": nn.Linear(4, 4)}),
        ((X, X), {"loss": "mse", "model": nn.Linear(4, 4)}),
        (IDS, LM | {"model": Positions()}),
        (put(IDS, 0, 0), LM | {"model": Positions()}),
        ({"input_ids": IDS, "labels": put(IDS, slice(0, 9), -100)}, LM | {"model": Positions()}),
        ((put(X, 0, math.inf), Y), {"on_spike": "off", "model": nn.Sequential(nn.Tanh(), nn.Linear(4, 3))}),
    ):
        assert fit(data, **settings).state.cursor == 2


def test_a_few_short_sequences_are_warned_of_with_their_rate() -> None:
    items = [[1, 2, 3]] * 6 + [[4]] * 2
    with pytest.warns(DataWarning, match=r"data: 2 of 8 sequences looked at \(0\.25 of them\) have fewer than 2"):
        fit(items, model=Positions(), task="language_modeling", loss=None)


def test_it_can_be_turned_off() -> None:
    with pytest.warns(HealthWarning, match="NaN"):
        result = fit((put(X, 0, math.nan), Y), check_data=False, shuffle=False, max_steps=2)
    assert result.history[-1]["skipped"] == 1


def test_nothing_is_known_of_the_labels_of_a_function() -> None:
    fit((X, Y + 5), loss=lambda outputs, batch: outputs.square().mean())
    with pytest.raises(DataError, match="NaN"):
        fit((put(X, 0, math.nan), Y), loss=lambda outputs, batch: outputs.square().mean(), **EVERY)


def test_the_look_changes_nothing_of_the_run() -> None:
    class Noisy(nn.Sequential):
        pass

    runs = []
    for check in (True, False):
        torch.manual_seed(0)
        model = Noisy(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        torch.manual_seed(7)
        before = torch.get_rng_state()
        runs.append(fit(model=model, check_data=check, max_steps=5).state)
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert digest(runs[0].params) == digest(runs[1].params)
    assert digest(runs[0].buffers) == digest(runs[1].buffers)


def test_the_hooks_are_gone_after_a_refusal_too() -> None:
    model = Positions()
    with pytest.raises(DataError):
        fit(IDS + 100, model=model, **LM)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_sample_is_from_all_over_the_data_and_small() -> None:
    asked: list[int] = []

    class Counted(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    loader = Loader(Counted(range(100_000)), batch_size=10, shuffle=False)
    batches = list(loader.sample(EXAMPLES))
    assert len(batches) == 8
    assert len(asked) == 80
    assert [int(asked[0]), int(asked[-1])] == [0, 99_999]
    assert len(list(Loader(torch.arange(5), batch_size=10).sample(EXAMPLES))) == 1
    assert len(list(Loader(torch.arange(10**6), batch_size=10**5).sample(EXAMPLES))) == 2


def test_a_model_that_takes_another_width_says_so_for_float64_features() -> None:
    with pytest.raises(ModelError, match=r'the data is float64[^$]*x\.astype\("float32"\)'):
        fit((X.double().numpy(), Y))


def test_ragged_texts_with_a_tokenizer_that_is_too_large() -> None:
    texts = trainfn.data.Tokenized(["to be", "or not"], trainfn.data.ByteTokenizer())
    with pytest.raises(DataError, match=r"Ids are beyond[^$]*has 20 rows[^$]*116; 11 of 12 ids"):
        fit(texts, model=Positions(), task="language_modeling", loss=None, collate=collator("text", pad_id=1))
