"""Power loss, in a model: after every call of a save and a pruning, every state that the disk may be left in."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainfn.store.disk
from tests.crash.faults import Disk, make_state
from tests.crash.power import Contents, Model, lay_out
from trainfn.errors import CheckpointError
from trainfn.store import Retention, load, prune, save, steps

Found = dict[str, Contents]


def first_save(run: Path) -> None:
    save(make_state(1), run)


def later_save(run: Path) -> None:
    save(make_state(2), run)


def save_over_a_damaged_step(run: Path) -> None:
    save(make_state(1), run)


def pruning(run: Path) -> None:
    prune(run, Retention(last=1), newest=1)


def prepared(root: Path, work: Callable[[Path], None]) -> Path:
    """Return the run directory that the work is done in: two made directories deep, or with what it needs in it."""
    run = root / "new" / "run"
    root.mkdir()
    if work is not first_save:
        save(make_state(0), run)
        save(make_state(1), run)
    if work is save_over_a_damaged_step:
        (run / "step_00000001" / "manifest.json").write_bytes(b"{}")
    return run


def recorded(root: Path, work: Callable[[Path], None], left_out: int = 0) -> tuple[Model, Path, Disk, Found]:
    """Do the work; return the disk and what it held before it, and the calls, without the fsync of this number."""
    run = prepared(root, work)
    model, count, before = Model(root), iter(range(1, 1000)), read(run)
    drops = lambda _, call: call == "fsync" and next(count) == left_out  # noqa: E731
    with Disk(deletes=True, drops=drops, chunk=2000).mounted() as disk:
        work(run)
    return model, run, disk, before


def read(run: Path) -> Found:
    return {step.name: {file.name: file.read_bytes() for file in step.iterdir()} for step in steps(run)}


def states(
    root: Path, work: Callable[[Path], None], left_out: int = 0
) -> tuple[list[Found], list[Found], Found, Found]:
    """Return the states that may be found during the work, those after it, and what was there before, and is now."""
    model, run, disk, before = recorded(root, work, left_out)
    during = visible(model, run)
    for (call, path), detail in zip(disk.events, disk.details, strict=True):
        model.happens(call, path, detail)
        during += visible(model, run)
    return during, visible(model, run), before, read(run)


def visible(model: Model, run: Path) -> list[Found]:
    """Each state once, of what a reader looks at: step directories."""
    unique = {}
    for found in model.cuts(run):
        shown = {name: files for name, files in found.items() if name.startswith("step_")}
        unique[repr(sorted((name, sorted(files.items())) for name, files in shown.items()))] = shown
    return list(unique.values())


def torn(during: list[Found], after: list[Found], before: Found, now: Found) -> list[str]:
    """Return what is wrong: half a step in sight, an old one that is lost, a new one that is not there."""
    flaws = []
    for found in during:
        flaws += [f"{name} is torn" for name, files in found.items() if files not in (before.get(name), now.get(name))]
        flaws += [
            f"{name} is lost" for name in before.keys() & now.keys() if before[name] == now[name] != found.get(name)
        ]
    return flaws + [
        f"{name} is not there, though done" for found in after for name in now if now[name] != found.get(name)
    ]


WORKS = [first_save, later_save, save_over_a_damaged_step, pruning]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_no_power_cut_tears_a_step_or_loses_one(tmp_path: Path, work: Callable[[Path], None]) -> None:
    during, after, before, now = states(tmp_path / "home", work)
    assert torn(during, after, before, now) == []
    assert len(during) > 5
    unique = {repr(found): found for found in during}
    for number, found in enumerate(unique.values()):
        run = tmp_path / str(number)
        lay_out(run, found)
        if not found:
            with pytest.raises(CheckpointError, match="no checkpoint"):
                load(run, make_state())
            continue
        with warnings.catch_warnings():
            if work is save_over_a_damaged_step:
                warnings.simplefilter("ignore")
            state = load(run, make_state())
        assert all(bool((param == state.cursor).all()) for param in state.params.values())


@pytest.mark.parametrize(
    ("work", "fsyncs"), list(zip(WORKS, [6, 4, 4, 1], strict=True)), ids=[work.__name__ for work in WORKS]
)
def test_control_any_one_fsync_left_out_is_seen(tmp_path: Path, work: Callable[[Path], None], fsyncs: int) -> None:
    _, _, disk, _ = recorded(tmp_path / "whole", work)
    assert [call for call, _ in disk.events].count("fsync") == fsyncs
    for left_out in range(1, fsyncs + 1):
        assert torn(*states(tmp_path / str(left_out), work, left_out)), f"fsync number {left_out} was left out"


@pytest.mark.parametrize("how", ["left out", "copied in place"])
@pytest.mark.parametrize(
    ("work", "renames"), list(zip(WORKS, [1, 1, 2, 1], strict=True)), ids=[work.__name__ for work in WORKS]
)
def test_control_any_one_rename_that_is_none_is_seen(
    tmp_path: Path, work: Callable[[Path], None], renames: int, how: str
) -> None:
    _, whole, disk, _ = recorded(tmp_path / "whole", work)
    assert [call for call, _ in disk.events].count("rename") == renames
    for number in range(renames + 1):  # 0: each of them is a rename, and nothing is seen
        run = prepared(tmp_path / str(number), work)
        model, before, count, during = Model(tmp_path / str(number)), read(run), iter(range(1, 9)), []
        with pytest.MonkeyPatch.context() as patch, Disk(deletes=True, chunk=2000).mounted() as disk:
            rename = os.rename

            def other(old: Path, new: Path, number: int = number, rename: Any = rename, count: Any = count) -> None:
                if next(count) != number:
                    rename(old, new)
                elif how == "copied in place":
                    copy(old, new)

            patch.setattr(os, "rename", other)
            try:
                work(run)
            except CheckpointError:
                continue  # what it has left undone stops what comes after it
        for (call, path), detail in zip(disk.events, disk.details, strict=True):
            model.happens(call, path, detail)
            during += visible(model, run)
        now = read(whole)
        gone = [name for name in before if name not in now and any(name in found for found in visible(model, run))]
        found = torn(during, visible(model, run), before, same(now, read(run))) + gone
        assert bool(found) == bool(number), f"rename number {number} was {how}: {found}"


def same(expected: Found, found: Found) -> Found:
    """What was to be there, with the bytes that this run has written for it, if it has: a manifest says when it was."""
    return {name: found.get(name, files) for name, files in expected.items()}


def copy(old: Path, new: Path) -> None:
    """What a rename must not be: the files under the other name, one after another."""
    os.mkdir(new)
    for name in sorted(os.listdir(old)):
        data = (old / name).read_bytes()
        file = os.open(new / name, os.O_WRONLY | os.O_CREAT)
        while data:
            data = data[os.write(file, data) :]
        os.close(file)
    shutil.rmtree(old)


def test_control_a_pruning_that_deletes_in_place_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainfn.store.disk, "remove", shutil.rmtree)
    assert any("torn" in flaw for flaw in torn(*states(tmp_path / "home", pruning)))


def test_control_a_save_that_renames_first_is_seen(tmp_path: Path) -> None:
    """The same calls in another order: the rename before what it makes visible is on the disk."""
    model, run, disk, _ = recorded(tmp_path / "disk", later_save)
    calls = [(call, path, detail) for (call, path), detail in zip(disk.events, disk.details, strict=True)]
    at = next(index for index, (call, _, _) in enumerate(calls) if call == "rename")
    hidden, target = calls[at][2], calls[at][1]
    early = [
        calls[0],
        calls[at],
        *((c, target / p.name if p.parent == hidden else p, d) for c, p, d in calls[1:at] if p != hidden),
    ]
    during = []
    for call, path, detail in early:
        model.happens(call, path, detail)
        during += visible(model, run)
    assert any("torn" in flaw for flaw in torn(during, [], {}, read(run)))
