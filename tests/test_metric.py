"""Metrics against scikit-learn and naive loops; which labels count; what NaN does; what is refused."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.strategies import torch_warns_of_itself
from trainfn import loss as losses
from trainfn import metric as metrics
from trainfn.errors import ConfigError, DataError, ModelError
from trainfn.metric import Metric, MetricSum, base, merge, nothing, perplexity_of, resolve
from trainfn.metric import registry as metric_registry

IGNORED = -100
REGISTERED = metrics.names()  # now: a doctest registers one more, later
NAN, INF = float("nan"), float("inf")
Batch = dict[str, Tensor]


def value(metric: Metric, outputs: Any, labels: Any) -> dict[str, float]:
    batch = labels if isinstance(labels, dict) else {"labels": torch.as_tensor(labels)}
    return metric.result(metric.measure(outputs, batch))


def only(metric: Metric, outputs: Any, labels: Any) -> float:
    (number,) = value(metric, outputs, labels).values()
    return number


def close(found: Any, right: Any, tolerance: float = 1e-12) -> None:
    assert found == pytest.approx(right, rel=tolerance, abs=tolerance, nan_ok=True)


def draw(seed: int, length: int, classes: int, used: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 logits [B, C], labels [B] of which a third does not count, and which do; the first always does."""
    own = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(length, classes, generator=own, dtype=torch.float64)
    labels = torch.randint(0, used or classes, (length,), generator=own)
    logits[torch.arange(length), labels] += 1.5  # better than chance
    counted = torch.rand(length, generator=own) > 0.3
    counted[0] = True
    return logits, labels.masked_fill(~counted, IGNORED), counted


def probabilities(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


# --- independent oracles ----------------------------------------------------------------------------------------------

drawn = given(st.integers(0, 10**6), st.integers(1, 40), st.integers(3, 8))


@settings(max_examples=40)
@drawn
def test_counts_are_those_of_scikit_learn(seed: int, length: int, classes: int) -> None:
    """With classes that are never a label (``used``), so that the rule for absent ones is tested too."""
    logits, labels, counted = draw(seed, length, classes, used=max(2, classes - 2))
    true, scores = labels[counted].numpy(), logits[counted].numpy()
    answers, every = scores.argmax(1), list(range(classes))
    close(only(metrics.accuracy(), logits, labels), sklearn.metrics.accuracy_score(true, answers))
    for k in (1, 2, classes):
        right = (np.argsort(-scores, axis=1)[:, :k] == true[:, None]).any(1).mean()
        if k < classes:  # where every class is among the k, scikit-learn warns
            close(sklearn.metrics.top_k_accuracy_score(true, scores, k=k, labels=every), right)
        close(only(metrics.top_k(k), logits, labels), right)
    confusion = metrics.confusion(classes)
    found = confusion.measure(logits, {"labels": labels})
    matrix = sklearn.metrics.confusion_matrix(true, answers, labels=every)
    assert metrics.confusion_matrix(found, classes).tolist() == matrix.tolist()
    expected = {f"confusion_{i}_{j}": float(matrix[i, j]) for i in every for j in every}
    assert confusion.result(found) == expected | {"confusion_none": 0.0}
    for average in ("macro", "micro", None):
        right = sklearn.metrics.f1_score(true, answers, labels=every, average=average, zero_division=0)
        for metric in (metrics.f1(average=average), metrics.f1(classes, average=average)):  # type: ignore[arg-type]
            close(list(value(metric, logits, labels).values()), np.atleast_1d(right).tolist())


@settings(max_examples=40)
@drawn
def test_probabilities_are_those_of_a_naive_loop(seed: int, length: int, classes: int) -> None:
    logits, labels, counted = draw(seed, length, classes)
    rows = [probabilities(row) for row in logits[counted].tolist()]
    true = labels[counted].tolist()
    nats = [-math.log(row[label]) for row, label in zip(rows, true, strict=True)]
    close(only(metrics.perplexity(), logits, labels), math.exp(math.fsum(nats) / len(nats)))
    expected = {
        "confidence": statistics.fmean(max(row) for row in rows),
        "top_5_mass": statistics.fmean(sum(sorted(row)[-5:]) for row in rows),
        "entropy": statistics.fmean(-sum(p * math.log(p) for p in row) for row in rows),
    }
    close(value(metrics.confidence(), logits, labels), expected)
    for bins in (1, 4, 15):
        gap = 0.0
        for m in range(bins):
            inside = [
                (max(row), float(row.index(max(row)) == label))
                for row, label in zip(rows, true, strict=True)
                if m / bins < max(row) <= (m + 1) / bins
            ]
            if inside:
                sure, right = (statistics.fmean(each) for each in zip(*inside, strict=True))
                gap += len(inside) / len(rows) * abs(right - sure)
        close(only(metrics.ece(bins), logits, labels), gap, 1e-9)


def test_calibration_tells_a_model_that_knows_how_sure_to_be_from_one_that_is_too_sure() -> None:
    own = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=own, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=own)[:, 0]
    assert only(metrics.ece(), logits, labels) < 0.02
    assert only(metrics.ece(), 4 * logits, labels) > 0.2  # control


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_multi_label_metrics_are_those_of_scikit_learn(seed: int, length: int) -> None:
    own = torch.Generator().manual_seed(seed)
    logits = torch.randn(length, 4, generator=own)
    labels = torch.randint(0, 2, (length, 4), generator=own)
    labels[:, 3] = 0
    logits[:, 3] = -1.0  # neither a label nor an answer
    true, answers = labels.numpy(), (logits > 0).numpy().astype(int)
    right = 1 - sklearn.metrics.hamming_loss(true, answers)
    for targets in (labels, labels.bool(), labels.float()):
        close(only(metrics.multi_label_accuracy(), logits, targets), right)
    for average in ("macro", "micro", None):
        right = sklearn.metrics.f1_score(true, answers, average=average, zero_division=0)
        metric = metrics.multi_label_f1(average=average)  # type: ignore[arg-type]
        close(list(value(metric, logits, labels).values()), np.atleast_1d(right).tolist())
    partly = labels.masked_fill(torch.rand(labels.shape, generator=own) < 0.5, IGNORED)
    held = (partly != IGNORED).numpy()
    if held.any():
        close(only(metrics.multi_label_accuracy(), logits, partly), (true == answers)[held].mean())


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([0.0, 5.0]))
def test_distances_are_those_of_scikit_learn(seed: int, length: int, center: float) -> None:
    own = torch.Generator().manual_seed(seed)
    wanted = 5 + torch.randn(length, generator=own, dtype=torch.float64)
    found = wanted + torch.randn(length, generator=own, dtype=torch.float64)
    pair = wanted.numpy(), found.numpy()
    close(only(metrics.mean_absolute_error(), found, wanted), sklearn.metrics.mean_absolute_error(*pair))
    close(only(metrics.root_mean_squared_error(), found, wanted), sklearn.metrics.root_mean_squared_error(*pair))
    close(only(metrics.r2(center=center), found[:, None], wanted), sklearn.metrics.r2_score(*pair), 1e-9)


@pytest.mark.parametrize(("mean", "digits"), [(1e3, 1e-9), (1e5, 1e-4), (1e9, None)])
def test_r2_is_right_or_nan_where_the_mean_swallows_the_variance(mean: float, digits: float | None) -> None:
    """Control: at 1e9 the plain formula, without a word, is wrong in every digit."""
    own = torch.Generator().manual_seed(0)
    wanted = mean + torch.randn(1000, generator=own, dtype=torch.float64)
    found = wanted + 0.5 * torch.randn(1000, generator=own, dtype=torch.float64)
    right = sklearn.metrics.r2_score(wanted.numpy(), found.numpy())
    close(only(metrics.r2(center=mean), found, wanted), right, 1e-6)
    close(only(metrics.r2(), found, wanted), right if digits else NAN, digits or 0.0)
    if digits is None:
        varied = wanted.square().sum() - wanted.sum() ** 2 / 1000
        assert abs(1 - float((found - wanted).square().sum() / varied) - right) > 0.1
    assert math.isnan(only(metrics.r2(), torch.ones(3), torch.ones(3)))  # targets that do not vary


# --- language models: which token is meant ----------------------------------------------------------------------------


def language_models() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens [8, 400], the logits of a model that knows the next one and of one that repeats what it reads."""
    tokens = torch.randint(0, 10, (8, 400), generator=torch.Generator().manual_seed(0))
    return tokens, F.one_hot(tokens.roll(-1, 1), 10) * 50.0, F.one_hot(tokens, 10) * 50.0


@pytest.mark.parametrize("form", ["tokens alone", "input_ids", "labels"])
def test_a_perfect_language_model_is_always_right_and_one_that_copies_is_by_chance(form: str) -> None:
    tokens, perfect, copy = language_models()
    batch: Any = tokens if form == "tokens alone" else {"input_ids": tokens}
    if form == "labels":
        batch = {"input_ids": tokens, "labels": tokens}
    named = resolve("accuracy", loss="language_modeling")
    for metric in (metrics.accuracy(shift=True), named):
        assert only(metric, perfect, batch) == 1.0
        assert 0.07 < only(metric, copy, batch) < 0.13
    close(only(resolve("perplexity", loss="language_modeling"), perfect, batch), 1.0, 1e-9)
    # control: unshifted, the model that copies is the perfect one
    if form == "labels":
        assert only(metrics.accuracy(), copy, batch) == 1.0
        assert only(metrics.accuracy(), perfect, batch) < 0.13


def test_accuracy_and_perplexity_are_over_tokens_and_not_over_batches() -> None:
    own = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 4, (2, 6), generator=own)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    logits = torch.randn(2, 6, 4, generator=own, dtype=torch.float64)
    logits[0] += 3.0 * F.one_hot(tokens[0].roll(-1), 4)  # good at the long one
    nats = [
        -math.log(probabilities(logits[b, t].tolist())[int(tokens[b, t + 1])])
        for b, length in ((0, 6), (1, 2))
        for t in range(length - 1)
    ]
    rows = [{"input_ids": tokens[b : b + 1], "attention_mask": mask[b : b + 1]} for b in range(2)]
    metric = metrics.perplexity(shift=True)
    parts = [metric.measure(logits[b : b + 1], rows[b]) for b in range(2)]
    assert [int(part.weight) for part in parts] == [5, 1]
    close(metric.result(merge(*parts))["perplexity"], math.exp(math.fsum(nats) / 6))
    # control: a mean of means, of perplexities or of accuracies, is another number
    assert abs(statistics.fmean(metric.result(part)["perplexity"] for part in parts) - math.exp(sum(nats) / 6)) > 0.1
    right = metrics.accuracy(shift=True)
    parts = [right.measure(logits[b : b + 1], rows[b]) for b in range(2)]
    whole = right.result(merge(*parts))["accuracy"]
    assert abs(statistics.fmean(right.result(part)["accuracy"] for part in parts) - whole) > 0.1


def test_padding_that_is_the_end_of_text_token_too_is_told_by_the_mask() -> None:
    """Token 0 ends the text and fills the rest: the first one counts, the others do not."""
    batch = {"input_ids": torch.tensor([[5, 3, 0, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    found = metrics.accuracy(shift=True).measure(F.one_hot(torch.tensor([[3, 0, 1, 1, 1]]), 6) * 9.0, batch)
    assert (int(found.total), int(found.weight)) == (2, 2)


# --- by name: the metric reads what the loss reads --------------------------------------------------------------------


def made(loss: Any) -> MetricSum:
    """What accuracy counts on logits [2, 3, 4] whose answers are known, beside a loss."""
    answers = torch.tensor([[1, 2, 3], [0, 1, 0]])
    labels = torch.tensor([[1, 1, 2], [0, 3, 255]])
    return resolve("accuracy", loss=loss).measure(F.one_hot(answers, 4).float(), {"x": labels, "labels": labels})


@pytest.mark.parametrize(
    ("loss", "total", "weight"),
    [
        ("language_modeling", 2, 4),
        (losses.language_modeling(ignore_index=255), 2, 3),
        (losses.distillation(base="language_modeling"), 2, 4),
        ("peft_aware(low_precision_safe(language_modeling))", 2, 4),
        (losses.peft_aware(losses.language_modeling(chunk_size=2)), 2, 4),
        ("seq2seq", 2, 6),
        ("masked_language_modeling", 2, 6),
        (losses.seq2seq(ignore_index=255), 2, 5),
        ("classification", 2, 6),
        (lambda outputs, batch: outputs.mean(), 2, 6),
        (None, 2, 6),
    ],
)
def test_a_name_means_the_labels_that_the_loss_looks_at(loss: Any, total: int, weight: int) -> None:
    found = made(loss)
    assert (int(found.total), int(found.weight)) == (total, weight)


def test_other_readings_are_followed_too() -> None:
    labels = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    pixels = torch.tensor([5.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    found = resolve("accuracy", loss=losses.segmentation(ignore_index=255)).measure(pixels, (None, labels))
    assert (int(found.total), int(found.weight)) == (1, 1)
    batch = {"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([1])}
    positions = F.one_hot(torch.tensor([[0, 1, 0]]), 2).float()
    for pooling, right in (("last", 1.0), ("mean", 0.0)):  # of the mean [0.5, 0.5], the first class
        loss = losses.classification(pooling=pooling)  # type: ignore[arg-type]
        assert only(resolve("accuracy", loss=loss), positions, batch) == right
    entries = (None, torch.tensor([[1, 7]]))
    found = resolve("multi_label_accuracy", loss=losses.multi_label(ignore_index=7)).measure(torch.ones(1, 2), entries)
    assert (int(found.total), int(found.weight)) == (1, 1)


def test_a_metric_by_value_is_taken_as_it_is() -> None:
    metric = metrics.accuracy()
    assert resolve(metric, loss="language_modeling") is metric


def test_every_name_is_a_metric_beside_a_loss_that_fits() -> None:
    beside = {"multi": "multi_label", "mean_": "regression", "root_": "mse", "r2": "huber"}
    for name in REGISTERED:
        loss = next((loss for start, loss in beside.items() if name.startswith(start)), "classification")
        assert resolve(name, loss=loss).name == name
    assert resolve("top_3_accuracy").name == "top_3_accuracy"


@pytest.mark.parametrize(
    ("metric", "loss", "message"),
    [
        ("acuracy", None, "did you mean 'accuracy'"),
        ("rmse", None, "did you mean 'root_mean_squared_error'"),
        ("PPL", None, "did you mean 'perplexity'"),
        ("top_0_accuracy", None, "no metric of this name"),
        ("nonsense", None, "one of accuracy"),
        ("confusion", None, r"trainfn\.metric\.confusion\(10\)"),
        (3, None, "neither a name nor a Metric"),
        ("accuracy", "mse", r"does not fit the loss[\s\S]*numbers[\s\S]*mean_absolute_error"),
        ("accuracy", "multi_label", "multi_label_accuracy"),
        ("r2", "peft_aware(classification)", r"over numbers\n  try: one of accuracy"),
        ("accuracy", "clasification", "did you mean 'classification'"),
    ],
)
def test_what_is_no_metric_is_refused(metric: Any, loss: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(metric, loss=loss)


def test_a_registered_metric_is_given_the_reading_and_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_registry, "_METRICS", dict(metric_registry._METRICS))
    seen: list[Any] = []
    metrics.register("mine", lambda reading: seen.append(reading) or metrics.accuracy())
    resolve("mine", loss="language_modeling")
    resolve("mine", loss="mse")
    assert [reading.shift for reading in seen] == [True, False]
    for name in ("mine", "accuracy", "top_17_accuracy"):
        with pytest.raises(ConfigError, match="registered already"):
            metrics.register(name, lambda reading: metrics.accuracy())


# --- what is not a number, and what is no class -----------------------------------------------------------------------

LABELS = torch.tensor([0, 1])
WITH_NAN = torch.tensor([[3.0, 1.0, 0.0], [0.0, NAN, 0.0]])


def test_a_nan_is_never_right_and_never_hidden() -> None:
    """torch takes a NaN for the largest number: without a rule, the second row would answer 1, and be right."""
    assert int(WITH_NAN.argmax(1)[1]) == 1  # control
    assert only(metrics.accuracy(), WITH_NAN, LABELS) == 0.5
    for k in (1, 2, 3):
        assert only(metrics.top_k(k), WITH_NAN, LABELS) == 0.5
    for metric in (metrics.perplexity(), metrics.confidence(), metrics.ece()):
        assert all(map(math.isnan, value(metric, WITH_NAN, LABELS).values()))
        assert not any(map(math.isnan, value(metric, WITH_NAN, [0, IGNORED]).values()))  # of a row that does not count
    confusion = metrics.confusion(3)
    assert value(confusion, WITH_NAN, LABELS)["confusion_none"] == 1
    assert metrics.confusion_matrix(confusion.measure(WITH_NAN, (None, LABELS)), 3).sum() == 1
    assert value(metrics.f1(average=None), WITH_NAN, LABELS) == {"f1_0": 1.0, "f1_1": 0.0, "f1_2": 0.0}
    close(only(metrics.f1(average="micro"), WITH_NAN, LABELS), 2 * 1 / (1 + 2))
    for target in (0, 1):
        assert only(metrics.multi_label_accuracy(), torch.tensor([[NAN]]), [[target]]) == 0.0
        assert only(metrics.multi_label_f1(), torch.tensor([[NAN, 1.0]]), [[target, 1]]) == 0.5
    for metric in (metrics.mean_absolute_error(), metrics.root_mean_squared_error(), metrics.r2()):
        assert math.isnan(only(metric, torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize("outside", [-1, 3, 10**6])
def test_a_label_that_names_no_class_is_wrong_and_counted_metrics_raise(outside: int) -> None:
    logits, labels = torch.eye(3), torch.tensor([0, 1, outside])
    close(only(metrics.accuracy(), logits, labels), 2 / 3)
    close(only(metrics.top_k(3), logits, labels), 2 / 3)
    assert math.isnan(only(metrics.perplexity(), logits, labels))
    assert only(metrics.ece(1), logits, labels) > 0
    for metric in (metrics.confusion(3), metrics.f1(), metrics.f1(3)):
        with pytest.raises(DataError, match=r"labels from 0 to 2[\s\S]*1 label outside"):
            value(metric, logits, labels)
        value(metric, logits, labels.clamp(0, 2))  # control


def test_equal_logits_are_one_answer() -> None:
    """Or else a model that says nothing would be among the best k of everything."""
    logits, labels = torch.zeros(4, 4), torch.arange(4)
    assert [only(metrics.top_k(k), logits, labels) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert only(metrics.accuracy(), logits, labels) == 0.25


def test_what_is_ruled_out_costs_everything_or_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, -INF]])
    assert only(metrics.perplexity(), logits, [2]) == INF
    close(only(metrics.perplexity(), logits, [0]), 2.0, 1e-6)
    close(
        value(metrics.confidence(), logits, [0]), {"confidence": 0.5, "top_5_mass": 1.0, "entropy": math.log(2)}, 1e-6
    )


@pytest.mark.parametrize(
    ("nats", "right"), [(0.0, 1.0), (709.0, math.exp(709)), (710.0, INF), (INF, INF), (-INF, 0.0), (NAN, NAN)]
)
def test_perplexity_beyond_the_range_is_infinite(nats: float, right: float) -> None:
    close(perplexity_of(nats), right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn])
def test_low_precision_logits_are_widened_first(dtype: torch.dtype) -> None:
    logits, labels, _ = draw(3, 200, 12)
    low = logits.clamp(-8, 8).to(dtype)
    for metric in (metrics.accuracy(), metrics.top_k(3), metrics.perplexity(), metrics.confidence(), metrics.ece()):
        assert value(metric, low, labels) == value(metric, low.float(), labels)
    # control: a softmax in bfloat16 is another one
    if dtype == torch.bfloat16:
        sure = low[labels != IGNORED].softmax(1).amax(1).float().mean()
        assert abs(float(sure) - value(metrics.confidence(), low, labels)["confidence"]) > 1e-5


# --- form, memory, devices, programs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: (x, None), lambda x: {"logits": x}, lambda x: SimpleNamespace(logits=x)]
)
def test_outputs_may_have_the_forms_that_losses_take(form: Callable[[Tensor], Any]) -> None:
    assert only(metrics.accuracy(), form(torch.eye(3)), [0, 1, 0]) == pytest.approx(2 / 3)


EVERY = {
    "accuracy": (metrics.accuracy(shift=True), (2, 5, 4), (2, 5)),
    "top_k": (metrics.top_k(3), (6, 4), (6,)),
    "perplexity": (metrics.perplexity(shift=True), (2, 5, 4), (2, 5)),
    "confidence": (metrics.confidence(), (2, 4, 3, 3), (2, 3, 3)),
    "ece": (metrics.ece(), (6, 4), (6,)),
    "f1": (metrics.f1(), (6, 4), (6,)),
    "confusion": (metrics.confusion(4), (6, 4), (6,)),
    "multi_label_accuracy": (metrics.multi_label_accuracy(), (6, 4), (6, 4)),
    "multi_label_f1": (metrics.multi_label_f1(), (6, 4), (6, 4)),
    "mean_absolute_error": (metrics.mean_absolute_error(), (6, 1), (6,)),
    "root_mean_squared_error": (metrics.root_mean_squared_error(), (6,), (6,)),
    "r2": (metrics.r2(), (6,), (6,)),
}


def sample(name: str) -> tuple[Metric, Tensor, Batch]:
    metric, shape, label_shape = EVERY[name]
    own = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, label_shape, generator=own)
    return metric, torch.randn(shape, generator=own, requires_grad=True), {"labels": labels}


def check_reads_no_values(measure: Callable[..., Any], outputs: Tensor, batch: Batch) -> None:
    found = measure(outputs.to("meta"), {key: each.to("meta") for key, each in batch.items()})
    assert found.total.is_meta
    assert found.weight.is_meta


@pytest.mark.parametrize("name", EVERY)
def test_measuring_waits_for_no_device_and_records_no_graph(name: str) -> None:
    """Meta tensors have no values to wait for."""
    metric, outputs, batch = sample(name)
    check_reads_no_values(metric.measure, outputs, batch)
    found = metric.measure(outputs, batch)
    assert not found.total.requires_grad
    assert not found.weight.requires_grad
    assert found.weight.dtype == torch.int64
    assert found.total.dtype in (torch.int64, torch.float64)
    assert torch.is_grad_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", EVERY)
def test_measuring_and_merging_wait_for_no_gpu(name: str) -> None:
    metric, outputs, batch = sample(name)
    moved = outputs.detach().cuda(), {key: each.cuda() for key, each in batch.items()}
    metric.measure(*moved)  # the first call may load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = merge(nothing(), metric.measure(*moved))
        with pytest.raises(RuntimeError):  # control
            found.weight.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    right = metric.result(metric.measure(outputs, batch))
    close(list(metric.result(found).values()), list(right.values()), 1e-5)


def test_control_a_measure_that_reads_a_value_is_noticed() -> None:
    def reads(outputs: Tensor, batch: Batch) -> MetricSum:
        count = torch.tensor(int((batch["labels"] == 0).sum().item()))
        return MetricSum(total=count, weight=count)

    with pytest.raises((RuntimeError, NotImplementedError)):
        check_reads_no_values(reads, *sample("accuracy")[1:])


@torch_warns_of_itself
@pytest.mark.parametrize("name", EVERY)
def test_a_measure_is_one_program(name: str) -> None:
    torch._dynamo.reset()
    metric, outputs, batch = sample(name)
    compiled = torch.compile(metric.measure, fullgraph=True, backend="aot_eager")
    found, right = compiled(outputs, batch), metric.measure(outputs, batch)
    for one, other in ((found.total, right.total), (found.weight, right.weight)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notices how many elements the largest float32 tensor has that is made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                self.largest = max(self.largest, leaf.numel())
        return result


@pytest.mark.parametrize("name", ["accuracy", "top_k", "perplexity", "confidence", "ece", "f1", "confusion"])
def test_rows_are_looked_at_a_few_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 16-bit logits of a large vocabulary are never held in float32 as a whole."""
    metric, outputs, batch = sample(name)
    low, whole = outputs.detach().bfloat16(), metric.measure(outputs, batch)
    with Sizes() as before:
        metric.measure(low, batch)
    monkeypatch.setattr(base, "_HELD", 8)
    with Sizes() as after:
        metric.measure(low, batch)
    if name in ("perplexity", "confidence", "ece"):
        assert after.largest == 8
        assert before.largest == low.numel()  # control
    parts = metric.measure(outputs, batch)
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-6, atol=1e-6)
    assert torch.equal(parts.weight, whole.weight)


def test_measuring_a_trained_classifier_needs_nothing_but_its_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    labels = (x[:, 0] > 0).long()
    head = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    before = only(metrics.accuracy(), head(x), labels)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(head(x), labels).backward()
        optimizer.step()
    assert only(metrics.accuracy(), head(x), labels) > max(before, 0.95)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: metrics.top_k(0), "k is out of range"),
        (lambda: metrics.ece(bins=1.5), "bins is out of range"),  # type: ignore[arg-type]
        (lambda: metrics.confusion(True), "classes is out of range"),
        (lambda: metrics.f1(0), "classes is out of range"),
        (lambda: metrics.f1(average="marco"), "did you mean 'macro'"),  # type: ignore[arg-type]
        (lambda: metrics.multi_label_f1(average="mean"), "no average of this name"),  # type: ignore[arg-type]
        (lambda: metrics.accuracy(pooling="lats"), "did you mean 'last'"),  # type: ignore[arg-type]
        (lambda: metrics.accuracy(pooling="last", shift=True), "do not go together"),
        (lambda: metrics.r2(center=NAN), "center is out of range"),
    ],
)
def test_options_out_of_range_are_told_when_the_metric_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


LONG = torch.int64


@pytest.mark.parametrize(
    ("metric", "shape", "labels", "error", "message"),
    [
        (metrics.top_k(5), (2, 3), torch.zeros(2, dtype=LONG), ModelError, "at least 5 classes"),
        (metrics.f1(4), (2, 3), torch.zeros(2, dtype=LONG), ModelError, "4 classes"),
        (metrics.confusion(2), (2, 3), torch.zeros(2, dtype=LONG), ModelError, "2 classes"),
        (metrics.accuracy(), (2, 3), torch.zeros(2), DataError, "wrong dtype"),
        (metrics.accuracy(), (2, 3), torch.zeros(2, 3, dtype=LONG), DataError, r"labels \[2\]"),
        (metrics.accuracy(), (2, 3, 4), torch.zeros(2, dtype=LONG), DataError, r"labels \[2, 3\]"),
        (metrics.accuracy(), (3,), torch.zeros(3, dtype=LONG), ModelError, "one row of logits"),
        (metrics.accuracy(shift=True), (2, 3), torch.zeros(2, dtype=LONG), ModelError, "every position"),
        (metrics.accuracy(shift=True), (2, 1, 3), torch.zeros(2, 1, dtype=LONG), DataError, "length 1"),
        (metrics.multi_label_accuracy(), (2, 3), torch.zeros(2), DataError, r"targets \[2, 3\]"),
        (metrics.r2(), (2,), torch.zeros(2, 2), DataError, "nothing is broadcast"),
    ],
)
def test_what_does_not_fit_is_told(metric: Metric, shape: Any, labels: Tensor, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        metric.measure(torch.zeros(shape), {"labels": labels})
