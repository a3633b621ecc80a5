"""Schedules of several phases: a warm-up and what follows it.

    lr(s) = peak (s + 1) / (warmup + 1)                     for s < warmup, in all but ``one_cycle``

The first step is not wasted on a learning rate of 0, and step ``warmup`` is the first at ``peak``. After ``total``
each stays as it is.

References:
    P. Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677, 2017 (the warm-up).
    S. Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models", arXiv:2404.06395, 2024 (stable, decay).
    A. Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024,
    arXiv:2405.18392 (the decay by a square root).
    L. Smith, N. Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates",
    arXiv:1708.07120, 2018 (one cycle).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.optim.schedule import Named, fraction, half_cosine, straight
from trainfn.optim.settings import COUNT, NON_NEGATIVE, POSITIVE, POSITIVE_COUNT, Rule, Rules, call, check, one_of
from trainfn.optim.transform import Schedule, wide


def warmup_cosine(peak: float, *, warmup: int, total: int, final: float = 0.0) -> Schedule:
    """Return a linear rise to ``peak`` over ``warmup`` steps, then half a cosine down to ``final`` at step ``total``.

        lr(s) = final + (peak - final) (1 + cos(pi (s - warmup) / (total - warmup))) / 2      for s >= warmup

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
    _check("warmup_cosine", peak, final, warmup, total)

    def schedule(step: Tensor) -> Tensor:
        now = wide(step)
        return _rising(now, peak, warmup, half_cosine(peak, final, fraction(now, warmup, total)))

    return Named(schedule, call("warmup_cosine", peak, warmup=warmup, total=total, final=final))


def warmup_constant(peak: float, *, warmup: int) -> Schedule:
    """Return a linear rise to ``peak`` over ``warmup`` steps, which then stays: for runs whose length is not known.

    Args:
        peak: highest value.
        warmup: number of steps below it.

    Raises:
        ConfigError: values that are negative or not finite.

    >>> lr = warmup_constant(1.0, warmup=3)
    >>> [float(lr(torch.tensor(s))) for s in (0, 2, 3, 99)]
    [0.25, 0.75, 1.0, 1.0]
    """
    check("warmup_constant", {"peak": (peak, NON_NEGATIVE), "warmup": (warmup, COUNT)})

    def schedule(step: Tensor) -> Tensor:
        now = wide(step)
        return _rising(now, peak, warmup, torch.full_like(now, peak))

    return Named(schedule, call("warmup_constant", peak, warmup=warmup))


def warmup_linear(peak: float, *, warmup: int, total: int, final: float = 0.0) -> Schedule:
    """Return a linear rise to ``peak`` over ``warmup`` steps, then a straight line to ``final`` at step ``total``.

    Args:
        peak: highest value.
        warmup: number of steps below it.
        total: step at which ``final`` is reached.
        final: last value.

    Raises:
        ConfigError: not 0 <= warmup < total, or values that are negative or not finite.

    >>> lr = warmup_linear(1.0, warmup=3, total=13)
    >>> [round(float(lr(torch.tensor(s))), 3) for s in (0, 2, 3, 8, 13, 99)]
    [0.25, 0.75, 1.0, 0.5, 0.0, 0.0]
    """
    _check("warmup_linear", peak, final, warmup, total)

    def schedule(step: Tensor) -> Tensor:
        now = wide(step)
        return _rising(now, peak, warmup, straight(peak, final, fraction(now, warmup, total)))

    return Named(schedule, call("warmup_linear", peak, warmup=warmup, total=total, final=final))


def warmup_stable_decay(
    peak: float, *, warmup: int, decay: int, total: int, final: float = 0.0, shape: Literal["linear", "sqrt"] = "linear"
) -> Schedule:
    """Return a linear rise to ``peak``, a plateau, and a fall to ``final`` over the last ``decay`` steps.

        lr(s) = peak                                                    for warmup <= s < total - decay
        lr(s) = peak + (final - peak) (f  or  sqrt(f))                  f = (s - total + decay) / decay, after

    A run can be prolonged from its plateau.

    Args:
        peak: value of the plateau.
        warmup: number of steps before it.
        decay: number of steps after it.
        total: step at which ``final`` is reached.
        final: last value.
        shape: of the fall.

    Raises:
        ConfigError: a setting is out of range, or the phases do not fit into ``total``.

    >>> lr = warmup_stable_decay(1.0, warmup=3, decay=4, total=20)
    >>> [float(lr(torch.tensor(s))) for s in (0, 2, 3, 16, 18, 20, 99)]
    [0.25, 0.75, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    rules = {"decay": (decay, POSITIVE_COUNT), "shape": (shape, one_of("linear", "sqrt"))}
    _check("warmup_stable_decay", peak, final, warmup, total, rules)
    if warmup + decay > total:
        raise ConfigError(
            "The phases do not fit into the run.",
            expected="warmup + decay <= total",
            got=f"{warmup=}, {decay=}, {total=}",
        )

    def schedule(step: Tensor) -> Tensor:
        now = wide(step)
        fallen = fraction(now, total - decay, total)
        return _rising(now, peak, warmup, straight(peak, final, fallen.sqrt() if shape == "sqrt" else fallen))

    settings = {"warmup": warmup, "decay": decay, "total": total, "final": final, "shape": shape}
    return Named(schedule, call("warmup_stable_decay", peak, **settings))


def one_cycle(
    peak: float,
    *,
    total: int,
    pct_start: float = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Return a rise to ``peak`` and a fall far below the start, as the learning rate of torch's ``OneCycleLR``.

    From ``peak / div_factor`` at step 0 to ``peak`` at step ``pct_start total - 1``, and on to
    ``peak / div_factor / final_div_factor`` at step ``total - 1``, its last.

    Args:
        peak: highest value.
        total: number of steps.
        pct_start: fraction of them that rises.
        anneal_strategy: half cosines or straight lines.
        div_factor: ``peak`` over the first value.
        final_div_factor: first value over the last.
        three_phase: fall to the first value as fast as it rose from there, then on to the last.

    Raises:
        ConfigError: a setting is out of range; all that are, together. A phase has no steps.

    >>> lr = one_cycle(1.0, total=11, pct_start=0.5, anneal_strategy="linear", div_factor=10.0, final_div_factor=1.0)
    >>> [round(float(lr(torch.tensor(s))), 3) for s in (0, 4, 5, 10, 99)]
    [0.1, 0.9, 0.918, 0.1, 0.1]
    """
    check(
        "one_cycle",
        {
            "peak": (peak, NON_NEGATIVE),
            "total": (total, POSITIVE_COUNT),
            "pct_start": (pct_start, Rule("in (0, 1)", lambda value: POSITIVE.holds(value) and value < 1.0)),
            "anneal_strategy": (anneal_strategy, one_of("cos", "linear")),
            "div_factor": (div_factor, POSITIVE),
            "final_div_factor": (final_div_factor, POSITIVE),
        },
    )
    first, last = peak / div_factor, peak / div_factor / final_div_factor
    # (step, value) of each turn
    turns = [(0.0, first), (pct_start * total - 1.0, peak), (total - 1.0, last)]
    if three_phase:
        turns.insert(2, (2.0 * pct_start * total - 2.0, first))
    if any(later[0] <= earlier[0] for earlier, later in pairwise(turns)):
        raise ConfigError(
            "A phase of one_cycle has no steps.",
            expected="turns at rising steps: 0, pct_start total - 1, 2 pct_start total - 2 if three_phase, total - 1",
            got=f"turns at {', '.join(f'{at:g}' for at, _ in turns)}",
        )
    anneal = half_cosine if anneal_strategy == "cos" else straight

    def schedule(step: Tensor) -> Tensor:
        now = wide(step)
        value = torch.full_like(now, first)
        for (begin, start), (end, finish) in pairwise(turns):
            value = torch.where(now > begin, anneal(start, finish, fraction(now, begin, end)), value)
        return value

    name = call(
        "one_cycle",
        peak,
        total=total,
        pct_start=pct_start,
        anneal_strategy=anneal_strategy,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        three_phase=three_phase,
    )
    return Named(schedule, name)


def _rising(now: Tensor, peak: float, warmup: int, after: Tensor) -> Tensor:
    return torch.where(now < warmup, peak * (now + 1.0) / (warmup + 1.0), after)


def _check(builder: str, peak: float, final: float, warmup: int, total: int, more: Rules | None = None) -> None:
    check(
        builder,
        {
            "peak": (peak, NON_NEGATIVE),
            "final": (final, NON_NEGATIVE),
            "warmup": (warmup, COUNT),
            "total": (total, POSITIVE_COUNT),
        }
        | (more or {}),
    )
    if warmup >= total:
        raise ConfigError(
            "The warm-up does not fit into the run.", expected="0 <= warmup < total", got=f"{warmup=}, {total=}"
        )
