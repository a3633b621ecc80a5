"""What watches a run: a function, called with the state after every step, or an object with any of these methods.

| method | when | what it gets |
|---|---|---|
| ``on_start(plan)`` | once, before the first step | the :class:`trainfn.Plan`; ``plan.state`` is where the run starts |
| ``on_step(state)`` | after every step, before anything else is done about it | the state, on its device |
| ``on_row(state, row)`` | a row of the history has been written (``log_every`` and others) | the row: plain numbers |
| ``on_eval(state, row)`` | it holds an evaluation | the same row |
| ``on_epoch(state, row)`` | the row of an epoch has been written, at its last step | that row |
| ``on_checkpoint(path)`` | a checkpoint is safe on the disk, a few steps after it was due | its directory |
| ``on_end(result)`` | once: the run is over, everything is saved | the ``FitResult``; None after an error |

Between two steps they come in this order, but ``on_checkpoint`` right after ``on_step``; at each point, observers are
called in the order in which they were passed, after the history and the progress bar. A state is good until the next
step, which writes into the same memory. Its numbers are on the device, and stay there until an observer reads one
(``float(state.report.loss)`` waits for a GPU); those of a row have been read already, all in one copy.

An observer changes nothing: not the state, not the order of the data, not the draws. What it raises ends the run, with
a note that names it, after the state has been saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainfn.errors import ConfigError, suggest

Observer = Any
"""A function of the state, or an object with any of the methods that are in ``POINTS``; see above."""

POINTS = ("on_start", "on_step", "on_row", "on_eval", "on_epoch", "on_checkpoint", "on_end")


class Observers:
    """Observers, sorted by the points that they want to be called at.

    Args:
        observers: functions and objects, in the order in which they are called; or a single one.

    Raises:
        ConfigError: something that can be called at no point; methods that would never be called, with near names.

    >>> class Noisy:
    ...     def on_end(self, result):
    ...         print("done:", result)
    >>> observers = Observers([Noisy(), lambda state: print("a step:", state)])
    >>> observers("on_step", 1), observers("on_end", 2)
    a step: 1
    done: 2
    (None, None)
    """

    def __init__(self, observers: Observer | Sequence[Observer] = ()) -> None:
        self._at: dict[str, list[tuple[str, Callable[..., object]]]] = {point: [] for point in POINTS}
        wrong = []
        for observer in observers if isinstance(observers, (list, tuple)) else [observers]:
            name = getattr(observer, "__qualname__", type(observer).__qualname__)
            methods = {each: getattr(observer, each) for each in dir(observer) if each.startswith("on_")}
            wrong += [f"{name}.{each} ({suggest(each, POINTS)})" for each in methods if each not in POINTS]
            if isinstance(observer, type):
                wrong.append(f"{name}, a class (pass an object: {name}())")
            elif not methods and callable(observer):
                methods = {"on_step": observer}
            elif not methods:
                wrong.append(f"{name}, which cannot be called and has none of {', '.join(POINTS)}")
            for point in self._at:
                if point in methods:
                    self._at[point].append((name, methods[point]))
        if wrong:
            raise ConfigError("There are observers that would not be called.", got="; ".join(wrong))

    def __call__(self, point: str, *values: object, after: int | None = None) -> None:
        """Call those who want to be called at a point, ``after`` so many steps. An error gets a note that says who."""
        for name, call in self._at[point]:
            try:
                call(*values)
            except Exception as error:
                step = "" if after is None else f", after step {after}"
                error.add_note(f"It was raised by the observer {name} in {point}{step}.")
                raise
