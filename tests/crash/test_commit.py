"""The commit: system calls in an order that power loss cannot tear, and a disk that fails at every one of them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import threading
from pathlib import Path

import pytest

from tests.crash.faults import Disk, flaws, hidden, make_state
from trainfn import tree
from trainfn.store import (
    CheckpointWriteError,
    History,
    Retention,
    Saver,
    clean,
    cut,
    load,
    prune,
    rows,
    save,
    steps,
    verify,
)


def test_every_byte_and_name_is_on_the_disk_before_the_step_is(tmp_path: Path) -> None:
    with Disk().mounted() as disk:
        target = save(make_state(), tmp_path / "new" / "run")
    assert flaws(disk.events, target) == []
    assert [call for call, _ in disk.events].count("fsync") == 6  # two made directories, two files, building, parent


def test_control_the_same_check_sees_any_one_fsync_left_out(tmp_path: Path) -> None:
    for left_out in range(1, 7):
        fsyncs = iter(range(1, 100))
        disk = Disk(drops=lambda _, call, n=left_out, fsyncs=fsyncs: call == "fsync" and next(fsyncs) == n)
        with disk.mounted():
            target = save(make_state(), tmp_path / f"new{left_out}" / "run")
        assert len(flaws(disk.events, target)) >= 1, f"fsync number {left_out} was left out"


def test_a_step_found_in_place_is_made_durable_before_it_is_returned(tmp_path: Path) -> None:
    target = save(make_state(), tmp_path)
    with Disk().mounted() as disk:
        assert save(make_state(), tmp_path) == target
    assert disk.events == [("fsync", tmp_path)]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("damaged", [False, True], ids=["new step", "over a damaged step"])
@pytest.mark.parametrize("recovers", [True, False], ids=["once", "from then on"])
def test_a_failure_at_any_call_leaves_no_trace(tmp_path: Path, error: int, damaged: bool, recovers: bool) -> None:
    old = save(make_state(1), tmp_path)
    broken = tmp_path / "step_00000002" / "manifest.json"
    if damaged:
        save(make_state(2), tmp_path)
        broken.write_bytes(b"{}")
    before = steps(tmp_path)
    descriptors = len(os.listdir("/proc/self/fd"))
    calls = 11 if damaged else 10  # mkdir; create, write, fsync of two files; fsync; [rename aside]; rename; fsync
    for number in range(1, calls + 1):

        def fails(count: int, call: str, number: int = number) -> int | None:
            # A disk that is full for good still renames: that is how the failed save is taken back.
            now = count == number if recovers or call == "rename" else count >= number
            return error if now else None

        with Disk(fails=fails).mounted(), pytest.raises(CheckpointWriteError) as raised:
            save(make_state(2), tmp_path)
        assert raised.value.errno == error
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert isinstance(raised.value.__cause__, OSError)
        assert re.search(
            rf"{os.strerror(error)}.*\d+ bytes to be written.*\d+ bytes free", str(raised.value), re.DOTALL
        )
        assert hidden(tmp_path) == []
        assert steps(tmp_path) == before
        assert verify(old).cursor == 1
        assert not damaged or broken.read_bytes() == b"{}"
    with Disk().mounted() as disk:
        save(make_state(2), tmp_path)
    assert disk.count == calls
    assert hidden(tmp_path) == []
    assert tree.digest(load(tmp_path, make_state())) == tree.digest(make_state(2))


def test_a_save_after_a_failed_one_works(tmp_path: Path) -> None:
    broken = Disk(fails=lambda count, call: errno.EIO if call == "fsync" else None)
    with broken.mounted(), pytest.raises(CheckpointWriteError):
        save(make_state(3), tmp_path)
    assert load(save(make_state(3), tmp_path), make_state()).cursor == 3


def test_an_interrupt_while_writing_leaves_no_trace(tmp_path: Path) -> None:
    def fails(count: int, call: str) -> int | None:
        if call == "write":
            raise KeyboardInterrupt
        return None

    with Disk(fails=fails).mounted(), pytest.raises(KeyboardInterrupt):
        save(make_state(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path) -> None:
    with Disk(chunk=100).mounted() as disk:
        target = save(make_state(), tmp_path)
    assert [call for call, _ in disk.events].count("write") > 20
    assert verify(target).cursor == 0


def test_the_operating_systems_own_refusal_is_reported(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointWriteError) as raised:
            save(make_state(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 12}))
    with Disk().mounted() as disk, pytest.raises(CheckpointWriteError, match="12 bytes free") as raised:
        save(make_state(), tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert disk.events == []


def test_a_failed_cut_leaves_the_history_as_it_was(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step in range(5):
        history.append({"step": step})
    for number in range(1, 6):  # create, write, fsync, rename, fsync
        broken = Disk(fails=lambda count, call, n=number: errno.EIO if count == n else None)
        with broken.mounted(), pytest.raises(CheckpointWriteError):
            cut(history.path, 2)
        assert os.listdir(tmp_path) == ["history.jsonl"]
        assert len(list(rows(history.path))) == (5 if number < 5 else 3)
    cut(history.path, 2)
    assert len(list(rows(history.path))) == 3


def test_a_removal_is_durable_before_anything_is_deleted(tmp_path: Path) -> None:
    for cursor in range(3):
        save(make_state(cursor), tmp_path)
    with Disk(deletes=True).mounted() as record:
        prune(tmp_path, Retention(last=1), newest=2)
    calls = [call for call, _ in record.events]
    assert calls == ["rename", "fsync", "unlink", "unlink", "rmdir"] * 2
    assert all(path.name.startswith(".trash-step_") for call, path in record.events if call == "rename")


def test_control_the_same_check_sees_an_fsync_left_out(tmp_path: Path) -> None:
    for cursor in range(2):
        save(make_state(cursor), tmp_path)
    with Disk(deletes=True, drops=lambda count, call: call == "fsync").mounted() as record:
        prune(tmp_path, Retention(last=1), newest=1)
    assert [call for call, _ in record.events] != ["rename", "fsync", "unlink", "unlink", "rmdir"]


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE])
def test_a_failure_at_any_call_of_a_pruning_leaves_whole_steps(tmp_path: Path, error: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(1, 6):
        run = tmp_path / str(number)
        for cursor in range(2):
            save(make_state(cursor), run)
        broken = Disk(deletes=True, fails=lambda count, call, n=number: error if count == n else None)
        with (
            broken.mounted(),
            contextlib.nullcontext() if number > 2 else pytest.raises(CheckpointWriteError) as raised,
        ):
            prune(run, Retention(last=1), newest=1)
        if number <= 2:
            assert raised.value.errno == error
        assert [verify(step).cursor for step in steps(run)] == ([0, 1] if number == 1 else [1])
        clean(run)
        prune(run, Retention(last=1), newest=1)
        assert sorted(os.listdir(run)) == ["step_00000001"]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_save_on_a_thread_fails_as_one_in_the_open_does(tmp_path: Path) -> None:
    threads = threading.active_count()
    for number in range(1, 11):
        broken = Disk(fails=lambda count, call, n=number: errno.EIO if count == n else None)
        saver = Saver(tmp_path)
        saver.save(make_state(0))
        saver.drain()
        with broken.mounted(), pytest.raises(CheckpointWriteError):
            saver.save(make_state(1)), saver.drain()
        assert [verify(step).cursor for step in steps(tmp_path)] == [0]
        assert hidden(tmp_path) == []
    saver.save(make_state(1))
    assert saver.drain() == tmp_path / "step_00000001"
    assert threading.active_count() == threads
