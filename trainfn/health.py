"""Whether a step may be applied: decided on the device, without a sync, before anything is changed.

The loop reads the verdict late. Until it does, nothing is lost: a step that is not ``OK`` leaves parameters, moments,
buffers and EMA as they were, bit for bit.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from trainfn.state import Health


class Verdict(enum.IntEnum):
    """A step's outcome, as a code with a sentence."""

    OK = 0
    NON_FINITE_LOSS = 1
    NON_FINITE_GRADIENT = 2
    EMPTY = 3

    @property
    def sentence(self) -> str:
        """What happened, for people.

        >>> Verdict.EMPTY.sentence
        'nothing in the batch counted (weight 0): the step was skipped'
        """
        return _SENTENCES[self]


_SENTENCES = {
    Verdict.OK: "the step was applied",
    Verdict.NON_FINITE_LOSS: "the loss is NaN or infinite: the step was skipped",
    Verdict.NON_FINITE_GRADIENT: "a gradient is NaN or infinite: the step was skipped",
    Verdict.EMPTY: "nothing in the batch counted (weight 0): the step was skipped",
}


def judge(total: Tensor, weight: Tensor, grad_norm: Tensor) -> Tensor:
    """Return the verdict on a step, [] int64; a non-finite loss is named before the gradients it spoils.

    Args:
        total: summed loss, [].
        weight: what it is a sum over, [].
        grad_norm: norm of the summed gradients, [], finite exactly when every element is.

    >>> judge(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(float("inf")))
    tensor(2)
    """
    verdict = torch.where(weight > 0, int(Verdict.OK), int(Verdict.EMPTY))
    verdict = torch.where(torch.isfinite(grad_norm), verdict, int(Verdict.NON_FINITE_GRADIENT))
    return torch.where(torch.isfinite(total) & torch.isfinite(weight), verdict, int(Verdict.NON_FINITE_LOSS))


def track(health: Health, verdict: Tensor) -> Health:
    """Return the counters after a step with this verdict. An empty batch neither adds to a streak nor ends it.

    >>> zero = torch.tensor(0)
    >>> track(Health(streak=zero, skipped=zero), torch.tensor(2))
    Health(streak=tensor(1), skipped=tensor(1))
    """
    bad = (verdict == int(Verdict.NON_FINITE_LOSS)) | (verdict == int(Verdict.NON_FINITE_GRADIENT))
    ended = verdict == int(Verdict.OK)
    return Health(
        streak=torch.where(ended, 0, health.streak + bad),
        skipped=health.skipped + bad,
    )
