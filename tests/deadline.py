"""A bound on the time that a test may take, for what could hang: a FIFO without a writer, a gigabyte of header."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deadline(seconds: float) -> Iterator[Callable[[], None]]:
    """Raise TimeoutError after ``seconds`` of the processor's time, or ten times as many on the clock.

    The clock alone would measure how busy the machine is; the processor's time alone would miss what only waits.

    Yields:
        A function that lets the time begin anew.
    """

    def late(*_: object) -> None:
        raise TimeoutError(f"{seconds:g} seconds are over")

    def begin() -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)

    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    begin()
    try:
        yield begin
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
