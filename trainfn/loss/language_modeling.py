"""Next-token cross-entropy.

    total = - sum over b, t of log softmax(logits[b, t])[labels[b, t + 1]],   over the labels that are not ignored

in nats; the weight is their number. The shift happens here and only here: ``labels`` are aligned with ``input_ids``,
as in Hugging Face. Letters: B batch, T positions, V vocabulary.

References:
    Y. Bengio et al., "A Neural Probabilistic Language Model", JMLR 3, 2003.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from trainfn.batch import TARGET_NAMES, Batch, inputs, target
from trainfn.errors import DataError, ModelError
from trainfn.loss.base import Loss, LossSum, check_labels, logits_of
from trainfn.tree import describe


def language_modeling(*, ignore_index: int = -100) -> Loss:
    """Return the loss that trains a model to predict the next token.

    Labels are the batch's target field, or else the token ids themselves, with padding (``attention_mask == 0``) left
    out. Every real token counts, token 0 and end-of-text included.

    Args:
        ignore_index: label that does not count.

    Raises:
        DataError: (from the loss) sequences of length 1 hold no next token; labels of another shape or dtype.
        ModelError: (from the loss) logits that are not [B, T, V].

    >>> tokens = torch.tensor([[1, 2, 0]])
    >>> perfect = F.one_hot(tokens.roll(-1, 1), 3) * 100.0
    >>> language_modeling()(perfect, {"input_ids": tokens})
    LossSum(total=tensor(0.), weight=tensor(2.))
    """

    def loss(outputs: Any, batch: Batch) -> LossSum:
        logits = logits_of(outputs)
        if logits.ndim != 3:
            raise ModelError(
                "Language modelling needs logits for every position.",
                expected="logits [batch, positions, vocabulary]",
                got=describe(logits),
            )
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
        wide = logits.reshape(-1, logits.shape[-1])  # (B * T, V)
        wide = wide if wide.dtype == torch.float64 else wide.float()
        total = F.cross_entropy(wide, nexts, ignore_index=ignore_index, reduction="sum")
        return LossSum(total=total, weight=(nexts != ignore_index).sum().to(total.dtype))

    return loss


def _labels(batch: Batch, ignore_index: int) -> Tensor:
    if isinstance(batch, dict):
        if any(name in batch for name in TARGET_NAMES):
            return target(batch)
        _, fields = inputs(batch)
        mask = fields.pop("attention_mask", None)
        tokens = fields.get("input_ids", next(iter(fields.values())) if len(fields) == 1 else None)
        if tokens is not None:
            return cast(Tensor, tokens if mask is None else tokens.masked_fill(mask == 0, ignore_index))
    elif isinstance(batch, Tensor):
        return batch
    return target(batch)
