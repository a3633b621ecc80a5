"""How a batch meets a forward: the table of what goes where, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn
from trainfn.errors import ModelError
from trainfn.forward import ForwardWarning, make_arguments, warn_of_unread


def module(forward: Callable[..., Any]) -> nn.Module:
    made = nn.Module()
    made.forward = forward
    return made


def one(x): ...
def two(x, mask): ...
def optional(x, mask=None): ...
def all_optional(input_ids=None, attention_mask=None, labels=None): ...
def needs_labels(input_ids, labels): ...
def hugging_face(input_ids=None, attention_mask=None, labels=None, **kwargs): ...
def any_name(**fields): ...
def any_number(*tensors): ...
def mixed(x, *more, scale=1, **fields): ...
def keyword_only(x, *, mask): ...
def attends(x, *, attn_mask=None): ...
def positional_only(x, /): ...
def nothing(): ...
def whole(batch): ...


GOES = [
    # by name
    (one, {"x": 1, "y": 9}, (), {"x": 1}),
    (two, {"mask": 2, "x": 1, "labels": 9}, (), {"x": 1, "mask": 2}),
    (optional, {"x": 1, "mask": 2, "y": 9}, (), {"x": 1, "mask": 2}),
    # what describes an input, to those that take it
    (one, {"x": 1, "attention_mask": 2, "y": 9}, (), {"x": 1}),
    (one, {"tokens": 1, "attention_mask": 2, "position_ids": 3, "y": 9}, (), {"x": 1}),
    (all_optional, {"tokens": 1, "attention_mask": 2, "y": 9}, (), {"input_ids": 1, "attention_mask": 2}),
    (keyword_only, {"x": 1, "mask": 2, "y": 9}, (), {"x": 1, "mask": 2}),
    (any_name, {"a": 1, "b": 2, "y": 9}, (), {"a": 1, "b": 2}),
    # the one left over belongs to the one missing
    (one, {"features": 1, "y": 9}, (), {"x": 1}),
    (two, {"x": 1, "attention": 2, "y": 9}, (), {"x": 1, "mask": 2}),
    (optional, {"features": 1, "y": 9}, (), {"x": 1}),
    (all_optional, {"tokens": 1, "labels": 9}, (), {"input_ids": 1}),
    # targets only to those that require them
    (all_optional, {"input_ids": 1, "labels": 9}, (), {"input_ids": 1}),
    (hugging_face, {"input_ids": 1, "attention_mask": 2, "labels": 9}, (), {"input_ids": 1, "attention_mask": 2}),
    (needs_labels, {"input_ids": 1, "labels": 9}, (), {"input_ids": 1, "labels": 9}),
    # by position
    (one, (1, 9), (1,), {}),
    (one, 1, (1,), {}),
    (two, (1, 2, 9), (1, 2), {}),
    (two, [1, 2, 9], (1, 2), {}),
    (optional, (1, 9), (1,), {}),
    (optional, (1, 2, 9), (1, 2), {}),
    (any_number, (1, 2, 3, 9), (1, 2, 3), {}),
    (mixed, (1, 2, 3, 9), (1, 2, 3), {}),
    (positional_only, (1, 9), (1,), {}),
    (positional_only, 1, (1,), {}),
    # an input that is a tree of its own
    (one, {"x": {"a": 1, "b": (2, 3)}, "y": 9}, (), {"x": {"a": 1, "b": (2, 3)}}),
    (one, ((1, 2), 9), ((1, 2),), {}),
    (one, ({"a": 1}, 9), ({"a": 1},), {}),
    (two, ((1, 2), 9), (1, 2), {}),
    (two, [[1, 2], 9], (1, 2), {}),
    (two, ({"mask": 2, "x": 1}, 9), (), {"x": 1, "mask": 2}),
    (hugging_face, ({"input_ids": 1, "attention_mask": 2}, 9), (), {"input_ids": 1, "attention_mask": 2}),
    (whole, {"a": 1, "b": 2, "y": 9}, (), {"batch": {"a": 1, "b": 2}}),
    (whole, {"a": 1, "y": 9}, (), {"batch": {"a": 1}}),
    (whole, {"batch": 1, "y": 9}, (), {"batch": 1}),
    (whole, (1, 9), (1,), {}),
]


@pytest.mark.parametrize(("forward", "batch", "args", "kwargs"), GOES)
def test_what_goes_where(forward: Callable[..., Any], batch: Any, args: Any, kwargs: Any) -> None:
    found = make_arguments(module(forward))(batch)
    assert found == (args, kwargs)
    forward(*found[0], **found[1])


REFUSED = [
    (two, {"a": 1, "b": 2, "y": 9}),
    (two, {"x": 1, "y": 9}),
    (one, {"a": 1, "b": 2, "y": 9}),
    (one, {"y": 9}),
    (one, {}),
    (all_optional, {"a": 1, "b": 2}),
    (two, (1, 9)),
    (one, (1, 2, 9)),
    (keyword_only, (1, 2, 9)),
    (nothing, (1, 9)),
    (nothing, {"x": 1}),
    (two, 1),
    (two, ({"a": 1, "b": 2}, 9)),
    (two, ((1, 2, 3), 9)),
    (whole, {"y": 9}),
]


def gpt(idx, targets=None): ...


WITH_TARGETS = [
    (gpt, {"idx": 1, "targets": 9}, (), {"idx": 1, "targets": 9}),
    (gpt, {"idx": 1, "labels": 9}, (), {"idx": 1, "targets": 9}),
    (gpt, (1, 9), (1,), {"targets": 9}),
    (gpt, 1, (1,), {}),
    (gpt, {"idx": 1}, (), {"idx": 1}),
    (hugging_face, {"input_ids": 1, "labels": 9}, (), {"input_ids": 1, "labels": 9}),
    (hugging_face, (1, 9), (1,), {"labels": 9}),
    (needs_labels, {"input_ids": 1, "labels": 9}, (), {"input_ids": 1, "labels": 9}),
    (one, {"x": 1, "y": 9}, (), {"x": 1}),
]


@pytest.mark.parametrize(("forward", "batch", "args", "kwargs"), WITH_TARGETS)
def test_targets_are_passed_where_the_loss_is_the_models_own(
    forward: Callable[..., Any], batch: Any, args: Any, kwargs: Any
) -> None:
    assert make_arguments(module(forward), targets=True)(batch) == (args, kwargs)


@pytest.mark.parametrize(("forward", "batch"), REFUSED)
def test_what_does_not_fit_is_refused_with_both_sides_shown(forward: Callable[..., Any], batch: Any) -> None:
    with pytest.raises(ModelError) as caught:
        make_arguments(module(forward))(batch)
    assert "forward(" in str(caught.value.where)
    assert "a batch of " in str(caught.value.got)


@pytest.mark.parametrize(
    ("forward", "batch", "near"),
    [
        (all_optional, {"input_ids": 1, "attn_mask": 2, "labels": 9}, "attention_mask"),
        (hugging_face, {"input_ids": 1, "attention_masks": 2}, "attention_mask"),
        (attends, {"x": 1, "attention_mask": 2}, "attn_mask"),
        (mixed, {"x": 1, "scales": 2}, "scale"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_name_that_is_meant(
    forward: Callable[..., Any], batch: Any, near: str
) -> None:
    arguments = make_arguments(module(forward))
    for _ in range(2):
        with pytest.raises(ModelError, match=f"did you mean '{near}'") as caught:
            arguments(batch)
        assert "forward(" in str(caught.value.where)
        assert all(name in str(caught.value.got) for name in batch)


@pytest.mark.parametrize(
    ("forward", "batch", "field"),
    [
        (optional, {"x": 1, "other": 2, "y": 9}, "other"),
        (hugging_face, {"input_ids": 1, "text": 2}, "text"),
        (optional, {"x": 1, "attention_mask": 2}, "attention_mask"),
    ],
)
def test_a_field_that_is_not_passed_is_warned_of(forward: Callable[..., Any], batch: Any, field: str) -> None:
    assert field not in make_arguments(module(forward))(batch)[1]
    with pytest.warns(ForwardWarning, match=f"'{field}' is not passed.*forward.*{field}: int"):
        warn_of_unread(module(forward), batch)


class Weighted(nn.Linear):
    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(input) * scale


def test_fit_warns_of_fields_that_neither_model_nor_loss_read() -> None:
    batch = {"input": torch.ones(4, 2), "labels": torch.zeros(4, dtype=torch.long), "weight": torch.ones(4)}

    def weighted(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs.sum(1) * batch["weight"]).mean()

    options: dict[str, Any] = {"max_steps": 1, "device": "cpu", "progress": False}
    with pytest.warns(ForwardWarning, match="'weight' is not passed"):
        trainfn.fit(Weighted(2, 2), batch, loss="classification", **options)
    trainfn.fit(Weighted(2, 2), batch, loss=weighted, **options)
    trainfn.fit(Weighted(2, 2), batch, task=trainfn.TaskSpec(kind="tabular", inputs=["input"]), **options)


class Generating(nn.Module):
    def forward(self, x: Tensor, use_cache: bool = True) -> Tensor:
        return x if use_cache else -x


@pytest.mark.parametrize(
    ("batch", "sign"),
    [
        (torch.ones(2), -1),
        ({"x": torch.ones(2)}, -1),
        ({"x": torch.ones(2), "use_cache": True}, 1),
        ((torch.ones(2), True, torch.ones(2)), 1),
    ],
)
def test_no_cache_is_made_unless_the_batch_asks_for_one(batch: object, sign: int) -> None:
    args, kwargs = make_arguments(Generating())(batch)
    assert torch.equal(Generating()(*args, **kwargs), sign * torch.ones(2))


class Causal(nn.Module):
    """As nanoGPT's: all logits, and a loss, only beside targets; the last position's logits without."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 16), nn.Linear(16, 8)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.embed(idx)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


ROWS = (torch.arange(10) + torch.arange(8)[:, None]) % 8
OWN: dict[str, Any] = {"lr": 0.1, "batch_size": 4, "device": "cpu", "progress": False, "log_every": 1}


@pytest.mark.parametrize("data", [(ROWS[:, :-1], ROWS[:, 1:]), {"idx": ROWS[:, :-1], "targets": ROWS[:, 1:]}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_may_have_a_loss_of_its_own(data: Any, precision: str) -> None:
    torch.manual_seed(0)
    model = Causal()
    result = trainfn.fit(model, data, val_data=data, loss="own", precision=precision, max_steps=30, **OWN)
    with torch.no_grad():
        right = float(model(ROWS[:4, :-1], ROWS[:4, 1:])[1])
    assert result.history[0]["loss"] == pytest.approx(right, rel=0.3)  # of other rows
    assert result.history[0]["weight"] == 4  # examples: what a mean of the model's own is over is not known
    assert result.history[-1]["val_loss"] < 0.1


def test_a_loss_may_come_before_the_logits() -> None:
    class Swapped(Causal):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
            return super().forward(idx, targets)[::-1]

    data, found = (ROWS[:, :-1], ROWS[:, 1:]), []
    for made in (Causal, Swapped):
        torch.manual_seed(0)
        result = trainfn.fit(made(), data, val_data=data, loss="own", metrics=["accuracy"], max_steps=9, **OWN)
        found.append((result.history[-1]["val_accuracy"], result.generate([1, 2], max_new_tokens=3).tolist()))
    assert found[0] == found[1]


def test_the_loss_of_a_first_step_is_what_the_model_says() -> None:
    torch.manual_seed(0)
    model = Causal()
    result = trainfn.fit(model, (ROWS[:, :-1], ROWS[:, 1:]), loss="own", max_steps=1, **OWN | {"batch_size": 8})
    assert result.history[0]["loss"] == pytest.approx(float(model(ROWS[:, :-1], ROWS[:, 1:])[1].detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("model", "data", "loss", "words"),
    [
        (Causal(), ROWS, "language_modeling", 'has a loss of its own: loss="own"'),
        (nn.Linear(2, 2), (torch.ones(8, 2), torch.ones(8, 2)), "own", "holds no loss of its own"),
        (Causal(), ROWS, "own", "call the batch's target as the forward does"),
    ],
)
def test_a_loss_that_is_not_there_is_answered_before_the_first_step(
    model: nn.Module, data: Any, loss: str, words: str
) -> None:
    with pytest.raises(trainfn.errors.TrainfnError, match=words):
        trainfn.fit(model, data, loss=loss, max_steps=1, **OWN)


class Table(nn.Module):
    """Numbers and categories, in a tree: what a net over several inputs takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(5, 2)

    def forward(self, numbers: Tensor, words: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat([numbers, self.embed(words["colour"]) + self.embed(words["size"])], 1))


def test_nested_batches_train_in_parts_and_whole() -> None:
    torch.manual_seed(0)
    words = {"colour": torch.arange(12) % 4, "size": torch.arange(12) % 3}
    data = {"numbers": torch.randn(12, 2), "words": words, "labels": torch.arange(12) % 2}
    model = Table()
    options: dict[str, Any] = OWN | {"loss": "classification", "max_steps": 3, "optimizer": trainfn.optim.sgd(lr=0.1)}
    del options["lr"]
    whole = trainfn.fit(model, data, **options | {"batch_size": 12})
    parts = trainfn.fit(model, data, **options | {"batch_size": 3, "accumulate": 4})
    pairs = trainfn.fit(model, ((data["numbers"], words), data["labels"]), **options | {"batch_size": 12})
    for name, value in whole.state.params.items():
        torch.testing.assert_close(parts.state.params[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(pairs.state.params[name], value)
