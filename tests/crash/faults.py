"""What the crash tests share: a small state, a record of the system calls of a save, and a disk that fails on cue."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch import nn

from trainfn.state import TrainState, init

MOMENTS = SimpleNamespace(
    init=lambda params: {"exp_avg": {n: torch.zeros_like(p) for n, p in params.items()}}, frozen=None
)
"""Stands in for an optimizer: all that a checkpoint sees of one is its state."""


def make_state(cursor: int = 0, width: int = 4) -> TrainState:
    """Return a state whose parameters all equal ``cursor``, so that a loaded one can be told from the others."""
    state = init(nn.Linear(width, 2), MOMENTS, seed=7)
    params = {name: torch.full_like(param, cursor).requires_grad_() for name, param in state.params.items()}
    return attrs.evolve(state, step=torch.tensor(cursor), params=params, cursor=cursor)


def hidden(run: Path) -> list[str]:
    """Return the names in a run directory that are not steps."""
    return sorted(name for name in os.listdir(run) if not name.startswith("step_"))


@attrs.define
class Disk:
    """The writing calls of ``os``, recorded, counted from 1, and made to fail, be left out, or be cut short.

    Attributes:
        events: (call, path) in order; a rename's path is where to.
        details: of each event, where from a rename is, what a write has written, and the whole path of a deletion.
        fails: is asked with the number and name of each call; an errno it returns is raised instead of calling.
        drops: is asked likewise; True leaves the call out, unrecorded, as if the code had forgotten it.
        chunk: most bytes that one write takes.
        deletes: whether deletions are among the calls.
    """

    events: list[tuple[str, Path]] = attrs.field(factory=list)
    details: list[Any] = attrs.field(factory=list)
    fails: Callable[[int, str], int | None] = lambda number, call: None
    drops: Callable[[int, str], bool] = lambda number, call: False
    chunk: int = 1 << 30
    deletes: bool = False
    count: int = 0

    @contextmanager
    def mounted(self) -> Iterator[Disk]:
        """Put this disk in the place of the real one."""
        names = ("open", "mkdir", "write", "fsync", "rename", "unlink", "rmdir")
        real = SimpleNamespace(**{name: getattr(os, name) for name in names})
        paths: dict[int, Path] = {}

        def call(name: str, path: Path, act: Callable[[], Any], detail: Any = None) -> Any:
            self.count += 1
            if (error := self.fails(self.count, name)) is not None:
                raise OSError(error, os.strerror(error), str(path))
            if self.drops(self.count, name):
                return None
            self.events.append((name, path))
            self.details.append(detail)
            return act()

        def whole(path: Any, dir_fd: int | None = None) -> Path:
            return Path(path) if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path)

        def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            def act() -> int:
                descriptor: int = real.open(path, flags, *args, **kwargs)
                if kwargs.get("dir_fd") is None:  # rmtree opens relative names, to delete
                    paths[descriptor] = Path(path)
                return descriptor

            made = flags & os.O_CREAT
            return call("create", Path(path), act) if made else act()

        def write(descriptor: int, data: Any) -> int:
            if descriptor not in paths:  # a pipe
                return int(real.write(descriptor, data))
            part = bytes(data[: self.chunk])
            return int(call("write", paths[descriptor], lambda: real.write(descriptor, part), part))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", open_)
            patch.setattr(os, "mkdir", lambda p, *a, **k: call("mkdir", Path(p), lambda: real.mkdir(p, *a, **k)))
            patch.setattr(os, "write", write)
            patch.setattr(os, "fsync", lambda fd: call("fsync", paths[fd], lambda: real.fsync(fd)))
            patch.setattr(os, "rename", lambda a, b: call("rename", Path(b), lambda: real.rename(a, b), Path(a)))
            if self.deletes:
                patch.setattr(
                    os, "unlink", lambda p, **k: call("unlink", Path(p), lambda: real.unlink(p, **k), whole(p, **k))
                )
                patch.setattr(
                    os, "rmdir", lambda p, **k: call("rmdir", Path(p), lambda: real.rmdir(p, **k), whole(p, **k))
                )
            yield self


def flaws(events: list[tuple[str, Path]], target: Path) -> list[str]:
    """Return what a power cut could undo or tear of the directory that these calls committed as ``target``.

    Every file must be fsynced after its last write and the building directory after its last new name, both before the
    rename; the parent after the rename; and the parent of every other directory that was made, at any time after.
    """
    found = []
    renamed = events.index(("rename", target))
    for index, (call, path) in enumerate(events):
        if call in ("create", "write"):
            if ("fsync", path) not in events[index:renamed]:
                found.append(f"{path.name} is not fsynced between its {call} and the rename")
            if call == "create" and ("fsync", path.parent) not in events[index:renamed]:
                found.append(f"the name {path.name} is not fsynced before the rename")
        elif call == "mkdir" and not path.name.startswith(".tmp-") and ("fsync", path.parent) not in events[index:]:
            found.append(f"the name {path.name} is never fsynced")
    if ("fsync", target.parent) not in events[renamed:]:
        found.append("the parent is not fsynced after the rename")
    return found
