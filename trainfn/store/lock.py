"""One writer for a run directory: a lock of the operating system's, which dies with the process that holds it.

The lock is ``fcntl``'s, on ``run/.lock``, and not ``flock``'s: that one belongs to the open file, which forked data
workers share, and so outlives an owner that was killed. An ``fcntl`` lock belongs to the process, which has two
consequences. It keeps out other processes only, so those of this process are listed here. And it is lost when the
process closes the file anywhere: nothing in this package opens it elsewhere, it stays when the lock is released, and an
observer that copies the run directory has to leave it out.

Readers take no lock. Where the file system has no locks, a warning says so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from trainfn.errors import CheckpointError
from trainfn.store.checkpoint import CheckpointWarning, RunPath
from trainfn.store.disk import reporting

FILE = ".lock"
_MAX_NOTE = 4096

_held: dict[tuple[int, int], int] = {}
"""Directories, by device and inode, that a process holds; which one, because a fork inherits the list, but no lock."""

_deciding = threading.Lock()


class RunLockedError(CheckpointError):
    """Somebody else is writing into the run directory."""


@contextlib.contextmanager
def writing(run: RunPath) -> Iterator[None]:
    """Be the only writer of a run directory, which is made if it is absent.

    Raises:
        RunLockedError: another process, or another run of this one, is; the error says which, where and since when.
        CheckpointWriteError: the lock's file cannot be made.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run, writing(run):
    ...     with writing(run):
    ...         pass
    Traceback (most recent call last):
        ...
    trainfn.store.lock.RunLockedError: The run directory is being written into by this process already.
    ...
    """
    path = Path(run, FILE)
    with reporting(path, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        status = os.stat(path.parent)
    directory = (status.st_dev, status.st_ino)
    with _deciding:
        if _held.get(directory) == os.getpid():  # to open the file, and close it, would be enough to lose the lock
            raise _refusal(path, "by this process already")
        descriptor = _take(path)
        _held[directory] = os.getpid()
    try:
        yield
    finally:
        with _deciding:
            del _held[directory]
            os.close(descriptor)


def _take(path: Path) -> int:
    import fcntl  # POSIX only, like the rest of what writes

    with reporting(path, 0):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = _owner(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise _refusal(path, f"by {owner}") from error
        text = f"This file system has no locks ({error.strerror}): nothing keeps a second run out of {path.parent}."
        warnings.warn(text, CheckpointWarning, stacklevel=5)
    _note(descriptor)
    return descriptor


def _note(descriptor: int) -> None:
    """Write down who holds the lock. That is for people: whether it is held, the operating system knows."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode()
    with contextlib.suppress(OSError):  # a full disk is told of when it matters
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)


def _owner(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, _MAX_NOTE, 0))
        return f"process {note['pid']} on {note['host']}, since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _refusal(path: Path, who: str) -> RunLockedError:
    return RunLockedError(
        f"The run directory is being written into {who}.",
        where=path.parent,
        hint="wait for it, end it, or pass another out_dir; the lock ends with the process that holds it",
    )
