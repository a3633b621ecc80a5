"""Binary cross-entropy over labels that do not exclude each other.

    total = - sum over b, c of  p[c] y[b, c] log sigmoid(x[b, c]) + (1 - y[b, c]) log sigmoid(-x[b, c])

in nats, over the entries that are not ignored; the weight is their number. p weighs the positive entries (1 if not
given) and does not enter the weight, as in ``torch.nn.BCEWithLogitsLoss``. Letters: B batch, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainfn.batch import Batch, target
from trainfn.errors import DataError, ModelError
from trainfn.loss.base import Loss, LossSum, logits_of, widens
from trainfn.loss.cross_entropy import weights_tensor
from trainfn.loss.reading import Reading, reads
from trainfn.tree import describe, widened


def multi_label(*, pos_weight: Sequence[float] | Tensor | None = None, ignore_index: int = -100) -> Loss:
    """Return the loss that trains a model to say of each label whether it holds.

    Targets are [B, C] like the logits: bool, integers 0 and 1, or floats from 0 to 1 (soft labels), converted to the
    dtype of the sum. Their values are not looked at, which would wait for the device.

    Args:
        pos_weight: what a positive entry of each label counts for against a negative one, [C].
        ignore_index: entry that does not count, for labels that are not known.

    Raises:
        ConfigError: ``pos_weight`` is no list of finite numbers >= 0.
        DataError: (from the loss) targets that are complex or of another shape; nothing is broadcast.
        ModelError: (from the loss) logits that are not [B, C], or not one for each ``pos_weight``.

    >>> logits = torch.tensor([[200.0, -200.0, 3.0]])
    >>> multi_label()(logits, (None, torch.tensor([[1, 0, -100]])))
    LossSum(total=tensor(0.), weight=tensor(2.))
    """
    table = None if pos_weight is None else weights_tensor("pos_weight", pos_weight)

    @widens
    @reads(Reading("labels", ignore_index))
    def loss(outputs: Any, batch: Batch) -> LossSum:
        wide, labels, counted = entries(outputs, batch, ignore_index, None if table is None else table.shape[0])
        weights = None if table is None else table.to(wide.device, non_blocking=True).to(wide.dtype)
        each = F.binary_cross_entropy_with_logits(
            wide, torch.where(counted, labels, 0.0), pos_weight=weights, reduction="none"
        )
        total = torch.where(counted, each, 0.0).sum()
        return LossSum(total=total, weight=counted.sum().to(total.dtype))

    return loss


def entries(
    outputs: Any, batch: Batch, ignore_index: int, num_labels: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [B, C] and targets [B, C], both in the dtype of the sum, and which entries count, [B, C] bool.

    Raises:
        DataError: targets that are complex or of another shape.
        ModelError: logits that are not [B, C], or not of ``num_labels`` labels.

    >>> entries(torch.zeros(1, 2), (None, torch.tensor([[1, -100]])), -100)[2]
    tensor([[ True, False]])
    """
    logits, labels = logits_of(outputs), target(batch)
    if logits.ndim != 2 or num_labels not in (None, logits.shape[1]):
        raise ModelError(
            "Multi-label classification needs a logit for each label of each example.",
            expected=f"logits [batch, {'labels' if num_labels is None else num_labels}]",
            got=describe(logits),
        )
    if not isinstance(labels, Tensor) or labels.dtype.is_complex:
        raise DataError(
            "The targets have the wrong dtype.",
            expected="bool, integers 0 and 1, or floats from 0 to 1",
            got=describe(labels),
        )
    if labels.shape != logits.shape:
        raise DataError(
            "The targets do not have the shape of the logits.",
            expected=f"targets {list(logits.shape)}",
            got=describe(labels),
            hint='for one class index per example, loss="classification"' if labels.ndim == 1 else None,
        )
    wide = widened(logits)
    # A bool tensor equals no number but 0 and 1; of uint8, -100 would be 156.
    labels = labels.to(wide.dtype)
    return wide, labels, labels != ignore_index
