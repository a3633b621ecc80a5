"""Counts over classes: the confusion matrix, and F1.

    confusion[i, j] = number of labels i for which the answer was j
    f1[c]           = 2 right[c] / (answered[c] + labelled[c])

where right[c] counts labels c that were answered with c, answered[c] the answers c and labelled[c] the labels c. F1 of
a class that was neither a label nor an answer is 0, as with scikit-learn's ``zero_division=0``, and it counts in the
macro mean, which would otherwise be over other classes in each evaluation. A row of logits with a NaN in it is no
answer. That a label names no class cannot be told on the device without waiting for it; such labels are counted apart,
and raised when the result is read. Letters: N labels, C classes.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from trainfn.errors import ConfigError, DataError, ModelError, suggest
from trainfn.loss.base import check_count
from trainfn.loss.reading import Pooling, Reading
from trainfn.metric.base import Metric, MetricSum, best, over_rows, summed

Average = Literal["macro", "micro"]


def confusion(classes: int, *, ignore_index: int = -100, shift: bool = False, pooling: Pooling | None = None) -> Metric:
    """Return the confusion matrix as counts: ``{"confusion_0_1": labels 0 that were answered with 1, ...}``.

    ``confusion_none`` counts the labels that got no answer, because their logits held a NaN. A count of nothing is 0.
    :func:`confusion_matrix` makes a tensor of the sum. It takes (C + 1)^2 numbers; for many classes see :func:`f1`.

    Args:
        classes: how many there are, C.
        ignore_index, shift, pooling: as in :func:`trainfn.metric.accuracy`.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the result) labels that name no class; (from the measure) labels that do not fit.
        ModelError: (from the measure) logits of another number of classes.

    >>> metric = confusion(2)
    >>> metric.result(metric.measure(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), (None, torch.tensor([0, 1]))))
    {'confusion_0_0': 1.0, 'confusion_0_1': 0.0, 'confusion_1_0': 1.0, 'confusion_1_1': 0.0, 'confusion_none': 0.0}
    """
    check_count("classes", classes)
    side = classes + 1  # the last row: labels that name no class; the last column: no answer

    def measure(rows: Tensor, labels: Tensor, counted: Tensor) -> MetricSum:
        labels, answers = _indices(rows, labels, classes)
        cells = _counts(labels * side + answers, counted, side * side).reshape(side, side)
        return MetricSum(total=cells, weight=summed(counted))

    def result(found: MetricSum) -> dict[str, float]:
        matrix = confusion_matrix(found, classes).tolist()
        cells = {f"confusion_{i}_{j}": float(matrix[i][j]) for i in range(classes) for j in range(classes)}
        return cells | {"confusion_none": float(int(found.weight) - sum(map(sum, matrix)))}

    return Metric(
        name="confusion", measure=over_rows(measure, Reading("classes", ignore_index, shift, pooling)), result=result
    )


def confusion_matrix(found: MetricSum, classes: int) -> Tensor:
    """Return the sum of :func:`confusion` as a matrix on the host, [C, C] int64: labels down, answers across.

    Raises:
        DataError: there were labels that name no class.

    >>> metric = confusion(2)
    >>> confusion_matrix(metric.measure(torch.eye(2), (None, torch.tensor([0, 0]))), 2)
    tensor([[1, 1],
            [0, 0]])
    """
    cells = found.total.cpu().expand(classes + 1, classes + 1)
    _check_labels(int(cells[classes].sum()), classes)
    return cells[:classes, :classes]


def f1(
    classes: int | None = None,
    *,
    average: Average | None = "macro",
    ignore_index: int = -100,
    shift: bool = False,
    pooling: Pooling | None = None,
) -> Metric:
    """Return F1, the harmonic mean of precision and recall, from 0 to 1.

    Args:
        classes: how many there are, C; None takes as many as the logits have.
        average: ``"macro"``, the mean over all C classes: ``{"f1": ...}``. ``"micro"``, from the counts of all classes
            together: ``{"f1_micro": ...}``, which is the accuracy where every row is an answer. None, one for each
            class: ``{"f1_0": ..., "f1_1": ...}``.
        ignore_index, shift, pooling: as in :func:`trainfn.metric.accuracy`.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the result) labels that name no class; (from the measure) labels that do not fit.
        ModelError: (from the measure) logits of another number of classes.

    >>> metric = f1()
    >>> found = metric.measure(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), (None, torch.tensor([0, 1])))
    >>> round(metric.result(found)["f1"], 4)
    0.3333
    """
    if classes is not None:
        check_count("classes", classes)
    check_average(average)

    def measure(rows: Tensor, labels: Tensor, counted: Tensor) -> MetricSum:
        number = rows.shape[1] if classes is None else classes
        labels, answers = _indices(rows, labels, number)
        right = counted & (labels == answers) & (labels < number)
        counts = [_counts(answers, right, number + 1), _counts(answers, counted, number + 1)]
        return MetricSum(
            total=torch.stack([*counts, _counts(labels, counted, number + 1)]),  # (3, C + 1)
            weight=summed(counted),
        )

    def result(found: MetricSum) -> dict[str, float]:
        counts = found.total.cpu()
        counts = counts if counts.ndim else counts.expand(3, (classes or 0) + 1)
        _check_labels(int(counts[2, -1]), counts.shape[1] - 1)
        return f1_of(counts[:, :-1], int(found.weight), average, "f1")

    return Metric(
        name=name_of("f1", average),
        measure=over_rows(measure, Reading("classes", ignore_index, shift, pooling)),
        result=result,
    )


def f1_of(counts: Tensor, weight: int, average: Average | None, name: str) -> dict[str, float]:
    """Return F1 from counts [3, C]: right, answered, labelled. NaN if the weight is 0.

    >>> f1_of(torch.tensor([[1, 0], [2, 0], [1, 1]]), 2, None, "f1")
    {'f1_0': 0.6666666666666666, 'f1_1': 0.0}
    """
    if average == "micro":
        counts = counts.sum(1, keepdim=True)
    right, answered, labelled = counts.double()
    each = 2.0 * right / (answered + labelled).clamp(min=1) if weight else torch.full_like(right, math.nan)
    if average is None:
        return {f"{name}_{index}": value for index, value in enumerate(each.tolist())}
    return {name_of(name, average): float(each.mean())}


def name_of(name: str, average: Average | None) -> str:
    """Return what F1 is called under an average.

    >>> name_of("f1", "macro"), name_of("f1", "micro"), name_of("f1", None)
    ('f1', 'f1_micro', 'f1_per_class')
    """
    return name if average == "macro" else f"{name}_{average or 'per_class'}"


def check_average(average: str | None) -> None:
    """Raise unless this is a way to average, or None.

    Raises:
        ConfigError: there is none of this name.

    >>> check_average("macro")
    """
    if average is not None and average not in get_args(Average):
        raise ConfigError(
            "There is no average of this name.", got=repr(average), hint=suggest(str(average), get_args(Average))
        )


def _indices(rows: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return labels and answers, each from 0 to C, where C is no class and no answer."""
    if rows.shape[1] != classes:
        raise ModelError(
            "The logits have another number of classes than the metric.",
            expected=f"{classes} classes",
            got=f"{rows.shape[1]} classes",
        )
    answers, answered = best(rows)
    known = (labels >= 0) & (labels < classes)
    return torch.where(known, labels, classes), torch.where(answered, answers, classes)


def _counts(index: Tensor, counted: Tensor, size: int) -> Tensor:
    return index.new_zeros(size).index_add(0, index, counted.long())  # torch.bincount would wait for the device


def _check_labels(outside: int, classes: int) -> None:
    if outside:
        raise DataError(
            "There are labels that name no class.",
            expected=f"labels from 0 to {classes - 1}, or the ignored one",
            got=f"{outside} label{'s' if outside > 1 else ''} outside",
            hint="check how the labels are numbered, and ignore_index",
        )
