"""Lion: the sign of a momentum, with decoupled weight decay.

    update = - lr (sign(b1 m + (1 - b1) g) + weight_decay p),    m = b2 m + (1 - b2) g

References:
    X. Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, make_shrinkage
from trainfn.optim.moments import zeros
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import FRACTION, NON_NEGATIVE, PREDICATE, RATE, call, check
from trainfn.optim.transform import Schedule, Transform
from trainfn.state import Params
from trainfn.tree import record


@record
class LionState:
    """Momentum, by parameter name."""

    mu: Params


def lion(
    lr: float | Schedule = 1e-4,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    decay: Decay | None = None,
) -> Transform:
    """Return Lion. Every element moves by ``lr``: use 3 to 10 times less of it than with AdamW, and as much more decay.

    Args:
        lr: a number, or a schedule of the updates applied.
        betas: share of the momentum in the step taken, and in the next momentum, each in [0, 1).
        weight_decay: fraction of ``lr`` by which each parameter shrinks.
        decay: ``(name, param) -> bool``, which parameters shrink; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> optimizer, params = lion(lr=0.1), {"w": torch.ones(3)}
    >>> grads = {"w": torch.tensor([5.0, 0.0, -0.01])}
    >>> optimizer.update(grads, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-0.1000, -0.0000,  0.1000])
    """
    check(
        "lion",
        {
            "lr": (lr, RATE),
            "betas[0]": (betas[0], FRACTION),
            "betas[1]": (betas[1], FRACTION),
            "weight_decay": (weight_decay, NON_NEGATIVE),
            "decay": (decay, PREDICATE),
        },
    )
    schedule, shrinkage = as_schedule(lr), make_shrinkage(weight_decay, decay)

    def init(params: Params) -> LionState:
        return LionState(mu=zeros(params))

    def update(grads: Params, state: LionState, params: Params, step: Tensor) -> tuple[Params, LionState]:
        rate = schedule(step)
        updates, mu = {}, {}
        for name, grad in grads.items():
            sign = torch.sign(torch.lerp(state.mu[name], grad, 1.0 - betas[0]))
            updates[name] = -(rate.to(grad.dtype) * sign + shrinkage(name, params[name], rate))
            mu[name] = torch.lerp(state.mu[name], grad, 1.0 - betas[1])
        return updates, LionState(mu=mu)

    name = call("lion", lr=schedule, betas=betas, weight_decay=weight_decay, decay=decay)
    return Transform(init, update, name, schedule)
