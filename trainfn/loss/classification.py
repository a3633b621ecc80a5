"""Cross-entropy over classes: of examples, of sequences, of images and of pixels.

    total = - sum over b of log softmax(logits[b])[labels[b]],   over the labels that are not ignored

in nats; the weight is their number, or with class weights the sum of the weights of those labels, so that the quotient
is the weighted mean of ``torch.nn.CrossEntropyLoss``. Letters: B batch, T positions, C classes, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainfn.batch import Batch, target
from trainfn.errors import ConfigError, DataError, ModelError, suggest
from trainfn.loss.base import Loss, LossSum, check_labels, logits_of, widened
from trainfn.loss.cross_entropy import make_cross_entropy
from trainfn.tree import describe

Pooling = Literal["last", "mean"]


def classification(
    *,
    ignore_index: int = -100,
    pooling: Pooling | None = None,
    class_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Loss:
    """Return the loss that trains a model to name the class of each example.

    Args:
        ignore_index: label that does not count.
        pooling: how logits of every position, [B, T, C], become one row for each example: ``"last"`` takes the last
            real position, ``"mean"`` the mean over the real ones. Real is where the batch's ``attention_mask`` is
            not 0; without that field every position is. An example without a real position does not count. Logits
            [B, C] are taken as they are.
        class_weights: what each class counts for, [C].
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1].

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the loss) labels that are not class indices [B]; a mask that is not [B, T].
        ModelError: (from the loss) logits that are not [B, C], or with ``pooling`` [B, T, C].

    >>> logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    >>> classification()(logits, (None, torch.tensor([0, -100])))
    LossSum(total=tensor(0.), weight=tensor(1.))
    >>> batch = {"attention_mask": torch.tensor([[1, 0]]), "labels": torch.tensor([0])}
    >>> classification(pooling="last")(logits[None], batch)
    LossSum(total=tensor(0.), weight=tensor(1.))
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise ConfigError(
            "There is no pooling of this name.", got=repr(pooling), hint=suggest(str(pooling), get_args(Pooling))
        )
    reduce = make_cross_entropy(ignore_index=ignore_index, class_weights=class_weights, label_smoothing=label_smoothing)

    def loss(outputs: Any, batch: Batch) -> LossSum:
        logits = logits_of(outputs)
        if pooling is None or logits.ndim != 3:
            return reduce(*examples(logits, batch, ignore_index))
        real = _real_positions(logits, batch)
        pooled, labels = examples(_pool(logits, real, pooling), batch, ignore_index)
        return reduce(pooled, labels.masked_fill(~real.any(1), ignore_index))

    return loss


def vision_classification(
    *,
    ignore_index: int = -100,
    class_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Loss:
    """Return the loss that trains a model to name the class of each image: logits [B, C], labels [B].

    Args:
        ignore_index, class_weights, label_smoothing: as in :func:`classification`.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the loss) labels that are not class indices [B].
        ModelError: (from the loss) logits that are not [B, C].

    >>> batch = {"pixel_values": torch.zeros(1, 3, 2, 2), "labels": torch.tensor([1])}
    >>> vision_classification()(torch.tensor([[0.0, 100.0]]), batch)
    LossSum(total=tensor(0.), weight=tensor(1.))
    """
    return classification(ignore_index=ignore_index, class_weights=class_weights, label_smoothing=label_smoothing)


def segmentation(
    *,
    ignore_index: int = -100,
    class_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Loss:
    """Return the loss that trains a model to name the class of each pixel: logits [B, C, H, W], labels [B, H, W].

    The weight counts pixels, so an image with few labelled ones weighs little. Logits of another resolution than the
    labels are an error, not resized.

    Args:
        ignore_index: label that does not count; 255 in Pascal VOC and Cityscapes, whose labels are uint8.
        class_weights, label_smoothing: as in :func:`classification`.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the loss) labels that are not class indices [B, H, W].
        ModelError: (from the loss) logits that are not [B, C, H, W].

    >>> labels = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    >>> logits = torch.tensor([100.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    >>> segmentation(ignore_index=255)(logits, (None, labels))
    LossSum(total=tensor(0.), weight=tensor(1.))
    """
    reduce = make_cross_entropy(ignore_index=ignore_index, class_weights=class_weights, label_smoothing=label_smoothing)

    def loss(outputs: Any, batch: Batch) -> LossSum:
        logits = logits_of(outputs)
        if logits.ndim != 4:
            raise ModelError(
                "Segmentation needs logits for every pixel.",
                expected="logits [batch, classes, height, width]",
                got=describe(logits),
            )
        labels = target(batch)
        check_labels(labels, (logits.shape[0], *logits.shape[2:]), logits)
        return reduce(logits, labels.long())

    return loss


def examples(logits: Tensor, batch: Batch, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return logits [B, C] and the labels of the same examples, [B] int64.

    Raises:
        DataError, ModelError: as in :func:`classification`.
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
    labels = target(batch)
    check_labels(labels, (logits.shape[0],), logits)
    return logits, labels.long()


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
