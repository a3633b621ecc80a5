"""Where compiled programs are kept, so that a run that is resumed need not wait for the compiler again.

PyTorch keeps them below the system's temporary directory, which is emptied when a machine starts. Here it is the user's
cache directory, ``~/.cache/trainfn`` or ``$XDG_CACHE_HOME/trainfn``; one for each version of PyTorch and each kind of
processor, since a home may be shared by machines that do not run each other's code. PyTorch fills and reads it, and is
made for several processes doing so at once. It may be deleted at any time. It holds code, as a compiler's cache does:
it is the user's own, and no run directory or checkpoint contains or names it.

Within it there is one for each set of vector instructions. Which of them work, PyTorch finds out by a trial in each
process, and does without them where that takes a minute, on a busy machine, or where ``ATEN_CPU_CAPABILITY`` says so;
but its key to what it keeps does not hold them (2.13), and a program that was made with them does not build without.
Where there is a directory for them, a trial has succeeded before, with this PyTorch on this kind of processor; another
one would take a second.

``TORCHINDUCTOR_CACHE_DIR`` is respected; where the directory cannot be written to, it is PyTorch's after all.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from trainfn.engine.processor import cpuinfo

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def kept_programs() -> Iterator[None]:
    """Let what is compiled inside be looked for and kept in the user's cache directory.

    >>> import torch._inductor.runtime.cache_dir_utils      # sets the variable, where nobody has
    >>> before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    >>> with kept_programs():
    ...     pass
    >>> os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
    True
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(_VARIABLE)
    # PyTorch puts its own choice into the variable, too, as soon as its compiler is imported.
    is_chosen = before is not None and before != os.path.abspath(default_cache_dir())
    directory = None if is_chosen else user_directory()
    if directory is None:
        yield
        return
    os.environ[_VARIABLE] = directory
    try:
        os.environ[_VARIABLE] = str(_for_vectors(directory))
        with _trusting_vectors():
            yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before


def user_directory() -> str | None:
    """Return the directory, made if it is not there; None if it cannot be made or written to, or is not the user's."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if not base.is_absolute():
            return None
        directory = base / "trainfn" / f"torch-{torch.__version__}-{_processor()}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        is_own = not hasattr(os, "getuid") or directory.stat().st_uid == os.getuid()
    except (OSError, RuntimeError):  # RuntimeError: no home can be found
        return None
    return str(directory) if is_own else None


def _for_vectors(directory: str) -> Path:
    """Return the directory in this one, made if it is not there, for programs with the instructions now in use."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa, supported_vec_isa_list, valid_vec_isa_list

    def chosen() -> Path:
        return Path(directory, "-".join(str(pick_vec_isa()).lower().split()))

    if not valid_vec_isa_list.cache_info().currsize:  # nobody has tried them in this process
        with _trusting_vectors():
            if (known := chosen()).is_dir():
                return known
        answers: list[Any] = [
            kind.__dict__.get("__bool__") for isa in supported_vec_isa_list for kind in type(isa).__mro__
        ]
        for answer in (valid_vec_isa_list, *answers):  # they are remembered, and were given on trust
            getattr(answer, "cache_clear", lambda: None)()
    made = chosen()
    made.mkdir(mode=0o700, exist_ok=True)
    return made


def _trusting_vectors() -> AbstractContextManager[None]:
    """Let PyTorch take vector instructions to work, unless the user has said whether they do."""
    from torch._inductor import config

    return config.patch({"cpp.vec_isa_ok": True}) if config.cpp.vec_isa_ok is None else nullcontext()


@functools.cache
def _processor() -> str:
    """Return a short hash of what code for this processor depends on."""
    told = [platform.machine(), platform.processor()]
    told += sorted({line for line in cpuinfo() if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
