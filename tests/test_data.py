"""The data room: batches by number, the forms of data, what is refused, and text as bytes."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import random
from collections import UserDict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import trainfn.data
from trainfn.data import ByteText, Loader
from trainfn.errors import ConfigError, DataError
from trainfn.tree import digest

sizes = st.integers(1, 40)
workers_may_fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Rows:
    """Map-style, deterministic."""

    def __init__(self, count: int = 10) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.tensor([index, index]), "y": index}


class Augmented(Rows):
    """Draws from all three global generators."""

    def __getitem__(self, index: int) -> Any:
        drawn = torch.rand(2), torch.tensor(random.random()), torch.tensor(np.random.rand())
        return {"x": torch.tensor(index), "drawn": torch.cat([part.reshape(-1).double() for part in drawn])}


class Failing(Rows):
    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise KeyError("no such row")
        return super().__getitem__(index)


class Ragged(Rows):
    def __getitem__(self, index: int) -> Any:
        return torch.ones(index + 1)


class Batched(Rows):
    """Answers for a whole batch: with a finished batch, or with a list of items."""

    def __init__(self, count: int = 10, *, finished: bool = True) -> None:
        super().__init__(count)
        self.finished = finished

    def __getitems__(self, indices: list[int]) -> Any:
        x = torch.tensor(indices)
        return (x, x * 2) if self.finished else [{"x": one} for one in x]


class Process(Rows):
    def __getitem__(self, index: int) -> Any:
        return os.getpid()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def generators() -> str:
    """The bits of the global generators' states."""
    name, keys, *rest = np.random.get_state()
    return digest(
        [torch.get_rng_state(), repr(random.getstate()), str(name), torch.from_numpy(keys.copy()), repr(rest)]
    )


def digests(loader: Loader, start: int, stop: int) -> list[str]:
    return [digest(batch) for batch in loader.batches(start, stop)]


# --- positions


@given(examples=sizes, batch_size=sizes, shuffle=st.booleans(), drop=st.booleans(), start=st.integers(0, 100))
def test_batches_from_anywhere_are_the_tail_of_all_batches(
    examples: int, batch_size: int, shuffle: bool, drop: bool, start: int
) -> None:
    drop = drop and examples >= batch_size
    settings: dict[str, Any] = {"batch_size": batch_size, "seed": 5, "shuffle": shuffle, "drop_last": drop}
    data = torch.arange(examples)
    whole = [batch.tolist() for batch in Loader(data, **settings).batches(0, start + 5)]
    other = Loader(data, **settings)
    assert [batch.tolist() for batch in other.batches(start, start + 5)] == whole[start:]
    assert [other.indices(number).tolist() for number in reversed(range(start + 5))] == whole[::-1]
    assert other.batch(start).tolist() == whole[start]


@given(examples=sizes, batch_size=sizes, epoch=st.integers(0, 50), seed=st.integers(0, 2**63 - 1))
def test_an_epoch_visits_every_example_once_and_ends_in_a_short_batch(
    examples: int, batch_size: int, epoch: int, seed: int
) -> None:
    loader = Loader(torch.arange(examples), batch_size=batch_size, seed=seed)
    first = epoch * loader.batches_per_epoch
    batches = list(loader.batches(first, first + loader.batches_per_epoch))
    assert sorted(torch.cat(batches).tolist()) == list(range(examples))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert len(batches[-1]) == (examples % batch_size or min(batch_size, examples))
    assert {loader.epoch(number) for number in range(first, first + loader.batches_per_epoch)} == {epoch}
    assert loader.epoch(first + loader.batches_per_epoch) == epoch + 1


def test_drop_last_leaves_out_the_short_batch_only() -> None:
    loader = Loader(torch.arange(11), batch_size=4, drop_last=True)
    batches = list(loader.batches(0, 2))
    assert loader.batches_per_epoch == 2
    assert [len(batch) for batch in batches] == [4, 4]
    assert len(set(torch.cat(batches).tolist())) == 8


def test_epochs_and_seeds_differ_and_the_unshuffled_order_is_the_data_sets_own() -> None:
    data = torch.arange(50)
    loader = Loader(data, batch_size=50)
    first, second = loader.batches(0, 2)
    assert not torch.equal(first, second)
    assert not torch.equal(first, Loader(data, batch_size=50, seed=1).batch(0))
    plain = Loader(data, batch_size=20, shuffle=False)
    assert torch.equal(torch.cat(list(plain.batches(0, 6))), torch.cat([data, data]))


def test_batches_go_on_without_end_and_a_batch_far_away_costs_no_replay() -> None:
    loader = Loader(torch.arange(10), batch_size=4)
    assert len(list(islice(loader.batches(10**15), 7))) == 7
    assert loader.epoch(10**15) == 10**15 // 3
    assert list(loader.batches(3, 3)) == []


def test_a_batch_size_beyond_the_data_is_the_whole_data_set() -> None:
    assert len(Loader(torch.arange(10), batch_size=10**12).batch(0)) == 10


# --- forms


def test_batches_keep_the_form_of_the_data() -> None:
    x, y = torch.randn(6, 3), torch.arange(6)
    chosen = Loader(y, batch_size=4).indices(0)
    assert torch.equal(next(Loader(x, batch_size=4).batches()), x[chosen])
    for data in ((x, y), TensorDataset(x, y), [(x[i], int(y[i])) for i in range(6)]):
        batch = next(Loader(data, batch_size=4).batches())
        assert isinstance(batch, tuple)
        assert digest(batch) == digest((x[chosen], y[chosen]))
    for data in ({"x": x, "y": y}, UserDict({"x": x, "y": y}), [{"x": x[i], "y": int(y[i])} for i in range(6)]):
        batch = next(Loader(data, batch_size=4).batches())
        assert type(batch) is dict
        assert digest(batch) == digest({"x": x[chosen], "y": y[chosen]})
    nested = next(Loader(({"a": x, "b": y}, y), batch_size=4).batches())
    assert digest(nested) == digest(({"a": x[chosen], "b": y[chosen]}, y[chosen]))


def test_batched_fetch_is_used_and_a_finished_batch_is_taken_as_it_is() -> None:
    finished = Loader(Batched(), batch_size=4)
    chosen = finished.indices(0)
    assert digest(finished.batch(0)) == digest((chosen, chosen * 2))
    assert digest(Loader(Batched(finished=False), batch_size=4).batch(0)) == digest({"x": chosen})
    with pytest.raises(ConfigError, match="nothing to collate"):
        Loader(Batched(), batch_size=4, collate=list).batch(0)


def test_a_collate_function_makes_the_batch_of_items() -> None:
    loader = Loader(Ragged(), batch_size=4, collate=lambda items: {"sum": torch.stack([item.sum() for item in items])})
    assert torch.equal(loader.batch(0)["sum"], loader.indices(0) + 1.0)
    mapping = Loader(
        Rows(), batch_size=4, collate=lambda items: UserDict(y=torch.tensor([item["y"] for item in items]))
    )
    assert type(mapping.batch(0)) is dict


def test_a_batch_shares_no_memory_with_the_data() -> None:
    data = torch.ones(10, requires_grad=True)
    for shuffle in (True, False):
        batch = Loader(data, batch_size=5, shuffle=shuffle).batch(0)
        assert not batch.requires_grad
        batch.zero_()
    loader = Loader(data, batch_size=5)
    expected = loader.indices(0).tolist()
    loader.indices(0).zero_()
    assert loader.indices(0).tolist() == expected
    assert bool((data == 1).all())


# --- randomness and workers


def test_the_global_generators_are_untouched_even_by_a_data_set_that_draws() -> None:
    np.random.standard_normal()  # leaves a second number in numpy's pocket, which is state too
    before = generators()
    for data in (torch.arange(10), Rows(), Augmented(), ByteText("to be or not to be", length=4)):
        loader = Loader(data, batch_size=4)
        loader.fingerprint()
        for _ in loader.batches(0, 5):
            assert generators() == before
    with pytest.raises(DataError):
        list(Loader(Failing(), batch_size=4).batches(0, 3))
    assert generators() == before
    Augmented()[0]
    assert generators() != before


def test_random_items_are_a_function_of_seed_and_batch_number() -> None:
    loader = Loader(Augmented(), batch_size=10, shuffle=False)
    first = digests(loader, 0, 4)
    assert len(set(first)) == 4
    torch.rand(3), random.random(), np.random.rand()
    assert digests(loader, 2, 4) == first[2:]
    assert digests(Loader(Augmented(), batch_size=10, shuffle=False, seed=1), 0, 4) != first


def test_a_data_set_that_promises_to_draw_nothing_is_not_guarded() -> None:
    class Promising(Augmented):
        draws = False

    before = generators()
    Loader(Promising(), batch_size=4).batch(0)
    assert generators() != before


@workers_may_fork
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches(workers: int) -> None:
    before = generators()
    for data in ((torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10)), Augmented()):
        assert digests(Loader(data, batch_size=4, workers=workers), 1, 8) == digests(Loader(data, batch_size=4), 1, 8)
    assert generators() == before


@workers_may_fork
def test_workers_live_through_epochs_and_end_with_the_iterator() -> None:
    batches = Loader(Process(6), batch_size=2, workers=2).batches()
    seen = {int(pid) for batch in islice(batches, 12) for pid in batch}  # four epochs
    assert len(seen) == 2
    assert os.getpid() not in seen
    assert seen <= {child.pid for child in multiprocessing.active_children()}
    batches.close()
    assert not seen & {child.pid for child in multiprocessing.active_children()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_keep_their_form(workers: int) -> None:
    loader = Loader((torch.randn(10, 3), torch.arange(10)), batch_size=4, workers=workers, pin=True)
    batch = next(loader.batches())
    assert isinstance(batch, tuple)
    assert all(leaf.is_pinned() for leaf in batch)
    assert digest(batch) == digest(loader.batch(0))


def test_a_loader_can_be_sent_to_a_fresh_process() -> None:
    loader = Loader(Rows(), batch_size=4)
    assert digests(pickle.loads(pickle.dumps(loader)), 0, 3) == digests(loader, 0, 3)


# --- what is refused


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(0, 3), "empty"),
        ([], "empty"),
        (Rows(0), "empty"),
        (torch.tensor(1.0), "0-d"),
        ((torch.ones(3), torch.ones(4)), "0: 3, 1: 4"),
        ({"x": torch.ones(3), "y": torch.ones(4)}, "x: 3, y: 4"),
        ({"x": torch.ones(3), "y": [1, 2, 3]}, "y.0: int"),
        ({"train": Batched(), "test": Batched()}, r"data\['train'\]"),
        ((1, 2, 3), "as a list"),
        ((), "no tensor"),
        ({"x": np.ones(3), "y": np.array(["a", "b", "c"])}, "does not hold numbers"),
        ("to be or not to be", "ByteText"),
        (b"to be", "ByteText"),
        (iter(range(3)), "data.Stream"),
        (Stream(), "data.Stream"),
        (DataLoader(Rows()), "loader.dataset"),
        (None, "NoneType"),
        ({1, 2}, "set"),
        (Rows, "map-style"),
    ],
)
def test_data_that_cannot_be_read_is_refused_at_once(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Loader(data, batch_size=2)


def test_settings_out_of_range_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=0, workers=-1, seed=True"):
        Loader(torch.ones(3), batch_size=0, workers=-1, seed=True)
    with pytest.raises(ConfigError, match=r"batch_size=2\.0"):
        Loader(torch.ones(3), batch_size=2.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no batch"):
        Loader(torch.ones(3), batch_size=4, drop_last=True)
    with pytest.raises(ConfigError, match="nothing to collate"):
        Loader(torch.ones(3), batch_size=2, collate=list)
    loader = Loader(torch.ones(3), batch_size=2)
    for ask in (loader.batches, loader.batch, loader.indices, loader.epoch):
        with pytest.raises(ConfigError, match="out of range"):
            ask(-1)


@workers_may_fork
@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_example_is_named_with_its_batch(workers: int) -> None:
    loader = Loader(Failing(), batch_size=4, shuffle=False, workers=workers)
    batches = loader.batches()
    next(batches)
    with pytest.raises(DataError, match="example 7 failed") as caught:
        next(batches)
    assert caught.value.where == "batch 1, examples [4, 5, 6, 7]" + (", in data worker 0" if workers else "")
    assert caught.value.got == "KeyError: 'no such row'"
    assert "no such row" in str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, RuntimeError if workers else KeyError)


@workers_may_fork
@pytest.mark.parametrize("workers", [0, 1])
def test_items_that_do_not_stack_ask_for_a_collate_function(workers: int) -> None:
    loader = Loader(Ragged(), batch_size=3, shuffle=False, workers=workers)
    with pytest.raises(DataError, match=r"examples \[0, 1, 2\]") as caught:
        next(loader.batches())
    assert caught.value.hint is not None
    assert "collate=" in caught.value.hint


def test_a_failing_collate_function_and_a_failing_batched_fetch_are_named() -> None:
    def collate(items: list[Any]) -> Any:
        raise OSError("disk")

    class Broken(Rows):
        def __getitems__(self, indices: list[int]) -> Any:
            raise OSError("disk")

    for loader in (Loader(Rows(), batch_size=3, collate=collate), Loader(Broken(), batch_size=3)):
        with pytest.raises(DataError, match=r"batch 0, examples \[.*\n.*OSError: disk") as caught:
            loader.batch(0)
        assert isinstance(caught.value.__cause__, OSError)


# --- fingerprint


def test_the_fingerprint_is_of_the_data_not_of_the_settings() -> None:
    x = torch.randn(9, 4)
    same = Loader(x, batch_size=2).fingerprint()
    assert same == Loader(x.clone(), batch_size=3, seed=4, shuffle=False, drop_last=True).fingerprint()
    assert len(same) == 16
    others = [x[:8], x.double(), (x,), {"x": x}, {"y": x}, list(x)]
    for changed in (0, 4, 8):
        other = x.clone()
        other[changed, 3] += 1
        others.append(other)
    prints = [Loader(other, batch_size=2).fingerprint() for other in others]
    assert len({same, *prints}) == len(others) + 1


def test_the_fingerprint_of_items_is_stable() -> None:
    class Odd(Rows):
        def __getitem__(self, index: int) -> Any:
            return {"array": np.full(3, index), "name": str(index), "object": object(), "none": None}

    for data in (Rows, Augmented, Odd, Ragged):
        assert Loader(data(), batch_size=2).fingerprint() == Loader(data(), batch_size=3).fingerprint()
        assert Loader(data(), batch_size=2).fingerprint() != Loader(data(11), batch_size=2).fingerprint()


# --- text


@given(st.text(), st.integers(2, 9), st.integers(1, 9) | st.none())
def test_windows_of_a_text(text: str, length: int, stride: int | None) -> None:
    raw = text.encode()
    if len(raw) < length:
        with pytest.raises(DataError, match="shorter than one window"):
            ByteText(text, length=length, stride=stride)
        return
    data = ByteText(text, length=length, stride=stride)
    expected = [list(raw[at : at + length]) for at in range(0, len(raw) - length + 1, stride or length)]
    assert [item["input_ids"].tolist() for item in data] == expected  # type: ignore[attr-defined]
    assert data.__getitems__(list(range(len(data))))["input_ids"].tolist() == expected
    assert data[-1]["input_ids"].dtype == torch.int64
    assert ByteText.decode(list(raw)) == text
    assert ByteText.decode(torch.tensor(list(raw))) == text


def test_text_goes_through_the_loader_and_through_a_split_of_it() -> None:
    data = ByteText(bytes(range(256)), length=16)
    batch = Loader(data, batch_size=16).batch(0)["input_ids"]
    assert sorted(batch.flatten().tolist()) == list(range(256))
    part: Tensor = Loader(Subset(data, [3, 5]), batch_size=2, shuffle=False).batch(0)["input_ids"]  # type: ignore[arg-type]
    assert part[:, 0].tolist() == [48, 80]


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="length"):
        ByteText("abc", length=1)
    with pytest.raises(ConfigError, match="stride"):
        ByteText("abc", length=2, stride=0)
    with pytest.raises(DataError, match="int"):
        ByteText(3, length=2)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not a byte"):
        ByteText.decode([256])


def test_the_room_exports_what_it_says() -> None:
    public = {name for name, value in vars(trainfn.data).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public == set(trainfn.data.__all__)
