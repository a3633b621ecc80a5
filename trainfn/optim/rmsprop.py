"""RMSprop: gradients divided by the root of their running mean square.

    g = g + weight_decay p,    v = alpha v + (1 - alpha) g^2,    a = alpha a + (1 - alpha) g
    d = g / (sqrt(v - a^2  if centered else  v) + eps)
    b = momentum b + d,    update = - lr b

References:
    T. Tieleman, G. Hinton, "Lecture 6.5: RMSprop", Neural Networks for Machine Learning, 2012.
    A. Graves, "Generating Sequences With Recurrent Neural Networks", arXiv:1308.0850, 2013 (centered).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainfn.optim.decay import Decay, with_l2
from trainfn.optim.moments import next_mean, next_square, zeros
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import PREDICATE, RATE, SHARE, call, check
from trainfn.optim.transform import Hyper, Transform, narrow, rebind, value_at
from trainfn.state import Params
from trainfn.tree import record


@record
class RMSpropState:
    """Mean squares, means (empty unless centered) and momentum buffers (empty without momentum), by parameter name."""

    nu: Params
    mu: Params
    momentum: Params


def rmsprop(
    lr: Hyper = 1e-2,
    *,
    alpha: Hyper = 0.99,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum: Hyper = 0.0,
    centered: bool = False,
    decay: Decay | None = None,
) -> Transform:
    """Return RMSprop. Defaults are those of ``torch.optim.RMSprop``.

    Args:
        lr: a number, or a schedule of the updates applied; the numbers below may be schedules too.
        alpha: decay rate of the mean square, in [0, 1).
        eps: added to its root.
        weight_decay: added to the gradient, times the parameter.
        momentum: decay rate of the buffer, in [0, 1).
        centered: divide by the standard deviation instead of the root mean square.
        decay: ``(name, param) -> bool``, which parameters are decayed; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> import torch
    >>> optimizer, params = rmsprop(lr=0.1), {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-1.0000])
    """
    check(
        "rmsprop",
        {
            "lr": (lr, RATE),
            "alpha": (alpha, SHARE),
            "eps": (eps, RATE),
            "weight_decay": (weight_decay, RATE),
            "momentum": (momentum, SHARE),
            "decay": (decay, PREDICATE),
        },
    )
    schedule = as_schedule(lr)

    def init(params: Params) -> RMSpropState:
        return RMSpropState(
            nu=zeros(params), mu=zeros(params) if centered else {}, momentum=zeros(params) if momentum else {}
        )

    def update(grads: Params, state: RMSpropState, params: Params, step: Tensor) -> tuple[Params, RMSpropState]:
        rate, least = schedule(step), value_at(eps, step)
        memory, kept = value_at(alpha, step), value_at(momentum, step)
        nu, mu, buffers, updates = {}, {}, {}, {}
        for name, grad in with_l2(grads, params, weight_decay, decay, step).items():
            spread = nu[name] = next_square(state.nu[name], grad, memory)
            if centered:
                mu[name] = next_mean(state.mu[name], grad, memory)
                # A variance; rounding takes that of a constant gradient below 0, and its root would be NaN.
                spread = (spread - mu[name] * mu[name]).clamp(min=0.0)
            direction = grad / (spread.sqrt() + narrow(least, grad.dtype))
            if momentum:
                direction = buffers[name] = state.momentum[name] * narrow(kept, grad.dtype) + direction
            updates[name] = direction * -rate.to(grad.dtype)
        return updates, RMSpropState(nu=nu, mu=mu, momentum=buffers)

    settings: dict[str, Any] = {
        "lr": lr,
        "alpha": alpha,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "centered": centered,
    }
    bind = rebind(lambda chosen: rmsprop(**settings, decay=chosen), decay)
    return Transform(init, update, call("rmsprop", **settings, decay=decay), schedule, bind=bind)
