"""RAdam: Adam that moves by the first moment alone until the second has enough gradients in it.

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2,    t = step + 1
    R = 2 / (1 - b2) - 1,    r = R - 2 t b2^t / (1 - b2^t)             the length of the average in v
    update = - lr m / (1 - b1^t) * (q / (sqrt(v) + eps) if r > 5 else 1)
    q = sqrt((1 - b2^t) (r - 4) (r - 2) R / ((R - 4) (R - 2) r))

That r is 1 + 2 a, with a the mean age of the squares in v, as they are weighted. Where b2 is a schedule, a is carried
along, 1 - b2^t is what the weights sum to, and R is the larger of r and 2 / (1 - b2) - 1: an average that b2 has left
longer than it would make it needs no correction.

References:
    L. Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv:1908.03265, 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, make_shrinkage, with_l2
from trainfn.optim.moments import (
    AdamState,
    adam_rules,
    init_moments,
    next_moments,
    power,
    sum_of_weights,
    zero_like_step,
)
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import call, check
from trainfn.optim.transform import Hyper, Scalar, Transform, narrow, rebind, value_at, wide
from trainfn.state import Params
from trainfn.tree import evolve


def radam(
    lr: Hyper = 1e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decoupled_weight_decay: bool = False,
    decay: Decay | None = None,
) -> Transform:
    """Return RAdam. Defaults are those of ``torch.optim.RAdam``.

    Args:
        lr: a number, or a schedule of the updates applied; the numbers below may be schedules too.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: added to the gradient, times the parameter; or as in AdamW, see below.
        decoupled_weight_decay: shrink parameters by ``weight_decay`` times ``lr`` instead.
        decay: ``(name, param) -> bool``, which parameters are decayed; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> optimizer, params = radam(lr=0.1), {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.full((1,), 3.0)}, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-0.3000])
    """
    check("radam", adam_rules(lr, betas, eps, weight_decay, decay))
    schedule = as_schedule(lr)
    l2, decoupled = (0.0, weight_decay) if decoupled_weight_decay else (weight_decay, 0.0)
    shrinkage = make_shrinkage(decoupled, decay)

    def init(params: Params) -> AdamState:
        moments = init_moments(params, betas)
        return evolve(moments, nu_age=zero_like_step(params)) if callable(betas[1]) else moments

    def update(grads: Params, state: AdamState, params: Params, step: Tensor) -> tuple[Params, AdamState]:
        rate, least = schedule(step), value_at(eps, step)
        shrink = shrinkage(step, rate)
        state = next_moments(with_l2(grads, params, l2, decay, step), state, betas, step)
        size1 = rate / sum_of_weights(state.mu_weight, betas[0], step)
        rectified, factor = _rectification(state, betas[1], step)
        updates = {}
        for name, mu in state.mu.items():
            adaptive = factor.to(mu.dtype) / (state.nu[name].sqrt() + narrow(least, mu.dtype))
            scale = torch.where(rectified, adaptive, 1.0)
            updates[name] = -(size1.to(mu.dtype) * (mu * scale) + shrink(name, params[name]))
        return updates, state

    settings: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
    }
    bind = rebind(lambda chosen: radam(**settings, decay=chosen), decay)
    return Transform(init, update, call("radam", **settings, decay=decay), schedule, bind=bind)


def _rectification(state: AdamState, beta2: Hyper, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether r > 5, [] bool, and the factor q, [] float64, which means something only then."""
    corrected = sum_of_weights(state.nu_weight, beta2, step)
    # r <= R: where R <= 5 nothing is ever rectified, and R = 4 must not divide by 0.
    if callable(beta2):
        assert state.nu_age is not None, "a scheduled second decay rate carries the age of its squares"
        length = 1.0 + 2.0 * state.nu_age / corrected
        most: Scalar = torch.maximum(2.0 / (1.0 - beta2(step)) - 1.0, length).clamp(min=5.0)
    else:
        t, limit = wide(step) + 1.0, 2.0 / (1.0 - beta2) - 1.0
        length = limit - 2.0 * t * power(beta2, t) / corrected
        most = max(limit, 5.0)
    squared = corrected * (length - 4.0) * (length - 2.0) * most / ((most - 4.0) * (most - 2.0) * length)
    return length > 5.0, torch.where(length > 5.0, squared, 1.0).sqrt()
