"""How a batch is read and divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainfn.batch import TARGET_NAMES, inputs, micro_batches, target
from trainfn.errors import DataError
from trainfn.tree import batch_length, digest


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"a": 1, "b": 2, "labels": 3}, ((), {"a": 1, "b": 2})),
        ({"a": 1, "labels": 3, "y": 4}, ((), {"a": 1})),
        ((1, 2, 3), ((1, 2), {})),
        ([1, 2], ((1,), {})),
        ((1,), ((1,), {})),
        (1, ((1,), {})),
        ({}, ((), {})),
    ],
)
def test_inputs_are_what_is_no_target(batch: Any, found: Any) -> None:
    assert inputs(batch) == found


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_each_name_of_a_target_is_known(name: str) -> None:
    assert target({"x": 1, name: 7}) == 7


def test_the_last_of_a_tuple_is_the_target() -> None:
    assert target((1, 2, 7)) == 7
    assert target([1, 7]) == 7


@pytest.mark.parametrize("batch", [{"x": torch.ones(1)}, (torch.ones(1),), torch.ones(1), {}, ()])
def test_a_batch_without_a_target_is_refused(batch: Any) -> None:
    with pytest.raises(DataError, match="no target") as caught:
        target(batch)
    assert "labels" in str(caught.value.expected)


def test_two_targets_are_refused_and_named() -> None:
    with pytest.raises(DataError, match="more than one target") as caught:
        target({"x": torch.ones(1), "y": torch.ones(1), "labels": torch.ones(1)})
    assert "labels, y" in str(caught.value.got)


@given(st.integers(1, 40), st.integers(1, 50))
def test_micro_batches_are_the_batch_again_in_order_as_views(length: int, count: int) -> None:
    batch = {
        "x": torch.arange(length),
        "pair": (torch.arange(2 * length).reshape(length, 2), None),
        "scale": torch.ones(()),
    }
    parts = micro_batches(batch, count)
    assert 1 <= len(parts) <= min(count, length)
    assert digest(torch.cat([part["x"] for part in parts])) == digest(batch["x"])
    assert digest(torch.cat([part["pair"][0] for part in parts])) == digest(batch["pair"][0])
    lengths = [batch_length(part) for part in parts]
    assert set(lengths[:-1]) <= {max(lengths)}
    assert 1 <= lengths[-1] <= max(lengths)
    # No more memory at once than is asked for: the longest part is as short as `count` parts can make it.
    assert max(lengths) == min(size for size in range(1, length + 1) if size * count >= length)
    assert all(part["scale"] is batch["scale"] and part["pair"][1] is None for part in parts)
    assert {part["x"].untyped_storage().data_ptr() for part in parts} == {batch["x"].untyped_storage().data_ptr()}


def test_one_micro_batch_is_the_batch_itself_whatever_it_is() -> None:
    odd = {"text": "no tensors here"}
    assert micro_batches(odd, 1)[0] is odd
    with pytest.raises(DataError):
        micro_batches(odd, 2)
    with pytest.raises(DataError, match="disagree"):
        micro_batches((torch.ones(2), torch.ones(3)), 2)


def test_an_empty_batch_is_one_empty_micro_batch() -> None:
    assert [part.shape for part in micro_batches(torch.ones(0, 3), 4)] == [(0, 3)]
