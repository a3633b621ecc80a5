"""Cross-entropy over classes.

    total = - sum over b of log softmax(logits[b])[labels[b]],   over the labels that are not ignored

in nats; the weight is their number. Letters: B batch, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from trainfn.batch import Batch, target
from trainfn.errors import ModelError
from trainfn.loss.base import Loss, LossSum, check_labels, logits_of
from trainfn.tree import describe


def classification(*, ignore_index: int = -100) -> Loss:
    """Return the loss that trains a model to name the class of each example.

    Args:
        ignore_index: label that does not count.

    Raises:
        DataError: (from the loss) labels that are not class indices [B].
        ModelError: (from the loss) logits that are not [B, C].

    >>> logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    >>> classification()(logits, (None, torch.tensor([0, -100])))
    LossSum(total=tensor(0.), weight=tensor(1.))
    """

    def loss(outputs: Any, batch: Batch) -> LossSum:
        logits = logits_of(outputs)
        if logits.ndim != 2:
            raise ModelError(
                "Classification needs one row of logits for each example.",
                expected="logits [batch, classes]",
                got=describe(logits),
            )
        labels = target(batch)
        check_labels(labels, (logits.shape[0],), logits)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        total = F.cross_entropy(wide, labels.long(), ignore_index=ignore_index, reduction="sum")
        return LossSum(total=total, weight=(labels != ignore_index).sum().to(total.dtype))

    return loss
