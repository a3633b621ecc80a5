"""Language modelling and classification against naive sums, what counts, and what is refused."""

from __future__ import annotations

import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainfn.errors import ConfigError, DataError, ModelError
from trainfn.loss import (
    LossSum,
    PeftWarning,
    Reading,
    as_loss_sum,
    classification,
    language_modeling,
    logits_of,
    low_precision_safe,
    names,
    peft_aware,
    reading_of,
    register,
    resolve,
    segmentation,
    wrappers,
)
from trainfn.loss import registry as loss_registry

IGNORED = -100


def nats(row: list[float], label: int) -> float:
    """Minus the log of the softmax of one row, in plain Python."""
    return math.log(sum(math.exp(number) for number in row)) - row[label]


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] and labels [B, T], some of which do not count."""
    batch, length, words = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(2, 4))
    count = batch * length
    numbers = draw(st.lists(st.floats(-9, 9), min_size=count * words, max_size=count * words))
    labels = draw(st.lists(st.sampled_from([IGNORED, *range(words)]), min_size=count, max_size=count))
    logits = torch.tensor(numbers, dtype=torch.float64).reshape(batch, length, words)
    return logits, torch.tensor(labels).reshape(batch, length)


@settings(max_examples=60)
@given(sequences())
def test_language_modeling_is_the_sum_over_next_tokens(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    found = language_modeling()(logits, {"input_ids": labels.clamp(min=0), "labels": labels})
    counted = [
        nats(row, label)
        for rows, row_labels in zip(logits.tolist(), labels.tolist(), strict=True)
        for row, label in zip(rows[:-1], row_labels[1:], strict=True)
        if label != IGNORED
    ]
    assert float(found.total) == pytest.approx(sum(counted), rel=1e-12, abs=1e-12)
    assert float(found.weight) == len(counted)
    assert (found.total.dtype, found.weight.shape) == (torch.float64, torch.Size([]))


@settings(max_examples=60)
@given(sequences())
def test_classification_is_the_sum_over_examples(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn[0].flatten(0, 1), drawn[1].flatten()
    found = classification()(logits, (None, labels))
    pairs = zip(logits.tolist(), labels.tolist(), strict=True)
    counted = [nats(row, label) for row, label in pairs if label != IGNORED]
    assert float(found.total) == pytest.approx(sum(counted), rel=1e-12, abs=1e-12)
    assert float(found.weight) == len(counted)


def uniform(batch: int, length: int, words: int) -> Tensor:
    return torch.zeros(batch, length, words)


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, 6),  # every token but the first of each row; token 0 is a token like any other
        ({"attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]]}, 3),
        # Padded on the left: what stands behind padding is not predicted from anything.
        ({"attention_mask": [[0, 0, 1, 1], [0, 1, 1, 1]]}, 3),
        ({"attention_mask": [[True] * 4, [False] * 4]}, 3),
        ({"labels": [[9, 1, 1, IGNORED], [IGNORED] * 4]}, 2),
        ({"labels": [[0] * 4] * 2, "attention_mask": [[1, 0, 0, 0]] * 2}, 6),  # labels say for themselves what counts
    ],
)
def test_which_tokens_count(fields: dict[str, Any], weight: int) -> None:
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64)} | {k: torch.tensor(v) for k, v in fields.items()}
    found = language_modeling()(uniform(2, 4, 10), batch)
    assert float(found.weight) == weight
    assert float(found.total) == pytest.approx(weight * math.log(10))


@pytest.mark.parametrize("batch", [torch.tensor([[1, 2, 0]]), {"tokens": torch.tensor([[1, 2, 0]])}])
def test_the_tokens_of_a_batch_that_is_nothing_else_are_its_labels(batch: Any) -> None:
    assert float(language_modeling()(uniform(1, 3, 5), batch).weight) == 2


def test_token_0_and_the_end_of_text_are_trained_and_padding_with_the_same_token_is_not() -> None:
    """Token 0 stands inside the text, ends it and fills the rest; the mask says which is which."""
    batch = {"input_ids": torch.tensor([[5, 0, 3, 0, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    logits = torch.zeros(1, 6, 6, requires_grad=True)
    found = language_modeling()(logits, batch)
    (grad,) = torch.autograd.grad(found.total, logits)
    # Position 0 is to say 0, position 1 is to say 3, position 2 is to say 0: the end. The others learn nothing.
    assert float(found.weight) == 3
    assert grad[0].argmin(1).tolist()[:3] == [0, 3, 0]
    assert grad[0].abs().sum(1).gt(0).tolist() == [True, True, True, False, False, False]
    del batch["attention_mask"]  # control: without it, padding is trained
    assert float(language_modeling()(logits, batch).weight) == 5


def test_the_labels_are_the_next_tokens_and_not_the_same_ones() -> None:
    tokens = torch.tensor([[3, 1, 4, 1]])
    knows_next = torch.nn.functional.one_hot(torch.tensor([[1, 4, 1, 0]]), 5) * 50.0
    repeats = torch.nn.functional.one_hot(tokens, 5) * 50.0
    assert float(language_modeling()(knows_next, {"input_ids": tokens}).total) < 1e-6
    assert float(language_modeling()(repeats, {"input_ids": tokens}).total) > 100


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("wide", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_integer_names_a_class_and_sums_are_wide(dtype: torch.dtype, wide: torch.dtype) -> None:
    found = classification()(torch.zeros(3, 4, dtype=wide), (None, torch.tensor([0, 1, 3], dtype=dtype)))
    assert found.total.dtype == found.weight.dtype == (torch.float64 if wide == torch.float64 else torch.float32)
    assert float(found.weight) == 3


def test_another_label_can_be_the_one_ignored() -> None:
    assert float(classification(ignore_index=0)(torch.zeros(3, 4), (None, torch.tensor([0, 1, 0]))).weight) == 1
    batch = {"input_ids": torch.tensor([[1, 0, 2]]), "labels": torch.tensor([[1, 0, 2]])}
    assert float(language_modeling(ignore_index=0)(uniform(1, 3, 4), batch).weight) == 1


@pytest.mark.parametrize("labels", [torch.full((3,), IGNORED), torch.zeros(0, dtype=torch.int64)])
def test_where_nothing_counts_the_sum_is_zero_and_can_be_differentiated(labels: Tensor) -> None:
    logits = torch.zeros(len(labels), 4, requires_grad=True)
    found = classification()(logits, (None, labels))
    assert (float(found.total.detach()), float(found.weight)) == (0.0, 0.0)
    (grad,) = torch.autograd.grad(found.total, logits)
    assert not grad.any()


REFUSED = [
    (language_modeling(), uniform(2, 1, 4), {"input_ids": torch.zeros(2, 1).long()}, DataError, "length 1"),
    (language_modeling(), uniform(2, 3, 4)[0], {"input_ids": torch.zeros(2, 3).long()}, ModelError, "every position"),
    (language_modeling(), uniform(2, 3, 4), {"input_ids": torch.zeros(2, 4).long()}, DataError, "shape"),
    (language_modeling(), uniform(2, 3, 4), {"input_ids": torch.zeros(2, 3)}, DataError, "dtype"),
    (language_modeling(), uniform(2, 3, 4), {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, DataError, "no target"),
    (classification(), torch.zeros(3, 4), (None, torch.zeros(3)), DataError, "dtype"),
    (classification(), torch.zeros(3, 4), (None, torch.zeros(3, dtype=torch.bool)), DataError, "dtype"),
    (classification(), torch.zeros(3, 4), (None, torch.zeros(3, dtype=torch.complex64)), DataError, "dtype"),
    (classification(), torch.zeros(3, 4), (None, [0, 1, 2]), DataError, "dtype"),
    (classification(), torch.zeros(3, 4), (None, torch.zeros(3, 1).long()), DataError, "shape"),
    (classification(), torch.zeros(3, 4), (None, torch.zeros(2).long()), DataError, "shape"),
    (classification(), torch.zeros(3), (None, torch.zeros(3).long()), ModelError, "one row of logits"),
    (classification(), torch.zeros(3, 2, 4), (None, torch.zeros(3).long()), ModelError, "one row of logits"),
    (classification(), torch.zeros(3, 4), torch.zeros(3), DataError, "no target"),
]


@pytest.mark.parametrize(("loss", "outputs", "batch", "error", "what"), REFUSED)
def test_what_does_not_fit_is_refused(loss: Any, outputs: Tensor, batch: Any, error: type, what: str) -> None:
    with pytest.raises(error, match=what):
        loss(outputs, batch)


# --- outputs and sums -------------------------------------------------------------------------------------------------


@attrs.define
class Output:
    logits: Any = None
    loss: Any = None


class OrderedOutput(OrderedDict):
    """What Hugging Face returns: a dict whose fields are attributes too."""

    __getattr__ = OrderedDict.__getitem__


LOGITS = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        (LOGITS, "hidden states"),
        [LOGITS],
        {"loss": torch.ones(()), "logits": LOGITS},
        Output(logits=LOGITS),
        OrderedOutput(loss=torch.ones(()), logits=LOGITS),
        ({"logits": LOGITS}, "hidden states"),
        ((LOGITS, "auxiliary"), None),
        {"out": LOGITS, "aux": torch.ones(2)},
        SimpleNamespace(output=LOGITS),
    ],
    ids=lambda outputs: type(outputs).__name__,
)
def test_logits_are_found_in_any_output(outputs: Any) -> None:
    assert logits_of(outputs) is LOGITS
    assert float(classification()(outputs, (None, torch.tensor([0, 1]))).weight) == 2


@pytest.mark.parametrize("outputs", [None, 3, (), ("a", LOGITS), {"scores": LOGITS}, Output(), {"logits": [1.0]}])
def test_outputs_without_logits_are_refused(outputs: Any) -> None:
    with pytest.raises(ModelError, match="holds no logits") as caught:
        logits_of(outputs)
    assert type(outputs).__name__ in str(caught.value.got)


def test_a_scalar_is_a_mean_over_examples_and_a_sum_stays_a_sum() -> None:
    found = as_loss_sum(torch.tensor(0.5, dtype=torch.float64), (torch.ones(6, 2), torch.ones(6)))
    assert (float(found.total), float(found.weight), found.weight.dtype) == (3.0, 6.0, torch.float64)
    own = as_loss_sum(LossSum(total=torch.tensor(1.0), weight=torch.tensor(0.25)), None)
    assert (float(own.total), float(own.weight)) == (1.0, 0.25)


@pytest.mark.parametrize("value", [1.0, torch.ones(1), torch.ones(2), None, (torch.ones(()), 2)])
def test_what_cannot_be_added_up_is_refused(value: Any) -> None:
    with pytest.raises(ModelError, match="cannot be added up"):
        as_loss_sum(value, torch.ones(2))


# --- the registry -----------------------------------------------------------------------------------------------------


def test_losses_are_found_by_name_and_functions_are_themselves() -> None:
    assert callable(resolve("classification"))
    assert callable(resolve("language_modeling"))
    assert resolve(logits_of) is logits_of


def test_a_registered_loss_is_found_and_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_registry, "_LOSSES", dict(loss_registry._LOSSES))
    register("mine", lambda: logits_of)
    assert resolve("mine") is logits_of
    for name in ("mine", "classification"):
        with pytest.raises(ConfigError, match="registered already"):
            register(name, lambda: logits_of)


@pytest.mark.parametrize("loss", ["clasification", "", 3, None])
def test_what_is_no_loss_is_refused(loss: Any) -> None:
    with pytest.raises(ConfigError, match="loss"):
        resolve(loss)


# --- wrappers, by name and around each other --------------------------------------------------------------------------


def mean_output(outputs: Any, batch: Any) -> Tensor:
    return logits_of(outputs).mean()


@pytest.mark.parametrize(
    "name",
    [
        "peft_aware(classification)",
        "low_precision_safe(classification)",
        "peft_aware(low_precision_safe(classification))",
        " low_precision_safe( peft_aware( classification ) ) ",
    ],
)
def test_wrappers_are_called_by_name(name: str) -> None:
    batch = (None, torch.tensor([0, 2]))
    found, right = resolve(name)(LOGITS, batch), classification()(LOGITS, batch)
    assert isinstance(found, LossSum)
    assert isinstance(right, LossSum)
    assert torch.equal(found.total, right.total)
    assert torch.equal(found.weight, right.weight)
    assert hasattr(resolve(name), "check_trained") == ("peft_aware" in name)


def test_a_registered_loss_can_be_wrapped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_registry, "_LOSSES", dict(loss_registry._LOSSES))
    register("mine", lambda: mean_output)
    assert resolve("low_precision_safe(mine)")(torch.ones(2).half(), None).dtype == torch.float32  # type: ignore[union-attr]
    for name in ("peft_aware", "mine(1)"):
        with pytest.raises(ConfigError):
            register(name, lambda: mean_output)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("peft_aware(msee)", "did you mean 'mse'"),
        ("peft_awre(mse)", "did you mean 'peft_aware'"),
        ("mse(huber)", "no wrapper of this name"),
        ("peft_aware", "called around the name of a loss"),
        ("peft_aware()", "called around the name of a loss"),
        ("peft_aware(peft_aware())", "called around the name of a loss"),
        (
            "peft_aware(mse",
            r"one of low_precision_safe, peft_aware around one of chunked_language_modeling, classification",
        ),
        ("peft_aware(mse))", r"peft_aware\(language_modeling\)"),
        ("(mse)", "called around the name of a loss"),
        ("peft_aware(mse) + huber", "called around the name of a loss"),
    ],
)
def test_malformed_names_are_told_with_what_is_known(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(name)


def test_wrappers_are_listed_apart() -> None:
    assert wrappers() == ["low_precision_safe", "peft_aware"]
    assert not set(wrappers()) & set(names())


@pytest.mark.parametrize(
    "loss",
    [
        peft_aware("classification"),
        peft_aware(mean_output),
        low_precision_safe(peft_aware(mean_output)),
        peft_aware(low_precision_safe(mean_output)),
    ],
)
def test_a_peft_aware_loss_asks_whether_a_few_parameters_are_trained(loss: Any) -> None:
    loss.check_trained(["lora.a"], ["weight", "bias"])
    with pytest.raises(
        ModelError, match=r"No parameter is trained[\s\S]*4 frozen: a, b, c, \.\.\.[\s\S]*requires_grad_"
    ):
        loss.check_trained([], ["a", "b", "c", "d"])
    with pytest.raises(ModelError, match="No parameter is trained"):
        loss.check_trained([], [])
    with pytest.warns(
        PeftWarning, match=r"Every parameter is trained \(2: weight, bias\)[\s\S]*requires_grad_\(False\)"
    ):
        loss.check_trained(["weight", "bias"], [])


def test_a_check_that_a_loss_has_itself_is_asked_too() -> None:
    asked = []

    class Own:
        def __call__(self, outputs: Any, batch: Any) -> Tensor:
            return mean_output(outputs, batch)

        def check_trained(self, trained: Any, frozen: Any) -> None:
            asked.append((trained, frozen))

    peft_aware(Own()).check_trained(["a"], ["b"])  # type: ignore[attr-defined]
    low_precision_safe(Own()).check_trained(["a"], [])  # type: ignore[attr-defined]
    assert asked == [(["a"], ["b"]), (["a"], [])]


def test_what_a_loss_says_of_itself_is_seen_through_its_wrappers() -> None:
    reading = Reading(ignore_index=255)
    loss = segmentation(ignore_index=255)
    for wrapped in (loss, peft_aware(loss), low_precision_safe(peft_aware(loss))):
        assert reading_of(wrapped) == reading
        assert wrapped.widens  # type: ignore[attr-defined]
    assert reading_of(resolve("peft_aware(language_modeling)")) == Reading(shift=True)
    assert reading_of(peft_aware(mean_output)) is None
    assert not hasattr(peft_aware(mean_output), "widens")  # or else it would not be made safe
    assert hasattr(low_precision_safe(peft_aware(mean_output)), "widens")


# --- what a user's loss may return ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_in_16_bits_is_counted_in_32(dtype: torch.dtype) -> None:
    found = as_loss_sum(torch.tensor(2.0, dtype=dtype), torch.ones(70_001, 1))
    assert (float(found.total), float(found.weight), found.total.dtype) == (140_002.0, 70_001.0, torch.float32)


@pytest.mark.parametrize("total", [torch.ones(3), torch.ones((), dtype=torch.long), 1.0])
def test_a_sum_of_what_is_no_number_is_refused(total: Any) -> None:
    with pytest.raises(ModelError, match="cannot be added up"):
        as_loss_sum(LossSum(total=total, weight=torch.tensor(3.0)), None)


@pytest.mark.parametrize("weight", [4, 4.0, torch.tensor(4)])
def test_a_weight_may_be_any_number(weight: Any) -> None:
    found = as_loss_sum(LossSum(total=torch.tensor(2.0, requires_grad=True), weight=weight), None)
    assert (float(found.weight), found.weight.dtype, found.weight.requires_grad) == (4.0, torch.float32, False)


def test_tokens_alone_may_be_wrapped_in_a_tuple() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    assert float(language_modeling()(uniform(1, 3, 5), (tokens,)).weight) == 2.0


def test_one_logit_is_no_choice() -> None:
    with pytest.raises(ModelError, match="two classes or more"):
        classification()(torch.zeros(3, 1), (None, torch.zeros(3, dtype=torch.long)))


def test_padding_on_either_side_is_the_same_loss() -> None:
    own = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 6, generator=own)
    tokens, pad = torch.tensor([1, 2, 3, 4]), torch.zeros(3, dtype=torch.long)
    found = []
    for left in (True, False):
        ids = torch.cat([pad, tokens] if left else [tokens, pad])[None]
        logits = torch.cat(
            [torch.randn(3, 6, generator=own), rows] if left else [rows, torch.randn(3, 6, generator=own)]
        )
        mask = torch.cat([pad, tokens.clamp(max=1)] if left else [tokens.clamp(max=1), pad])[None]
        found.append(language_modeling()(logits[None], {"input_ids": ids, "attention_mask": mask}))
    assert (float(found[0].weight), float(found[1].weight)) == (3.0, 3.0)
    torch.testing.assert_close(found[0].total, found[1].total)
