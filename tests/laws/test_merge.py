"""Law 3: gradients are a monoid under ``merge``, commutative in their sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import Recipe, language_models, leaves, mlps
from trainfn.batch import micro_batches
from trainfn.grad import Gradients, fold, make_gradients, merge
from trainfn.loss import resolve
from trainfn.tree import digest, map_leaves

Merge = Callable[[Gradients, Gradients], Gradients]

numbers = st.floats(-1e3, 1e3, width=32)
shapes = st.dictionaries(st.sampled_from("abc"), st.sampled_from([(), (2,), (0,), (2, 3)]), min_size=1)


@st.composite
def contributions(draw: st.DrawFn, count: int) -> list[Gradients]:
    """Gradients of one structure; some weigh nothing."""
    form = draw(shapes)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return torch.tensor(draw(st.lists(numbers, min_size=size, max_size=size)), dtype=dtype).reshape(shape)

    return [
        Gradients(
            grads={name: tensor(shape) for name, shape in form.items()},
            total=tensor(()),
            weight=torch.tensor(float(draw(st.integers(0, 9))), dtype=dtype),
            micro_batches=torch.tensor(draw(st.integers(0, 9))),
            buffers={"mean": tensor((2,))},
        )
        for _ in range(count)
    ]


def identity(like: Gradients) -> Gradients:
    zeros = map_leaves(torch.zeros_like, like)
    return attrs.evolve(zeros, buffers=like.buffers)


def check_same(found: Gradients, right: Gradients) -> None:
    """To rounding: sums of three numbers below 1e3."""
    tolerance = 1e-3 if found.total.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(leaves(found), leaves(right), rtol=1e-6, atol=tolerance)


def check_associative(op: Merge, a: Gradients, b: Gradients, c: Gradients) -> None:
    check_same(op(op(a, b), c), op(a, op(b, c)))


def check_commutative(op: Merge, a: Gradients, b: Gradients) -> None:
    check_same(op(a, b), attrs.evolve(op(b, a), buffers=b.buffers))


def check_identity(op: Merge, a: Gradients) -> None:
    check_same(op(a, identity(a)), a)
    check_same(op(identity(a), a), a)


@settings(max_examples=60)
@given(contributions(3))
def test_merge_is_associative(three: list[Gradients]) -> None:
    check_associative(merge, *three)


@settings(max_examples=60)
@given(contributions(2))
def test_merge_is_commutative_in_its_sums_and_keeps_the_later_buffers(two: list[Gradients]) -> None:
    check_commutative(merge, *two)
    assert merge(*two).buffers is two[1].buffers


@settings(max_examples=40)
@given(contributions(1))
def test_nothing_of_weight_nothing_is_the_identity(one: list[Gradients]) -> None:
    check_identity(merge, one[0])


@settings(max_examples=40)
@given(contributions(2))
def test_merge_writes_to_neither_side(two: list[Gradients]) -> None:
    before = digest(two)
    merge(*two)
    assert digest(two) == before


@settings(max_examples=20)
@given(mlps(batch_norm=False, dropout=False) | language_models(dropout=False), st.permutations(range(4)), st.data())
def test_contributions_of_a_net_merge_in_any_order_and_grouping(
    net: Recipe, order: list[int], data: st.DataObject
) -> None:
    model = net.model()
    gradients, params = make_gradients(model, resolve(net.loss)), dict(model.named_parameters())
    parts = micro_batches(net.batch(8), 4)
    pile = [gradients(params, {}, parts[index]) for index in order]
    while len(pile) > 1:
        at = data.draw(st.integers(0, len(pile) - 2))
        pile[at : at + 2] = [merge(pile[at], pile[at + 1])]
    right = fold(gradients, params, {}, parts)
    tolerance = 1e-5 if net.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(leaves(pile[0]), leaves(right), rtol=tolerance, atol=tolerance)
    assert digest(right) == digest(reduce(merge, [gradients(params, {}, part) for part in parts]))


# --- controls: things that look like a merge --------------------------------------------------------------------------


def average(a: Gradients, b: Gradients) -> Gradients:
    return map_leaves(lambda left, right: (left + right) / 2, a, b)


def keeps_the_left_weight(a: Gradients, b: Gradients) -> Gradients:
    return attrs.evolve(merge(a, b), weight=a.weight)


def one(value: float) -> Gradients:
    scalar = torch.tensor(value, dtype=torch.float64)
    parts = torch.tensor(1)
    return Gradients(grads={"w": scalar}, total=scalar, weight=scalar, micro_batches=parts, buffers={"mean": scalar})


def test_control_an_average_is_neither_associative_nor_has_an_identity() -> None:
    with pytest.raises(AssertionError):
        check_associative(average, one(1.0), one(2.0), one(4.0))
    with pytest.raises(AssertionError):
        check_identity(average, one(1.0))


def test_control_a_forgotten_weight_does_not_commute() -> None:
    with pytest.raises(AssertionError):
        check_commutative(keeps_the_left_weight, one(1.0), one(2.0))
