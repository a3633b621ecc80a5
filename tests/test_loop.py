"""What goes on around the steps of a run: batches on their way, numbers on theirs, garbage, and a setting of a GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import trainfn
from trainfn.data import Loader, prefetched
from trainfn.engine import collecting_at_rows
from trainfn.engine.memory import is_frozen
from trainfn.errors import CompileError, ConfigError, DataError
from trainfn.reports import fetched, taken_apart
from trainfn.tree import digest

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def train(**settings: Any) -> trainfn.FitResult:
    options = {"loss": "classification", "batch_size": 4, "device": "cpu", "progress": False, "max_steps": 12}
    torch.manual_seed(0)
    return trainfn.fit(nn.Linear(4, 2), (X, Y), **(options | settings))


# --- batches ----------------------------------------------------------------------------------------------------------


class Lane:
    """Notes what happens to a batch, in order."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def send(self, batch: Any) -> tuple[Any, int]:
        self.notes.append("sent")
        return batch, len(self.notes)

    def receive(self, batch: Any, arrival: int) -> Any:
        assert self.notes[arrival - 1] == "sent"
        self.notes.append("received")
        return batch


def test_prefetched_batches_are_the_batches_and_each_waits_for_its_own_copy() -> None:
    loader, notes = Loader((X, Y), batch_size=5, seed=1), list[str]()
    found = []
    for batch in prefetched(loader.batches(3, 9), Lane(notes)):
        notes.append("step")
        found.append(batch)
    assert digest(found) == digest(list(loader.batches(3, 9)))
    assert notes == ["sent", "received", "step"] * 6


def test_a_batch_is_fetched_after_the_step_before_it_was_launched() -> None:
    notes: list[str] = []

    def numbers() -> Iterator[Any]:
        for number in range(3):
            notes.append(f"fetch {number}")
            yield number

    for number in prefetched(numbers(), Lane([])):  # type: ignore[arg-type]
        notes.append(f"step {number}")
    assert notes == ["fetch 0", "step 0", "fetch 1", "step 1", "fetch 2", "step 2"]


def test_closing_it_closes_the_batches_and_errors_pass() -> None:
    class Bad(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            if index == 5:
                raise KeyError("five")
            return torch.ones(2)

    batches = Loader(Bad(), batch_size=2, shuffle=False).batches(0, 4)
    ready = prefetched(batches, Lane([]))
    next(ready)
    next(ready)
    with pytest.raises(DataError, match="batch 2"):
        next(ready)
    other = Loader(X, batch_size=2).batches(0, 9)
    ready = prefetched(other, Lane([]))
    next(ready)
    ready.close()
    assert next(other, None) is None


def test_on_a_cpu_no_batch_is_prefetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    def refuse(*_: Any) -> None:
        raise AssertionError("not on a CPU")

    monkeypatch.setattr(sys.modules["trainfn.loop"], "prefetched", refuse)
    train(max_steps=2)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_in_one_row_are_the_numbers() -> None:
    values = [torch.tensor(2), torch.tensor([1.5, float("inf")]), torch.tensor(0.25, dtype=torch.float64)]
    row = torch.cat([value.reshape(-1).double() for value in values])
    assert taken_apart(row, values) == fetched(values) == [2, [1.5, float("inf")], 0.25]
    assert taken_apart(row.roll(1), values) != fetched(values)  # control: another order


# --- garbage ----------------------------------------------------------------------------------------------------------


def settings_of_collector() -> tuple[bool, tuple[int, ...], bool]:
    return gc.isenabled(), gc.get_threshold(), is_frozen()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs set the collector from their first row on, however short they are."""
    import sys

    monkeypatch.setattr(sys.modules["trainfn.loop"], "collecting_at_rows", lambda: collecting_at_rows(after=0))


@pytest.mark.usefixtures("at_once")
def test_in_a_run_the_collector_is_set_and_afterwards_as_it_was() -> None:
    before, inside = settings_of_collector(), []
    train(log_every=2, observers=[lambda state: inside.append(settings_of_collector())])
    assert inside[0] == before
    assert inside[-1][0]
    assert inside[-1][1][:2] == before[1][:2]
    assert inside[-1][1][2] > 10**6
    assert inside[-1][2]
    assert settings_of_collector() == before


@pytest.mark.usefixtures("at_once")
def test_after_an_error_it_is_as_it_was() -> None:
    def fail(state: trainfn.TrainState) -> None:
        if state.cursor == 9:
            assert is_frozen()
            raise KeyError("mine")

    before = settings_of_collector()
    with pytest.raises(KeyError, match="mine"):
        train(log_every=2, observers=[fail])
    assert settings_of_collector() == before


@pytest.mark.parametrize("mine", ["off", "frozen"])
def test_a_collector_that_someone_has_set_is_left_alone(mine: str) -> None:
    gc.disable() if mine == "off" else gc.freeze()
    try:
        *before, frozen = settings_of_collector()
        with collecting_at_rows(after=0) as collect:
            collect()
            *inside, frozen_inside = settings_of_collector()
        *after, frozen_after = settings_of_collector()
        assert inside == after == before
        # Frozen objects may die meanwhile; to freeze again would add thousands, to unfreeze leaves none.
        assert frozen >= frozen_inside >= frozen_after >= frozen - 100
    finally:
        gc.enable()
        gc.unfreeze()


class Node:
    other: Any = None


def alive_after(turns: int, collect: Any) -> int:
    """Make cycles that live long enough to be old; return how many are still there."""
    made: list[Any] = []
    held: list[Node] = []
    for _ in range(turns):
        one, two = Node(), Node()
        one.other, two.other = two, one
        made.append(weakref.ref(one))
        held = [one, *held[:2_000]]
        del one, two
        if len(made) % 50 == 0:
            collect()
    held.clear()
    return sum(ref() is not None for ref in made)


def test_cycles_that_grow_old_are_collected_at_rows() -> None:
    with collecting_at_rows(after=0) as collect:
        collect()
        kept = alive_after(30_000, collect)
    with collecting_at_rows(after=0) as collect:
        collect()
        control = alive_after(30_000, lambda: None)  # nobody asks: what has grown old stays
    assert kept < 10_000 < control


def test_a_short_run_does_not_pay_for_a_collection() -> None:
    frozen = []
    train(log_every=1, observers=[lambda state: frozen.append(is_frozen())])
    assert set(frozen) == {False}


# --- the setting ------------------------------------------------------------------------------------------------------


def test_a_cuda_graph_that_is_asked_for_is_refused_without_a_gpu() -> None:
    with pytest.raises(CompileError, match="the state is on cpu"):
        train(cuda_graph=True)
    with pytest.raises(ConfigError, match="cuda_graph='yes'"):
        train(cuda_graph="yes")
    assert digest(train(cuda_graph=False).state) == digest(train().state)
