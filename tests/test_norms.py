"""Norms: of all numbers together, finite exactly when they are, and of any size as in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfn.norms import norm, row_norms


@settings(max_examples=40)
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), max_size=5), min_size=1, max_size=4))
def test_the_norm_is_that_of_all_numbers_together(rows: list[list[float]]) -> None:
    tree = {str(index): torch.tensor(row) for index, row in enumerate(rows)}
    assert float(norm(tree)) == pytest.approx(math.hypot(*[number for row in rows for number in row]), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_the_norm_is_finite_exactly_when_every_number_is(dtype: torch.dtype, number: float) -> None:
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    if dtype == torch.float64:
        largest, smallest = 1e150, 1e-150
    tree = [torch.full((4,), largest, dtype=dtype), torch.full((4,), smallest, dtype=dtype), torch.ones(0)]
    assert norm(tree).dtype == torch.float64
    assert norm(tree).isfinite()
    assert norm(tree[1:]) > 0
    tree[1][2] = number
    assert not norm(tree).isfinite()
    assert float(norm({})) == 0.0


MAGNITUDES = (1e-45, 1e-38, 1e-30, 1e-15, 1.0, 1e15, 1e30, 1e38)


@pytest.mark.parametrize("magnitude", [*MAGNITUDES, None])
@pytest.mark.parametrize("length", [2**18, 2**18 + 1_025])
def test_the_norm_of_many_numbers_of_any_size_is_that_in_float64(magnitude: float | None, length: int) -> None:
    """Their squares are summed in float32; None: sizes of all kinds side by side."""
    own = torch.Generator().manual_seed(length)
    sizes = torch.tensor(MAGNITUDES)[torch.randint(0, len(MAGNITUDES), (length,), generator=own)]
    values = torch.rand(length, generator=own) * (sizes if magnitude is None else magnitude)
    right = float(values.double().square().sum().sqrt())
    assert float(norm(values)) == pytest.approx(right, rel=1e-6)
    rows = values[: 2**18].view(16, -1)
    torch.testing.assert_close(row_norms(rows), rows.double().square().sum(1).sqrt(), rtol=1e-6, atol=0)
    for bad in (math.nan, math.inf):
        values[-1] = bad
        assert not norm(values).isfinite()


def test_control_float32_alone_loses_small_numbers_and_calls_large_ones_infinite() -> None:
    for size, wrong in ((1e-30, 0.0), (1e30, math.inf)):
        values = torch.full((2**18,), size)
        assert float(torch.linalg.vector_norm(values)) == wrong
        assert float(norm(values)) == pytest.approx(512.0 * size, rel=1e-6)


def test_the_norms_of_many_numbers_are_mapped_and_differentiated() -> None:
    values = torch.randn(2, 2**18 + 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.func.vmap(norm)(values), values.double().norm(dim=1), rtol=1e-6, atol=0)
    rows = values[:, : 2**18].view(2, 256, 1024)
    torch.testing.assert_close(torch.func.vmap(row_norms)(rows), rows.double().norm(dim=2), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.func.grad(norm)(values[0]), values[0] / values[0].norm(), rtol=1e-4, atol=0)


def test_the_norm_of_many_zeros_is_zero() -> None:
    assert float(norm(torch.zeros(2**18))) == 0.0
