"""Perplexity: how many equally likely classes the model's uncertainty amounts to.

    perplexity = exp( - sum over n of log softmax(logits[n])[labels[n]]  /  number of labels )

of the plain cross-entropy, whatever smoothing or other terms the loss has. Letters: N labels, C classes.

References:
    F. Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks", Journal of the Acoustical
    Society of America 62, 1977.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainfn.loss.reading import Pooling, Reading
from trainfn.metric.base import Metric, MetricSum, means, over_rows, summed
from trainfn.tree import widened


def perplexity(*, ignore_index: int = -100, shift: bool = False, pooling: Pooling | None = None) -> Metric:
    """Return exp of the mean nats per label: ``{"perplexity": from 1 to inf}``.

    Logits of 16 bits are widened to float32 first. It is infinite where a label was ruled out (a logit of -inf), and
    NaN where a row that counts holds a NaN or its label names no class.

    Args:
        ignore_index, shift, pooling: as in :func:`trainfn.metric.accuracy`.

    Raises:
        ConfigError, DataError, ModelError: as in :func:`trainfn.metric.accuracy`.

    >>> metric = perplexity(shift=True)
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> round(metric.result(metric.measure(torch.zeros(1, 3, 8), tokens))["perplexity"], 6)
    8.0
    """

    def measure(rows: Tensor, labels: Tensor, counted: Tensor) -> MetricSum:
        wide = widened(rows)
        known = (labels >= 0) & (labels < rows.shape[1])
        own = wide.gather(1, torch.where(known, labels, 0)[:, None])[:, 0]  # (N)
        nats = torch.where(known, wide.logsumexp(1) - own, torch.nan)
        return MetricSum(total=summed(torch.where(counted, nats, 0.0)), weight=summed(counted))

    return Metric(
        name="perplexity",
        measure=over_rows(measure, Reading("classes", ignore_index, shift, pooling)),
        result=lambda found: {"perplexity": perplexity_of(float(means(found)))},
    )


def perplexity_of(mean_nats: float) -> float:
    """Return exp(mean_nats), with the one rule for what does not fit: inf beyond float64's range, and NaN stays NaN.

    The range ends near 709.78 nats per label. Nothing is clipped: a huge perplexity is told from an infinite one.

    >>> perplexity_of(0.0), perplexity_of(1e3), perplexity_of(float("nan"))
    (1.0, inf, nan)
    """
    try:
        return math.exp(mean_nats)
    except OverflowError:
        return math.inf
