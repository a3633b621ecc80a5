"""The loss that a model computes itself, beside its outputs: ``model(x, y).loss``, ``logits, loss = model(x, y)``."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from trainfn.batch import Batch
from trainfn.errors import ModelError
from trainfn.loss.base import Loss, widens
from trainfn.tree import describe, widened


def own() -> Loss:
    """Return the loss that is found in the model's output, which the model is given the batch's targets for.

    It is the output itself where that is one number; the first number in a tuple; of a dict or an object, what is
    called ``loss``. It is taken for a mean over the batch's examples, whatever the model has made a mean over: with
    micro-batches of uneven padding, other losses are exact and this one is not.

    The targets go to the forward's parameter of the same name, or to the one that is called like a target (``labels``,
    ``targets``), whether it is required or not.

    Raises:
        ModelError: (from the loss) the output holds no such number.

    >>> import torch
    >>> own()((torch.zeros(2, 3), torch.tensor(0.5)), None)
    tensor(0.5000)
    """

    @widens
    def loss(outputs: Any, batch: Batch) -> Tensor:
        if isinstance(outputs, (tuple, list)) and not hasattr(outputs, "loss"):
            found = next((each for each in outputs if _is_number(each)), None)
        elif isinstance(outputs, Tensor):
            found = outputs
        else:
            found = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
        if not _is_number(found):
            raise ModelError(
                "The model's output holds no loss of its own.",
                expected="one number, a tuple with one, or a 'loss'",
                got=f"{type(outputs).__name__}({describe(outputs)})",
                hint="call the batch's target as the forward does (labels, targets, ...), or name a loss of trainfn's",
            )
        return widened(cast(Tensor, found))

    cast(Any, loss).takes_target = True
    return loss


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()
