"""What goes wrong in a run and is no mistake of its settings: memory that is not there, errors between two steps."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from trainfn.batch import Batch
from trainfn.errors import StepMemoryError, TrainfnError
from trainfn.tree import describe


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no memory left, on a GPU, on the host, or for Python.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), is_out_of_memory(ValueError())
    (True, False)
    """
    if isinstance(error, TrainfnError):
        return False
    text = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and text)


def memory_error(error: BaseException, where: str, batch: Batch, batch_size: int, accumulate: int) -> StepMemoryError:
    """Return what is said about a step for which there was no memory; the error is to be its cause.

    >>> found = memory_error(MemoryError("no"), "step 3", torch.ones(8, 2), 4, 2)
    >>> print(found)
    There is not enough memory for a step.
      where: step 3, a batch of float32[8, 2]
      got: no
      try: a smaller batch_size with a larger accumulate is the same step in less memory: batch_size=2, accumulate=4; checkpoint="*" recomputes activations; precision="bf16-mixed" halves them
    """  # noqa: E501
    smaller = (
        f": batch_size={batch_size // 2}, accumulate={accumulate * 2}"
        if batch_size > 1
        else ", but this one is the smallest; shorter examples help"
    )
    return StepMemoryError(
        "There is not enough memory for a step.",
        where=f"{where}, a batch of {describe(batch)}",
        got=str(error).strip().partition("\n")[0] or type(error).__name__,
        hint=f"a smaller batch_size with a larger accumulate is the same step in less memory{smaller}; "
        'checkpoint="*" recomputes activations; precision="bf16-mixed" halves them',
    )


class Rescue:
    """Calls ``save`` with an error that ends what is done in its context, if the error came between two steps.

    What it came from is looked up in the traceback: the run, or the loader that the run was asking for a batch.

    >>> told = []
    >>> with Rescue(lambda error: told.append(str(error))):
    ...     raise ValueError("in an observer")
    Traceback (most recent call last):
        ...
    ValueError: in an observer
    >>> told
    ['in an observer']
    """

    def __init__(self, save: Callable[[Exception], object]) -> None:
        self._save = save

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and is_between_steps(error.__traceback__):
            self._save(error)


def is_between_steps(trace: TracebackType | None) -> bool:
    """Return whether an error came while no step was at work: not in the fold, or while the fold waited for a batch."""
    frames = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame, _ in traceback.walk_tb(trace)]
    return ("trainfn.loop", "run") not in frames or comes_from_data(trace)


def comes_from_data(trace: TracebackType | None) -> bool:
    """Return whether an error came while a batch was fetched."""
    return any(frame.f_globals.get("__name__", "").startswith("trainfn.data.") for frame, _ in traceback.walk_tb(trace))
