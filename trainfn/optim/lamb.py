"""LAMB: AdamW whose step in each tensor is as long as the tensor, for very large batches.

    r = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p,    m, v, t as in Adam
    update = - lr |p| / |r| r,    with 1 in place of |p| / |r| where either norm is 0

References:
    Y. You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv:1904.00962, 2020.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, make_shrinkage
from trainfn.optim.moments import AdamState, adam_direction, adam_rules, init_moments, next_moments
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import call, check
from trainfn.optim.transform import Hyper, Transform, wide
from trainfn.state import Params


def lamb(
    lr: Hyper = 1e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-6,
    weight_decay: Hyper = 0.01,
    decay: Decay | None = None,
) -> Transform:
    """Return LAMB. Not elementwise: the norms are those of one parameter each.

    Args:
        lr: a number, or a schedule of the updates applied, as may be the numbers below: the step's length as a fraction
            of the parameter's.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: share of the parameter in the direction of the step.
        decay: ``(name, param) -> bool``, which parameters are decayed; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> optimizer, params = lamb(lr=0.1, weight_decay=0.0), {"w": torch.tensor([3.0, 4.0])}
    >>> grads = {"w": torch.tensor([0.2, 0.7])}
    >>> optimizer.update(grads, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-0.3536, -0.3536])
    """
    check("lamb", adam_rules(lr, betas, eps, weight_decay, decay))
    schedule, shrinkage = as_schedule(lr), make_shrinkage(weight_decay, decay)

    def update(grads: Params, state: AdamState, params: Params, step: Tensor) -> tuple[Params, AdamState]:
        rate = schedule(step)
        one = torch.ones_like(wide(step))
        shrink = shrinkage(step, one)
        state = next_moments(grads, state, betas, step)
        updates = {}
        for name, adapted in adam_direction(state, one, step, betas=betas, eps=eps).items():
            direction = adapted + shrink(name, params[name])
            updates[name] = direction * -(rate * _trust(params[name], direction)).to(direction.dtype)
        return updates, state

    name = call("lamb", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decay=decay)
    return Transform(partial(init_moments, betas=betas), update, name, schedule)


def _trust(param: Tensor, direction: Tensor) -> Tensor:
    length, stride = wide(torch.linalg.vector_norm(param)), wide(torch.linalg.vector_norm(direction))
    return torch.where((length > 0.0) & (stride > 0.0), length / stride, 1.0)
