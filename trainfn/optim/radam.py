"""RAdam: Adam that moves by the first moment alone until the second has enough gradients in it.

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2,    t = step + 1
    R = 2 / (1 - b2) - 1,    r = R - 2 t b2^t / (1 - b2^t)             the length of the average in v
    update = - lr m / (1 - b1^t) * (q / (sqrt(v) + eps) if r > 5 else 1)
    q = sqrt((1 - b2^t) (r - 4) (r - 2) R / ((R - 4) (R - 2) r))

References:
    L. Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv:1908.03265, 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, make_shrinkage, with_l2
from trainfn.optim.moments import AdamState, adam_rules, init_moments, next_moments, one_minus_power, power
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import call, check
from trainfn.optim.transform import Schedule, Transform, wide
from trainfn.state import Params


def radam(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    decay: Decay | None = None,
) -> Transform:
    """Return RAdam. Defaults are those of ``torch.optim.RAdam``.

    Args:
        lr: a number, or a schedule of the updates applied.
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

    def update(grads: Params, state: AdamState, params: Params, step: Tensor) -> tuple[Params, AdamState]:
        rate, t = schedule(step), wide(step) + 1.0
        state = next_moments(with_l2(grads, params, l2, decay), state, *betas)
        size1 = rate / one_minus_power(betas[0], t)
        rectified, factor = _rectification(betas[1], t)
        updates = {}
        for name, mu in state.mu.items():
            adaptive = factor.to(mu.dtype) / (state.nu[name].sqrt() + eps)
            scale = torch.where(rectified, adaptive, 1.0)
            updates[name] = -(size1.to(mu.dtype) * (mu * scale) + shrinkage(name, params[name], rate))
        return updates, state

    name = call(
        "radam",
        lr=schedule,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        decay=decay,
    )
    return Transform(init_moments, update, name, schedule)


def _rectification(beta2: float, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether r > 5, [] bool, and the factor q, [] float64, which means something only then."""
    most = 2.0 / (1.0 - beta2) - 1.0
    corrected = one_minus_power(beta2, t)
    length = most - 2.0 * t * power(beta2, t) / corrected
    most = max(most, 5.0)  # r <= R: where R <= 5 nothing is ever rectified, and R = 4 must not divide by 0
    squared = corrected * (length - 4.0) * (length - 2.0) * most / ((most - 4.0) * (most - 2.0) * length)
    return length > 5.0, torch.where(length > 5.0, squared, 1.0).sqrt()
