"""The order of the data: a permutation, a pure function of (seed, epoch), even, and the same for ever."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainfn.data import order
from trainfn.data.order import MAX_LENGTH
from trainfn.errors import ConfigError

seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 2**63 - 1)


@given(st.integers(0, 700), seeds, epochs)
def test_it_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    found = order(torch.arange(length), length, seed=seed, epoch=epoch)
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == list(range(length))


@given(st.integers(1, MAX_LENGTH), seeds, epochs, st.data())
def test_a_position_means_the_same_alone_and_in_any_block(
    length: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    positions = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=8, unique=True)))
    kept = positions.clone()
    found = order(positions, length, seed=seed, epoch=epoch)
    assert torch.equal(positions, kept)
    assert 0 <= int(found.min()) <= int(found.max()) < length
    assert len(set(found.tolist())) == len(found)
    assert order(int(positions[-1]), length, seed=seed, epoch=epoch) == int(found[-1])
    assert torch.equal(order(positions.flip(0).reshape(1, -1), length, seed=seed, epoch=epoch), found.flip(0)[None])


@given(st.integers(1, 90), seeds, st.lists(epochs, min_size=1, max_size=4))
def test_a_tensor_of_epochs_is_each_epoch_in_turn(length: int, seed: int, several: list[int]) -> None:
    together = order(torch.arange(length), length, seed=seed, epoch=torch.tensor(several)[:, None])
    for row, epoch in zip(together, several, strict=True):
        assert torch.equal(row, order(torch.arange(length), length, seed=seed, epoch=epoch))


@pytest.mark.parametrize(
    ("length", "seed", "epoch", "expected"),
    [
        (1, 0, 0, [0]),
        (2, 5, 1, [0, 1]),
        (3, 0, 0, [1, 2, 0]),
        (10, 0, 0, [7, 1, 6, 4, 9, 8, 5, 2]),
        (10, 0, 1, [2, 7, 1, 9, 5, 0, 8, 6]),
        (10, 1, 0, [0, 4, 3, 8, 1, 2, 9, 6]),
        (1000, 7, 3, [517, 592, 5, 611, 411, 231, 549, 490]),
        (10**6 + 3, 2**63 - 1, 12, [963063, 455575, 731412, 969426, 565807, 59346, 605848, 113083]),
        (2**62, 0, 0, [1007058737197171654, 2136109266521656300, 1082459805817119947, 3677356776396423872]),
    ],
)
def test_the_order_never_changes_between_versions(length: int, seed: int, epoch: int, expected: list[int]) -> None:
    """A run resumes in the middle of an epoch by its number alone: these values may not change, ever."""
    positions = torch.arange(min(len(expected), length))
    assert order(positions, length, seed=seed, epoch=epoch).tolist() == expected


def test_the_number_of_threads_does_not_matter() -> None:
    positions = torch.arange(200_000)  # PyTorch divides elementwise work from 32,768 elements on
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = order(positions, 10**9 + 7, seed=3, epoch=4)
        torch.set_num_threads(2)
        assert torch.equal(order(positions, 10**9 + 7, seed=3, epoch=4), alone)
    finally:
        torch.set_num_threads(threads)


Orders = Callable[[int, int], Tensor]


def ours(length: int, count: int) -> Tensor:
    return order(torch.arange(length), length, seed=11, epoch=torch.arange(count)[:, None])  # (count, length)


def rotations(length: int, count: int) -> Tensor:
    """A control: every position meets every index equally often, and the order is no shuffle at all."""
    return (torch.arange(length) + torch.arange(count)[:, None]) % length


def identities(length: int, count: int) -> Tensor:
    return torch.arange(length).expand(count, length)


def excess(counts: Tensor) -> float:
    """Chi-square of counts that should be equal, in standard deviations above its mean."""
    expected, freedom = counts.sum() / counts.numel(), counts.numel() - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def worst_single(orders: Orders, length: int, count: int) -> float:
    """Over all positions: how unevenly the indices fall on one of them."""
    return max(excess(torch.bincount(at, minlength=length)) for at in orders(length, count).t())


def worst_pair(orders: Orders, length: int, count: int) -> float:
    """Over several pairs of positions: how unevenly pairs of different indices fall on them."""
    found, different = orders(length, count), ~torch.eye(length, dtype=torch.bool)
    pairs = [(0, 1), (1, 2), (0, length // 2), (0, length - 1)]
    joint = [torch.bincount(found[:, a] * length + found[:, b], minlength=length**2) for a, b in pairs]
    return max(excess(counts.view(length, length)[different]) for counts in joint)


@pytest.mark.parametrize("length", [2, 3, 5, 10, 16, 33])
def test_every_position_is_as_likely_to_get_every_index(length: int) -> None:
    assert worst_single(ours, length, 6000) < 5
    assert worst_single(identities, length, 6000) > 50


@pytest.mark.parametrize("length", [3, 7, 16, 33])
def test_every_pair_of_positions_is_as_likely_to_get_every_pair(length: int) -> None:
    assert worst_pair(ours, length, 12_000) < 5
    assert worst_pair(rotations, length, 12_000) > 50


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's r in standard deviations of chance."""
    return float(torch.corrcoef(torch.stack([one, other]).double())[0, 1]) * math.sqrt(one.numel())


@pytest.mark.parametrize("length", [1000, 10**6 + 3, 10**12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_neighbours_and_neighbouring_seeds_and_epochs_are_not_correlated(length: int, seed: int) -> None:
    positions = torch.arange(min(length, 100_000))
    found = order(positions, length, seed=seed)
    for lag in (1, 2, 31):
        assert abs(correlation(found[lag:], found[:-lag])) < 5
    assert abs(correlation(found, positions)) < 5
    assert abs(correlation(found, order(positions, length, seed=seed, epoch=1))) < 5
    assert abs(correlation(found, order(positions, length, seed=seed + 1))) < 5
    assert correlation(positions[1:], positions[:-1]) > 25


def test_two_epochs_agree_in_one_place_on_average() -> None:
    """As two random permutations do; a permutation agrees with itself everywhere."""
    found = ours(1000, 300)
    agreeing = (found[1:] == found[:-1]).sum(1).double()
    assert 0.7 < float(agreeing.mean()) < 1.3
    assert float(agreeing.max()) < 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": torch.tensor([0, 5])},
        {"positions": torch.tensor([-1])},
        {"positions": 5},
        {"positions": 0, "length": 0},
        {"length": MAX_LENGTH + 1},
        {"length": 2.0},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": True},
        {"epoch": -1},
        {"epoch": torch.tensor([0, -1])},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    arguments: dict[str, object] = {"positions": torch.arange(2), "length": 5, "seed": 0, "epoch": 0} | wrong
    with pytest.raises(ConfigError, match="out of range"):
        order(**arguments)  # type: ignore[call-overload]
