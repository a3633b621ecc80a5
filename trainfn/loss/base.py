"""``LossSum``, what a loss is, and how a model's output becomes logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.errors import ConfigError, DataError, ModelError
from trainfn.tree import batch_length, describe, record, widened


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


L = TypeVar("L", bound=Callable[..., Any])

_LAST_ALONE = 'a model that gives logits for all positions only beside targets has a loss of its own: loss="own"'
_LOGITS = ("logits", "out", "output")

MARKS = ("widens", "reading", "check_trained", "takes_target")
"""What a loss may carry as an attribute: see ``widens``, ``reads``, ``peft_aware`` and ``takes_target``."""


def widens(loss: L) -> L:
    """Mark a loss as one that makes its sums in float32 or wider itself, so that it needs no wide copy of the outputs.

    >>> @widens
    ... def loss(outputs, batch):
    ...     return outputs.float().mean()
    >>> loss.widens
    True
    """
    cast(Any, loss).widens = True
    return loss


def takes_target(loss: Any) -> bool:
    """Return whether a loss is marked as one that the model computes itself, and needs the targets for.

    >>> takes_target(lambda outputs, batch: outputs.mean())
    False
    """
    return bool(getattr(loss, "takes_target", False))


def marked_like(base: Any) -> Callable[[L], L]:
    """Return a decorator that gives a loss around ``base`` the marks that ``base`` carries.

    >>> marked_like(widens(lambda outputs, batch: 0))(lambda outputs, batch: 1).widens
    True
    """

    def mark(loss: L) -> L:
        for name in MARKS:
            if hasattr(base, name):
                setattr(loss, name, getattr(base, name))
        return loss

    return mark


def as_loss_sum(value: LossSum | Tensor, batch: Batch) -> LossSum:
    """Turn what a loss returned into a sum: a 0-d tensor is a mean over examples, so it is multiplied by their number.

    Totals and weights are made in float32 or wider: in 16 bits no count above 2,048 is exact.

    Raises:
        ModelError: the value is neither, or a LossSum of something that is no number.

    >>> as_loss_sum(torch.tensor(0.5), {"x": torch.ones(4, 2)})
    LossSum(total=tensor(2.), weight=tensor(4.))
    >>> as_loss_sum(LossSum(total=torch.tensor(6.0), weight=3), None)
    LossSum(total=tensor(6.), weight=tensor(3.))
    """
    total, weight = (value.total, value.weight) if isinstance(value, LossSum) else (value, 1)
    if not isinstance(total, Tensor) or total.ndim != 0 or not total.is_floating_point() or not _is_number(weight):
        raise ModelError(
            "The loss returned something that cannot be added up.",
            expected="a LossSum(total, weight) of 0-d tensors, or a 0-d tensor: the mean over the batch's examples",
            got=describe(value),
            hint="sum over the elements: reduction='sum' and not 'none'",
        )
    total = widened(total)
    if isinstance(value, LossSum):
        if isinstance(weight, Tensor):
            return LossSum(total=total, weight=weight.to(total.dtype))
        return LossSum(total=total, weight=torch.full_like(total, weight, requires_grad=False))
    count = batch_length(batch)
    return LossSum(total=total * count, weight=torch.full_like(total, float(count), requires_grad=False))


def logits_of(outputs: Any) -> Tensor:
    """Return the logits in a model's output.

    They are the tensor itself; the first item of a tuple, or the logits in it, where a loss (one number) or None may
    come before; of a dict or an object, what is called
    ``logits``, or else ``out``, as torchvision has it, or ``output``.

    Quantized logits and floats of 8 bits, for which PyTorch has few operations, come back as float32.

    Raises:
        ModelError: none of these is a tensor.

    >>> logits_of({"logits": torch.ones(2)})
    tensor([1., 1.])
    """
    found = outputs
    while isinstance(found, (tuple, list)) and found and not hasattr(found, "logits"):
        rest = [each for each in found if each is not None and not (isinstance(each, Tensor) and each.ndim == 0)]
        found = (rest or found)[0]
    if not isinstance(found, Tensor):
        has = found.get if isinstance(found, dict) else partial(getattr, found)
        found = next((value for name in _LOGITS if (value := has(name, None)) is not None), None)
    if not isinstance(found, Tensor):
        raise ModelError(
            "The model's output holds no logits.",
            expected="a tensor, a tuple that starts with one, a dict with 'logits', or an object with .logits "
            "('out' and 'output' are names for them, too)",
            got=f"{type(outputs).__name__}({describe(outputs)})",
            hint="pass a loss function of your own: loss(outputs, batch)",
        )
    return from_eight_bits(found)


def from_eight_bits(values: Tensor) -> Tensor:
    """Return quantized values and floats of 8 bits as float32, all else as it is.

    >>> from_eight_bits(torch.ones(2).to(torch.float8_e5m2)).dtype, from_eight_bits(torch.ones(2).half()).dtype
    (torch.float32, torch.float16)
    """
    if values.is_quantized:
        return values.dequantize()
    return values.float() if values.dtype.is_floating_point and values.dtype.itemsize == 1 else values


def check_labels(labels: Tensor, shape: tuple[int, ...], logits: Tensor) -> None:
    """Raise unless ``labels`` are class indices (an integer dtype) of ``shape``. Reads metadata only.

    Raises:
        DataError: another dtype or shape.

    >>> check_labels(torch.tensor([0, 2]), (2,), torch.zeros(2, 3))
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
            hint=_LAST_ALONE if logits.ndim == 3 and logits.shape[1] == 1 else None,
        )


def _is_number(value: Any) -> bool:
    return value.ndim == 0 if isinstance(value, Tensor) else isinstance(value, (int, float))


def check_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise unless a setting is a whole number above 0, or None where that is an answer.

    Raises:
        ConfigError: it is not.

    >>> check_count("bins", 15)
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        expected = "an int >= 1, or None" if optional else "an int >= 1"
        raise ConfigError(f"{name} is out of range.", expected=expected, got=repr(value))


def check_number(name: str, value: float, *, least: float, most: float = math.inf) -> None:
    """Raise unless a setting is a finite number from ``least`` to ``most``.

    Raises:
        ConfigError: it is not.

    >>> check_number("alpha", 0.5, least=0.0, most=1.0)
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not least <= value <= most:
        expected = f"a number >= {least:g}" if most == math.inf else f"a number from {least:g} to {most:g}"
        raise ConfigError(f"{name} is out of range.", expected=expected, got=repr(value))
