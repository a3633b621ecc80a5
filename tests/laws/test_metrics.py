"""Law: a metric over any batching is the metric over the whole; its sums are a monoid under ``merge``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import reduce

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainfn import metric as metrics
from trainfn.metric import Metric, MetricSum, merge, nothing
from trainfn.tree import digest

IGNORED = -100
CLASSES = 7
Batch = dict[str, Tensor]
Merge = Callable[[MetricSum, MetricSum], MetricSum]
Together = Callable[[Metric, list[MetricSum]], dict[str, float]]


@attrs.frozen
class Case:
    """A metric and what it is given: outputs [B, *shape], and in the batch labels [B, *label_shape] of a kind."""

    metric: Metric
    shape: tuple[int, ...] = (CLASSES,)
    label_shape: tuple[int, ...] = ()
    kind: str = "class"

    def make(self, seed: int, length: int) -> tuple[Tensor, Batch]:
        """Return float64 outputs and a batch in which each example has another share of labels that do not count."""
        own = torch.Generator().manual_seed(seed)
        outputs = 2 * torch.randn(length, *self.shape, generator=own, dtype=torch.float64)
        if self.kind == "number":
            return outputs, {"labels": torch.randn(length, *self.label_shape, generator=own, dtype=torch.float64)}
        labels = torch.randint(0, 2 if self.kind == "binary" else CLASSES, (length, *self.label_shape), generator=own)
        share = torch.rand(length, *[1] * len(self.label_shape), generator=own).mul(1.6).sub(0.3)
        return outputs, {"labels": labels.masked_fill(torch.rand(labels.shape, generator=own) < share, IGNORED)}


TOKENS = {"shape": (5, CLASSES), "label_shape": (5,)}
CASES: dict[str, Case] = {
    "accuracy": Case(metrics.accuracy()),
    "accuracy of next tokens": Case(metrics.accuracy(shift=True), **TOKENS),
    "accuracy of pixels": Case(metrics.accuracy(), (CLASSES, 2, 3), (2, 3)),
    "accuracy of pooled positions": Case(metrics.accuracy(pooling="mean"), (5, CLASSES)),
    "top 3": Case(metrics.top_k(3), **TOKENS),
    "perplexity": Case(metrics.perplexity(shift=True), **TOKENS),
    "confidence": Case(metrics.confidence(), **TOKENS),
    "ece": Case(metrics.ece()),
    "ece of pixels": Case(metrics.ece(4), (CLASSES, 2, 3), (2, 3)),
    "f1": Case(metrics.f1()),
    "f1 micro": Case(metrics.f1(CLASSES, average="micro", shift=True), **TOKENS),
    "f1 per class": Case(metrics.f1(average=None)),
    "confusion": Case(metrics.confusion(CLASSES)),
    "multi-label accuracy": Case(metrics.multi_label_accuracy(), (3,), (3,), "binary"),
    "multi-label f1": Case(metrics.multi_label_f1(), (3,), (3,), "binary"),
    "mean absolute error": Case(metrics.mean_absolute_error(), (2,), (2,), "number"),
    "root mean squared error": Case(metrics.root_mean_squared_error(), (1,), (), "number"),
    "r2": Case(metrics.r2(), (), (), "number"),
}


@st.composite
def batchings(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A number of examples and the lengths of the batches they come in: uneven, often of one example."""
    lengths = draw(st.lists(st.sampled_from([1, 1, 2, 3, 5]), min_size=1, max_size=6))
    return sum(lengths), lengths


def measured(case: Case, seed: int, lengths: list[int]) -> list[MetricSum]:
    outputs, batch = case.make(seed, sum(lengths))
    parts = zip(outputs.split(lengths), batch["labels"].split(lengths), strict=True)
    return [case.metric.measure(part, {"labels": labels}) for part, labels in parts]


def check_same(found: MetricSum, right: MetricSum) -> None:
    """Counts exactly, floats to rounding."""
    for one, other in ((found.total, right.total), (found.weight, right.weight)):
        if right.total.dtype == torch.int64:
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


def check_numbers(found: dict[str, float], right: dict[str, float], tolerance: float = 1e-12) -> None:
    assert list(found) == list(right)
    assert list(found.values()) == pytest.approx(list(right.values()), rel=tolerance, abs=tolerance, nan_ok=True)


def check_sums(op: Merge, case: Case, seed: int, lengths: list[int]) -> None:
    check_same(reduce(op, measured(case, seed, lengths)), case.metric.measure(*case.make(seed, sum(lengths))))


def check_results(together: Together, case: Case, seed: int, lengths: list[int]) -> None:
    whole = case.metric.measure(*case.make(seed, sum(lengths)))
    # r2 subtracts sums from sums: over one or two targets most digits cancel.
    tolerance = 1e-9 if case.metric.name == "r2" else 1e-12
    check_numbers(together(case.metric, measured(case, seed, lengths)), case.metric.result(whole), tolerance)


def merged(metric: Metric, parts: list[MetricSum]) -> dict[str, float]:
    return metric.result(reduce(merge, parts))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25)
@given(st.integers(0, 10**6), batchings())
def test_any_batching_is_the_whole(name: str, seed: int, batching: tuple[int, list[int]]) -> None:
    check_sums(merge, CASES[name], seed, batching[1])
    check_results(merged, CASES[name], seed, batching[1])


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=10)
@given(st.integers(0, 10**6), st.permutations([1, 2, 4]))
def test_merge_is_associative_and_commutative(name: str, seed: int, lengths: list[int]) -> None:
    a, b, c = measured(CASES[name], seed, lengths)
    check_same(merge(merge(a, b), c), merge(a, merge(b, c)))
    check_same(merge(a, b), merge(b, a))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_the_identity_bit_for_bit_and_a_batch_of_no_examples_is_too(name: str) -> None:
    case = CASES[name]
    (one,) = measured(case, 0, [3])
    before = digest(one)
    none = case.metric.measure(*case.make(0, 0))
    for empty in (nothing(), none):
        for same in (merge(empty, one), merge(one, empty)):
            assert digest(same) == before
    assert digest(one) == before


@pytest.mark.parametrize("name", CASES)
def test_where_nothing_counts_the_result_is_nan(name: str) -> None:
    case = CASES[name]
    outputs, batch = case.make(0, 3)
    if case.kind == "number":
        outputs, batch = outputs[:0], {"labels": batch["labels"][:0]}
    else:
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    found = case.metric.result(case.metric.measure(outputs, batch))
    expected = 0.0 if case.metric.name == "confusion" else float("nan")  # a count of nothing is 0
    check_numbers(found, dict.fromkeys(found, expected))
    assert found
    if name != "f1 per class":  # which cannot know of how many
        check_numbers(case.metric.result(nothing()), found)


# --- controls: things that look like a merge --------------------------------------------------------------------------


def mean_of_means(metric: Metric, parts: list[MetricSum]) -> dict[str, float]:
    found = [metric.result(part) for part in parts]
    return {name: statistics.fmean(each[name] for each in found) for name in found[0]}


def forgets_a_weight(left: MetricSum, right: MetricSum) -> MetricSum:
    return MetricSum(total=left.total + right.total, weight=right.weight)


@pytest.mark.parametrize("name", ["accuracy", "perplexity", "ece", "f1", "multi-label f1", "root mean squared error"])
def test_control_other_ways_to_put_batches_together_are_not_the_whole(name: str) -> None:
    seed, lengths = 3, [8, 40, 15]
    assert not any(map(math.isnan, mean_of_means(CASES[name].metric, measured(CASES[name], seed, lengths)).values()))
    with pytest.raises(AssertionError):
        check_results(mean_of_means, CASES[name], seed, lengths)
    with pytest.raises(AssertionError):
        check_sums(forgets_a_weight, CASES[name], seed, lengths)
