"""Collators: padding, prompts, masks, packing, images, tables; by name, by hand, and through ``fit``."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from trainfn.data import Collator, Loader, Packed, collator, collator_names, register_collator
from trainfn.data.collators import choose_collator
from trainfn.errors import ConfigError, DataError
from trainfn.loss import LossSum, language_modeling
from trainfn.tree import digest

sequences = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=9), min_size=1, max_size=6)
workers_may_fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Tiny(nn.Module):
    """Logits of a token are made of the token and the mean of those before it, by the mask if there is one."""

    def __init__(self, vocabulary: int = 64) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.tokens(input_ids)[:, None]  # (B, 1, T, d)
        seen = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=seen, is_causal=seen is None)
        out: Tensor = self.head(x[:, 0])
        return out


# --- padding


@given(sequences, st.sampled_from(["left", "right"]), st.integers(1, 4))
def test_padding_keeps_every_token_at_its_side(items: list[list[int]], side: str, multiple: int) -> None:
    batch: Any = collator("text", side=side, pad_id=63, multiple_of=multiple)(items)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    longest = max(map(len, items))
    assert ids.shape[1] % multiple == 0
    assert longest <= ids.shape[1] < longest + multiple
    for row, real, item in zip(ids, mask, items, strict=True):
        assert row[real == 1].tolist() == item
        assert row[real == 0].tolist() == [63] * (ids.shape[1] - len(item))
        edge = slice(0, len(item)) if side == "right" else slice(ids.shape[1] - len(item), None)
        assert bool((real[edge] == 1).all())


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_are_kept_and_padded_with_what_does_not_count(kind: Any) -> None:
    items = [{"input_ids": kind([1, 2, 3]), "labels": kind([7, 8, 9])}, {"input_ids": kind([4]), "labels": kind([5])}]
    batch: Any = collator("text")(items)
    assert batch["labels"].tolist() == [[7, 8, 9], [5, -100, -100]]
    assert collator("text", ignore_index=-1)(items)["labels"].tolist() == [[7, 8, 9], [5, -1, -1]]
    assert collator("text", side="left")(items)["labels"].tolist() == [[7, 8, 9], [-100, -100, 5]]
    assert collator("text")([(kind([1, 2]), 3), (kind([4]), 0)])["labels"].tolist() == [3, 0]


def test_a_mask_that_is_there_is_kept_and_sequences_of_their_own_length_are_padded_to_it() -> None:
    items = [
        {"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1], "decoder_input_ids": [1]},
        {"input_ids": [4], "attention_mask": [1], "decoder_input_ids": [1, 2]},
    ]
    batch: Any = collator("text")(items)
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[1, 0], [1, 2]]


@given(sequences, st.data(), st.sampled_from(["left", "right"]))
def test_prompts_are_not_learnt(items: list[list[int]], data: st.DataObject, side: str) -> None:
    prompts = [data.draw(st.integers(0, len(item))) for item in items]
    rows = [{"input_ids": item, "prompt_length": n} for item, n in zip(items, prompts, strict=True)]
    batch: Any = collator("text", side=side)(rows)
    assert "prompt_length" not in batch
    for labels, real, item, prompt in zip(batch["labels"], batch["attention_mask"], items, prompts, strict=True):
        assert labels[real == 1].tolist() == [-100] * prompt + item[prompt:]
        assert bool((labels[real == 0] == -100).all())


def test_padding_changes_no_loss() -> None:
    items = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    model, loss = Tiny(), language_modeling()
    alone = [loss(model(torch.tensor([item])), torch.tensor([item])) for item in items]
    batch: Any = collator("text", multiple_of=8)(items)
    found = loss(model(batch["input_ids"]), batch)
    assert isinstance(found, LossSum)
    torch.testing.assert_close(found.total, sum(each.total for each in alone))  # type: ignore[union-attr]
    assert float(found.weight) == sum(len(item) - 1 for item in items)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["a text", "another"], "numbers"),
        ([{"words": [1, 2]}], "no sequence of token ids"),
        ([[0.5, 1.5]], "no sequence of token ids"),
        ([[[1, 2], [3, 4]]], "no sequence of token ids"),
        ([{"input_ids": [1], "text": "word"}, {"input_ids": [2], "text": "other"}], "field text"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [2]}], "differ in their fields"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "prompt_length": 1}], "prompt_length and labels"),
        ([{"input_ids": [1, 2], "prompt_length": 3}], "from 0 to 2"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1], "labels": 3}], "neither numbers nor sequences"),
    ],
)
def test_items_that_cannot_be_padded(items: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        collator("text")(items)


@pytest.mark.parametrize("options", [{"side": "top"}, {"pad_id": -1}, {"multiple_of": 0}, {"max_length": 0}])
def test_options_out_of_range(options: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        collator("text", **options)


def test_ragged_lists_without_a_collator_name_the_one_that_takes_them() -> None:
    items = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
    with pytest.raises(DataError, match='collate="text"') as caught:
        trainfn.fit(Tiny(), items, loss="language_modeling", max_steps=1, batch_size=2, progress=False, shuffle=False)
    assert caught.value.where == "field input_ids, batch 0, examples [0, 1]"
    with pytest.raises(DataError, match="ImageFolder"):
        Loader([torch.ones(3, 4, 4), torch.ones(3, 5, 4)], batch_size=2).batch(0)
    with pytest.raises(DataError, match="fields"):
        Loader([{"x": 1}, {"y": 1}], batch_size=2).batch(0)
    result = trainfn.fit(
        Tiny(), items, loss="language_modeling", collate="text", max_steps=1, batch_size=2, progress=False
    )
    assert result.history[-1]["weight"] == 3


# --- masked tokens


def masked(items: Any, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return collator("mlm", **({"mask_id": 1, "vocab_size": 1000, "special_ids": [2, 3]} | options))(items)


def test_of_the_chosen_tokens_80_are_masked_10_drawn_and_10_kept() -> None:
    items = torch.randint(4, 1000, (200, 500), generator=torch.Generator().manual_seed(0))
    batch = masked(list(items))
    chosen = batch["labels"] != -100
    assert float(chosen.float().mean()) == pytest.approx(0.15, abs=0.005)
    assert torch.equal(batch["labels"][chosen], items[chosen])
    assert torch.equal(batch["input_ids"][~chosen], items[~chosen])
    now, before = batch["input_ids"][chosen], items[chosen]
    assert float((now == 1).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert float((now == before).float().mean()) == pytest.approx(0.1, abs=0.01)
    drawn = now[(now != 1) & (now != before)]
    assert len(drawn) / len(now) == pytest.approx(0.1, abs=0.01)
    assert int(drawn.min()) >= 4, "special tokens are not drawn either"
    assert len(drawn.unique()) > 500


def test_special_tokens_and_padding_are_spared() -> None:
    batch = masked([[2, 5, 3, 1, 6], [2, 7]], probability=1.0)
    assert batch["labels"].tolist() == [[-100, 5, -100, -100, 6], [-100, 7, -100, -100, -100]]
    assert batch["input_ids"][0, [0, 2, 3]].tolist() == [2, 3, 1]
    assert batch["input_ids"][1, 2:].tolist() == [0, 0, 0]


@workers_may_fork
@pytest.mark.parametrize("form", ["ragged", "tensor", "finished"])
def test_masked_batches_are_functions_of_seed_and_number(form: str) -> None:
    data: Any = {
        "ragged": [list(range(4, 4 + n)) for n in range(5, 25)],
        "tensor": {"input_ids": torch.arange(400).reshape(20, 20) + 4},
        "finished": trainfn.data.ByteText(bytes(range(200)) * 2, length=20),
    }[form]
    mlm = collator("mlm", mask_id=1, vocab_size=1000, probability=0.5)

    def run(seed: int = 0, workers: int = 0) -> list[str]:
        loader = Loader(data, batch_size=5, seed=seed, collate=mlm, workers=workers)
        return [digest(batch) for batch in loader.batches(2, 8)]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert run() == run(workers=1) == first
    assert run(seed=1) != first
    assert len(set(first)) == 6
    whole = Loader(data, batch_size=20, shuffle=False, collate=mlm)
    one, later = whole.batch(0)["labels"], whole.batch(1)["labels"]
    assert not torch.equal(one, later), "another epoch masks other tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_id": 1000}, "out of range"),
        ({"special_ids": [-1]}, "out of range"),
        ({"probability": 0}, "probability"),
        ({"probability": 1.5}, "probability"),
        ({"vocab_size": 2, "special_ids": [0]}, "Every token"),
    ],
)
def test_masks_that_cannot_be(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        masked([[5]], **options)


def test_labels_that_are_there_are_not_overwritten() -> None:
    with pytest.raises(DataError, match="no labels"):
        masked([{"input_ids": [1, 2], "labels": [1, 2]}])


# --- packing


@given(st.lists(st.lists(st.integers(1, 60), min_size=2, max_size=14), min_size=1, max_size=8), st.integers(2, 10))
def test_packing_keeps_every_token_and_no_label_crosses_a_boundary(documents: list[list[int]], length: int) -> None:
    rows = Packed(documents, length=length, position_ids=True)
    batch: Any = rows.__getitems__(list(range(len(rows))))
    pieces = [document[at : at + length] for document in documents for at in range(0, len(document), length)]
    kept = batch["input_ids"][batch["input_ids"] != 0]
    assert kept.tolist() == [token for piece in pieces for token in piece]
    learnt = batch["labels"][batch["labels"] != -100]
    assert learnt.tolist() == [token for piece in pieces for token in piece[1:]]
    restarts = (batch["position_ids"] == 0) & (batch["input_ids"] != 0)
    assert int(restarts.sum()) == len(pieces)


def test_with_the_block_mask_the_loss_is_that_of_the_documents_alone() -> None:
    documents = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]]
    model, loss = Tiny().requires_grad_(False), language_modeling()
    alone = [loss(model(torch.tensor([document])), torch.tensor([document])) for document in documents]
    for mask, same in ((True, True), (False, False)):
        rows = Packed(documents, length=6, block_mask=mask)
        batch: Any = rows.__getitems__(list(range(len(rows))))
        found = loss(model(batch["input_ids"], batch.get("attention_mask")), batch)
        assert isinstance(found, LossSum)
        assert float(found.weight) == sum(len(document) - 1 for document in documents)
        total = sum(float(each.total) for each in alone)  # type: ignore[union-attr]
        assert (float(found.total) == pytest.approx(total, rel=1e-5)) == same, "the control sees across boundaries"


def test_packed_documents_train_and_need_no_collator() -> None:
    result = trainfn.fit(
        Tiny(), Packed([[5, 6, 7, 8]] * 20, length=8, block_mask=True), task="language_modeling", lr=0.05,
        max_steps=30, batch_size=4, log_every=1, device="cpu", progress=False,
    )  # fmt: skip
    assert result.history[0]["weight"] == 4 * 2 * 3
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2


@pytest.mark.parametrize("documents", [[], [[1]], [["a", "b"]], [[0.5, 1.0]], [[[1, 2]]]])
def test_what_cannot_be_packed(documents: Any) -> None:
    with pytest.raises(DataError):
        Packed(documents, length=4)


# --- images


@pytest.mark.parametrize("form", ["bytes", "array", "tensor", "dict", "batch", "dict of batches"])
def test_images_come_out_the_same_from_every_form(form: str) -> None:
    pixels = torch.randint(0, 256, (6, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(6)
    forms: dict[str, Any] = {
        "bytes": [(one.permute(1, 2, 0).numpy(), int(label)) for one, label in zip(pixels, labels, strict=True)],
        "array": [
            (one.permute(1, 2, 0).float().numpy() / 255, int(label)) for one, label in zip(pixels, labels, strict=True)
        ],
        "tensor": [(one, int(label)) for one, label in zip(pixels, labels, strict=True)],
        "dict": [{"image": one, "label": int(label)} for one, label in zip(pixels, labels, strict=True)],
        "batch": (pixels, labels),
        "dict of batches": {"image": pixels.numpy(), "label": labels},
    }
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    batch = Loader(forms[form], batch_size=6, shuffle=False, collate=collator("image", mean=mean, std=std)).batch(0)
    found, which = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
    want = (pixels.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(found, want)
    assert torch.equal(which, labels)


def test_gray_images() -> None:
    color = torch.rand(2, 3, 4, 4)
    gray: Any = collator("image", grayscale=True)(list(color))
    want = 0.299 * color[:, 0] + 0.587 * color[:, 1] + 0.114 * color[:, 2]
    torch.testing.assert_close(gray, want[:, None])
    assert collator("image")([torch.rand(4, 4), torch.rand(4, 4)]).shape == (2, 1, 4, 4)
    assert collator("image", grayscale=True)([np.zeros((4, 4), np.uint8)]).shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([torch.ones(3, 4, 4), torch.ones(3, 4, 5)], {}, r"shape \[3, 4, 5\]"),
        ([torch.ones(1, 4, 4), torch.ones(3, 4, 4)], {}, "differ in shape"),
        ([torch.ones(3, 4, 4)], {"shape": (3, 8, 8)}, r"\[3, 8, 8\][^$]*\[3, 4, 4\]"),
        ([torch.ones(2, 4, 4)], {"mean": [0.0, 0.0, 0.0]}, "3 channels"),
        ([torch.ones(4)], {}, "no image"),
        ([{"a": torch.ones(3, 4, 4), "b": torch.ones(3, 4, 4)}], {}, "Which field"),
    ],
)
def test_images_that_do_not_fit(items: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        collator("image", **options)(items)


def test_image_options_out_of_range() -> None:
    for options in ({"std": 0}, {"std": [1.0, 0.0, 1.0]}, {"mean": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            collator("image", **options)


# --- tables


def test_a_table_is_rows_of_its_columns() -> None:
    rows = [{"b": 2, "a": 1.5, "label": 0}, {"b": 4, "a": 3.5, "label": 1}]
    columns = {"b": torch.tensor([2, 4]), "a": torch.tensor([1.5, 3.5]), "label": torch.tensor([0, 1])}
    for data in (rows, columns):
        batch = Loader(data, batch_size=2, shuffle=False, collate="table").batch(0)
        assert batch["features"].tolist() == [[1.5, 2.0], [3.5, 4.0]]
        assert batch["labels"].tolist() == [0, 1]
        chosen = Loader(data, batch_size=2, shuffle=False, collate=collator("table", columns=["b"])).batch(0)
        assert chosen["features"].tolist() == [[2.0], [4.0]]
    with pytest.raises(DataError, match="did you mean 'a'"):
        collator("table", columns=["aa"])(rows)
    with pytest.raises(DataError, match="one number a row"):
        collator("table", columns=["a"])([{"a": [1, 2], "y": 0}])
    with pytest.raises(DataError, match="one number a row"):
        collator("table")([{"a": "word", "y": 0}])
    assert collator("table")([{"a": [1, 2], "y": 0}])["a"].tolist() == [[1, 2]]
    with pytest.raises(DataError, match="one target"):
        collator("table")([{"a": 1, "y": 0, "label": 0}])


# --- by name


def test_names_and_options_are_checked_with_near_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        collator("imgae")
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        trainfn.fit(nn.Linear(1, 1), [1.0], loss="mse", collate="imgae", max_steps=1)
    with pytest.raises(ConfigError, match="did you mean 'grayscale'"):
        collator("image", greyscale=True)
    with pytest.raises(ConfigError, match="mask_id, vocab_size"):
        collator("mlm")
    with pytest.raises(ConfigError, match="neither a name nor a function"):
        Loader([1, 2], batch_size=1, collate=3)  # type: ignore[arg-type]


def test_a_collator_of_ones_own_has_a_name() -> None:
    register_collator("doubled", lambda factor=2: Collator(stack=lambda items: torch.tensor(items) * factor))
    assert "doubled" in collator_names()
    assert Loader([1, 2], batch_size=2, shuffle=False, collate="doubled").batch(0).tolist() == [2, 4]
    assert collator("doubled", factor=3)([1]).tolist() == [3]
    with pytest.raises(ConfigError, match="registered already"):
        register_collator("text", Collator)


def test_by_hand_comes_before_configured_and_that_before_usual() -> None:
    one, two, three = (Collator(stack=stack) for stack in (list, tuple, sorted))  # type: ignore[arg-type]
    assert choose_collator(one, two, three) is one
    assert choose_collator(None, two, three) is two
    assert choose_collator(None, None, three) is three
    assert choose_collator(None) is None
    data = [[1, 2, 3], [4, 5]]
    plans = [
        trainfn.plan(Tiny(), data, max_steps=1, batch_size=2, shuffle=False, **given).loader.batch(0)["input_ids"]
        for given in (
            {"task": "language_modeling"},
            {"task": trainfn.TaskSpec(kind="language_modeling", collate_options={"side": "left"})},
            {"task": "language_modeling", "collate": collator("text", pad_id=9)},
        )
    ]
    assert [ids[1].tolist() for ids in plans] == [[4, 5, 0], [0, 4, 5], [4, 5, 9]]


def test_collators_can_be_sent_to_workers() -> None:
    for name in ("default", "image", "table", "text"):
        assert isinstance(pickle.loads(pickle.dumps(collator(name))), Collator)
    task = trainfn.TaskSpec(kind="text_classification", inputs={"words": "input_ids"}, shapes={"input_ids": (None,)})
    made = pickle.loads(pickle.dumps(task.make_collator()))
    assert made([{"words": [1, 2], "label": 0}])["input_ids"].tolist() == [[1, 2]]
