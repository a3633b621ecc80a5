"""``MetricSum``, ``Metric``, and how a metric over classes goes through the rows of logits.

    merge(left, right) = (left.total + right.total, left.weight + right.weight)

which is associative and commutative (to rounding, where the totals are no counts), and ``nothing()`` is its identity.
Counts are int64 and so exact; other totals are float64, and float32 on devices that have no float64. Letters: N labels,
C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.errors import ConfigError
from trainfn.loss.reading import Reading, check_pooling, labelled_rows
from trainfn.tree import record, wide_float

_HELD = 2**24
"""Logits that are looked at together: 64 MiB in float32, so that no float32 copy of all logits is made."""


@record
class MetricSum:
    """Sums that add, over what was measured so far.

    Attributes:
        total: whatever the metric sums, of any shape.
        weight: what it is a sum over, of the same shape or one that is broadcast to it. 0 where nothing counted.
    """

    total: Tensor
    weight: Tensor


Measure = Callable[[Any, Batch], MetricSum]
RowMeasure = Callable[[Tensor, Tensor, Tensor], MetricSum]
"""``(rows [N, C], labels [N] int64, counted [N] bool) -> MetricSum``; labels that do not count may be any number."""


class Metric(NamedTuple):
    """A pair of functions, and a name.

    Attributes:
        name: what it is called.
        measure: ``(outputs, batch) -> MetricSum``, on the device, without gradients and without waiting for it.
        result: ``MetricSum -> {name: number}``, on the host. NaN where nothing counted.
    """

    name: str
    measure: Measure
    result: Callable[[MetricSum], dict[str, float]]


def merge(left: MetricSum, right: MetricSum) -> MetricSum:
    """Return the sum of two sums.

    >>> one = MetricSum(total=torch.tensor(2), weight=torch.tensor(3))
    >>> merge(one, one)
    MetricSum(total=tensor(4), weight=tensor(6))
    """
    return MetricSum(total=left.total + right.total, weight=left.weight + right.weight)


def nothing() -> MetricSum:
    """Return the sum over nothing: ``merge(nothing(), x)`` is x, whatever its shape, dtype and device.

    >>> merge(nothing(), MetricSum(total=torch.ones(2), weight=torch.tensor(3))).total
    tensor([1., 1.])
    """
    return MetricSum(total=torch.zeros((), dtype=torch.int64), weight=torch.zeros((), dtype=torch.int64))


def over_rows(measure: RowMeasure, reading: Reading) -> Measure:
    """Return the measure that finds labels as ``reading`` says and adds up ``measure`` over the rows, some at a time.

    Raises:
        ConfigError: there is no such pooling, or it is combined with a shift.
        DataError, ModelError: (from the measure) logits and labels that do not fit, as in the losses.

    >>> ones = over_rows(lambda rows, labels, counted: MetricSum(total=counted.sum(), weight=counted.sum()), Reading())
    >>> ones(torch.zeros(3, 2), (None, torch.tensor([0, -100, 1])))
    MetricSum(total=tensor(2), weight=tensor(2))
    """
    check_pooling(reading.pooling)
    if reading.shift and reading.pooling is not None:
        raise ConfigError(
            "shift and pooling do not go together.",
            expected="shift for next tokens, pooling for one class of each sequence",
            got=f"shift=True, pooling={reading.pooling!r}",
        )

    @torch.no_grad()
    def whole(outputs: Any, batch: Batch) -> MetricSum:
        rows, labels = labelled_rows(outputs, batch, reading)
        size = max(1, _HELD // max(1, rows.shape[1]))
        parts = zip(torch.split(rows, size), torch.split(labels, size), strict=True)
        return reduce(merge, [measure(part, own, own != reading.ignore_index) for part, own in parts])

    return whole


def best(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class with the highest logit of each row, [N] int64, and whether it is an answer, [N] bool.

    Among equals the first class is taken. A row with a NaN in it gives no answer.

    >>> best(torch.tensor([[1.0, 2.0, 2.0], [0.0, float("nan"), 1.0]]))[1]
    tensor([ True, False])
    """
    found = rows.max(1)
    return found.indices, ~found.values.isnan()  # max hands a NaN on


def summed(values: Tensor, dim: int = 0) -> Tensor:
    """Return the sum over one dimension: int64 of bools and integers, else in the widest float that the device has.

    >>> summed(torch.tensor([0.5, 0.25])), summed(torch.tensor([True, True]))
    (tensor(0.7500, dtype=torch.float64), tensor(2))
    """
    return values.sum(dim, dtype=wide_float(values) if values.dtype.is_floating_point else torch.int64)


def means(found: MetricSum) -> Tensor:
    """Return total / weight on the host, float64; NaN where nothing counted.

    >>> means(MetricSum(total=torch.tensor([1, 2]), weight=torch.tensor(4)))
    tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    return found.total.cpu().double() / found.weight.cpu().double()  # cpu first: not every device has float64
