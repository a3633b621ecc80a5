"""NAdam: Adam with Nesterov momentum.

    c(t) = b1 (1 - 0.96^(t momentum_decay) / 2),    C(t) = c(1) ... c(t),    t = step + 1
    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
    update = - lr (c(t+1) m / (1 - C(t+1)) + (1 - c(t)) g / (1 - C(t))) / (sqrt(v / (1 - b2^t)) + eps)

Where b1 or momentum_decay is a schedule, c(t+1) reads it one step ahead.

References:
    T. Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop, 2016,
    https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
"""

from __future__ import annotations

from typing import Any

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
from trainfn.optim.settings import RATE, call, check
from trainfn.optim.transform import Hyper, Transform, narrow, rebind, value_at, wide
from trainfn.state import Params
from trainfn.tree import record


@record
class NadamState:
    """The moments, and the product of all momentum coefficients so far, [] float64."""

    moments: AdamState
    product: Tensor


def nadam(
    lr: Hyper = 2e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum_decay: Hyper = 4e-3,
    decoupled_weight_decay: bool = False,
    decay: Decay | None = None,
) -> Transform:
    """Return NAdam. Defaults are those of ``torch.optim.NAdam``.

    Args:
        lr: a number, or a schedule of the updates applied; the numbers below may be schedules too.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: added to the gradient, times the parameter; or as in AdamW, see below.
        momentum_decay: how fast the momentum coefficient rises from half of ``betas[0]`` to the whole.
        decoupled_weight_decay: shrink parameters by ``weight_decay`` times ``lr`` instead.
        decay: ``(name, param) -> bool``, which parameters are decayed; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> import torch
    >>> optimizer, params = nadam(lr=0.1), {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-0.1056])
    """
    check(
        "nadam",
        adam_rules(lr, betas, eps, weight_decay, decay) | {"momentum_decay": (momentum_decay, RATE)},
    )
    schedule = as_schedule(lr)
    l2, decoupled = (0.0, weight_decay) if decoupled_weight_decay else (weight_decay, 0.0)
    shrinkage = make_shrinkage(decoupled, decay)

    def coefficient(step: Tensor) -> Tensor:
        share = 0.5 * power(0.96, (wide(step) + 1.0) * value_at(momentum_decay, step))
        return value_at(betas[0], step) * (1.0 - share)

    def init(params: Params) -> NadamState:
        # The coefficients' product stands in for the sum of the weights in the first moment.
        return NadamState(moments=init_moments(params, (0.0, betas[1])), product=zero_like_step(params) + 1.0)

    def update(grads: Params, state: NadamState, params: Params, step: Tensor) -> tuple[Params, NadamState]:
        rate, least = schedule(step), value_at(eps, step)
        shrink = shrinkage(step, rate)
        grads = with_l2(grads, params, l2, decay, step)
        moments = next_moments(grads, state.moments, betas, step)
        now, ahead = coefficient(step), coefficient(step + 1)
        product = state.product * now
        grad_size = rate * (1.0 - now) / (1.0 - product)
        mu_size = rate * ahead / (1.0 - product * ahead)
        root2 = sum_of_weights(moments.nu_weight, betas[1], step).sqrt()
        updates = {}
        for name, grad in grads.items():
            dtype = grad.dtype
            denominator = moments.nu[name].sqrt() / root2.to(dtype) + narrow(least, dtype)
            ahead_grad = grad_size.to(dtype) * grad + mu_size.to(dtype) * moments.mu[name]
            updates[name] = -(ahead_grad / denominator + shrink(name, params[name]))
        return updates, NadamState(moments=moments, product=product)

    settings: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum_decay": momentum_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
    }
    bind = rebind(lambda chosen: nadam(**settings, decay=chosen), decay)
    return Transform(init, update, call("nadam", **settings, decay=decay), schedule, bind=bind)
