"""Saving beside the training: the right numbers, no lost error, nothing left running; and the lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainfn
from tests.crash.faults import Disk, hidden, make_state
from trainfn.errors import ConfigError
from trainfn.store import (
    CheckpointWarning,
    CheckpointWriteError,
    Retention,
    RunLockedError,
    Saver,
    load,
    rows,
    save,
    steps,
    verify,
    writing,
)
from trainfn.tree import digest

ROOT = Path(__file__).parents[1]
X, Y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def train(**settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    options = {"loss": "classification", "batch_size": 8, "device": "cpu", "progress": False, "lr": 0.01} | settings
    return trainfn.fit(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.1), nn.Linear(64, 3)), (X, Y), **options)


# The saver


@pytest.mark.parametrize("mode", ["eager", pytest.param("graph", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_is_saved_is_the_state_at_that_step_though_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Every write is held up until several steps later, which have been written into the saved state's memory."""
    at: dict[int, str] = {}

    def note(state: trainfn.TrainState) -> None:
        at[state.cursor] = digest(state)

    go_on, honest = threading.Event(), save

    def late(*args: Any, **kwargs: Any) -> Path:
        go_on.wait(10)
        return honest(*args, **kwargs)

    def release(state: trainfn.TrainState) -> None:
        if state.cursor % 5 == 4:
            go_on.set()
        elif state.cursor % 5 == 1:
            go_on.clear()

    monkeypatch.setattr("trainfn.store.saver.save", late)
    train(max_steps=14, save_every=5, keep_last=None, out_dir=tmp_path, observers=[note, release], compile=mode)
    like = train(max_steps=1).state
    assert [path.name for path in steps(tmp_path)] == ["step_00000005", "step_00000010", "step_00000014"]
    for path in steps(tmp_path):
        state = load(path, like=like)
        assert digest(state) == at[state.cursor]


def test_control_without_the_copy_other_numbers_would_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(state: trainfn.TrainState) -> trainfn.TrainState:
        return trainfn.tree.map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, state)

    monkeypatch.setattr("trainfn.store.saver._copied", shared)
    honest = save

    def late(*args: Any, **kwargs: Any) -> Path:
        time.sleep(0.3)
        return honest(*args, **kwargs)

    monkeypatch.setattr("trainfn.store.saver.save", late)
    at: dict[int, str] = {}
    train(
        max_steps=9, save_every=5, keep_last=None, out_dir=tmp_path,
        observers=[lambda state: at.update({state.cursor: digest(state.params)})],
    )  # fmt: skip
    saved = load(tmp_path / "step_00000005", like=train(max_steps=1).state)
    assert digest(saved.params) != at[5]


def test_saving_beside_the_training_changes_no_bit_of_it(tmp_path: Path) -> None:
    runs = [
        train(
            max_steps=12, save_every=1, out_dir=tmp_path / str(there), save_async=there, val_data=(X, Y), eval_every=3
        )
        for there in (False, True)
    ]
    assert digest(runs[0].state) == digest(runs[1].state)
    names = [sorted(path.name for path in (tmp_path / str(there)).glob("step_*")) for there in (False, True)]
    assert names[0] == names[1]


@pytest.mark.parametrize("background", [True, False])
def test_an_error_is_raised_by_the_next_call_and_the_next_save_works(tmp_path: Path, background: bool) -> None:
    with Saver(tmp_path, background=background) as saver:

        def fill() -> None:
            saver.save(make_state(1))
            while not saver._job.ended:
                time.sleep(0.001)
            saver.check()

        full = Disk(fails=lambda count, call: errno.ENOSPC if call == "write" else None)
        with full.mounted(), pytest.raises(CheckpointWriteError) as raised:
            fill()
        assert raised.value.errno == errno.ENOSPC
        saver.check()
        saver.save(make_state(2))
        assert saver.newest == tmp_path / "step_00000002"
    assert saver.last == tmp_path / "step_00000002"
    assert hidden(tmp_path) == []


def test_an_error_is_not_lost_when_the_saver_is_left(tmp_path: Path) -> None:
    full = Disk(fails=lambda count, call: errno.ENOSPC if call == "write" else None)

    def fill(divisor: int) -> None:
        with Saver(tmp_path) as saver:
            saver.save(make_state(1))
            _ = 1 // divisor

    with full.mounted(), pytest.raises(CheckpointWriteError):
        fill(1)
    with full.mounted(), pytest.raises(ZeroDivisionError) as raised:
        fill(0)
    assert "No space left" in raised.value.__notes__[0]


def test_the_user_chooses_whether_a_failed_save_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = save

    def fails_at_4(state: Any, *args: Any, **kwargs: Any) -> Path:
        if state.cursor == 4:
            raise CheckpointWriteError("The disk refused: on purpose.")
        return honest(state, *args, **kwargs)

    monkeypatch.setattr("trainfn.store.saver.save", fails_at_4)
    seen: list[int] = []
    with pytest.raises(CheckpointWriteError, match="on purpose"):
        train(max_steps=8, save_every=2, out_dir=tmp_path / "a", observers=[lambda state: seen.append(state.cursor)])
    assert seen[-1] in (5, 6)
    with pytest.warns(CheckpointWarning, match="on purpose"):
        result = train(max_steps=8, save_every=2, out_dir=tmp_path / "b", on_save_error="warn", keep_last=None)
    assert [path.name[-1] for path in steps(tmp_path / "b")] == ["2", "6", "8"]
    assert result.checkpoint == tmp_path / "b" / "step_00000008"
    with pytest.raises(CheckpointWriteError, match="on purpose"):  # the last save of all
        train(max_steps=4, out_dir=tmp_path / "c")


@pytest.mark.parametrize("many", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_is_left_behind_by_many_saves(tmp_path: Path, many: int) -> None:
    state = make_state(width=1)
    with Saver(tmp_path, Retention(last=1)) as saver:
        saver.save(state)
        saver.drain()
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for cursor in range(1, many + 1):
            object.__setattr__(state, "cursor", cursor)
            saver.save(state)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert os.listdir(tmp_path) == [f"step_{many:08d}"]


# Retention in a run


def test_a_run_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    result = train(
        max_steps=30, save_every=5, keep_last=1, keep_best=1, eval_every=3, val_data=(X, Y), out_dir=tmp_path
    )
    assert result.best is not None
    assert result.best_checkpoint == tmp_path / f"step_{result.best['step']:08d}"
    assert result.best["val_loss"] == min(row["val_loss"] for row in result.history if "val_loss" in row)
    assert {path.name for path in steps(tmp_path)} == {result.best_checkpoint.name, "step_00000030"}
    assert verify(result.best_checkpoint).metrics["val_loss"] == result.best["val_loss"]
    more = train(max_steps=31, resume="auto", keep_last=1, eval_every=50, out_dir=tmp_path, val_data=(X, Y))
    assert more.best == min((row for row in more.history if "val_loss" in row), key=lambda row: row["val_loss"])


def test_another_number_can_decide(tmp_path: Path) -> None:
    result = train(
        max_steps=20, eval_every=2, metrics=["accuracy"], monitor="val_accuracy", keep_last=1, val_data=(X, Y),
        out_dir=tmp_path,
    )  # fmt: skip
    assert result.best["val_accuracy"] == max(row.get("val_accuracy", 0) for row in result.history)
    assert result.best_checkpoint is not None
    with pytest.raises(ConfigError, match="val_accuracy"):
        train(max_steps=1, monitor="val_acuracy", val_data=(X, Y), metrics=["accuracy"])
    with pytest.raises(ConfigError, match="pass mode="):
        train(max_steps=1, monitor="val_confidence", val_data=(X, Y), metrics=["confidence"])


def test_minutes_make_a_checkpoint_due(tmp_path: Path) -> None:
    train(max_steps=5, save_every=None, save_every_minutes=1e-9, keep_last=None, out_dir=tmp_path)
    assert len(steps(tmp_path)) == 5


# One writer


def test_a_second_run_in_the_same_process_is_refused(tmp_path: Path) -> None:
    refused: list[str] = []

    def again(state: trainfn.TrainState) -> None:
        for way in (tmp_path, tmp_path / ".." / tmp_path.name):
            with pytest.raises(RunLockedError, match="this process already") as raised:
                train(max_steps=3, out_dir=way, resume="auto")
            refused.append(str(raised.value))

    train(max_steps=2, out_dir=tmp_path, observers=[again])
    assert len(refused) == 4
    assert train(max_steps=3, out_dir=tmp_path, resume="auto").state.cursor == 3


def test_a_refused_plan_and_a_failed_run_release_the_lock(tmp_path: Path) -> None:
    train(max_steps=2, out_dir=tmp_path)
    with pytest.raises(ConfigError, match="already holds"):
        train(max_steps=3, out_dir=tmp_path)
    with pytest.raises(ZeroDivisionError):
        train(max_steps=3, out_dir=tmp_path, resume="auto", observers=[lambda state: 1 // 0])
    assert train(max_steps=3, out_dir=tmp_path, resume="auto").state.cursor == 3
    trainfn.plan(nn.Linear(4, 3), (X, Y), loss="classification", max_steps=3, out_dir=tmp_path / "new")
    assert not (tmp_path / "new" / ".lock").exists()


HOLD = """
import sys, time
from trainfn.store import RunLockedError, writing
try:
    with writing(sys.argv[1]):
        print("won", flush=True)
        sys.stdin.read()
except RunLockedError as error:
    print("lost", str(error).replace(chr(10), " "), flush=True)
"""


@contextlib.contextmanager
def started(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, which does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


FORKS = """
import os, sys
from trainfn.store import RunLockedError, writing
go_in, go_out = os.pipe()
inlet, outlet = os.pipe()
end_in, end_out = os.pipe()
for _ in range(20):
    if not os.fork():
        os.read(go_in, 1)
        try:
            with writing(sys.argv[1]):
                os.write(outlet, b"w")
                os.read(end_in, 1)  # until all have tried
        except RunLockedError as error:
            os.write(outlet, b"l" if "process" in str(error) else b"?")
        os._exit(0)
os.write(go_out, bytes(20))
said = b"".join(os.read(inlet, 1) for _ in range(20))
os.write(end_out, bytes(1))
for _ in range(20):
    os.wait()
print(said.decode())
"""


def test_of_twenty_processes_exactly_one_wins(tmp_path: Path) -> None:
    with started(FORKS, tmp_path / "run") as parent:
        said, _ = parent.communicate(timeout=60)
    assert sorted(said.strip()) == ["l"] * 19 + ["w"]


def test_the_owner_is_named_and_readers_do_not_wait(tmp_path: Path) -> None:
    step, like = save(make_state(3), tmp_path), make_state()
    with started(HOLD, tmp_path) as owner:
        assert owner.stdout.readline() == "won\n"
        with pytest.raises(RunLockedError, match=rf"by process {owner.pid} on .*, since 20"), writing(tmp_path):
            pass
        draws, before = torch.get_rng_state(), [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")]
        assert load(tmp_path, like).cursor == verify(step).cursor == 3
        assert torch.equal(torch.get_rng_state(), draws)
        assert [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")] == before
    with writing(tmp_path):
        note = json.loads(subprocess.check_output(["cat", tmp_path / ".lock"]))  # to open it here would lose the lock
    assert note["pid"] == os.getpid()


WORKERS = """
import os, sys, time, torch
from torch import nn
import trainfn
class Items(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, index): return torch.ones(4), index % 3
def tell(state):
    if state.cursor == 3:
        print(*[p for p in os.listdir("/proc") if p.isdigit() and parent(p) == os.getpid()], flush=True)
        time.sleep(100)
def parent(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rsplit(")")[1].split()[1])
    except OSError:
        return 0
if __name__ == "__main__":
    trainfn.fit(nn.Linear(4, 3), Items(), loss="classification", max_steps=1000, batch_size=4, workers=2,
                out_dir=sys.argv[1], save_every=1, progress=False, device="cpu", observers=[tell])
"""


def test_after_a_kill_a_run_can_be_taken_up_though_its_workers_live(tmp_path: Path) -> None:
    with started(WORKERS, tmp_path) as owner:
        workers = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # they cannot notice that they are orphans
        owner.kill()
        owner.wait()
        try:
            with writing(tmp_path):
                pass
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)


FLOCK = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
child = os.fork()
if not child:
    os.close(0), os.close(1)
    time.sleep(100)
print(child, flush=True)
sys.stdin.read()
"""


def test_control_flock_would_outlive_the_owner(tmp_path: Path) -> None:
    with started(FLOCK, tmp_path / "file") as owner:
        child = int(owner.stdout.readline())
    try:
        with open(tmp_path / "file", "w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with pytest.warns(CheckpointWarning, match="no locks"), writing(tmp_path):
        pass


def test_history_after_the_checkpoint_is_cut_and_the_best_is_remembered(tmp_path: Path) -> None:
    settings = {"val_data": (X, Y), "eval_every": 2, "log_every": 1, "out_dir": tmp_path, "save_every": 4}

    def dies(state: trainfn.TrainState) -> None:
        if state.cursor == 7:
            raise KeyboardInterrupt  # at once, as by a second Ctrl-C: nothing is saved on the way out

    with pytest.raises(KeyboardInterrupt):
        train(max_steps=10, observers=[dies], keep_best=0, **settings)
    assert [row["step"] for row in rows(tmp_path / "history.jsonl")][-1] == 6
    result = train(max_steps=10, resume="auto", **settings)
    assert [row["step"] for row in result.history] == list(range(1, 11))
