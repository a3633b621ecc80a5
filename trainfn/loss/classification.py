"""Cross-entropy over classes: of examples, of sequences, of images and of pixels.

    total = - sum over b of log softmax(logits[b])[labels[b]],   over the labels that are not ignored

in nats; the weight is their number, or with class weights the sum of the weights of those labels, so that the quotient
is the weighted mean of ``torch.nn.CrossEntropyLoss``. Letters: B batch, T positions, C classes, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trainfn.batch import Batch
from trainfn.loss.base import Loss, LossSum, logits_of, widens
from trainfn.loss.cross_entropy import make_cross_entropy
from trainfn.loss.reading import Pooling, Reading, check_pooling, examples, pixels, pooled_examples, reads


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

    >>> import torch
    >>> logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    >>> classification()(logits, (None, torch.tensor([0, -100])))
    LossSum(total=tensor(0.), weight=tensor(1.))
    >>> batch = {"attention_mask": torch.tensor([[1, 0]]), "labels": torch.tensor([0])}
    >>> classification(pooling="last")(logits[None], batch)
    LossSum(total=tensor(0.), weight=tensor(1.))
    """
    check_pooling(pooling)
    reduce = make_cross_entropy(ignore_index=ignore_index, class_weights=class_weights, label_smoothing=label_smoothing)

    @widens
    @reads(Reading(ignore_index=ignore_index, pooling=pooling))
    def loss(outputs: Any, batch: Batch) -> LossSum:
        logits = logits_of(outputs)
        if pooling is None:
            return reduce(*examples(logits, batch, ignore_index))
        return reduce(*pooled_examples(logits, batch, ignore_index, pooling))

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

    >>> import torch
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

    >>> import torch
    >>> labels = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    >>> logits = torch.tensor([100.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    >>> segmentation(ignore_index=255)(logits, (None, labels))
    LossSum(total=tensor(0.), weight=tensor(1.))
    """
    reduce = make_cross_entropy(ignore_index=ignore_index, class_weights=class_weights, label_smoothing=label_smoothing)

    @widens
    @reads(Reading(ignore_index=ignore_index))
    def loss(outputs: Any, batch: Batch) -> LossSum:
        return reduce(*pixels(logits_of(outputs), batch, ignore_index))

    return loss
