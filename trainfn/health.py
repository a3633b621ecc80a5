"""Whether a step may be applied: decided on the device, without a sync, before anything is changed.

The loop reads the verdict late. Until it does, nothing is lost: a step that is not applied leaves parameters, moments,
buffers and EMA as they were, bit for bit.

A *spike* is a loss or a gradient norm far above its own recent past. That past is a running mean and spread s of three
coordinates x: the loss, its logarithm and the logarithm of the gradient norm. With d = x - mean,

    spike    : d > max(5.5 s, least)
    mean     = mean + max(1 / n, 1 / 20) hold(d, 3 s)
    s        = s + max(1 / n, 1 / 100) (0.886 hold(|x - last x|, 4 s) - s)

where hold(v, most) is v within max(most, least / 2) of 0. The spread is that of differences between neighbours, which a
trend hardly changes; 0.886 makes a standard deviation of their mean size, for normal variables. A loss must stand out
in both of its coordinates (in the first alone, where the mean is negative). Nothing is called a spike in the first 50
steps, spikes are kept out of the baseline, and ten in a row are a new level, which is learned from the beginning.

References:
    J. von Neumann et al., "The Mean Square Successive Difference", Annals of Mathematical Statistics 12, 1941.
    P. Huber, "Robust Estimation of a Location Parameter", Annals of Mathematical Statistics 35, 1964.
    A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311, 2022 (skipping spikes).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from trainfn.precision import LossScale
from trainfn.state import AccumulationStats, Baseline, Health
from trainfn.tree import evolve

OnSpike = Literal["off", "warn", "skip", "halt"]

_WARM_UP = 50
_ROBUST_FROM = 10  # steps from which the baseline holds outliers down; before, it knows no spread to hold them to
_MEAN_WINDOW, _SPREAD_WINDOW = 20, 100
_LASTING = 10
_DEVIATIONS = 5.5
_NORMAL = math.sqrt(math.pi) / 2.0  # standard deviation over mean size of the difference of two normal variables
_LEAST = (0.5, math.log(1.5), math.log(3.0))  # of the mean, for the loss; and as factors, 1.5 and 3


AILMENTS: dict[str, Callable[[float], bool]] = {
    "vanishing": lambda norm: 0.0 < norm < 1e-7,
    "exploding": lambda norm: norm > 10.0,
    "dead": lambda norm: norm == 0.0,
}


class HealthWarning(UserWarning):
    """A run shows something that it can go on with, and should not be overlooked."""


class Verdict(enum.IntEnum):
    """A step's outcome, as a code with a sentence."""

    OK = 0
    LOSS_SPIKE = 1
    GRADIENT_SPIKE = 2  # up to here, the step is applied
    NON_FINITE_LOSS = 3
    NON_FINITE_GRADIENT = 4
    EMPTY = 5
    OVERFLOW = 6
    HALTED = 7
    LOSS_SPIKE_SKIPPED = 8
    GRADIENT_SPIKE_SKIPPED = 9

    @property
    def sentence(self) -> str:
        """What happened, for people.

        >>> Verdict.EMPTY.sentence
        'nothing in the batch counted (weight 0): the step was skipped'
        """
        return _SENTENCES[self]

    @property
    def applied(self) -> bool:
        """Whether the step changed the parameters.

        >>> Verdict.LOSS_SPIKE.applied, Verdict.LOSS_SPIKE_SKIPPED.applied
        (True, False)
        """
        return self <= Verdict.GRADIENT_SPIKE


_SENTENCES = {
    Verdict.OK: "the step was applied",
    Verdict.NON_FINITE_LOSS: "the loss is NaN or infinite: the step was skipped",
    Verdict.NON_FINITE_GRADIENT: "a gradient is NaN or infinite: the step was skipped",
    Verdict.EMPTY: "nothing in the batch counted (weight 0): the step was skipped",
    Verdict.OVERFLOW: "a float16 gradient overflowed: the step was skipped and the loss scale halved",
    Verdict.HALTED: "the run was to stop at an earlier step: the step was skipped",
    Verdict.LOSS_SPIKE: "the loss is far above its recent past: the step was applied",
    Verdict.GRADIENT_SPIKE: "the gradient norm is far above its recent past: the step was applied",
    Verdict.LOSS_SPIKE_SKIPPED: "the loss is far above its recent past: the step was skipped",
    Verdict.GRADIENT_SPIKE_SKIPPED: "the gradient norm is far above its recent past: the step was skipped",
}
SPIKES = (Verdict.LOSS_SPIKE, Verdict.GRADIENT_SPIKE, Verdict.LOSS_SPIKE_SKIPPED, Verdict.GRADIENT_SPIKE_SKIPPED)
ALARMING = (Verdict.NON_FINITE_LOSS, Verdict.NON_FINITE_GRADIENT, *SPIKES)
"""What a run warns of."""
REFUSED = tuple(verdict for verdict in ALARMING if not verdict.applied)
"""What a run can be halted for."""


def judge(total: Tensor, weight: Tensor, grad_norm: Tensor, scale: LossScale | None = None) -> Tensor:
    """Return the verdict on a step's own numbers, [] int64; a non-finite loss is named before the gradients it spoils.

    Args:
        total: summed loss, [].
        weight: what it is a sum over, [].
        grad_norm: norm of the summed gradients, [], >= 0 and finite exactly when every element is.
        scale: the loss scale of the backward, if there was one: a gradient that is not finite is then an overflow,
            until the scale is down to 1 and cannot be the reason.

    >>> judge(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(float("inf")))
    tensor(4)
    """
    infinite: Tensor | int = int(Verdict.NON_FINITE_GRADIENT)
    if scale is not None:
        infinite = torch.where(scale.factor > 1.0, int(Verdict.OVERFLOW), infinite)
    verdict = (weight <= 0) * int(Verdict.EMPTY)  # else OK, which is 0
    verdict = torch.where(grad_norm < torch.inf, verdict, infinite)  # for NaN, too, no comparison holds
    is_finite = (total - weight).abs() < torch.inf  # of two infinities of one sign, too, it is not
    return torch.where(is_finite, verdict, int(Verdict.NON_FINITE_LOSS))


def judge_spike(
    baseline: Baseline, verdict: Tensor, loss: Tensor, grad_norm: Tensor, *, skip: bool
) -> tuple[Tensor, Baseline]:
    """Return the verdict with spikes in it, and the baseline with this step in it.

    Args:
        baseline: what is usual.
        verdict: [] int64; only an ``OK`` step can spike or be learned from.
        loss: mean loss, [].
        grad_norm: norm of its gradient, [].
        skip: whether a spike is to be skipped.

    >>> state = Baseline(mean=torch.tensor([2.0, 0.7, 0.0]).double(), spread=torch.full((3,), 0.1).double(),
    ...                  last=torch.zeros(3).double(), count=torch.full((3,), 100), lasting=torch.tensor(0))
    >>> def verdict(loss, grad_norm):
    ...     return int(judge_spike(state, torch.tensor(0), torch.tensor(loss), torch.tensor(grad_norm), skip=True)[0])
    >>> verdict(2.1, 1.2), verdict(20.0, 1.2), verdict(2.1, 12.0)
    (0, 8, 9)
    """
    wide = baseline.mean.dtype
    loss, grad_norm = loss.to(wide), grad_norm.to(wide)
    x = torch.stack([loss, loss.log(), grad_norm.log()])
    ok = verdict == int(Verdict.OK)
    known = torch.isfinite(x) & ok  # the loss may be negative, a gradient may be 0: these have no logarithm
    delta = torch.where(known, x - baseline.mean, 0.0)
    ready = baseline.count >= _WARM_UP
    least = torch.stack([baseline.mean[0].abs() * _LEAST[0], *(torch.full_like(loss, value) for value in _LEAST[1:])])
    out = known & ready & (delta > torch.maximum(_DEVIATIONS * baseline.spread, least))
    loss_spikes = out[0] & (out[1] | (baseline.mean[0] < 0.0))
    gradient_spikes = out[2]
    spikes = loss_spikes | gradient_spikes
    code = torch.where(
        loss_spikes,
        int(Verdict.LOSS_SPIKE_SKIPPED if skip else Verdict.LOSS_SPIKE),
        int(Verdict.GRADIENT_SPIKE_SKIPPED if skip else Verdict.GRADIENT_SPIKE),
    )
    return torch.where(spikes, code, verdict), _learn(baseline, x, least, known & ~spikes, ok, spikes)


def track(
    health: Health,
    verdict: Tensor,
    skipped: Tensor,
    baseline: Baseline,
    *,
    halt_after: int | None = None,
    on_spike: OnSpike = "off",
) -> Health:
    """Return the health after a step. An empty batch, an overflow or a spike neither adds to a streak nor ends it.

    Args:
        health: before it.
        verdict: on it, [] int64.
        skipped: whether it was not applied, [] bool.
        baseline: with it.
        halt_after: length of the streak at which the run has to stop; None for never.
        on_spike: ``"halt"`` if it has to stop at a spike.

    >>> zero, none, no = torch.tensor(0), torch.zeros(3), torch.tensor(False)
    >>> baseline = Baseline(mean=none, spread=none, last=none, count=none, lasting=zero)
    >>> after = track(Health(streak=zero, halted=no, baseline=baseline), torch.tensor(4), ~no, baseline, halt_after=1)
    >>> after.streak, after.halted
    (tensor(1), tensor(True))
    """
    bad = skipped & (verdict <= int(Verdict.NON_FINITE_GRADIENT))
    streak, halted = (health.streak + bad) * skipped, health.halted
    if halt_after is not None:
        halted = halted | (bad & (streak >= halt_after))
    if on_spike == "halt":
        halted = halted | (verdict >= int(Verdict.LOSS_SPIKE_SKIPPED))
    return Health(streak=streak, halted=halted, baseline=baseline)


def forgiven(health: Health) -> Health:
    """Return the health of a run that goes on although it had to stop: no streak, not halted.

    >>> zero, none = torch.tensor(0), torch.zeros(3)
    >>> baseline = Baseline(mean=none, spread=none, last=none, count=none, lasting=zero)
    >>> after = forgiven(Health(streak=torch.tensor(3), halted=torch.tensor(True), baseline=baseline))
    >>> after.streak, after.halted
    (tensor(0), tensor(False))
    """
    return evolve(health, streak=torch.zeros_like(health.streak), halted=torch.zeros_like(health.halted))


def add_up(
    stats: AccumulationStats, verdict: Tensor, skipped: Tensor, weight: Tensor, micro_batches: Tensor
) -> AccumulationStats:
    """Return the statistics after a step."""
    codes = torch.arange(stats.outcomes.shape[0], device=verdict.device)
    return AccumulationStats(
        micro_batches=stats.micro_batches + micro_batches,
        seen=stats.seen + weight.masked_fill(skipped, 0.0),
        outcomes=stats.outcomes + (codes == verdict),
    )


def is_applied(verdict: Tensor) -> Tensor:
    """Return whether a step with this verdict changes the parameters, [] bool."""
    return verdict <= int(Verdict.GRADIENT_SPIKE)


def ailing(norms: Mapping[str, float]) -> dict[str, list[str]]:
    """Return the names of tensors whose gradient norm is vanishing (below 1e-7), exploding (above 10) or dead (0).

    Frozen parameters have no gradient, and are not among the names. Ailments that no tensor has are left out.

    >>> ailing({"a": 1.0, "b": 1e-9, "c": 0.0})
    {'vanishing': ['b'], 'dead': ['c']}
    """
    found = {ailment: [name for name, value in norms.items() if has(value)] for ailment, has in AILMENTS.items()}
    return {ailment: names for ailment, names in found.items() if names}


def _learn(baseline: Baseline, x: Tensor, least: Tensor, known: Tensor, ok: Tensor, spikes: Tensor) -> Baseline:
    count = baseline.count + known
    share = 1.0 / count.clamp(min=1)
    robust = baseline.count >= _ROBUST_FROM
    step = _held(x - baseline.mean, torch.where(robust, torch.maximum(3.0 * baseline.spread, 0.5 * least), torch.inf))
    jump = _held(x - baseline.last, torch.where(robust, torch.maximum(4.0 * baseline.spread, 0.5 * least), torch.inf))
    mean = baseline.mean + share.clamp(min=1.0 / _MEAN_WINDOW) * step
    spread = baseline.spread + share.clamp(min=1.0 / _SPREAD_WINDOW) * (_NORMAL * jump.abs() - baseline.spread)
    lasting = torch.where(spikes, baseline.lasting + 1, torch.where(ok, 0, baseline.lasting))
    anew = lasting >= _LASTING

    def learned(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(anew, 0, torch.where(known, new, old)).to(old.dtype)

    return Baseline(
        mean=learned(mean, baseline.mean),
        # There is no jump into the first step.
        spread=learned(torch.where(count > 1, spread, 0.0), baseline.spread),
        last=learned(x, baseline.last),
        count=learned(count, baseline.count),
        lasting=torch.where(anew, 0, lasting),
    )


def _held(value: Tensor, most: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(value, -most), most)
