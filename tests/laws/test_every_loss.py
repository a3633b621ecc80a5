"""Law 2 for every loss there is: any split, uneven and empty masks, a short last window, in float64 at 1e-12."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies import IGNORED, Batch, relative_error
from trainfn import loss as losses
from trainfn.batch import micro_batches
from trainfn.grad import Gradients, fold, make_gradients, merge
from trainfn.loss import Loss, names
from trainfn.tree import map_leaves

B, T, C, F, H = 7, 4, 3, 2, 2  # most examples, tokens, classes, features, height and width
Field = Callable[[int, torch.Generator], Tensor]


def classes(*shape: int) -> Field:
    """Labels of which a share that is another one for each example does not count; for some, none does."""

    def draw(length: int, own: torch.Generator) -> Tensor:
        labels = torch.randint(0, C, (length, *shape), generator=own)
        share = torch.rand(length, *[1] * len(shape), generator=own).mul(1.6).sub(0.3)
        return labels.masked_fill(torch.rand(length, *shape, generator=own) > share, IGNORED)

    return draw


def entries(length: int, own: torch.Generator) -> Tensor:
    return classes(C)(length, own).clamp(max=1).double()


def numbers(*shape: int) -> Field:
    return lambda length, own: torch.randn(length, *shape, generator=own, dtype=torch.float64)


def mask(length: int, own: torch.Generator) -> Tensor:
    real = torch.randint(1, T + 1, (length, 1), generator=own)
    return (torch.arange(T) < real).long()


@attrs.frozen
class Kind:
    """A loss, the shape of the outputs that it takes for an example, and its fields of the batch."""

    loss: Loss
    outputs: tuple[int, ...]
    fields: dict[str, Field]

    def batch(self, length: int, seed: int) -> Batch:
        own = torch.Generator().manual_seed(seed)
        fields = {"input": numbers(F)} | self.fields  # nn.Sequential's name for it
        return {name: draw(length, own) for name, draw in fields.items()}

    def model(self, seed: int) -> nn.Module:
        own = torch.Generator().manual_seed(seed)
        size = torch.Size(self.outputs).numel()
        model = nn.Sequential(nn.Linear(F, size, dtype=torch.float64), nn.Unflatten(1, self.outputs))
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=own))
        return model


weights = [0.5, 1.0, 3.0]
KINDS = {
    "classification": Kind(losses.classification(), (C,), {"y": classes()}),
    "weighted": Kind(losses.classification(class_weights=weights, label_smoothing=0.1), (C,), {"y": classes()}),
    "pooled by the last": Kind(losses.classification(pooling="last"), (T, C), {"y": classes(), "attention_mask": mask}),
    "pooled by the mean": Kind(losses.classification(pooling="mean"), (T, C), {"y": classes(), "attention_mask": mask}),
    "vision_classification": Kind(losses.vision_classification(), (C,), {"y": classes()}),
    "segmentation": Kind(losses.segmentation(class_weights=weights), (C, H, H), {"y": classes(H, H)}),
    "language_modeling": Kind(
        losses.language_modeling(label_smoothing=0.1, z_loss=1e-2), (T, C), {"labels": classes(T)}
    ),
    "chunked_language_modeling": Kind(
        losses.language_modeling(z_loss=1e-2, chunk_size=3), (T, C), {"labels": classes(T)}
    ),
    "masked_language_modeling": Kind(losses.masked_language_modeling(), (T, C), {"labels": classes(T)}),
    "seq2seq": Kind(losses.seq2seq(), (T, C), {"labels": classes(T)}),
    "multi_label": Kind(losses.multi_label(pos_weight=weights), (C,), {"y": entries}),
    "mse": Kind(losses.regression(kind="mse"), (2,), {"y": numbers(2)}),
    "l1": Kind(losses.regression(kind="l1"), (2,), {"y": numbers(2)}),
    "huber": Kind(losses.regression(kind="huber", delta=0.3), (2,), {"y": numbers(2)}),
    "distillation": Kind(losses.distillation(), (C,), {"y": classes(), "teacher_logits": numbers(C)}),
    "wrapped": Kind(losses.low_precision_safe(losses.classification()), (C,), {"y": classes()}),
    "a mean of the user's own": Kind(lambda outputs, batch: outputs.square().mean(), (C,), {}),
}


def mean_gradient(found: Gradients) -> Any:
    return {name: grad / found.weight for name, grad in found.grads.items()} | {"loss": found.total / found.weight}


def oracle(kind: Kind, model: nn.Module, batch: Batch) -> Any:
    """The mean loss of the whole batch and its gradient, by PyTorch alone."""
    found = kind.loss(model(batch["input"]), batch)
    mean = found if isinstance(found, Tensor) else found.total / found.weight
    grads = torch.autograd.grad(mean, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), grads, strict=True)) | {"loss": mean.detach()}


def check_any_split(kind: Kind, batch: Batch, cuts: list[int], accumulate: int, add: Any = merge) -> None:
    model = kind.model(seed=0)
    gradients, params = make_gradients(model, kind.loss), dict(model.named_parameters())
    right = oracle(kind, model, batch)
    bounds = [0, *cuts, len(batch["input"])]
    parts = [map_leaves(lambda leaf, a=a, b=b: leaf[a:b], batch) for a, b in pairwise(bounds)]
    total = functools.reduce(add, [gradients(params, {}, part) for part in parts])
    windows = fold(gradients, params, {}, micro_batches(batch, accumulate))
    for found in (total, windows):
        error = relative_error(mean_gradient(found), right)
        assert error <= 1e-12, f"off by {error:.1e}"


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[int], int, int]:
    length = draw(st.integers(1, B))
    cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
    return length, cuts, draw(st.integers(1, B + 1)), draw(st.integers(0, 10_000))


def check_case(name: str, split: tuple[int, list[int], int, int]) -> None:
    length, cuts, accumulate, seed = split
    kind = KINDS[name]
    batch = kind.batch(length, seed)
    for label in ("y", "labels"):  # something must count: a mean over nothing is no number
        if label in batch:
            batch[label][0] = 1
    check_any_split(kind, batch, cuts, accumulate)


@settings(max_examples=120)
@given(st.sampled_from(sorted(KINDS)), splits())
def test_any_split_of_any_loss_gives_the_gradient_of_the_mean(name: str, split: Any) -> None:
    check_case(name, split)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(st.sampled_from(sorted(KINDS)), splits())
def test_any_split_of_any_loss_two_thousand_times(name: str, split: Any) -> None:
    check_case(name, split)


def test_every_registered_loss_is_here() -> None:
    elsewhere = {"regression", "own"}  # another name of mse; what a model computes, in test_forward
    assert {name for name in names() if not name.startswith(("mean_output", "test"))} - elsewhere <= set(KINDS)


def test_control_a_mean_of_means_is_off_by_more_than_a_tenth() -> None:
    """Two labels count in the first part and all of 16 in the second."""
    kind = KINDS["language_modeling"]
    batch = kind.batch(6, seed=1)
    own = torch.Generator().manual_seed(2)
    batch["labels"] = torch.randint(0, C, (6, T), generator=own)
    batch["labels"][0, 2:] = IGNORED

    def average(a: Gradients, b: Gradients) -> Gradients:
        def mean(gradients: Gradients) -> Gradients:
            return map_leaves(lambda leaf: leaf / gradients.weight, gradients)

        return map_leaves(lambda left, right: (left + right) / 2, mean(a), mean(b))

    check_any_split(kind, batch, [1], 1)
    with pytest.raises(AssertionError, match=r"off by [1-9]\.\de-01|off by [1-9]\.\de\+"):
        check_any_split(kind, batch, [1], 1, add=average)
