"""Adam, with weight decay as an L2 penalty.

    g = g + weight_decay p,    t = step + 1
    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
    update = - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

References:
    D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, 2015.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, with_l2
from trainfn.optim.moments import (
    AdamState,
    adam_direction,
    adam_rules,
    init_moments,
    make_fused_adam,
    next_moments,
)
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import call, check
from trainfn.optim.transform import Hyper, Transform, rebind
from trainfn.state import Params


def adam(
    lr: Hyper = 1e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decay: Decay | None = None,
) -> Transform:
    """Return Adam. Defaults are those of ``torch.optim.Adam``; for decay that does not pass the moments see ``adamw``.

    Args:
        lr: a number, or a schedule of the updates applied; the numbers below may be schedules too.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: added to the gradient, times the parameter.
        decay: ``(name, param) -> bool``, which parameters are decayed; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> import torch
    >>> optimizer, params = adam(lr=0.1), {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-0.1000])
    """
    check("adam", adam_rules(lr, betas, eps, weight_decay, decay))
    schedule = as_schedule(lr)

    def update(grads: Params, state: AdamState, params: Params, step: Tensor) -> tuple[Params, AdamState]:
        state = next_moments(with_l2(grads, params, weight_decay, decay, step), state, betas, step)
        return adam_direction(state, -schedule(step), step, betas=betas, eps=eps), state

    name = call("adam", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decay=decay)
    bind = rebind(lambda chosen: adam(lr, betas=betas, eps=eps, weight_decay=weight_decay, decay=chosen), decay)
    fused = make_fused_adam(torch._fused_adam_, betas, eps, weight_decay, decay)
    return Transform(partial(init_moments, betas=betas), update, name, schedule, bind=bind, fused=fused)
