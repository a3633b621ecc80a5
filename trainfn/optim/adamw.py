"""AdamW: Adam with decoupled weight decay.

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2,    t = step + 1
    update = - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

References:
    D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, 2015.
    I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, 2019.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, make_shrinkage
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


def adamw(
    lr: Hyper = 1e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.01,
    decay: Decay | None = None,
) -> Transform:
    """Return AdamW. Defaults are those of ``torch.optim.AdamW``.

    Args:
        lr: a number, or a schedule of the updates applied; the numbers below may be schedules too.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: fraction of ``lr`` by which each parameter shrinks.
        decay: ``(name, param) -> bool``, which parameters shrink, for example ``matrices_only``; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> import torch
    >>> optimizer, params = adamw(lr=0.1), {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params, torch.tensor(0))
    >>> updates["w"]
    tensor([-0.1010])
    """
    check("adamw", adam_rules(lr, betas, eps, weight_decay, decay))
    schedule, shrinkage = as_schedule(lr), make_shrinkage(weight_decay, decay)

    def update(grads: Params, state: AdamState, params: Params, step: Tensor) -> tuple[Params, AdamState]:
        rate = schedule(step)
        shrink = shrinkage(step, rate)
        state = next_moments(grads, state, betas, step)
        direction = adam_direction(state, rate, step, betas=betas, eps=eps)
        updates = {name: -(direction[name] + shrink(name, params[name])) for name in grads}
        return updates, state

    name = call("adamw", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decay=decay)
    bind = rebind(lambda chosen: adamw(lr, betas=betas, eps=eps, weight_decay=weight_decay, decay=chosen), decay)
    fused = make_fused_adam(torch._fused_adamw_, betas, eps, weight_decay, decay)
    return Transform(partial(init_moments, betas=betas), update, name, schedule, bind=bind, fused=fused)
