"""Bytes on a disk: read only from regular files, written so that they are whole or absent.

The recipe for a new directory: build it under a hidden name on the same file system, write and fsync every file, fsync
the directory, rename it to its final name, fsync the parent. The rename is the one commit point. A file that failed to
fsync is never fsynced again, because the second call reports success without having written anything (Rebello et al.,
"Can Applications Recover from fsync Failures?", https://www.usenix.org/conference/atc20/presentation/rebello, 2020);
it is thrown away instead.

Written for POSIX file systems. Hidden names begin with ``.tmp-`` (never committed) or ``.trash-`` (on its way out);
a process that is killed leaves them behind, and no reader looks at them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainfn.errors import CheckpointError

_NOT_A_FILE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO}
"""What ``open`` answers where a regular file should be and is not: nothing, a link, a file as directory, a socket."""


class CheckpointDamagedError(CheckpointError):
    """The bytes of a checkpoint contradict each other, or are not all there."""


class CheckpointWriteError(CheckpointError):
    """The disk refused. The operating system's error is the ``__cause__``."""

    @property
    def errno(self) -> int | None:
        """The operating system's error number, such as ``errno.ENOSPC``."""
        return getattr(self.__cause__, "errno", None)


def read(path: Path, *, size: int, exact: bool = False) -> bytes:
    """Return the bytes of a regular file, opened without following a link or waiting for a FIFO's writer.

    Args:
        path: the file; the directory that it lies in must not be a link either.
        size: most bytes to accept.
        exact: accept no fewer.

    Raises:
        CheckpointDamagedError: absent, not a regular file, or of another size.
        CheckpointError: the operating system refused for a reason that says nothing about what the file holds.

    >>> len(read(Path(os.path.realpath(__file__)), size=1 << 20)) > 1000
    True
    """
    with _opened(path, size=size, exact=exact) as (descriptor, length), open(descriptor, "rb", closefd=False) as file:
        return file.read(length)


def check(path: Path, *, size: int) -> None:
    """Hold that a regular file of ``size`` bytes is there, without reading it.

    Raises:
        CheckpointError: as :func:`read`.
    """
    with _opened(path, size=size, exact=True):
        pass


def commit(target: Path, files: Mapping[str, bytes | memoryview], *, displace: bool = False) -> None:
    """Make the directory ``target`` hold exactly ``files``. On return that survives power loss; on failure, no trace.

    Args:
        target: the directory; its parent is made if it is absent.
        files: name -> contents.
        displace: something is known to stand at ``target``: move it aside first and remove it last, or move it back if
            the commit fails. Otherwise it is an error that something does.

    Raises:
        CheckpointWriteError: the disk is full, failing, or read-only.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     commit(Path(home, "new"), {"a": b"1", "b": b"2"})
    ...     sorted(os.listdir(Path(home, "new")))
    ['a', 'b']
    """
    run, token = target.parent, f"{target.name}-{secrets.token_hex(4)}"
    temporary, trash = run / f".tmp-{token}", run / f".trash-{token}"
    needed = sum(len(data) for data in files.values())
    with reporting(target, needed), contextlib.ExitStack() as undo:
        _make_directory(run)
        if shutil.disk_usage(run).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        undo.callback(discard, temporary)
        os.mkdir(temporary)
        for name, data in files.items():
            _write(temporary / name, data)
        sync_directory(temporary)
        if displace:
            os.rename(target, trash)
            undo.callback(_move_back, trash, target)
        os.rename(temporary, target)
        undo.callback(_move_back, target, temporary)
        sync_directory(run)
        undo.pop_all()
    discard(trash)


def replace(path: Path, data: bytes) -> None:
    """Give the file ``path`` new contents: at every moment, also after power loss, it holds the old or the new ones.

    Raises:
        CheckpointWriteError: the disk is full, failing, or read-only.
    """
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    with reporting(path, len(data)), contextlib.ExitStack() as undo:
        undo.callback(discard, temporary)
        _write(temporary, data)
        os.rename(temporary, path)
        sync_directory(path.parent)
        undo.pop_all()


def remove(path: Path) -> None:
    """Take a directory away so that at every moment, also after power loss, it is whole under its name or not there.

    Raises:
        CheckpointWriteError: it could not be renamed, and is whole; or the renaming could not be made durable. What a
            deletion leaves behind is hidden, and for the next writer to discard.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     commit(Path(home, "new"), {"a": b"1"})
    ...     remove(Path(home, "new"))
    ...     os.listdir(home)
    []
    """
    trash = path.with_name(f".trash-{path.name}-{secrets.token_hex(4)}")
    with reporting(path, 0):
        os.rename(path, trash)
        sync_directory(path.parent)
    discard(trash)


def discard(path: Path) -> None:
    """Delete a file, a link, or a directory and what is in it, as far as that is possible; no link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Place:
    """A directory that is to stay the one that it is for as long as something is written into it.

    Whatever writes would make it anew, but without the lock, and without what was in it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     place = Place(Path(home))
    ...     place.check()
    >>> place.check()
    Traceback (most recent call last):
        ...
    trainfn.store.disk.CheckpointWriteError: The run directory has been taken away.
    ...
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = self._look() if path.exists() else None

    def check(self) -> None:
        """Hold that it is still there; the first time that it is there, remember which one it is.

        Raises:
            CheckpointWriteError: it is gone, or another one is in its place.
        """
        if self._identity is None:
            self._identity = self._look() if self._path.exists() else None
        elif self._look() != self._identity:
            raise self._error("another one is in its place")

    def _look(self) -> tuple[int, int]:
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        return status.st_dev, status.st_ino

    def _error(self, got: str) -> CheckpointWriteError:
        return CheckpointWriteError(
            "The run directory has been taken away.",
            where=self._path,
            got=got,
            hint="what was saved went with it; put it back and resume, or begin in another out_dir",
        )


@contextlib.contextmanager
def reporting(path: Path, needed: int) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`CheckpointWriteError` that says how much room was needed and is left."""
    try:
        yield
    except OSError as error:
        raise CheckpointWriteError(
            f"The disk refused: {error.strerror or error}.",
            where=path,
            expected=f"{needed} bytes to be written",
            got=f"{_free(path)} bytes free on that file system",
            hint="what was saved before is untouched; make room or choose another directory, and save again",
        ) from error


@contextlib.contextmanager
def _opened(path: Path, *, size: int, exact: bool) -> Iterator[tuple[int, int]]:
    """Yield the descriptor of a regular file of a size that is accepted, and its size."""
    try:
        if not stat.S_ISDIR(os.lstat(path.parent).st_mode):
            raise CheckpointDamagedError("Not a directory, or a link to one.", where=path.parent)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointDamagedError("Not a regular file.", where=path, got=stat.filemode(status.st_mode))
            if status.st_size > size or (exact and status.st_size < size):
                expected = f"{'exactly' if exact else 'at most'} {size} bytes"
                raise CheckpointDamagedError(
                    "The file has the wrong size.", where=path, expected=expected, got=f"{status.st_size} bytes"
                )
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        kind = CheckpointDamagedError if error.errno in _NOT_A_FILE else CheckpointError
        raise kind(f"The file cannot be read: {error.strerror}.", where=path) from error


def _write(path: Path, data: bytes | memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # less the umask
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]  # Linux writes at most 2 GiB a call
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        sync_directory(path.parent)


def _move_back(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.rename(source, target)


def _free(path: Path) -> int | str:
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return "an unknown number of"
