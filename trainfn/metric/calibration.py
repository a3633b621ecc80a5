"""How sure a model is of its answers, and whether it is as often right as it is sure.

    p[n]       = softmax(logits[n])
    confidence = mean over n of max over c of p[n, c]
    entropy    = mean over n of - sum over c of p[n, c] log p[n, c]
    ece        = sum over bins m of |number right in m - sum of confidences in m|  /  number of labels

where answer n is in bin m of M if (m - 1) / M < its confidence <= m / M. Softmax is of float32 or wider logits.
Letters: N labels, C classes, M bins.

References:
    C. Guo et al., "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn.loss.base import check_count
from trainfn.loss.reading import Pooling, Reading
from trainfn.metric.base import Metric, MetricSum, best, means, over_rows, summed
from trainfn.tree import wide_float, widened


def confidence(*, ignore_index: int = -100, shift: bool = False, pooling: Pooling | None = None) -> Metric:
    """Return three means over the labels that count.

    ``confidence``: the probability of the most likely class; ``top_5_mass``: that of the five most likely ones (of all,
    where there are fewer); ``entropy`` of the distribution, in nats. The labels say which rows count and nothing else.
    A row that counts and holds a NaN makes all three NaN.

    Args:
        ignore_index, shift, pooling: as in :func:`trainfn.metric.accuracy`.

    Raises:
        ConfigError, DataError, ModelError: as in :func:`trainfn.metric.accuracy`.

    >>> metric = confidence()
    >>> found = metric.result(metric.measure(torch.zeros(1, 10), (None, torch.tensor([0]))))
    >>> {name: round(value, 4) for name, value in found.items()}
    {'confidence': 0.1, 'top_5_mass': 0.5, 'entropy': 2.3026}
    """
    names = ("confidence", "top_5_mass", "entropy")

    def measure(rows: Tensor, labels: Tensor, counted: Tensor) -> MetricSum:
        logs = torch.log_softmax(widened(rows), 1)  # (N, C)
        masses = logs.exp()
        entropy = -torch.where(masses == 0, 0.0, masses * logs).sum(1)  # 0 log 0 = 0
        top = masses.topk(min(5, rows.shape[1]), dim=1).values.sum(1)
        each = torch.stack([masses.amax(1), top, entropy])  # (3, N)
        return MetricSum(total=summed(torch.where(counted, each, 0.0), 1), weight=summed(counted))

    return Metric(
        name="confidence",
        measure=over_rows(measure, Reading("classes", ignore_index, shift, pooling)),
        result=lambda found: dict(zip(names, means(found).expand(3).tolist(), strict=True)),
    )


def ece(bins: int = 15, *, ignore_index: int = -100, shift: bool = False, pooling: Pooling | None = None) -> Metric:
    """Return the expected calibration error: ``{"ece": from 0 to 1}``.

    A label that names no class was not the answer. A row that counts and holds a NaN makes the result NaN.

    Args:
        bins: into how many bins of equal width the confidences are sorted; 15 in Guo et al.
        ignore_index, shift, pooling: as in :func:`trainfn.metric.accuracy`.

    Raises:
        ConfigError, DataError, ModelError: as in :func:`trainfn.metric.accuracy`.

    >>> metric = ece()
    >>> sure = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    >>> metric.result(metric.measure(sure, (None, torch.tensor([0, 1]))))
    {'ece': 0.5}
    """
    check_count("bins", bins)

    def measure(rows: Tensor, labels: Tensor, counted: Tensor) -> MetricSum:
        sure = torch.softmax(widened(rows), 1).amax(1)  # (N)
        answers, answered = best(rows)
        right = (answers == labels) & answered
        # What a NaN becomes as an index is not said anywhere, so it is given the first bin, where it shows.
        index = torch.where(sure.isnan(), 0.0, sure * bins).ceil().long().sub(1).clamp(0, bins - 1)
        each = torch.stack([right.to(sure.dtype), sure])  # (2, N)
        each = torch.where(counted, each, 0.0).to(wide_float(sure))
        return MetricSum(
            total=each.new_zeros(2, bins).index_add(1, index, each),
            weight=labels.new_zeros(bins).index_add(0, index, counted.long()),
        )

    def result(found: MetricSum) -> dict[str, float]:
        right, sure = found.total.cpu().double().expand(2, bins)
        gaps = (right - sure).abs().sum()
        return {"ece": float(gaps / found.weight.cpu().double().sum())}

    return Metric(
        name="ece", measure=over_rows(measure, Reading("classes", ignore_index, shift, pooling)), result=result
    )
