"""Adagrad: gradients divided by the root of the sum of all their squares.

    g = g + weight_decay p,    s = s + g^2
    update = - lr / (1 + step lr_decay) g / (sqrt(s) + eps)

References:
    J. Duchi, E. Hazan, Y. Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
    JMLR 12, 2011.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, with_l2
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import NON_NEGATIVE, PREDICATE, RATE, call, check
from trainfn.optim.transform import Hyper, Transform, narrow, rebind, value_at, wide
from trainfn.state import Params
from trainfn.tree import record


@record
class AdagradState:
    """Sums of squared gradients, by parameter name."""

    total: Params


def adagrad(
    lr: Hyper = 1e-2,
    *,
    lr_decay: Hyper = 0.0,
    eps: Hyper = 1e-10,
    weight_decay: Hyper = 0.0,
    initial_accumulator_value: float = 0.0,
    decay: Decay | None = None,
) -> Transform:
    """Return Adagrad. Defaults are those of ``torch.optim.Adagrad``.

    Args:
        lr: a number, or a schedule of the updates applied; the numbers below may be schedules too.
        lr_decay: how fast the learning rate falls, on top of ``lr``.
        eps: added to the root of the sum.
        weight_decay: added to the gradient, times the parameter.
        initial_accumulator_value: what each sum begins with, a number.
        decay: ``(name, param) -> bool``, which parameters are decayed; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> optimizer, params = adagrad(lr=0.1), {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.full((1,), 5.0)}, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-0.1000])
    """
    check(
        "adagrad",
        {
            "lr": (lr, RATE),
            "lr_decay": (lr_decay, RATE),
            "eps": (eps, RATE),
            "weight_decay": (weight_decay, RATE),
            "initial_accumulator_value": (initial_accumulator_value, NON_NEGATIVE),
            "decay": (decay, PREDICATE),
        },
    )
    schedule = as_schedule(lr)

    def falling(step: Tensor) -> Tensor:
        return schedule(step) / (1.0 + wide(step) * value_at(lr_decay, step))

    def init(params: Params) -> AdagradState:
        return AdagradState(
            total={name: torch.full_like(param, initial_accumulator_value) for name, param in params.items()}
        )

    def update(grads: Params, state: AdagradState, params: Params, step: Tensor) -> tuple[Params, AdagradState]:
        rate, least = falling(step), value_at(eps, step)
        total, updates = {}, {}
        for name, grad in with_l2(grads, params, weight_decay, decay, step).items():
            total[name] = state.total[name] + grad * grad
            updates[name] = grad / (total[name].sqrt() + narrow(least, grad.dtype)) * -rate.to(grad.dtype)
        return updates, AdagradState(total=total)

    settings: dict[str, Any] = {
        "lr": lr,
        "lr_decay": lr_decay,
        "eps": eps,
        "weight_decay": weight_decay,
        "initial_accumulator_value": initial_accumulator_value,
    }
    bind = rebind(lambda chosen: adagrad(**settings, decay=chosen), decay)
    return Transform(init, update, call("adagrad", **settings, decay=decay), falling, bind=bind)
