"""Save in a loop, be killed, and see what is left. Run by ``test_kill.py`` in a process of its own, which it forks.

    python -m tests.crash.saver RUN at-random KILLS SEED
    python -m tests.crash.saver RUN at-every-call
    python -m tests.crash.saver RUN at-byte-positions POSITIONS
    python -m tests.crash.saver RUN pruning
    python -m tests.crash.saver RUN pruning-by-deletion
    python -m tests.crash.saver RUN cleaning
    python -m tests.crash.saver RUN overwriting

Prints one JSON object. An assertion that fails here is a save that was acknowledged and lost.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from tests.crash.faults import Disk, hidden, make_state
from trainfn.errors import CheckpointError
from trainfn.store import Retention, clean, disk, prune, restore, save, steps, verify

WIDTH = 50_000  # 0.8 MB a step


def survivors(run: Path, acknowledged: int) -> int:
    """Return the newest step's cursor, having checked that every step in sight is whole and none is missing."""
    for step in steps(run):
        verify(step)
    if acknowledged < 0 and not steps(run):
        return acknowledged
    state, manifest = restore(run, make_state(width=WIDTH))
    assert manifest.cursor >= acknowledged, f"saved {acknowledged}, found {manifest.cursor}"
    assert state.cursor == int(state.step) == manifest.cursor
    assert all(bool((param == state.cursor).all()) for param in state.params.values())
    return state.cursor


def killed(work: Callable[[Callable[[int], object]], object], after: float | None) -> int:
    """Run ``work(acknowledge)`` in a forked process until it is killed; return the last number that it acknowledged."""
    inlet, outlet = os.pipe()
    child = os.fork()
    if not child:
        try:
            work(lambda number: os.write(outlet, number.to_bytes(8, "little")))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(outlet)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(inlet, "rb") as pipe:
        numbers = pipe.read()
    return int.from_bytes(numbers[-8:], "little") if numbers else -1


def at_random(run: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill a process that saves as fast as it can, at random moments, and start the next from what is left."""
    draw = random.Random(seed)
    newest = acknowledged = -1
    torn = 0
    for _ in range(kills):

        def work(acknowledge: Callable[[int], object]) -> None:
            for cursor in itertools.count(newest + 1):  # noqa: B023
                save(make_state(cursor, WIDTH), run)
                acknowledge(cursor)

        acknowledged = max(acknowledged, killed(work, after=draw.uniform(0.0, 0.1)))
        newest = survivors(run, acknowledged) if run.exists() else newest
        for name in hidden(run) if run.exists() else []:
            torn += 1
            shutil.rmtree(run / name)
        for step in steps(run)[:-1]:
            shutil.rmtree(step)
    return {"kills": kills, "torn": torn, "saved": newest + 1}


def at_every_call(run: Path) -> dict[str, int]:
    """Kill a save before its first system call, its second, ..., with the files written in several pieces."""
    save(make_state(0, WIDTH), run)
    for number in itertools.count(1):

        def work(acknowledge: Callable[[int], object], number: int = number) -> None:
            def dies(count: int, call: str) -> None:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            with Disk(fails=dies, chunk=300_000).mounted():
                save(make_state(1, WIDTH), run)
            acknowledge(1)

        acknowledged = killed(work, after=None)
        newest = survivors(run, max(acknowledged, 0))
        if acknowledged == 1:
            return {"kills": number - 1, "saved": newest}
        for name in hidden(run):
            shutil.rmtree(run / name)
        for step in steps(run)[1:]:
            shutil.rmtree(step)
    raise AssertionError("unreachable")


def at_byte_positions(run: Path, positions: int) -> dict[str, int]:
    """Have the kernel kill a save when a file reaches a length: first of the tensors' file, then of the manifest.

    Python ignores SIGXFSZ; with the default back in place, the write that would pass RLIMIT_FSIZE is cut short, and the
    next one is the process's last.
    """
    kills = whole = 0
    for width, config in ((2000, {}), (1, {"text": "x" * 40_000})):
        shutil.rmtree(run, ignore_errors=True)
        old = save(make_state(0, width), run, config=config)
        longest = max(os.path.getsize(old / name) for name in ("state.safetensors", "manifest.json"))
        for number in range(positions // 2):
            limit = number * longest // (positions // 2 - 1)

            def work(acknowledge: Callable[[int], object], limit: int = limit) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                save(make_state(1, width), run, config=config)  # noqa: B023
                acknowledge(1)

            acknowledged = killed(work, after=None)
            found = [verify(step).cursor for step in steps(run)]
            assert found == ([0, 1] if acknowledged == 1 else [0]), (limit, acknowledged, found)
            kills += acknowledged != 1
            whole += acknowledged == 1
            clean(run)
            assert hidden(run) == []
            if acknowledged == 1:
                shutil.rmtree(run / "step_00000001")
    return {"kills": kills, "whole": whole}


def pruning(run: Path, take_away: Callable[[Path], object] = disk.remove) -> dict[str, int]:
    """Kill a later save and the pruning after it before every system call; count the half steps that are left in sight.

    Five steps are there; the best is the second; the newest and the best are kept.
    """
    losses = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    policy, half = Retention(last=1, best=1), 0
    original = disk.remove
    for number in itertools.count(1):
        shutil.rmtree(run, ignore_errors=True)
        for cursor in range(5):
            save(make_state(cursor, 500), run, metrics={"val_loss": losses[cursor]})

        def work(acknowledge: Callable[[int], object], number: int = number) -> None:
            def dies(count: int, call: str) -> None:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            disk.remove = take_away
            with Disk(fails=dies, deletes=True).mounted():
                save(make_state(5, 500), run, metrics={"val_loss": losses[5]})
                acknowledge(5)
                prune(run, policy, newest=5)
            acknowledge(6)

        acknowledged = killed(work, after=None)
        disk.remove = original
        for step in steps(run):
            try:
                verify(step)
            except CheckpointError:
                half += 1
        left = {int(step.name[-2:]) for step in steps(run)}
        assert {1, 5} <= left if acknowledged >= 5 else {0, 1, 2, 3, 4} <= left, (acknowledged, left)
        clean(run)
        assert hidden(run) == []
        if acknowledged == 6:
            assert left == {1, 5}
            return {"kills": number - 1, "half": half}
    raise AssertionError("unreachable")


def pruning_by_deletion(run: Path) -> dict[str, int]:
    """The control: a step is deleted where it is, file by file."""
    return pruning(run, shutil.rmtree)


def cleaning(run: Path) -> dict[str, int]:
    """Kill the cleaning at the start of a run before each of its calls, and start again."""
    for number in itertools.count(1):
        step = save(make_state(1, 500), run)
        for name in (".tmp-step_00000002-0123abcd", ".trash-step_00000000-0123abcd"):
            shutil.copytree(step, run / name, dirs_exist_ok=True)

        def work(acknowledge: Callable[[int], object], number: int = number) -> None:
            def dies(count: int, call: str) -> None:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            with Disk(fails=dies, deletes=True).mounted():
                clean(run)
            acknowledge(1)

        acknowledged = killed(work, after=None)
        assert [path.name for path in steps(run)] == ["step_00000001"]
        verify(step)
        if acknowledged == 1:
            assert hidden(run) == []
            return {"kills": number - 1}
        clean(run)
        assert hidden(run) == []
    raise AssertionError("unreachable")


def overwriting(run: Path) -> dict[str, int]:
    """The control: the same file name every time. Kill the second save after half of its bytes."""
    run.mkdir()
    path = run / "state.pt"
    whole = make_state(0, WIDTH).params

    class Half:
        """A file that kills its writer when half of the bytes are in it."""

        def __init__(self, file: BinaryIO) -> None:
            self.file, self.left = file, WIDTH * 4

        def write(self, data: bytes) -> int:
            self.file.write(data[: self.left])
            self.file.flush()
            self.left -= len(data)
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return len(data)

        def flush(self) -> None:
            pass

    def work(acknowledge: Callable[[int], object]) -> None:
        torch.save(whole, path)
        acknowledge(0)
        with open(path, "wb") as file:
            torch.save(whole, Half(file))  # type: ignore[arg-type]

    acknowledged = killed(work, after=None)
    try:
        torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError):
        return {"acknowledged": acknowledged, "lost": 1}
    return {"acknowledged": acknowledged, "lost": 0}


if __name__ == "__main__":
    warnings.simplefilter("error")  # nothing that a kill leaves behind may need walking back over
    torch.set_num_threads(1)
    run, how, *numbers = sys.argv[1:]
    ways = (at_random, at_every_call, at_byte_positions, pruning, pruning_by_deletion, cleaning, overwriting)
    way: Callable[..., dict[str, int]] = {way.__name__.replace("_", "-"): way for way in ways}[how]
    print(json.dumps(way(Path(run), *map(int, numbers))))
