"""Losses over numbers: squared, absolute, and Huber's, which is the first near 0 and the second far from it.

    mse:    each = e^2
    l1:     each = |e|
    huber:  each = e^2 / 2               where |e| <= delta
                   delta (|e| - delta/2) elsewhere

with e = prediction - target; the total is their sum over all entries, the weight the number of entries. Letters:
B batch.

References:
    P. J. Huber, "Robust Estimation of a Location Parameter", Annals of Mathematical Statistics 35, 1964.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from trainfn.batch import Batch, target
from trainfn.errors import ConfigError, DataError, ModelError, suggest
from trainfn.loss.base import Loss, LossSum, check_number, from_eight_bits, logits_of, widens
from trainfn.loss.reading import Reading, reads
from trainfn.tree import describe, widened

Kind = Literal["mse", "l1", "huber"]


def regression(*, kind: Kind = "mse", delta: float = 1.0) -> Loss:
    """Return the loss that trains a model to predict numbers.

    Predictions are the output itself, a tuple's first item, ``predictions`` or ``logits``. Targets have the shape of
    the predictions. Nothing is broadcast; one trailing dimension of length 1 may stand on either side alone, so [B, 1]
    and [B] go together. Targets may be integers; they are converted to the dtype of the sum.

    Args:
        kind: ``"mse"``, ``"l1"`` or ``"huber"``.
        delta: where Huber's loss turns from squared to absolute, in units of the target.

    Raises:
        ConfigError: an unknown kind, or a delta that is not positive.
        DataError: (from the loss) targets of another shape, or that are no real numbers.
        ModelError: (from the loss) the output holds no floating-point predictions.

    >>> batch = (None, torch.tensor([1.0, 2.0]))
    >>> regression()(torch.tensor([[1.0], [5.0]]), batch)
    LossSum(total=tensor(9.), weight=tensor(2.))
    >>> regression(kind="huber")(torch.tensor([1.0, 5.0]), batch)
    LossSum(total=tensor(2.5000), weight=tensor(2.))
    """
    if kind not in get_args(Kind):
        raise ConfigError(
            "There is no regression of this kind.", got=repr(kind), hint=suggest(str(kind), get_args(Kind))
        )
    check_number("delta", delta, least=0.0)
    if delta == 0:
        raise ConfigError("delta is out of range.", expected="a number > 0", got=repr(delta))

    @widens
    @reads(Reading("numbers"))
    def loss(outputs: Any, batch: Batch) -> LossSum:
        wide, wanted = predicted_and_wanted(outputs, batch)
        if kind == "mse":
            total = F.mse_loss(wide, wanted, reduction="sum")
        elif kind == "l1":
            total = F.l1_loss(wide, wanted, reduction="sum")
        else:
            total = F.huber_loss(wide, wanted, reduction="sum", delta=delta)
        return LossSum(total=total, weight=torch.full_like(total, float(wide.numel())))

    return loss


def predictions_of(outputs: Any) -> Tensor:
    """Return the predictions in a model's output: ``predictions`` where there is such a field, else the logits.

    Raises:
        ModelError: there is no floating-point tensor.

    >>> predictions_of({"predictions": torch.ones(2), "hidden": torch.zeros(3)})
    tensor([1., 1.])
    """
    found = None
    if not isinstance(outputs, Tensor):
        found = outputs.get("predictions") if isinstance(outputs, dict) else getattr(outputs, "predictions", None)
    found = from_eight_bits(found) if isinstance(found, Tensor) else logits_of(outputs)
    if not found.dtype.is_floating_point:
        raise ModelError(
            "The model's predictions are no floating-point numbers.",
            expected="predictions that can be differentiated",
            got=describe(found),
        )
    return found


def predicted_and_wanted(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return predictions and targets of one shape, both in the dtype of the sum.

    Raises:
        DataError, ModelError: as in :func:`regression`.

    >>> predicted_and_wanted(torch.ones(2, 1), (None, torch.tensor([3, 4])))[1]
    tensor([[3.],
            [4.]])
    """
    predictions, wanted = predictions_of(outputs), target(batch)
    wide = widened(predictions)
    if isinstance(wanted, Tensor) and wanted.shape == wide.shape and wanted.dtype == wide.dtype:
        return wide, wanted
    _check(predictions, wanted)
    return wide, wanted.to(wide.dtype).reshape(wide.shape)


def _check(predictions: Tensor, wanted: Any) -> None:
    if not isinstance(wanted, Tensor) or wanted.dtype.is_complex or wanted.dtype == torch.bool:
        raise DataError("The targets have the wrong dtype.", expected="real numbers", got=describe(wanted))
    left, right = tuple(predictions.shape), tuple(wanted.shape)
    if right not in (left, (*left, 1)) and left != (*right, 1):
        raise DataError(
            "The targets do not have the shape of the predictions.",
            expected=f"targets {list(left)}; one more or one less trailing 1 will do",
            got=describe(wanted),
            hint="reshape one of them: nothing is broadcast here, because that would compare every example with others",
        )
