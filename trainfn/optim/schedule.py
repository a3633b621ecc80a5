"""Schedules: pure functions of the number of updates applied, as a tensor, so that one program serves every step.

References:
    I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017 (the cosine).
    P. Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677, 2017 (the warm-up).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.optim.transform import Schedule, wide


class _Named:
    """A schedule that prints as the call that made it."""

    def __init__(self, fn: Callable[[Tensor], Tensor], name: str) -> None:
        self._fn, self._name = fn, name

    def __call__(self, step: Tensor) -> Tensor:
        return self._fn(step)

    def __repr__(self) -> str:
        return self._name


def constant(value: float) -> Schedule:
    """Return the schedule that is always ``value``.

    >>> float(constant(0.25)(torch.tensor(7)))
    0.25
    """
    _check(value, "value")
    return _Named(lambda step: torch.full_like(wide(step), value), f"{value:g}")


def warmup_cosine(peak: float, *, warmup: int, total: int, final: float = 0.0) -> Schedule:
    """Return a linear rise to ``peak`` over ``warmup`` steps, then half a cosine down to ``final`` at step ``total``.

        lr(s) = peak (s + 1) / (warmup + 1)                                         for s < warmup
        lr(s) = final + (peak - final) (1 + cos(pi (s - warmup) / (total - warmup))) / 2      after

    The first step is not wasted on a learning rate of 0, and step ``warmup`` is the first at ``peak``. After ``total``
    it stays at ``final``.

    Args:
        peak: highest value.
        warmup: number of steps below it.
        total: step at which ``final`` is reached.
        final: last value.

    Raises:
        ConfigError: not 0 <= warmup < total, or values that are negative or not finite.

    >>> lr = warmup_cosine(1.0, warmup=3, total=13)
    >>> [round(float(lr(torch.tensor(s))), 3) for s in (0, 2, 3, 8, 13, 99)]
    [0.25, 0.75, 1.0, 0.5, 0.0, 0.0]
    """
    _check(peak, "peak")
    _check(final, "final")
    if not 0 <= warmup < total:
        raise ConfigError(
            "The warm-up does not fit into the run.", expected="0 <= warmup < total", got=f"{warmup=}, {total=}"
        )

    def schedule(step: Tensor) -> Tensor:
        now = wide(step)
        fraction = ((now - warmup) / (total - warmup)).clamp(0.0, 1.0)
        falling = final + (peak - final) * 0.5 * (1.0 + torch.cos(math.pi * fraction))
        return torch.where(now < warmup, peak * (now + 1.0) / (warmup + 1.0), falling)

    return _Named(schedule, f"warmup_cosine({peak:g}, warmup={warmup}, total={total}, final={final:g})")


def as_schedule(value: float | Schedule) -> Schedule:
    """Return ``value`` if it is a schedule, else the constant schedule of that number."""
    return value if callable(value) else constant(value)


def describe_schedule(schedule: Schedule) -> str:
    """Return what a schedule is called in headers and checkpoints: the call that made it, or a function's name."""
    return repr(schedule) if isinstance(schedule, _Named) else getattr(schedule, "__qualname__", repr(schedule))


def _check(value: float, name: str) -> None:
    if not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
        raise ConfigError("A schedule's value is out of range.", where=name, expected="a number >= 0", got=repr(value))
