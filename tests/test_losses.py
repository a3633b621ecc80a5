"""Every registered loss against a naive loop, and as a sum: cut anywhere, added, compiled, in 16 bits, all ignored."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from tests.strategies import leaves, torch_warns_of_itself
from trainfn import loss as losses
from trainfn.errors import ConfigError, DataError, ModelError
from trainfn.loss import Loss, LossSum
from trainfn.step import make_step

IGNORED = -100
CLASSES = 5
Batch = dict[str, Tensor]
Pair = tuple[float, float]

# --- naive loops: one term at a time, in Python's floats --------------------------------------------------------------


def log_softmax(row: list[float]) -> list[float]:
    normaliser = math.log(sum(math.exp(value) for value in row))
    return [value - normaliser for value in row]


def cross_entropy(rows: Tensor, labels: Tensor, weights: Any = None, smoothing: float = 0.0, z: float = 0.0) -> Pair:
    total = weight = 0.0
    for row, label in zip(rows.reshape(-1, rows.shape[-1]).tolist(), labels.reshape(-1).tolist(), strict=True):
        if label == IGNORED:
            continue
        logs, count = log_softmax(row), len(row)
        each = weights or [1.0] * count
        total -= (1 - smoothing) * each[label] * logs[label]
        total -= smoothing / count * sum(w * log for w, log in zip(each, logs, strict=True))
        total += z * math.log(sum(math.exp(value) for value in row)) ** 2
        weight += each[label]
    return total, weight


def next_token(outputs: Tensor, batch: Batch, **options: float) -> Pair:
    return cross_entropy(outputs[:, :-1], batch["labels"][:, 1:], **options)


def aligned(outputs: Tensor, batch: Batch, **options: Any) -> Pair:
    return cross_entropy(outputs, batch["labels"], **options)


def pixels(outputs: Tensor, batch: Batch, **options: Any) -> Pair:
    return cross_entropy(outputs.permute(0, 2, 3, 1), batch["labels"], **options)


def binary(outputs: Tensor, batch: Batch, pos_weight: Any = None) -> Pair:
    total = weight = 0.0
    for row, labels in zip(outputs.tolist(), batch["labels"].tolist(), strict=True):
        for x, y, p in zip(row, labels, pos_weight or [1.0] * len(row), strict=True):
            if y != IGNORED:
                total += p * y * math.log1p(math.exp(-x)) + (1 - y) * math.log1p(math.exp(x))
                weight += 1
    return total, weight


def errors(each: Callable[[float], float]) -> Callable[[Tensor, Batch], Pair]:
    def oracle(outputs: Tensor, batch: Batch) -> Pair:
        pairs = zip(outputs.reshape(-1).tolist(), batch["labels"].reshape(-1).tolist(), strict=True)
        terms = [each(x - y) for x, y in pairs]
        return sum(terms), len(terms)

    return oracle


def huber(e: float, delta: float = 1.0) -> float:
    return e * e / 2 if abs(e) <= delta else delta * (abs(e) - delta / 2)


def distilled(rows: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0, alpha: float = 0.5) -> Pair:
    hard, weight = cross_entropy(rows, labels)
    soft = 0.0
    width = rows.shape[-1]
    for x, t, label in zip(rows.reshape(-1, width), teacher.reshape(-1, width), labels.reshape(-1), strict=True):
        p, q = log_softmax((t / temperature).tolist()), log_softmax((x / temperature).tolist())
        if label != IGNORED:
            soft += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    return (1 - alpha) * hard + alpha * temperature**2 * soft, weight


# --- one case for each registered name --------------------------------------------------------------------------------


@attrs.frozen
class Case:
    """What a loss is given: outputs [B, *shape], and in the batch labels [B, *label_shape] of a kind."""

    oracle: Callable[[Tensor, Batch], Pair]
    shape: tuple[int, ...] = (CLASSES,)
    label_shape: tuple[int, ...] = ()
    kind: str = "class"
    teacher: bool = False

    def make(self, seed: int, length: int = 4) -> tuple[Tensor, Batch]:
        """Return float64 outputs and a batch in which each example has another share of labels that do not count."""
        own = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return 2 * torch.randn(length, *shape, generator=own, dtype=torch.float64)

        outputs, batch = normal(*self.shape), {"x": normal(3)}
        if self.kind == "number":
            batch["labels"] = normal(*self.label_shape)
        else:
            most = 2 if self.kind == "binary" else CLASSES
            labels = torch.randint(0, most, (length, *self.label_shape), generator=own)
            share = torch.rand(length, *[1] * len(self.label_shape), generator=own).mul(1.4).sub(0.4)
            batch["labels"] = labels.masked_fill(torch.rand(labels.shape, generator=own) < share, IGNORED)
        if self.teacher:
            batch["teacher_logits"] = normal(*self.shape)
        return outputs, batch


def in_the_outputs_dtype(outputs: Tensor, batch: Batch) -> LossSum:
    """A loss as someone writes it who has float32 in mind."""
    rows, labels = outputs.flatten(0, 1), batch["labels"].flatten()
    total = nn.functional.cross_entropy(rows, labels, reduction="sum")
    return LossSum(total=total, weight=(labels != IGNORED).sum().to(total.dtype))


TOKENS = (6, CLASSES)
CASES = {
    "classification": Case(aligned),
    "vision_classification": Case(aligned),
    "segmentation": Case(pixels, (CLASSES, 2, 3), (2, 3)),
    "language_modeling": Case(next_token, TOKENS, (6,)),
    "chunked_language_modeling": Case(next_token, TOKENS, (6,)),
    "masked_language_modeling": Case(aligned, TOKENS, (6,)),
    "seq2seq": Case(aligned, TOKENS, (6,)),
    "multi_label": Case(binary, (3,), (3,), "binary"),
    "regression": Case(errors(lambda e: e * e), (2,), (2,), "number"),
    "mse": Case(errors(lambda e: e * e), (1,), (), "number"),
    "l1": Case(errors(abs), (), (1,), "number"),
    "huber": Case(errors(huber), (2,), (2,), "number"),
    "distillation": Case(lambda x, b: distilled(x, b["teacher_logits"], b["labels"]), teacher=True),
}
VARIANTS: dict[str, tuple[Loss, Case]] = {
    "smoothed": (
        losses.language_modeling(label_smoothing=0.2, z_loss=0.05),
        Case(lambda x, b: next_token(x, b, smoothing=0.2, z=0.05), TOKENS, (6,)),
    ),
    "chunked": (losses.language_modeling(chunk_size=4), Case(next_token, TOKENS, (6,))),
    "chunked, smoothed": (
        losses.seq2seq(chunk_size=5, label_smoothing=0.2, z_loss=0.05),
        Case(lambda x, b: aligned(x, b, smoothing=0.2, z=0.05), TOKENS, (6,)),
    ),
    "class weights": (
        losses.classification(class_weights=[1, 0.5, 2, 0, 3], label_smoothing=0.1),
        Case(lambda x, b: aligned(x, b, weights=[1, 0.5, 2, 0, 3], smoothing=0.1)),
    ),
    "pixel weights": (
        losses.segmentation(class_weights=torch.tensor([1, 0.5, 2, 1, 3])),
        Case(lambda x, b: pixels(x, b, weights=[1, 0.5, 2, 1, 3]), (CLASSES, 2, 3), (2, 3)),
    ),
    "positive weights": (
        losses.multi_label(pos_weight=[1, 0.5, 4]),
        Case(lambda x, b: binary(x, b, [1, 0.5, 4]), (3,), (3,), "binary"),
    ),
    "wide huber": (
        losses.regression(kind="huber", delta=2.5),
        Case(errors(lambda e: huber(e, 2.5)), (2, 2), (2, 2), "number"),
    ),
    "distilled next tokens": (
        losses.distillation(base="language_modeling", temperature=3.0, alpha=0.7),
        Case(
            lambda x, b: distilled(x[:, :-1], b["teacher_logits"][:, :-1], b["labels"][:, 1:], 3.0, 0.7),
            TOKENS,
            (6,),
            teacher=True,
        ),
    ),
    "low precision safe": (losses.low_precision_safe(in_the_outputs_dtype), Case(aligned, TOKENS, (6,))),
    "peft aware": (losses.peft_aware("segmentation"), Case(pixels, (CLASSES, 2, 3), (2, 3))),
}
REGISTERED = [name for name in losses.names() if name != "own"]  # now: a doctest registers one more, later
NAMES = [*REGISTERED, *VARIANTS]


# In torch's own words: creating quantized tensors will go away.
quantizing = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")


def find(name: str) -> tuple[Loss, Case]:
    return VARIANTS[name] if name in VARIANTS else (losses.resolve(name), CASES[name])


def cut(batch: Batch, start: int, stop: int) -> Batch:
    return {name: value[start:stop] for name, value in batch.items()}


def numbers(found: LossSum | Tensor) -> Pair:
    assert isinstance(found, LossSum)
    assert found.total.ndim == found.weight.ndim == 0
    assert not found.weight.requires_grad
    return float(found.total), float(found.weight)


def close(found: Pair, right: Pair, tolerance: float = 1e-12) -> None:
    assert found == pytest.approx(right, rel=tolerance, abs=tolerance)


def gradient(loss: Loss, outputs: Tensor, batch: Batch) -> Tensor:
    views = outputs.detach().requires_grad_()
    found = loss(views, batch)
    assert isinstance(found, LossSum)
    return torch.autograd.grad(found.total, views)[0]


def test_every_registered_loss_has_a_case() -> None:
    assert sorted(CASES) == REGISTERED


# --- laws of every loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_a_loss_is_the_naive_sum(name: str, seed: int, length: int) -> None:
    loss, case = find(name)
    outputs, batch = case.make(seed, length)
    close(numbers(loss(outputs, batch)), case.oracle(outputs, batch), 1e-9)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 7), st.data())
def test_parts_of_a_batch_add_up_to_the_whole(name: str, seed: int, length: int, data: st.DataObject) -> None:
    loss, case = find(name)
    outputs, batch = case.make(seed, length)
    at = data.draw(st.integers(0, length))
    parts = [numbers(loss(outputs[a:b], cut(batch, a, b))) for a, b in ((0, at), (at, length))]
    close((parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]), numbers(loss(outputs, batch)))
    halves = [gradient(loss, outputs[a:b], cut(batch, a, b)) for a, b in ((0, at), (at, length))]
    torch.testing.assert_close(torch.cat(halves), gradient(loss, outputs, batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_control_a_mean_of_means_is_another_number(name: str) -> None:
    """By more than 10 %: the law above is not one that anything would obey."""
    loss, case = find(name)
    worst = 0.0
    for seed in range(30):
        outputs, batch = case.make(seed, 6)
        total, weight = numbers(loss(outputs, batch))
        parts = [numbers(loss(outputs[a:b], cut(batch, a, b))) for a, b in ((0, 1), (1, 6))]
        if all(w > 0 for _, w in parts):
            mean = sum(t / w for t, w in parts) / 2
            worst = max(worst, abs(mean * weight / total - 1))
    assert worst > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_counts_total_weight_and_gradients_are_zero(name: str) -> None:
    loss, case = find(name)
    outputs, batch = case.make(0)
    if case.kind == "number":  # numbers have no label that does not count: an empty batch then
        outputs, batch = outputs[:0], cut(batch, 0, 0)
    else:
        batch["labels"] = batch["labels"].fill_(IGNORED)
    assert numbers(loss(outputs, batch)) == (0.0, 0.0)
    assert gradient(loss, outputs, batch).eq(0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_outputs_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    loss, case = find(name)
    outputs, batch = case.make(1, 40)
    low = (outputs * 100).to(dtype)
    found = loss(low, batch)
    assert isinstance(found, LossSum)
    assert found.total.dtype == found.weight.dtype == torch.float32
    close(numbers(found), numbers(loss(low.float(), batch)), 1e-6)
    grad = gradient(loss, low, batch)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_reads_no_values(name: str) -> None:
    """Meta tensors have none: nothing here waits for a device, in the checks or in the sum."""
    loss, case = find(name)
    outputs, batch = case.make(0)
    found = loss(outputs.to("meta"), {key: value.to("meta") for key, value in batch.items()})
    assert isinstance(found, LossSum)
    assert found.total.is_meta


class Reshaped(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.dense = nn.Linear(3, math.prod(shape), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x).reshape(x.shape[0], *self.shape)


@torch_warns_of_itself
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_and_its_gradient_are_one_program(name: str) -> None:
    torch._dynamo.reset()
    loss, case = find(name)
    outputs, batch = case.make(2)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(numbers(compiled(outputs, batch)), numbers(loss(outputs, batch)))
    pair = gradient(compiled, outputs, batch), gradient(loss, outputs, batch)
    torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


# Whole steps for one of each kind, and for every one that does more than call PyTorch's own losses.
STEPS = ["classification", "distillation", "huber", "multi_label", "chunked, smoothed", "low precision safe"]


@torch_warns_of_itself
@pytest.mark.filterwarnings("ignore::trainfn.loss.PeftWarning")  # nothing is frozen here
@pytest.mark.parametrize("name", [*STEPS, "peft aware"])
def test_a_step_is_the_same_as_one_program(name: str) -> None:
    _, case = find(name)
    torch.manual_seed(0)
    model, optimizer = Reshaped(case.shape), trainfn.optim.sgd(0.1)
    step = make_step(model, loss=name if name in CASES else VARIANTS[name][0], optimizer=optimizer, accumulate=2)
    compiled = trainfn.compile(step, mode="graph", backend="aot_eager")
    state = trainfn.init(model, optimizer)
    _, batch = case.make(2)
    found, right = compiled(state, batch), step(state, batch)
    torch.testing.assert_close(leaves(found), leaves(right), rtol=1e-12, atol=1e-12)
    assert int(right.step) == 1
    assert not torch.equal(right.params["dense.weight"], state.params["dense.weight"])


# --- options ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 0.01]))
def test_chunks_change_memory_and_nothing_else(seed: int, size: int, smoothing: float, z: float) -> None:
    outputs, batch = CASES["language_modeling"].make(seed)
    plain = losses.language_modeling(label_smoothing=smoothing, z_loss=z)
    chunked = losses.language_modeling(label_smoothing=smoothing, z_loss=z, chunk_size=size)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        given = outputs.to(dtype)
        close(numbers(chunked(given, batch)), numbers(plain(given, batch)), min(tolerance, 1e-6))
        pair = gradient(chunked, given, batch), gradient(plain, given, batch)
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


def test_chunks_can_be_differentiated_twice_and_vectorised() -> None:
    """A custom backward that is not told so gives second derivatives of zero, and no error."""
    outputs, batch = CASES["language_modeling"].make(0)
    found = []
    for loss in (losses.language_modeling(z_loss=0.1), losses.language_modeling(z_loss=0.1, chunk_size=5)):
        # Bound as a default: the loop's variable is another one by the time it is called.
        def total(outputs: Tensor, loss: Loss = loss) -> Tensor:
            return loss(outputs, batch).total  # type: ignore[union-attr]

        views = outputs.clone().requires_grad_()
        (first,) = torch.autograd.grad(total(views), views, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), views)[0]
        mapped = torch.func.vmap(torch.func.grad(total))(torch.stack([outputs, 2 * outputs]))
        found.append((first.detach(), second, mapped))
    assert found[0][1].abs().max() > 0.1
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_chunks_never_hold_all_logits_in_float32() -> None:
    """Counted by the sizes of the tensors that are made: none has [tokens, vocabulary] elements of float32."""

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for leaf in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                    self.largest = max(self.largest, leaf.numel())
            return made

    outputs = torch.randn(8, 16, 11).bfloat16()
    batch = {"labels": torch.randint(0, 11, (8, 16))}
    lean, plain = losses.language_modeling(chunk_size=16), losses.language_modeling()
    pairs = [(lean, 16 * 11), (losses.low_precision_safe(lean), 16 * 11), (plain, 128 * 11)]
    for loss, largest in pairs:
        with Sizes() as sizes:
            gradient(loss, outputs, batch)
        assert sizes.largest == largest


@pytest.mark.parametrize("pooling", ["last", "mean"])
@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_logits_of_positions_are_pooled_over_the_real_ones(pooling: Any, seed: int) -> None:
    outputs, batch = Case(aligned, TOKENS).make(seed)
    own = torch.Generator().manual_seed(seed)
    batch["attention_mask"] = torch.randint(0, 2, (4, 6), generator=own)
    batch["attention_mask"][0] = seed % 2  # at times, nothing in the first example is real
    total = weight = 0.0
    for row, mask, label in zip(outputs, batch["attention_mask"].bool(), batch["labels"], strict=True):
        if mask.any():
            pooled = row[mask][-1] if pooling == "last" else row[mask].mean(0)
            each = cross_entropy(pooled[None], label[None])
            total, weight = total + each[0], weight + each[1]
    loss = losses.classification(pooling=pooling)
    outputs = outputs.masked_fill(batch["attention_mask"][..., None] == 0, float("nan"))  # padding is not looked at
    close(numbers(loss(outputs, batch)), (total, weight))
    whole = outputs[..., :1].nan_to_num().expand(4, 6, CLASSES)
    del batch["attention_mask"]
    pooled = whole[:, -1] if pooling == "last" else whole.mean(1)
    close(numbers(loss(whole, batch)), numbers(losses.classification()(pooled, batch)))


def test_class_weights_give_the_weighted_mean_of_torch() -> None:
    outputs, batch = CASES["classification"].make(3, 9)
    table = torch.tensor([1.0, 0.5, 2.0, 4.0, 3.0], dtype=torch.float64)
    total, weight = numbers(losses.classification(class_weights=table)(outputs, batch))
    assert total / weight == pytest.approx(float(nn.CrossEntropyLoss(weight=table)(outputs, batch["labels"])))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16])
def test_multi_label_targets_may_have_any_real_dtype(dtype: torch.dtype) -> None:
    outputs, batch = CASES["multi_label"].make(0)
    batch["labels"] = batch["labels"].clamp(min=0)
    right = numbers(losses.multi_label()(outputs, batch))
    assert numbers(losses.multi_label()(outputs, batch | {"labels": batch["labels"].to(dtype)})) == right


def test_a_small_unsigned_label_is_not_taken_for_the_ignored_one() -> None:
    """-100 in uint8 is 156."""
    outputs = torch.zeros(1, 200)
    found = losses.classification()(outputs, (None, torch.tensor([156], dtype=torch.uint8)))
    close(numbers(found), (math.log(200), 1.0), 1e-6)


def test_a_teacher_is_asked_without_gradients_and_may_rule_classes_out() -> None:
    teacher, student = nn.Linear(3, 4), nn.Linear(3, 4)
    x, labels = torch.ones(2, 3), torch.tensor([0, 1])
    loss = losses.distillation(teacher=lambda batch: {"logits": teacher(batch[0])}, alpha=1.0)
    total = loss(student(x), (x, labels)).total
    total.backward()
    assert teacher.weight.grad is None
    assert float(total.detach()) > 0
    known = torch.tensor([[0.0, 1.0, float("-inf")]])
    given = {"teacher_logits": known, "labels": torch.tensor([0])}
    for outputs, right in ((known, True), (torch.zeros(1, 3), False)):
        found = losses.distillation(alpha=1.0)(outputs, given)
        assert (float(found.total) == 0) == right
        assert gradient(losses.distillation(alpha=1.0), outputs, given).isfinite().all()


Named = namedtuple("Named", ["logits", "rest"])
FORMS: list[Callable[[Tensor], Any]] = [
    lambda x: x,
    lambda x: (x, None),
    lambda x: [x],
    lambda x: {"logits": x, "ids": torch.ones(1, dtype=torch.int64)},
    lambda x: OrderedDict(logits=x),
    lambda x: Named(x, None),
    lambda x: SimpleNamespace(logits=x, loss=None),
]


@pytest.mark.parametrize("form", FORMS)
def test_low_precision_safe_keeps_the_form(form: Callable[[Tensor], Any]) -> None:
    seen = []

    def base(outputs: Any, batch: Any) -> Tensor:
        seen.append(outputs)
        return losses.logits_of(outputs).mean()

    given = form(torch.ones(2, dtype=torch.float16))
    assert losses.low_precision_safe(base)(given, None).dtype == torch.float32  # type: ignore[union-attr]
    assert type(seen[0]) is type(given)
    assert losses.logits_of(given).dtype == torch.float16


def test_a_loss_that_sums_in_float32_itself_needs_no_wrapper() -> None:
    for name in REGISTERED:
        loss = losses.resolve(name)
        assert losses.low_precision_safe(loss) is loss
    safe = losses.low_precision_safe(in_the_outputs_dtype)
    assert safe is not in_the_outputs_dtype
    assert losses.low_precision_safe(safe) is safe


def test_control_the_loss_of_someone_is_another_number_in_sixteen_bits() -> None:
    outputs, batch = CASES["seq2seq"].make(1, 40)
    low = outputs.bfloat16()
    right = numbers(in_the_outputs_dtype(low.float(), batch))
    assert numbers(losses.low_precision_safe(in_the_outputs_dtype)(low, batch)) == right
    assert abs(numbers(in_the_outputs_dtype(low, batch))[0] / right[0] - 1) > 1e-4


def eight_bits(outputs: Tensor, kind: torch.dtype) -> Tensor:
    if not kind.is_floating_point:
        return torch.quantize_per_tensor(outputs.float(), 0.05, 100 if kind == torch.quint8 else 0, kind)
    return outputs.to(kind)


@quantizing
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind",
    [torch.quint8, torch.qint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz],
    ids=str,
)
def test_quantized_outputs_and_floats_of_eight_bits_are_summed_in_float32(name: str, kind: torch.dtype) -> None:
    loss, case = find(name)
    outputs, batch = case.make(1, 6)
    low = eight_bits(outputs, kind)
    wide = low.float() if kind.is_floating_point else low.dequantize()
    if case.teacher:
        batch["teacher_logits"] = wide + 1.0
    found = loss(low, batch)
    assert isinstance(found, LossSum)
    assert found.total.dtype == torch.float32
    assert numbers(found) == numbers(loss(wide, batch))
    if kind.is_floating_point:
        assert gradient(loss, low, batch).float().isfinite().all()


@quantizing
@pytest.mark.parametrize("kind", [torch.quint8, torch.float8_e5m2])
def test_control_without_the_wrapper_eight_bits_are_an_error_of_torch(kind: torch.dtype) -> None:
    outputs, batch = CASES["seq2seq"].make(1, 6)
    with pytest.raises((NotImplementedError, RuntimeError)):
        in_the_outputs_dtype(eight_bits(outputs, kind), batch)


def test_pixels_that_are_labelled_255_in_uint8_do_not_count() -> None:
    """As in Pascal VOC and Cityscapes; what stands under them is not looked at."""
    outputs, batch = CASES["segmentation"].make(0)
    unknown = batch["labels"] == IGNORED
    right = pixels(outputs, batch)
    batch["labels"] = batch["labels"].masked_fill(unknown, 255).to(torch.uint8)
    hidden = outputs.masked_fill(unknown[:, None], 1e4)
    assert 0 < int(unknown.sum()) < unknown.numel()
    close(numbers(losses.segmentation(ignore_index=255)(hidden, batch)), right, 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_regression_finds_its_predictions(form: Callable[[Tensor], Any]) -> None:
    close(numbers(losses.regression()(form(torch.ones(2)), (None, torch.zeros(2, 1)))), (2.0, 2.0))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.language_modeling(label_smoothing=1.5), "label_smoothing is out of range"),
        (lambda: losses.language_modeling(z_loss=-1.0), "z_loss is out of range"),
        (lambda: losses.language_modeling(chunk_size=0), "chunk_size is out of range"),
        (lambda: losses.classification(pooling="lats"), "did you mean 'last'"),  # type: ignore[arg-type]
        (lambda: losses.classification(class_weights=[1.0, -1.0]), "class_weights cannot weigh"),
        (lambda: losses.multi_label(pos_weight=[float("nan")]), "pos_weight cannot weigh"),
        (lambda: losses.regression(kind="hubert"), "did you mean 'huber'"),  # type: ignore[arg-type]
        (lambda: losses.regression(delta=0.0), "delta is out of range"),
        (lambda: losses.distillation(temperature=0.0), "temperature is out of range"),
        (lambda: losses.distillation(alpha=float("nan")), "alpha is out of range"),
        (lambda: losses.distillation(base="regression"), "no such loss to distil"),  # type: ignore[arg-type]
        (lambda: losses.low_precision_safe("hubert"), "did you mean 'huber'"),
    ],
)
def test_options_out_of_range_are_told_when_the_loss_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


LONG, FLOAT = torch.int64, torch.float32


@pytest.mark.parametrize(
    ("loss", "outputs", "labels", "error", "message"),
    [
        (losses.classification(), (2, 3, 4), ((2,), LONG), ModelError, r'classification\(pooling="last"\)'),
        (losses.vision_classification(), (2, 3, 4, 4), ((2,), LONG), ModelError, "segmentation"),
        (losses.classification(), (2, 3), ((2,), FLOAT), DataError, r"labels\.long\(\)"),
        (losses.classification(), (2, 3), ((2, 1), LONG), DataError, r"labels \[2, 1\]"),
        (losses.classification(class_weights=[1.0, 2.0]), (2, 3), ((2,), LONG), ModelError, "2 classes"),
        (losses.segmentation(), (2, 3), ((2,), LONG), ModelError, "height, width"),
        (losses.segmentation(), (2, 3, 4, 4), ((2, 8, 8), LONG), DataError, r"labels \[2, 4, 4\]"),
        (losses.masked_language_modeling(), (2, 3), ((2,), LONG), ModelError, "every position"),
        (losses.seq2seq(), (2, 3, 4), ((2, 4), LONG), DataError, r"labels \[2, 3\]"),
        (losses.multi_label(), (2, 3), ((2,), LONG), DataError, 'loss="classification"'),
        (losses.multi_label(), (2, 3), ((1, 3), LONG), DataError, r"targets \[2, 3\]"),
        (losses.multi_label(), (2, 3), ((2, 3), torch.complex64), DataError, "wrong dtype"),
        (losses.multi_label(pos_weight=[1.0]), (2, 3), ((2, 3), LONG), ModelError, r"logits \[batch, 1\]"),
        (losses.regression(), (4, 1), ((1, 4), FLOAT), DataError, "nothing is broadcast"),
        (losses.regression(), (4, 2), ((4,), FLOAT), DataError, r"targets \[4, 2\]"),
        (losses.regression(), (4,), ((4,), torch.bool), DataError, "real numbers"),
        (losses.distillation(), (2, 3), ((2,), LONG), DataError, "teacher_logits"),
        (losses.distillation(teacher=lambda _: torch.ones(2, 4)), (2, 3), ((2,), LONG), DataError, "same classes"),
    ],
)
def test_what_does_not_fit_is_told_with_both_shapes(
    loss: Loss, outputs: Any, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loss(torch.zeros(outputs), {"x": torch.zeros(1), "labels": torch.zeros(labels[0], dtype=labels[1])})


def test_masked_tokens_are_not_guessed_from_the_inputs() -> None:
    with pytest.raises(DataError, match="no target"):
        losses.masked_language_modeling()(torch.zeros(1, 2, 3), {"input_ids": torch.zeros(1, 2, dtype=LONG)})


def test_a_mask_of_another_shape_is_told() -> None:
    batch = {"attention_mask": torch.ones(2, 5), "labels": torch.zeros(2, dtype=LONG)}
    with pytest.raises(DataError, match=r"attention_mask[\s\S]*\[2, 3\]"):
        losses.classification(pooling="mean")(torch.zeros(2, 3, 4), batch)
