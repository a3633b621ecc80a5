"""Lion: the sign of a momentum, with decoupled weight decay.

    update = - lr (sign(b1 m + (1 - b1) g) + weight_decay p),    m = b2 m + (1 - b2) g

References:
    X. Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, make_shrinkage
from trainfn.optim.moments import next_mean, zeros
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import PREDICATE, RATE, call, check, pair_of_shares
from trainfn.optim.transform import Hyper, Transform, rebind, value_at
from trainfn.state import Params
from trainfn.tree import record


@record
class LionState:
    """Momentum, by parameter name."""

    mu: Params


def lion(
    lr: Hyper = 1e-4,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.99),
    weight_decay: Hyper = 0.0,
    decay: Decay | None = None,
) -> Transform:
    """Return Lion. Every element moves by ``lr``: use 3 to 10 times less of it than with AdamW, and as much more decay.

    Args:
        lr: a number, or a schedule of the updates applied; the numbers below may be schedules too.
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
            **pair_of_shares("betas", betas),
            "weight_decay": (weight_decay, RATE),
            "decay": (decay, PREDICATE),
        },
    )
    schedule, shrinkage = as_schedule(lr), make_shrinkage(weight_decay, decay)

    def init(params: Params) -> LionState:
        return LionState(mu=zeros(params))

    def update(grads: Params, state: LionState, params: Params, step: Tensor) -> tuple[Params, LionState]:
        rate = schedule(step)
        shrink = shrinkage(step, rate)
        beta1, beta2 = value_at(betas[0], step), value_at(betas[1], step)
        updates, mu = {}, {}
        for name, grad in grads.items():
            sign = torch.sign(next_mean(state.mu[name], grad, beta1))
            updates[name] = -(rate.to(grad.dtype) * sign + shrink(name, params[name]))
            mu[name] = next_mean(state.mu[name], grad, beta2)
        return updates, LionState(mu=mu)

    name = call("lion", lr=lr, betas=betas, weight_decay=weight_decay, decay=decay)
    bind = rebind(lambda chosen: lion(lr, betas=betas, weight_decay=weight_decay, decay=chosen), decay)
    return Transform(init, update, name, schedule, bind=bind)
