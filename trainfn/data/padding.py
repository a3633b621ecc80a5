"""Collators for sequences of tokens: padding, prompts that are not learnt, tokens that are masked.

Letters: B examples, T tokens of the longest one.

References:
    J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (section 3.1, the 80/10/10 rule),
        https://arxiv.org/abs/1810.04805, 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainfn.batch import TARGET_NAMES, Batch
from trainfn.data.collate import Collator
from trainfn.errors import ConfigError, DataError
from trainfn.tree import describe

Side = Literal["right", "left"]

IGNORED = -100
"""The label that padding and prompts are given: no loss counts it."""


def text(
    *,
    side: Side = "right",
    pad_id: int = 0,
    ignore_index: int = IGNORED,
    multiple_of: int = 1,
    max_length: int | None = None,
) -> Collator:
    """Return the collator that pads sequences to the longest one of their batch.

    An item is a sequence of token ids, a tuple ``(ids, label)``, or a dict with ``input_ids``. Sequences are lists,
    arrays or tensors. In the batch, a dict, ``attention_mask`` [B, T] int64 is 1 at tokens and 0 at padding. Labels
    that are a sequence keep their values and are padded with ``ignore_index``; a single label stays one. Any other
    sequence is padded with 0. An item with a number ``prompt_length`` and no labels learns what comes after its first
    so many tokens: its labels are its tokens, with ``ignore_index`` in the prompt.

    Args:
        side: where the padding goes; ``"left"`` keeps the last tokens in one column, as generating needs.
        pad_id: token id of padding.
        ignore_index: label of padding and prompts.
        multiple_of: pad on to a multiple of this, so that there are fewer lengths.
        max_length: cut what is longer; None cuts nothing.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the collator) an item that holds no sequence of ids, or a field with words.

    >>> text()([[5, 6, 7], [8]])
    {'input_ids': tensor([[5, 6, 7],
            [8, 0, 0]]), 'attention_mask': tensor([[1, 1, 1],
            [1, 0, 0]])}
    >>> pad = text(side="left")
    >>> pad([{"input_ids": [5, 6, 7], "prompt_length": 2}, {"input_ids": [8, 9], "prompt_length": 1}])["labels"]
    tensor([[-100, -100,    7],
            [-100, -100,    9]])
    """
    if side not in ("right", "left"):
        raise ConfigError("There is no such side to pad on.", expected="'right' or 'left'", got=repr(side))
    for name, value, least in (("pad_id", pad_id, 0), ("multiple_of", multiple_of, 1), ("max_length", max_length, 1)):
        check_int(name, value, least, optional=name == "max_length")
    pad = partial(_pad, side=side, pad_id=pad_id, ignore=ignore_index, multiple=multiple_of, longest=max_length)
    return Collator(stack=pad)


def mlm(
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int] = (),
    probability: float = 0.15,
    side: Side = "right",
    pad_id: int = 0,
    ignore_index: int = IGNORED,
    multiple_of: int = 1,
    max_length: int | None = None,
) -> Collator:
    """Return the collator that pads, and masks tokens for :func:`trainfn.loss.masked_language_modeling`.

    Of the tokens, each is chosen with ``probability``; of the chosen ones, 80 % become ``mask_id``, 10 % a random
    token and 10 % stay. ``labels`` hold the chosen tokens, and ``ignore_index`` elsewhere. ``pad_id``, ``mask_id`` and
    ``special_ids`` are never chosen, nor drawn. The draws come from PyTorch's global generator, which the loader seeds
    for each batch: a batch is the same whenever it is asked for, and another one in the next epoch.

    Args:
        mask_id: token id of the mask.
        vocab_size: how many tokens there are; random ones are drawn from all of them but the special ones.
        special_ids: tokens that are spared.
        probability: share of tokens to predict, in (0, 1].
        side, pad_id, ignore_index, multiple_of, max_length: as in :func:`text`.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the collator) a batch that has labels already, or no ``input_ids``.

    >>> _ = torch.manual_seed(0)
    >>> batch = mlm(mask_id=1, vocab_size=9, special_ids=[2], probability=1.0)([[2, 5, 6], [2, 7]])
    >>> batch["labels"]
    tensor([[-100,    5,    6],
            [-100,    7, -100]])
    """
    check_int("vocab_size", vocab_size, 2)
    spared = sorted({mask_id, pad_id, *special_ids})
    for token in spared:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ConfigError("A special token is out of range.", expected=f"ids in [0, {vocab_size})", got=repr(token))
    if len(spared) >= vocab_size:
        raise ConfigError("Every token is special.", expected=f"fewer than {vocab_size}", got=f"{len(spared)} of them")
    if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 < probability <= 1:
        raise ConfigError("probability is out of range.", expected="a number in (0, 1]", got=repr(probability))
    pad = text(side=side, pad_id=pad_id, ignore_index=ignore_index, multiple_of=multiple_of, max_length=max_length)
    mask = partial(_mask, mask_id=mask_id, size=vocab_size, spared=spared, probability=probability, ignore=ignore_index)
    return Collator(stack=pad.stack, finish=mask, draws=True)


def check_int(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """Raise unless an option is a whole number of at least ``least``.

    Raises:
        ConfigError: it is not.

    >>> check_int("length", 3, 2)
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is out of range.", expected=f"an int >= {least}", got=repr(value))


def _pad(
    items: list[Any], *, side: Side, pad_id: int, ignore: int, multiple: int, longest: int | None
) -> dict[str, Tensor]:
    rows = [_fields(item, ignore, longest) for item in items]
    unlike = next((row for row in rows if row.keys() != rows[0].keys()), None)
    if unlike is not None:
        raise DataError("Items differ in their fields.", expected=", ".join(rows[0]), got=", ".join(unlike))
    for row in rows:
        row.setdefault("attention_mask", torch.ones_like(row["input_ids"], dtype=torch.int64))
    fills = {"input_ids": pad_id} | dict.fromkeys(TARGET_NAMES, ignore)

    def column(name: str) -> Tensor:
        values = [row[name] for row in rows]
        if len({value.ndim for value in values}) > 1 or values[0].ndim > 1:
            shapes = [list(value.shape) for value in values[:8]]
            raise DataError("A field is neither numbers nor sequences.", where=f"field {name}", got=f"shapes {shapes}")
        if values[0].ndim == 0:
            return torch.stack(values)
        width = -(-max(len(value) for value in values) // multiple) * multiple
        fill = fills.get(name, 0)

        def padded(value: Tensor) -> Tensor:
            room = width - len(value)
            return F.pad(value, (0, room) if side == "right" else (room, 0), value=fill)

        return torch.stack([padded(value) for value in values])  # (B, T)

    return {name: column(name) for name in rows[0]}


def _fields(item: Any, ignore: int, longest: int | None) -> dict[str, Tensor]:
    """Return an item as tensors by name: sequences [T], numbers []."""
    if isinstance(item, Mapping):
        named = dict(item)
    elif isinstance(item, tuple) and len(item) == 2:
        named = {"input_ids": item[0], "labels": item[1]}
    else:
        named = {"input_ids": item}
    row = {name: _numbers(name, value) for name, value in named.items()}
    ids = row.get("input_ids")
    if ids is None or ids.ndim != 1 or ids.is_floating_point():
        raise DataError(
            "An item holds no sequence of token ids.",
            expected="a sequence of ids, (ids, label), or a dict with 'input_ids'",
            got=describe(row),
            hint="rename its field with TaskSpec(inputs=...), or tokenize it: trainfn.data.Tokenized",
        )
    prompt = row.pop("prompt_length", None)
    if prompt is not None:
        _check_prompt(prompt, row)
        labels = ids.long().clone()
        labels[: int(prompt)] = ignore
        row["labels"] = labels
    return {name: value[:longest] if value.ndim == 1 and longest is not None else value for name, value in row.items()}


def _check_prompt(prompt: Tensor, row: dict[str, Tensor]) -> None:
    labelled = [name for name in TARGET_NAMES if name in row]
    if labelled:
        raise DataError(
            "An item says both what is a prompt and what is to be learnt.",
            got=f"prompt_length and {labelled[0]}",
            hint="leave out one of them",
        )
    if prompt.ndim or prompt.is_floating_point() or not 0 <= int(prompt) <= len(row["input_ids"]):
        expected = f"an int from 0 to {len(row['input_ids'])}, the number of tokens"
        raise DataError("prompt_length is out of range.", expected=expected, got=describe(prompt))


def _numbers(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, (list, tuple)) and not value:
            return torch.zeros(0, dtype=torch.int64)
        return torch.as_tensor(np.asarray(value)) if not isinstance(value, (int, float)) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            "A field does not hold numbers.",
            where=f"field {name}",
            got=type(value).__name__,
            hint="tokenize texts first (trainfn.data.Tokenized), or name the fields to use: TaskSpec(inputs=...)",
        ) from error


def _mask(batch: Batch, *, mask_id: int, size: int, spared: list[int], probability: float, ignore: int) -> Batch:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    found = [name for name in TARGET_NAMES if isinstance(batch, dict) and name in batch]
    if not isinstance(batch, dict) or "input_ids" not in batch or found:
        raise DataError(
            "Tokens cannot be masked in this batch.",
            expected="input_ids, and no labels: they are the tokens that are masked",
            got=describe(batch),
        )
    ids = cast(Tensor, batch["input_ids"])  # (B, T)
    real = batch["attention_mask"] != 0 if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    special = torch.isin(ids, torch.tensor(spared))
    chosen = (torch.rand(ids.shape) < probability) & real & ~special
    fate = torch.rand(ids.shape)
    ordinary = torch.tensor(sorted(set(range(size)) - set(spared)))
    drawn = ordinary[torch.randint(len(ordinary), ids.shape)].to(ids.dtype)
    masked = torch.where(chosen & (fate < 0.8), mask_id, ids)
    masked = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), drawn, masked)
    return {**batch, "input_ids": masked, "labels": torch.where(chosen, ids, ignore)}
