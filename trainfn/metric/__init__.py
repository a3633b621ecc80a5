"""Metrics: pairs of functions, one that sums over a batch on the device and one that divides on the host, at the end.

    result(measure(outputs, batch) + measure(outputs', batch') + ...)

As with losses, sums add and means do not, so a metric over any batching is the metric over the whole.

| name | what it is |
|---|---|
| ``Metric``, ``MetricSum`` | the pair, and what travels between its halves |
| ``merge``, ``nothing`` | sums are added; where a sum starts |
| ``accuracy``, ``top_k`` | share of right answers, and of answers among the best k |
| ``perplexity``, ``perplexity_of`` | exp of the mean nats per label |
| ``confidence`` | top-1 probability, mass of the top five, entropy |
| ``ece`` | expected calibration error |
| ``f1``, ``confusion`` | from counts over classes |
| ``multi_label_accuracy``, ``multi_label_f1`` | over labels that do not exclude each other |
| ``mean_absolute_error``, ``root_mean_squared_error``, ``r2`` | over numbers |
| ``register``, ``resolve``, ``names`` | metrics by name, reading labels as the loss does |
"""

from trainfn.metric.accuracy import accuracy, top_k
from trainfn.metric.base import Metric, MetricSum, merge, nothing
from trainfn.metric.calibration import confidence, ece
from trainfn.metric.confusion import confusion, confusion_matrix, f1
from trainfn.metric.multi_label import multi_label_accuracy, multi_label_f1
from trainfn.metric.perplexity import perplexity, perplexity_of
from trainfn.metric.registry import names, register, resolve
from trainfn.metric.regression import mean_absolute_error, r2, root_mean_squared_error

__all__ = [
    "Metric",
    "MetricSum",
    "accuracy",
    "confidence",
    "confusion",
    "confusion_matrix",
    "ece",
    "f1",
    "mean_absolute_error",
    "merge",
    "multi_label_accuracy",
    "multi_label_f1",
    "names",
    "nothing",
    "perplexity",
    "perplexity_of",
    "r2",
    "register",
    "resolve",
    "root_mean_squared_error",
    "top_k",
]
