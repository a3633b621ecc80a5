"""NAdam: Adam with Nesterov momentum.

    c(t) = b1 (1 - 0.96^(t momentum_decay) / 2),    C(t) = c(1) ... c(t),    t = step + 1
    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
    update = - lr (c(t+1) m / (1 - C(t+1)) + (1 - c(t)) g / (1 - C(t))) / (sqrt(v / (1 - b2^t)) + eps)

References:
    T. Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop, 2016,
    https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, make_shrinkage, with_l2
from trainfn.optim.moments import AdamState, adam_rules, init_moments, next_moments, one_minus_power, power
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import NON_NEGATIVE, call, check
from trainfn.optim.transform import Schedule, Transform, wide
from trainfn.state import Params
from trainfn.tree import record


@record
class NadamState:
    """The moments, and the product of all momentum coefficients so far, [] float64."""

    moments: AdamState
    product: Tensor


def nadam(
    lr: float | Schedule = 2e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    decay: Decay | None = None,
) -> Transform:
    """Return NAdam. Defaults are those of ``torch.optim.NAdam``.

    Args:
        lr: a number, or a schedule of the updates applied.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: added to the gradient, times the parameter; or as in AdamW, see below.
        momentum_decay: how fast the momentum coefficient rises from half of ``betas[0]`` to the whole.
        decoupled_weight_decay: shrink parameters by ``weight_decay`` times ``lr`` instead.
        decay: ``(name, param) -> bool``, which parameters are decayed; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> optimizer, params = nadam(lr=0.1), {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-0.1056])
    """
    check(
        "nadam",
        adam_rules(lr, betas, eps, weight_decay, decay) | {"momentum_decay": (momentum_decay, NON_NEGATIVE)},
    )
    schedule = as_schedule(lr)
    l2, decoupled = (0.0, weight_decay) if decoupled_weight_decay else (weight_decay, 0.0)
    shrinkage = make_shrinkage(decoupled, decay)

    def coefficient(t: Tensor) -> Tensor:
        return betas[0] * (1.0 - 0.5 * power(0.96, t * momentum_decay))

    def init(params: Params) -> NadamState:
        device = next(iter(params.values())).device if params else None
        return NadamState(moments=init_moments(params), product=wide(torch.ones((), device=device)))

    def update(grads: Params, state: NadamState, params: Params, step: Tensor) -> tuple[Params, NadamState]:
        rate, t = schedule(step), wide(step) + 1.0
        grads = with_l2(grads, params, l2, decay)
        moments = next_moments(grads, state.moments, *betas)
        now, ahead = coefficient(t), coefficient(t + 1.0)
        product = state.product * now
        grad_size = rate * (1.0 - now) / (1.0 - product)
        mu_size = rate * ahead / (1.0 - product * ahead)
        root2 = one_minus_power(betas[1], t).sqrt()
        updates = {}
        for name, grad in grads.items():
            dtype = grad.dtype
            denominator = moments.nu[name].sqrt() / root2.to(dtype) + eps
            ahead_grad = grad_size.to(dtype) * grad + mu_size.to(dtype) * moments.mu[name]
            updates[name] = -(ahead_grad / denominator + shrinkage(name, params[name], rate))
        return updates, NadamState(moments=moments, product=product)

    name = call(
        "nadam",
        lr=schedule,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        momentum_decay=momentum_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        decay=decay,
    )
    return Transform(init, update, name, schedule)
