"""Schedules: pure functions of the number of updates applied, as a tensor, so that one program serves every step.

Those of one phase are here, those of several in :mod:`trainfn.optim.phases`. After its last step each stays as it is.

References:
    I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017 (the cosine).
    A. Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, 2017 (the inverse square root).
    L.-C. Chen et al., "DeepLab: Semantic Image Segmentation", arXiv:1606.00915, 2016 (the polynomial).
    K. He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, 2015 (piecewise constant).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.optim.settings import COUNT, NON_NEGATIVE, POSITIVE, POSITIVE_COUNT, call, check
from trainfn.optim.transform import Hyper, Schedule, scheduled, wide
from trainfn.tree import wide_float


class Named:
    """A schedule that prints as the call that made it."""

    def __init__(self, fn: Callable[[Tensor], Tensor], name: str) -> None:
        self._fn, self._name = fn, name

    def __call__(self, step: Tensor) -> Tensor:
        return self._fn(step)

    def __repr__(self) -> str:
        return self._name


def constant(value: float) -> Schedule:
    """Return the schedule that is always ``value``.

    Raises:
        ConfigError: the value is negative or not finite.

    >>> float(constant(0.25)(torch.tensor(7)))
    0.25
    """
    check("constant", {"value": (value, NON_NEGATIVE)})
    return Named(lambda step: torch.full_like(step, value, dtype=wide_float(step)), call("constant", value))


def linear(start: float, end: float, *, total: int) -> Schedule:
    """Return a straight line from ``start`` at step 0 to ``end`` at step ``total``.

        lr(s) = start + (end - start) s / total

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> lr = linear(1.0, 0.5, total=10)
    >>> [float(lr(torch.tensor(s))) for s in (0, 5, 10, 99)]
    [1.0, 0.75, 0.5, 0.5]
    """
    check("linear", {"start": (start, NON_NEGATIVE), "end": (end, NON_NEGATIVE), "total": (total, POSITIVE_COUNT)})
    return Named(
        lambda step: straight(start, end, fraction(wide(step), 0, total)), call("linear", start, end, total=total)
    )


def cosine(peak: float, *, total: int, final: float = 0.0) -> Schedule:
    """Return half a cosine from ``peak`` at step 0 down to ``final`` at step ``total``.

        lr(s) = final + (peak - final) (1 + cos(pi s / total)) / 2

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> lr = cosine(1.0, total=10)
    >>> [round(float(lr(torch.tensor(s))), 3) for s in (0, 5, 10, 99)]
    [1.0, 0.5, 0.0, 0.0]
    """
    check("cosine", {"peak": (peak, NON_NEGATIVE), "total": (total, POSITIVE_COUNT), "final": (final, NON_NEGATIVE)})
    return Named(
        lambda step: half_cosine(peak, final, fraction(wide(step), 0, total)),
        call("cosine", peak, total=total, final=final),
    )


def polynomial(start: float, *, total: int, power: float = 1.0, end: float = 0.0) -> Schedule:
    """Return a power of the share of steps left, from ``start`` at step 0 to ``end`` at step ``total``.

        lr(s) = end + (start - end) (1 - s / total)^power

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> lr = polynomial(1.0, total=10, power=2.0)
    >>> [round(float(lr(torch.tensor(s))), 3) for s in (0, 5, 10, 99)]
    [1.0, 0.25, 0.0, 0.0]
    """
    check(
        "polynomial",
        {
            "start": (start, NON_NEGATIVE),
            "total": (total, POSITIVE_COUNT),
            "power": (power, POSITIVE),
            "end": (end, NON_NEGATIVE),
        },
    )

    def schedule(step: Tensor) -> Tensor:
        left = 1.0 - fraction(wide(step), 0, total)
        return end + (start - end) * torch.exp(power * torch.log(left))  # log(0) = -inf, and its exp is 0

    return Named(schedule, call("polynomial", start, total=total, power=power, end=end))


def inverse_sqrt(peak: float, *, warmup: int) -> Schedule:
    """Return a linear rise to ``peak`` over ``warmup`` steps, then a fall with the root of the step, without an end.

        lr(s) = peak min((s + 1) / (warmup + 1), sqrt((warmup + 1) / (s + 1)))

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> lr = inverse_sqrt(1.0, warmup=3)
    >>> [float(lr(torch.tensor(s))) for s in (0, 3, 15, 63)]
    [0.25, 1.0, 0.5, 0.25]
    """
    check("inverse_sqrt", {"peak": (peak, NON_NEGATIVE), "warmup": (warmup, COUNT)})

    def schedule(step: Tensor) -> Tensor:
        ratio = (wide(step) + 1.0) / (warmup + 1)
        return peak * torch.minimum(ratio, torch.rsqrt(ratio))

    return Named(schedule, call("inverse_sqrt", peak, warmup=warmup))


def piecewise(values: Sequence[float], *, boundaries: Sequence[int]) -> Schedule:
    """Return ``values[i]`` from step ``boundaries[i - 1]`` on, before ``boundaries[i]``.

    Args:
        values: one more than there are boundaries.
        boundaries: steps at which the next value begins, rising.

    Raises:
        ConfigError: a value is out of range, or boundaries do not rise or do not fit the values.

    >>> lr = piecewise([0.5, 0.25, 0.125], boundaries=[30, 60])
    >>> [float(lr(torch.tensor(s))) for s in (0, 29, 30, 59, 60, 99)]
    [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    """
    values, boundaries = tuple(values), tuple(boundaries)
    check(
        "piecewise",
        {f"values[{i}]": (value, NON_NEGATIVE) for i, value in enumerate(values)}
        | {f"boundaries[{i}]": (boundary, POSITIVE_COUNT) for i, boundary in enumerate(boundaries)},
    )
    if len(values) != len(boundaries) + 1 or sorted(set(boundaries)) != list(boundaries):
        raise ConfigError(
            "The pieces of a schedule do not fit together.",
            expected="boundaries that rise, and one value more than boundaries",
            got=f"{values=}, {boundaries=}",
        )

    def schedule(step: Tensor) -> Tensor:
        now = wide(step)
        value = torch.full_like(now, values[0])
        for boundary, later in zip(boundaries, values[1:], strict=True):
            value = torch.where(now < boundary, value, later)
        return value

    return Named(schedule, call("piecewise", values, boundaries=boundaries))


def as_schedule(value: Hyper) -> Schedule:
    """Return ``value`` if it is a schedule, made to give tensors, else the constant schedule of that number."""
    if not callable(value):
        return constant(value)
    return value if isinstance(value, Named) else lambda step: scheduled(value, step)


def fraction(now: Tensor, begin: float, end: float) -> Tensor:
    """Return how much of the way from step ``begin`` to step ``end`` is done, in [0, 1]."""
    return ((now - begin) / (end - begin)).clamp(0.0, 1.0)


def straight(start: float, end: float, done: Tensor) -> Tensor:
    """Return the line from ``start`` to ``end``."""
    return start + (end - start) * done


def half_cosine(start: float, end: float, done: Tensor) -> Tensor:
    """Return the half cosine from ``start`` to ``end``."""
    return end + (start - end) * 0.5 * (1.0 + torch.cos(math.pi * done))
