"""Metrics over labels that do not exclude each other: each entry [b, c] is a question of its own.

    answer[b, c]         = sigmoid(logits[b, c]) > 1/2, which is logits[b, c] > 0
    multi_label_accuracy = number of entries with answer = target  /  number of entries
    multi_label_f1[c]    = 2 right[c] / (answered[c] + labelled[c]), counting the entries that hold

A target holds if it is above 1/2. The answer of a logit that is NaN is the wrong one, whatever the target is. Letters:
B batch, C labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.loss.multi_label import entries
from trainfn.metric.base import Metric, MetricSum, means, summed
from trainfn.metric.confusion import Average, check_average, f1_of, name_of


def multi_label_accuracy(*, ignore_index: int = -100) -> Metric:
    """Return the share of entries that were answered rightly: ``{"multi_label_accuracy": from 0 to 1}``.

    It is 1 minus the Hamming loss. Where few labels hold, answering "no" to everything does well; see
    :func:`multi_label_f1`.

    Args:
        ignore_index: entry that does not count.

    Raises:
        DataError, ModelError: (from the measure) as in the loss of the same name.

    >>> metric = multi_label_accuracy()
    >>> metric.result(metric.measure(torch.tensor([[3.0, -3.0, 3.0]]), (None, torch.tensor([[1, 0, 0]]))))
    {'multi_label_accuracy': 0.6666666666666666}
    """

    @torch.no_grad()
    def measure(outputs: Any, batch: Batch) -> MetricSum:
        answers, holds, counted = _answers(outputs, batch, ignore_index)
        right = ((answers == holds) & counted).flatten()
        return MetricSum(total=summed(right), weight=summed(counted.flatten()))

    return Metric(
        name="multi_label_accuracy",
        measure=measure,
        result=lambda found: {"multi_label_accuracy": float(means(found))},
    )


def multi_label_f1(*, average: Average | None = "macro", ignore_index: int = -100) -> Metric:
    """Return F1 over the entries that hold: ``{"multi_label_f1": from 0 to 1}``.

    A label that never held and was never answered has an F1 of 0, as in :func:`trainfn.metric.f1`.

    Args:
        average: ``"macro"``, ``"micro"`` or None, as in :func:`trainfn.metric.f1`.
        ignore_index: entry that does not count.

    Raises:
        ConfigError: there is no such average.
        DataError, ModelError: (from the measure) as in the loss of the same name.

    >>> metric = multi_label_f1(average=None)
    >>> logits, targets = torch.tensor([[3.0, -3.0], [3.0, -3.0]]), torch.tensor([[1, 0], [1, 1]])
    >>> metric.result(metric.measure(logits, (None, targets)))
    {'multi_label_f1_0': 1.0, 'multi_label_f1_1': 0.0}
    """
    check_average(average)

    @torch.no_grad()
    def measure(outputs: Any, batch: Batch) -> MetricSum:
        answers, holds, counted = _answers(outputs, batch, ignore_index)
        counts = [summed(each & counted) for each in (answers & holds, answers, holds)]
        return MetricSum(total=torch.stack(counts), weight=summed(counted.flatten()))  # (3, C)

    def result(found: MetricSum) -> dict[str, float]:
        counts = found.total.cpu()
        return f1_of(counts if counts.ndim else counts.expand(3, 0), int(found.weight), average, "multi_label_f1")

    return Metric(name=name_of("multi_label_f1", average), measure=measure, result=result)


def _answers(outputs: Any, batch: Batch, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets, counted = entries(outputs, batch, ignore_index)
    holds = targets > 0.5
    return torch.where(logits.isnan(), ~holds, logits > 0), holds, counted
