"""How labels meet logits: the one rule for the losses over classes, for distillation and for the metrics.

| logits | labels | read by |
|---|---|---|
| [B, C] | [B] | ``examples`` |
| [B, T, C], pooled over the real positions | [B] | ``pooled_examples`` |
| [B, T, V] | [B, T], each at its own position | ``aligned_tokens`` |
| [B, T, V] | [B, T], each at the position before (language modelling) | ``next_tokens`` |
| [B, C, H, W] | [B, H, W] | ``pixels`` |

A loss says by :func:`reads` which it is, so that ``accuracy`` looks at the labels that were trained on. Letters: B
batch, T positions, C classes, V vocabulary, H, W height and width, N labels in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from trainfn.batch import TARGET_NAMES, Batch, inputs, target
from trainfn.errors import ConfigError, DataError, ModelError, suggest
from trainfn.loss.base import check_labels, logits_of
from trainfn.tree import describe, widened

Pooling = Literal["last", "mean"]
Target = Literal["classes", "labels", "numbers"]

L = TypeVar("L", bound=Callable[..., Any])


class Reading(NamedTuple):
    """Which labels a loss looks at, and against which logits.

    Attributes:
        target: what is predicted: one class of many, labels that do not exclude each other, or numbers.
        ignore_index: label that does not count.
        shift: whether the logits of a position are for the label of the next one.
        pooling: how logits of every position become one row for each example; None if they do not.
    """

    target: Target = "classes"
    ignore_index: int = -100
    shift: bool = False
    pooling: Pooling | None = None


def reads(reading: Reading) -> Callable[[L], L]:
    """Return a decorator that marks a loss with its reading, for metrics that are asked for by name.

    >>> @reads(Reading(shift=True))
    ... def loss(outputs, batch): ...
    >>> reading_of(loss)
    Reading(target='classes', ignore_index=-100, shift=True, pooling=None)
    """

    def mark(loss: L) -> L:
        cast(Any, loss).reading = reading
        return loss

    return mark


def reading_of(loss: Any) -> Reading | None:
    """Return the reading that a loss is marked with, or None: a function that someone wrote may look at anything.

    >>> reading_of(lambda outputs, batch: outputs.mean()) is None
    True
    """
    found = getattr(loss, "reading", None)
    return found if isinstance(found, Reading) else None


def check_pooling(pooling: str | None) -> None:
    """Raise unless this is a way to pool, or None.

    Raises:
        ConfigError: there is none of this name.

    >>> check_pooling("last")
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise ConfigError(
            "There is no pooling of this name.", got=repr(pooling), hint=suggest(str(pooling), get_args(Pooling))
        )


def labelled_rows(outputs: Any, batch: Batch, reading: Reading) -> tuple[Tensor, Tensor]:
    """Return rows of logits [N, C] and their labels [N] int64, by the form of the logits and the reading.

    Raises:
        DataError: labels of another shape or dtype than the logits ask for, or none.
        ModelError: logits of a form that no loss over classes takes.

    >>> rows, labels = labelled_rows(torch.zeros(2, 5, 3, 4), (None, torch.ones(2, 3, 4).long()), Reading())
    >>> rows.shape, labels.shape
    (torch.Size([24, 5]), torch.Size([24]))
    """
    logits, ignored = logits_of(outputs), reading.ignore_index
    if reading.shift:
        return next_tokens(logits, batch, ignored)
    if reading.pooling is not None:
        return pooled_examples(logits, batch, ignored, reading.pooling)
    if logits.ndim == 3:
        return aligned_tokens(logits, batch, ignored)
    if logits.ndim == 4:
        logits, labels = pixels(logits, batch, ignored)
        return logits.movedim(1, -1).reshape(-1, logits.shape[1]), labels.reshape(-1)  # (B * H * W, C)
    return examples(logits, batch, ignored)


def examples(logits: Tensor, batch: Batch, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return logits [B, C] and the labels of the same examples, [B] int64.

    Raises:
        DataError: labels that are not class indices [B].
        ModelError: logits that are not [B, C].

    >>> examples(torch.zeros(2, 3), {"x": None, "y": torch.tensor([1, 2])}, -100)[1]
    tensor([1, 2])
    """
    if logits.ndim != 2:
        raise ModelError(
            "Classification needs one row of logits for each example.",
            expected="logits [batch, classes]",
            got=describe(logits),
            hint={
                3: 'classification(pooling="last") or pooling="mean" makes one row out of those of all positions',
                4: 'loss="segmentation" is for classes of pixels',
            }.get(logits.ndim),
        )
    if logits.shape[1] == 1:
        raise ModelError(
            "Classification needs logits for two classes or more.",
            expected="logits [batch, classes]",
            got=describe(logits),
            hint='give the model two outputs; one that is above 0 or not is for loss="multi_label"',
        )
    labels = target(batch)
    check_labels(labels, (logits.shape[0],), logits)
    return logits, labels.long()


def pooled_examples(logits: Tensor, batch: Batch, ignore_index: int, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """Return logits [B, C], pooled over the real ones of [B, T, C], and labels [B]; none counts where nothing is real.

    Logits that are [B, C] already are taken as they are.

    Raises:
        DataError: labels that are not class indices [B]; a mask that is not [B, T].
        ModelError: logits that are neither.

    >>> batch = {"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([1])}
    >>> pooled_examples(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]), batch, -100, "last")[0]
    tensor([[3., 4.]])
    """
    if logits.ndim != 3:
        return examples(logits, batch, ignore_index)
    real = _real_positions(logits, batch)
    rows, labels = examples(_pool(logits, real, pooling), batch, ignore_index)
    return rows, labels.masked_fill(~real.any(1), ignore_index)


def pixels(logits: Tensor, batch: Batch, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return logits [B, C, H, W] and the labels of the same pixels, [B, H, W] int64.

    Raises:
        DataError: labels that are not class indices [B, H, W].
        ModelError: logits that are not [B, C, H, W].

    >>> pixels(torch.zeros(1, 3, 1, 2), (None, torch.tensor([[[0, 2]]])), -100)[1]
    tensor([[[0, 2]]])
    """
    if logits.ndim != 4:
        raise ModelError(
            "Segmentation needs logits for every pixel.",
            expected="logits [batch, classes, height, width]",
            got=describe(logits),
        )
    labels = target(batch)
    check_labels(labels, (logits.shape[0], *logits.shape[2:]), logits)
    return logits, labels.long()


def next_tokens(logits: Tensor, batch: Batch, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return logits [B * T, V] and, for each, the token that comes next, [B * T]; after the last one, none counts.

    Labels are the batch's target field, or else the token ids themselves, without those where ``attention_mask == 0``
    and without the one after such a place, on whichever side the padding is.

    Raises:
        DataError: sequences of length 1; labels of another shape or dtype.
        ModelError: logits that are not [B, T, V].

    >>> next_tokens(torch.zeros(1, 3, 8), torch.tensor([[5, 6, 7]]), -100)[1]
    tensor([   6,    7, -100])
    """
    _check_positions(logits)
    labels = _labels(batch, ignore_index)
    check_labels(labels, tuple(logits.shape[:2]), logits)
    if labels.shape[1] < 2:
        raise DataError(
            "A sequence of length 1 holds no next token to learn.",
            expected="sequences of at least 2 tokens",
            got=describe(batch),
        )
    # The labels are moved, not the logits: a slice of the logits would have to be copied to be flattened.
    nexts = F.pad(labels[:, 1:].long(), (0, 1), value=ignore_index).reshape(-1)  # (B * T)
    return logits.reshape(-1, logits.shape[-1]), nexts


def aligned_tokens(logits: Tensor, batch: Batch, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return logits [B * T, V] and the labels of the same positions, [B * T].

    Raises:
        DataError: no labels, or labels of another shape or dtype.
        ModelError: logits that are not [B, T, V].

    >>> aligned_tokens(torch.zeros(1, 3, 8), {"x": None, "labels": torch.tensor([[5, 6, 7]])}, -100)[1]
    tensor([5, 6, 7])
    """
    _check_positions(logits)
    labels = target(batch)
    check_labels(labels, tuple(logits.shape[:2]), logits)
    return logits.reshape(-1, logits.shape[-1]), labels.long().reshape(-1)


def _check_positions(logits: Tensor) -> None:
    if logits.ndim != 3:
        raise ModelError(
            "Language modelling needs logits for every position.",
            expected="logits [batch, positions, vocabulary]",
            got=describe(logits),
        )


def _labels(batch: Batch, ignore_index: int) -> Tensor:
    if isinstance(batch, dict):
        if any(name in batch for name in TARGET_NAMES):
            return target(batch)
        _, fields = inputs(batch)
        mask = fields.pop("attention_mask", None)
        tokens = fields.get("input_ids", next(iter(fields.values())) if len(fields) == 1 else None)
        if tokens is not None and mask is not None:
            real = mask != 0
            after_real = F.pad(real[:, :-1], (1, 0), value=True)
            return cast(Tensor, tokens.masked_fill(~(real & after_real), ignore_index))
        if tokens is not None:
            return cast(Tensor, tokens)
    elif isinstance(batch, (tuple, list)) and len(batch) == 1:
        return cast(Tensor, batch[0])
    elif isinstance(batch, Tensor):
        return batch
    return target(batch)


def _real_positions(logits: Tensor, batch: Batch) -> Tensor:
    shape = logits.shape[:2]  # (B, T)
    mask: Tensor | None = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    if mask.shape != shape:
        raise DataError(
            "The attention mask does not have the shape that the logits ask for.",
            where="attention_mask",
            expected=f"{list(shape)} for logits {list(logits.shape)}",
            got=describe(mask),
        )
    return mask != 0


def _pool(logits: Tensor, real: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "mean":
        held = torch.where(real[..., None], widened(logits), 0.0)  # (B, T, C)
        return held.sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # (B, C)
    positions = torch.arange(logits.shape[1], device=logits.device)
    last = (real * positions).amax(1)  # (B), 0 where nothing is real
    return logits.gather(1, last[:, None, None].expand(-1, 1, logits.shape[2]))[:, 0]  # (B, C)
