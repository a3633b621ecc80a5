"""Laws of retention: what is asked for stays, nothing else does, and the newest healthy checkpoint always does."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.crash.faults import hidden, make_state
from trainfn.store import CheckpointWriteError, Entry, Retention, clean, keep, prune, save, steps

SCORES = st.sampled_from([1.0, 2.0, 3.0, 3.0, math.nan, math.inf, -math.inf, None])


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    cursors = draw(st.lists(st.integers(0, 60), unique=True, max_size=10))
    made = []
    for cursor in cursors:
        found = {"loss": draw(SCORES), "val_loss": draw(SCORES)}
        made.append(Entry(cursor=cursor, metrics={name: value for name, value in found.items() if value is not None}))
    return made


policies = st.builds(
    Retention,
    last=st.integers(1, 4),
    best=st.integers(0, 3),
    mode=st.sampled_from(["min", "max"]),
    every=st.none() | st.integers(1, 20),
)


def oracle(found: list[Entry], policy: Retention) -> set[int]:
    """Checkpoint by checkpoint: is there a reason to keep it?"""

    def value(entry: Entry) -> float:
        return entry.metrics.get("val_loss", math.nan) * (1 if policy.mode == "min" else -1)

    def finite(entry: Entry) -> bool:
        return all(math.isfinite(entry.metrics.get(name, 0.0)) for name in ("loss", "val_loss"))

    kept = set()
    for one in found:
        newer = [other for other in found if other.cursor > one.cursor]
        better = [
            other for other in found
            if value(other) < value(one) or (value(other) == value(one) and other.cursor < one.cursor)
        ]  # fmt: skip
        counts = not math.isnan(value(one)) and value(one) != math.inf
        if (
            len(newer) < policy.last
            or (counts and len(better) < policy.best)
            or (policy.every is not None and one.cursor % policy.every == 0)
            or (finite(one) and not any(map(finite, newer)))
        ):
            kept.add(one.cursor)
    return kept


@given(found=entries(), policy=policies)
def test_what_there_is_a_reason_for_is_kept_and_nothing_else(found: list[Entry], policy: Retention) -> None:
    assert keep(found, policy) == oracle(found, policy)
    assert keep(reversed(found), policy) == keep(found, policy)
    assert keep(found, Retention(last=None)) == {entry.cursor for entry in found}


@given(found=entries(), policy=policies)
def test_pruning_as_it_goes_loses_nothing_of_what_is_kept_for_ever(found: list[Entry], policy: Retention) -> None:
    """What is pruned on the way would not have been kept in the end: no decision is regretted."""
    there: list[Entry] = []
    for entry in sorted(found, key=lambda entry: entry.cursor):
        there.append(entry)
        kept = keep(there, policy)
        there = [one for one in there if one.cursor in kept]
    assert {entry.cursor for entry in there} == keep(found, policy)


def test_control_counting_the_last_alone_would_lose_the_healthy_one() -> None:
    found = [Entry(cursor=n, metrics={"val_loss": 1.0 if n == 0 else math.nan}) for n in range(5)]
    assert 0 in keep(found, Retention(last=2, best=0))
    assert 0 not in sorted(entry.cursor for entry in found)[-2:]


def test_a_run_is_pruned_on_the_disk(tmp_path: Path) -> None:
    losses = [5.0, 1.0, 3.0, math.nan, 2.0]
    for cursor, loss in enumerate(losses):
        save(make_state(cursor), tmp_path, metrics={"val_loss": loss})
    gone = prune(tmp_path, Retention(last=1, best=1), newest=4)
    assert [path.name for path in gone] == ["step_00000000", "step_00000002", "step_00000003"]
    assert [path.name for path in steps(tmp_path)] == ["step_00000001", "step_00000004"]
    assert hidden(tmp_path) == []


def test_what_cannot_be_judged_or_comes_later_stays_and_does_not_count(tmp_path: Path) -> None:
    for cursor in range(6):
        save(make_state(cursor), tmp_path)
    (tmp_path / "step_00000001" / "manifest.json").write_bytes(b"{}")
    (tmp_path / "step_00000003" / "state.safetensors").write_bytes(b"")
    gone = prune(tmp_path, Retention(last=2), newest=4)
    assert [path.name for path in gone] == ["step_00000000"]
    assert [path.name[-1] for path in steps(tmp_path)] == ["1", "2", "3", "4", "5"]


def test_what_dead_writers_left_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    save(make_state(1), tmp_path / "run")
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    ours = [".tmp-step_00000002-0123abcd", ".trash-step_00000001-0123abcd", ".tmp-capsule_00000002-0123abcd"]
    for name in ours:
        (run / name).mkdir()
        (run / name / "state.safetensors").write_bytes(b"x")
    (run / ".tmp-history.jsonl-0123abcd").write_bytes(b"x")
    (run / ".trash-step_00000005-0123abcd").symlink_to(outside)
    (outside / "kept").write_bytes(b"x")
    theirs = [".tmp-notes", ".trash", ".tmp-step_00000002-0123abcg", "step_x"]
    for name in theirs:
        (run / name).mkdir()
    assert len(clean(run)) == 5
    assert sorted(os.listdir(run)) == sorted([*theirs, "step_00000001"])
    assert os.listdir(outside) == ["kept"]


@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "chflags"), reason="root may remove anything")
def test_a_step_that_cannot_be_removed_is_whole(tmp_path: Path) -> None:
    for cursor in range(2):
        save(make_state(cursor), tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointWriteError):
            prune(tmp_path, Retention(last=1), newest=1)
    finally:
        tmp_path.chmod(0o700)
    assert len(steps(tmp_path)) == 2
