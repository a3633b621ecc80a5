"""``LossSum``, what a loss is, and how a model's output becomes logits."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.errors import ConfigError, DataError, ModelError
from trainfn.tree import batch_length, describe, record


@record
class LossSum:
    """A sum and its weight. Sums add, means do not: the one division happens in the update, over everything.

    Attributes:
        total: summed loss, [] (nats over all counted tokens, for language modelling).
        weight: what it is a sum over, [] (number of counted tokens, examples, ...). 0 when nothing counted.
    """

    total: Tensor
    weight: Tensor


class Loss(Protocol):
    """``loss(outputs, batch)``: the model's outputs and the batch they came from.

    Returns a :class:`LossSum`; or a 0-d tensor, which is taken as the mean over the batch's examples.
    """

    def __call__(self, outputs: Any, batch: Batch, /) -> LossSum | Tensor: ...


def as_loss_sum(value: LossSum | Tensor, batch: Batch) -> LossSum:
    """Turn what a loss returned into a sum: a 0-d tensor is a mean over examples, so it is multiplied by their number.

    Raises:
        ModelError: the value is neither.

    >>> as_loss_sum(torch.tensor(0.5), {"x": torch.ones(4, 2)})
    LossSum(total=tensor(2.), weight=tensor(4.))
    """
    if isinstance(value, LossSum):
        return value
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise ModelError(
            "The loss returned something that cannot be added up.",
            expected="a LossSum(total, weight), or a 0-d tensor: the mean over the batch's examples",
            got=describe(value),
        )
    count = batch_length(batch)
    return LossSum(total=value * count, weight=torch.full((), float(count), dtype=value.dtype, device=value.device))


def logits_of(outputs: Any) -> Tensor:
    """Return the logits in a model's output: the tensor itself, a tuple's first item, ``["logits"]`` or ``.logits``.

    Raises:
        ModelError: none of these is a tensor.

    >>> logits_of({"logits": torch.ones(2)})
    tensor([1., 1.])
    """
    found = outputs
    if isinstance(outputs, dict):
        found = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)) and outputs:
        found = outputs[0]
    elif hasattr(outputs, "logits"):
        found = outputs.logits
    if not isinstance(found, Tensor):
        raise ModelError(
            "The model's output holds no logits.",
            expected="a tensor, a tuple that starts with one, a dict with 'logits', or an object with .logits",
            got=f"{type(outputs).__name__}({describe(outputs)})",
            hint="pass a loss function of your own: loss(outputs, batch)",
        )
    return found


def check_labels(labels: Tensor, shape: tuple[int, ...], logits: Tensor) -> None:
    """Raise unless ``labels`` are class indices (an integer dtype) of ``shape``. Reads metadata only.

    Raises:
        DataError: another dtype or shape.
    """
    dtype = labels.dtype if isinstance(labels, Tensor) else torch.bool
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise DataError(
            "The labels have the wrong dtype.",
            expected="class indices of an integer dtype",
            got=describe(labels),
            hint="convert them where the data set is made, for example labels.long()",
        )
    if tuple(labels.shape) != shape:
        raise DataError(
            "The labels do not have the shape that the logits ask for.",
            expected=f"labels {list(shape)} for logits {list(logits.shape)}",
            got=f"labels {list(labels.shape)}",
        )


def widened(values: Tensor) -> Tensor:
    """Return ``values`` in the dtype that sums are made in: float64 stays, all else becomes float32.

    >>> widened(torch.ones(2, dtype=torch.bfloat16))
    tensor([1., 1.])
    """
    return values if values.dtype == torch.float64 else values.float()


def check_number(name: str, value: float, *, least: float, most: float = math.inf) -> None:
    """Raise unless a setting is a finite number from ``least`` to ``most``.

    Raises:
        ConfigError: it is not.
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not least <= value <= most:
        expected = f"a number >= {least:g}" if most == math.inf else f"a number from {least:g} to {most:g}"
        raise ConfigError(f"{name} is out of range.", expected=expected, got=repr(value))
