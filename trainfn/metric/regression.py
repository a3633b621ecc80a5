"""Metrics over numbers, all entries together: how far predictions are from targets.

    mean_absolute_error     = sum |e| / n
    root_mean_squared_error = sqrt(sum e^2 / n)
    r2                      = 1 - sum e^2 / (sum (y - c)^2 - (sum (y - c))^2 / n)

with e = prediction - target y, over n entries; c is any constant and cancels out. A NaN in a prediction makes them NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.loss.base import check_number
from trainfn.loss.regression import predicted_and_wanted
from trainfn.metric.base import Measure, Metric, MetricSum, means, summed
from trainfn.tree import wide_float


def mean_absolute_error() -> Metric:
    """Return the mean distance from the target, in its unit: ``{"mean_absolute_error": ...}``.

    Raises:
        DataError, ModelError: (from the measure) as in the loss ``regression``.

    >>> metric = mean_absolute_error()
    >>> metric.result(metric.measure(torch.tensor([1.0, 2.0]), (None, torch.tensor([1.0, 5.0]))))
    {'mean_absolute_error': 1.5}
    """
    return Metric(
        name="mean_absolute_error",
        measure=_over_numbers(lambda errors, _: summed(errors.abs())),
        result=lambda found: {"mean_absolute_error": float(means(found))},
    )


def root_mean_squared_error() -> Metric:
    """Return the root of the mean squared distance from the target, in its unit: ``{"root_mean_squared_error": ...}``.

    Raises:
        DataError, ModelError: (from the measure) as in the loss ``regression``.

    >>> metric = root_mean_squared_error()
    >>> metric.result(metric.measure(torch.tensor([1.0, 2.0]), (None, torch.tensor([1.0, 4.0]))))
    {'root_mean_squared_error': 1.4142135623730951}
    """
    return Metric(
        name="root_mean_squared_error",
        measure=_over_numbers(lambda errors, _: summed(errors.square())),
        result=lambda found: {"root_mean_squared_error": float(means(found).sqrt())},
    )


def r2(*, center: float = 0.0) -> Metric:
    """Return the share of the targets' variance that the predictions explain: ``{"r2": up to 1}``.

    0 is what the mean of the targets would score. It is NaN where targets do not vary, and where they vary so little
    around a distant mean that fewer than four digits of the variance are left in the sums (in float64, a standard
    deviation below a millionth of the distance from ``center`` to the mean): give a ``center`` near the mean then.

    Args:
        center: what is subtracted from targets before they are summed, in their unit. The result does not depend on it,
            but its rounding does.

    Raises:
        ConfigError: ``center`` is not a finite number.
        DataError, ModelError: (from the measure) as in the loss ``regression``.

    >>> metric = r2()
    >>> metric.result(metric.measure(torch.tensor([1.0, 2.0, 4.0]), (None, torch.tensor([1.0, 2.0, 3.0]))))
    {'r2': 0.5}
    """
    check_number("center", center, least=-math.inf)

    def result(found: MetricSum) -> dict[str, float]:
        first, second, squared = found.total.cpu().double().expand(3).tolist()
        varied = second - first * first / max(int(found.weight), 1)
        digits = torch.finfo(found.total.dtype).eps if found.total.dtype.is_floating_point else 1.0
        return {"r2": 1.0 - squared / varied if varied > 1e4 * digits * second else math.nan}

    def each(errors: Tensor, wanted: Tensor) -> Tensor:
        moved = wanted - center
        return summed(torch.stack([moved, moved.square(), errors.square()]), 1)  # (3)

    return Metric(name="r2", measure=_over_numbers(each), result=result)


def _over_numbers(each: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    @torch.no_grad()
    def measure(outputs: Any, batch: Batch) -> MetricSum:
        predictions, wanted = predicted_and_wanted(outputs, batch)
        wide = wide_float(predictions)
        predictions, wanted = predictions.to(wide).flatten(), wanted.to(wide).flatten()
        count = torch.full((), wanted.numel(), dtype=torch.int64, device=wanted.device)
        return MetricSum(total=each(predictions - wanted, wanted), weight=count)

    return measure
