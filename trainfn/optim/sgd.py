"""Stochastic gradient descent with momentum.

    g = g + weight_decay p,    b = momentum b + g
    update = - lr (g + momentum b  if nesterov else  b)

References:
    I. Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, by_decay, with_l2
from trainfn.optim.moments import zeros
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import PREDICATE, RATE, SHARE, Rule, call, check
from trainfn.optim.transform import Hyper, Transform, narrow, rebind, value_at
from trainfn.state import Params
from trainfn.tree import record


@record
class SGDState:
    """Momentum buffers by parameter name; empty without momentum."""

    momentum: Params


def sgd(
    lr: Hyper,
    *,
    momentum: Hyper = 0.0,
    nesterov: bool = False,
    weight_decay: Hyper = 0.0,
    decay: Decay | None = None,
) -> Transform:
    """Return SGD, as ``torch.optim.SGD`` without dampening.

    Args:
        lr: a number, or a schedule of the updates applied; the numbers below may be schedules too.
        momentum: decay rate of the buffer, in [0, 1).
        nesterov: look ahead along the buffer.
        weight_decay: added to the gradient, times the parameter (L2, not decoupled).
        decay: ``(name, param) -> bool``, which parameters are decayed; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> import torch
    >>> optimizer, params = sgd(lr=0.5), {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-0.5000])
    """
    check(
        "sgd",
        {
            "lr": (lr, RATE),
            "momentum": (momentum, SHARE),
            "nesterov": (nesterov, Rule("with a momentum above 0 only", lambda value: not value or momentum != 0.0)),
            "weight_decay": (weight_decay, RATE),
            "decay": (decay, PREDICATE),
        },
    )
    schedule = as_schedule(lr)

    def init(params: Params) -> SGDState:
        return SGDState(momentum=zeros(params) if momentum else {})

    def update(grads: Params, state: SGDState, params: Params, step: Tensor) -> tuple[Params, SGDState]:
        rate, kept = schedule(step), value_at(momentum, step)
        updates, buffers = {}, {}
        for name, direction in with_l2(grads, params, weight_decay, decay, step).items():
            if momentum:
                share = narrow(kept, direction.dtype)
                buffers[name] = state.momentum[name] * share + direction
                direction = direction + share * buffers[name] if nesterov else buffers[name]
            updates[name] = direction * -rate.to(direction.dtype)
        return updates, SGDState(momentum=buffers)

    def fused(step: Tensor, lr: Tensor, skipped: Tensor) -> Callable[[Params, Params, SGDState], None]:
        kernel: Any = torch._fused_sgd_
        rate, found = lr.float(), skipped.float()

        def write(params: Params, grads: Params, state: SGDState) -> None:
            for names, share in by_decay(params, cast(float, weight_decay), decay):
                kernel(
                    [params[name] for name in names],
                    [grads[name] for name in names],
                    [state.momentum[name] for name in names] if momentum else [],
                    weight_decay=share,
                    momentum=momentum,
                    lr=rate,
                    dampening=0.0,
                    nesterov=nesterov,
                    maximize=False,
                    is_first_step=False,
                    grad_scale=None,
                    found_inf=found,
                )

        return write

    name = call("sgd", lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, decay=decay)
    bind = rebind(
        lambda chosen: sgd(lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, decay=chosen), decay
    )
    has_kernel = not callable(momentum) and not callable(weight_decay)
    return Transform(init, update, name, schedule, bind=bind, fused=fused if has_kernel else None)
