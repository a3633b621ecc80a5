"""Law 2: however a batch is divided, padded or cut short, the gradient is that of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import (
    IGNORED,
    Batch,
    LmRecipe,
    MlpRecipe,
    Recipe,
    Setup,
    float32_or_64,
    language_models,
    mlps,
    relative_error,
)
from trainfn.batch import micro_batches
from trainfn.grad import Gradients, fold, make_gradients
from trainfn.loss import resolve
from trainfn.optim import Transform, sgd
from trainfn.state import Params
from trainfn.step import make_step
from trainfn.tree import Tree, map_leaves

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

dividable = mlps(batch_norm=False, dropout=False) | language_models(dropout=False)


def check(found: Tree, right: Tree, dtype: torch.dtype) -> None:
    error = relative_error(found, right)
    assert error <= TOLERANCE[dtype], f"off by {error:.1e} of the gradient's norm"


def recorder() -> Transform:
    """An optimizer that moves nothing; its state is the gradient it was given."""

    def update(grads: Params, state: Any, params: Params, step: Tensor) -> tuple[Params, Any]:
        return {name: torch.zeros_like(grad) for name, grad in grads.items()}, grads

    return Transform(lambda params: map_leaves(torch.zeros_like, params), update, "recorder")


def gradient_of_step(net: Recipe, batch: Batch, accumulate: int, clip_norm: float | None = None) -> Tree:
    setup = Setup(net, recorder(), accumulate=accumulate, clip_norm=clip_norm)
    model = net.model()
    after = setup.step(model)(setup.state(model), batch)
    assert int(after.step) == 1
    return {"mean gradient": after.opt, "loss": after.report.loss, "weight": after.report.weight}


@settings(max_examples=60)
@given(dividable, st.integers(1, 9), st.integers(2, 11), st.integers(0, 99), st.sampled_from([None, 0.01]))
def test_accumulation_does_not_change_the_gradient(
    net: Recipe, length: int, accumulate: int, seed: int, clip_norm: float | None
) -> None:
    batch = net.batch(length, seed)
    whole = gradient_of_step(net, batch, 1, clip_norm)
    parts = gradient_of_step(net, batch, accumulate, clip_norm)
    check(parts, whole, net.dtype)
    assert float(parts["weight"]) == float(whole["weight"])


@settings(max_examples=30)
@given(dividable, st.integers(3, 8), st.data())
def test_a_micro_batch_in_which_nothing_counts_adds_nothing(net: Recipe, length: int, data: st.DataObject) -> None:
    batch = net.batch(length)
    start = data.draw(st.integers(1, length - 1))
    name = "y" if "y" in batch else "labels"
    batch[name][start:] = IGNORED
    whole = gradient_of_step(net, batch, 1)
    check(gradient_of_step(net, batch, length), whole, net.dtype)
    check(gradient_of_step(net, {field: value[:start] for field, value in batch.items()}, 1), whole, net.dtype)


@settings(max_examples=40)
@given(language_models(dropout=False), st.lists(st.integers(2, 9), min_size=1, max_size=7), st.data())
def test_any_split_with_any_padding_gives_the_gradient_of_the_whole(
    net: LmRecipe, lengths: list[int], data: st.DataObject
) -> None:
    rows = net.batch(len(lengths), data.draw(st.integers(0, 99)))
    for row, length in enumerate(lengths):
        rows["labels"][row, length:] = IGNORED
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1)))) if len(lengths) > 1 else []
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(lengths)], strict=True):
        longest, extra = max(lengths[start:stop]), data.draw(st.integers(0, 4))
        padding = data.draw(st.integers(0, net.vocabulary - 1))
        parts.append(
            {
                name: torch.nn.functional.pad(value[start:stop, :longest], (0, extra), value=filler)
                for (name, value), filler in zip(rows.items(), (padding, IGNORED), strict=True)
            }
        )
    model = net.model()
    gradients, params = make_gradients(model, resolve(net.loss)), dict(model.named_parameters())
    whole, folded = gradients(params, {}, rows), fold(gradients, params, {}, parts)
    assert float(whole.weight) == float(folded.weight)
    check(folded.grads, whole.grads, net.dtype)
    check(folded.total, whole.total, net.dtype)


@settings(max_examples=20)
@given(dividable, st.integers(2, 8), st.integers(2, 5))
def test_a_plain_mean_is_weighted_by_its_examples(net: Recipe, length: int, accumulate: int) -> None:
    def mean_square(outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.square().mean()

    found = []
    for count in (1, accumulate):
        model, optimizer = net.model(), recorder()
        setup = Setup(net, optimizer, accumulate=count)
        found.append(setup.step(model, mean_square)(setup.state(model), net.batch(length)).opt)
    check(found[1], found[0], net.dtype)


@settings(max_examples=20)
@given(mlps(dropout=False), float32_or_64, st.integers(2, 4))
def test_buffers_are_threaded_through_micro_batches_in_order(
    net: MlpRecipe, dtype: torch.dtype, accumulate: int
) -> None:
    setup = Setup(net, sgd(0.1), accumulate=accumulate)
    model, batch = net.model(), net.batch(2 * accumulate)
    after = setup.step(model)(setup.state(model), batch)
    oracle = net.model()  # changed in place, as torch does
    for part in micro_batches(batch, accumulate):
        oracle(part["x"])
    torch.testing.assert_close(dict(after.buffers), dict(oracle.named_buffers()), rtol=0, atol=0)


# --- controls ---------------------------------------------------------------------------------------------------------


def mean_of_means(parts: list[Gradients]) -> Tree:
    means = [{name: grad / part.weight for name, grad in part.grads.items()} for part in parts]
    return {name: torch.stack([mean[name] for mean in means]).mean(0) for name in means[0]}


def test_control_a_mean_of_means_is_off_by_more_than_a_tenth() -> None:
    net = LmRecipe(dtype=torch.float64)
    batch = net.batch(4)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:2, 3:] = IGNORED  # 2 tokens a row here, 8 a row below
    model = net.model()
    gradients, params = make_gradients(model, resolve(net.loss)), dict(model.named_parameters())
    whole = gradients(params, {}, batch)
    parts = [gradients(params, {}, part) for part in micro_batches(batch, 2)]
    assert [float(part.weight) for part in parts] == [4.0, 16.0]
    right = {name: grad / whole.weight for name, grad in whole.grads.items()}
    with pytest.raises(AssertionError, match="off by"):
        check(mean_of_means(parts), right, net.dtype)
    assert relative_error(mean_of_means(parts), right) > 0.1
    both = fold(gradients, params, {}, micro_batches(batch, 2))
    check({name: grad / both.weight for name, grad in both.grads.items()}, right, net.dtype)


def test_control_a_loss_that_hides_its_weight_is_off() -> None:
    def mean_over_tokens(outputs: Tensor, batch: Batch) -> Tensor:  # a mean, but not over the batch's examples
        return torch.nn.functional.cross_entropy(
            outputs[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
        )

    net = LmRecipe(dtype=torch.float64)
    batch, model = net.batch(4), net.model()
    found = []
    for accumulate in (1, 2):
        step = make_step(model, loss=mean_over_tokens, optimizer=recorder(), accumulate=accumulate)
        found.append(step(Setup(net, recorder()).state(model), batch).opt)
    with pytest.raises(AssertionError, match="off by"):
        check(found[1], found[0], net.dtype)
