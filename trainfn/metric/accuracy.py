"""Accuracy: the share of labels that were the answer, or among the best k answers.

    accuracy = number of labels with argmax(logits) = label  /  number of labels
    top_k    = number of labels with fewer than k classes ahead of them  /  number of labels

A class is ahead of another if its logit is higher, or equal and its index lower; so top_k(1) is accuracy, and equal
logits do not make everything right. A row of logits with a NaN in it is wrong, and so is a label that names no class.
Letters: N labels, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn.errors import ModelError
from trainfn.loss.base import check_count
from trainfn.loss.reading import Pooling, Reading
from trainfn.metric.base import Metric, MetricSum, best, means, over_rows, summed


def accuracy(*, ignore_index: int = -100, shift: bool = False, pooling: Pooling | None = None) -> Metric:
    """Return the share of right answers: ``{"accuracy": from 0 to 1}``.

    Logits may be [B, C], [B, T, C] with labels [B, T], or [B, C, H, W], and outputs may have any form that the losses
    take.

    Args:
        ignore_index: label that does not count.
        shift: whether the logits of a position are for the label of the next one, as in ``language_modeling``, which
            also finds labels in batches that are nothing but tokens.
        pooling: ``"last"`` or ``"mean"``: how logits [B, T, C] become one row for each example, as in
            ``classification``.

    Raises:
        ConfigError: there is no such pooling, or it is combined with a shift.
        DataError, ModelError: (from the measure) logits and labels that do not fit, as in the losses.

    >>> metric = accuracy()
    >>> logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    >>> metric.result(metric.measure(logits, (None, torch.tensor([0, 1, -100]))))
    {'accuracy': 0.5}
    """

    def measure(rows: Tensor, labels: Tensor, counted: Tensor) -> MetricSum:
        answers, answered = best(rows)
        return MetricSum(total=summed((answers == labels) & answered & counted), weight=summed(counted))

    return Metric(
        name="accuracy",
        measure=over_rows(measure, Reading("classes", ignore_index, shift, pooling)),
        result=lambda found: {"accuracy": float(means(found))},
    )


def top_k(k: int = 5, *, ignore_index: int = -100, shift: bool = False, pooling: Pooling | None = None) -> Metric:
    """Return the share of labels among the ``k`` classes with the highest logits: ``{"top_5_accuracy": from 0 to 1}``.

    Args:
        k: how many classes, >= 1.
        ignore_index, shift, pooling: as in :func:`accuracy`.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the measure) labels that do not fit.
        ModelError: (from the measure) there are fewer than ``k`` classes; logits that do not fit.

    >>> metric = top_k(2)
    >>> logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    >>> metric.result(metric.measure(logits, (None, torch.tensor([1, 2]))))
    {'top_2_accuracy': 0.5}
    """
    check_count("k", k)
    name = f"top_{k}_accuracy"

    def measure(rows: Tensor, labels: Tensor, counted: Tensor) -> MetricSum:
        if k > rows.shape[1]:
            raise ModelError(
                "There are fewer classes than k.",
                where=f"top_k({k})",
                expected=f"logits of at least {k} classes",
                got=f"{rows.shape[1]} classes",
                hint="choose a smaller k; of as many answers as classes, one is always right",
            )
        classes = torch.arange(rows.shape[1], device=rows.device)  # (C)
        known = (labels >= 0) & (labels < rows.shape[1])
        own = rows.gather(1, torch.where(known, labels, 0)[:, None])  # (N, 1)
        ahead = (rows > own) | ((rows == own) & (classes < labels[:, None]))  # (N, C)
        right = (ahead.sum(1) < k) & known & best(rows)[1]
        return MetricSum(total=summed(right & counted), weight=summed(counted))

    return Metric(
        name=name,
        measure=over_rows(measure, Reading("classes", ignore_index, shift, pooling)),
        result=lambda found: {name: float(means(found))},
    )
