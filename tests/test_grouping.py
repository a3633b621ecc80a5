"""Examples of like length in one batch: less padding, the same examples, an order from (seed, epoch) alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from trainfn.data import Loader, order_by_length
from trainfn.errors import CheckpointError, ConfigError, DataError
from trainfn.tree import digest

LENGTHS = torch.randint(1, 40, (230,), generator=torch.Generator().manual_seed(0)).tolist()
TEXTS = [{"input_ids": [1 + index % 7] * length, "labels": index % 3} for index, length in enumerate(LENGTHS)]
workers_may_fork = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def loader(**settings: Any) -> Loader:
    return Loader(TEXTS, **({"batch_size": 8, "seed": 3, "collate": "text", "group_by_length": True} | settings))


def padding(made: Loader, epochs: int = 2) -> int:
    """Padded positions, counted."""
    masks = [batch["attention_mask"] for batch in made.batches(0, epochs * made.batches_per_epoch)]
    return sum(int((mask == 0).sum()) for mask in masks)


def test_there_is_far_less_padding() -> None:
    assert padding(loader()) < padding(loader(group_by_length=False)) / 2


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 2**63 - 1),
)
def test_every_epoch_is_a_permutation(lengths: list[int], batch_size: int, epoch: int, seed: int) -> None:
    found = order_by_length(
        torch.arange(len(lengths)), torch.tensor(lengths), batch_size=batch_size, seed=seed, epoch=epoch
    )
    assert sorted(found.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_order_of_a_loader_is_that_function(drop_last: bool) -> None:
    made = loader(drop_last=drop_last)
    each = made.batches_per_epoch
    used = min(230, 8 * each)
    for epoch in (0, 1, 5):
        whole = order_by_length(torch.arange(used), torch.tensor(LENGTHS), batch_size=8, seed=3, epoch=epoch, used=used)
        found = torch.cat([made.indices(number) for number in range(each * epoch, each * (epoch + 1))])
        assert torch.equal(found, whole), epoch
    assert not torch.equal(made.indices(0), made.indices(each))
    assert made.indices(each - 1).numel() == (8 if drop_last else 230 % 8)


def test_batches_come_in_no_order_of_length() -> None:
    longest = [int(batch["attention_mask"].shape[1]) for batch in loader().batches(0, 7)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@workers_may_fork
def test_workers_make_no_difference() -> None:
    first = [digest(batch) for batch in loader().batches(20, 40)]
    assert all([digest(batch) for batch in loader(workers=n).batches(20, 40)] == first for n in (1, 2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out((self.table(input_ids) * attention_mask[..., None]).sum(1))


def fit(stop: int, run: Path | None, **settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    options = {"loss": "classification", "optimizer": trainfn.optim.adamw(lr=0.01), "batch_size": 4, "accumulate": 2,
               "collate": "text", "group_by_length": True, "device": "cpu", "compile": "eager", "progress": False,
               "resume": "auto" if run else None} | settings  # fmt: skip
    return trainfn.fit(Net(), TEXTS, max_steps=stop, out_dir=run, **options)


def test_two_and_two_are_four(tmp_path: Path) -> None:
    whole = fit(35, None)
    for stop in (10, 29, 35):
        last = fit(stop, tmp_path)
    assert digest(last.state) == digest(whole.state)
    assert digest(fit(35, None, group_by_length=False).state) != digest(whole.state)
    with pytest.raises(CheckpointError, match="group_by_length: True then, False now"):
        fit(40, tmp_path, group_by_length=False)


def test_lengths_may_be_said() -> None:
    class Known(list[Any]):
        lengths = LENGTHS

    made = Loader(Known(range(230)), batch_size=8, seed=3, group_by_length=True)
    assert torch.equal(made.indices(5), loader().indices(5))


@pytest.mark.parametrize(
    ("data", "settings", "kind"),
    [
        (torch.ones(8, 2), {}, ConfigError),
        (TEXTS, {"shuffle": False}, ConfigError),
        ([1, 2, 3], {}, DataError),
        (lambda index: torch.ones(2), {}, ConfigError),
    ],
)
def test_what_cannot_be_grouped(data: Any, settings: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="group_by_length"):
        Loader(data, batch_size=2, group_by_length=True, **settings)
