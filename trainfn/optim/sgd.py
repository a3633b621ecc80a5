"""Stochastic gradient descent with momentum.

    g = g + weight_decay p,    b = momentum b + g
    update = - lr (g + momentum b  if nesterov else  b)

References:
    I. Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.optim.schedule import as_schedule, describe_schedule
from trainfn.optim.transform import Schedule, Transform
from trainfn.state import Params
from trainfn.tree import record


@record
class SGDState:
    """Momentum buffers by parameter name; empty without momentum."""

    momentum: Params


def sgd(lr: float | Schedule, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Transform:
    """Return SGD, as ``torch.optim.SGD`` without dampening.

    Args:
        lr: a number, or a schedule of the updates applied.
        momentum: decay rate of the buffer, in [0, 1).
        nesterov: look ahead along the buffer.
        weight_decay: added to the gradient, times the parameter (L2, not decoupled).

    Raises:
        ConfigError: a setting is out of range.

    >>> optimizer, params = sgd(lr=0.5), {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params, torch.tensor(0))[0]["w"]
    tensor([-0.5000])
    """
    if not (0.0 <= momentum < 1.0 and 0.0 <= weight_decay < math.inf) or (nesterov and momentum == 0.0):
        raise ConfigError(
            "A setting of sgd is out of range.",
            expected="momentum in [0, 1), above 0 for nesterov; weight_decay >= 0",
            got=f"{momentum=}, {nesterov=}, {weight_decay=}",
        )
    schedule = as_schedule(lr)

    def init(params: Params) -> SGDState:
        kept = params.items() if momentum else ()
        return SGDState(momentum={name: torch.zeros_like(param) for name, param in kept})

    def update(grads: Params, state: SGDState, params: Params, step: Tensor) -> tuple[Params, SGDState]:
        rate = schedule(step)
        updates, buffers = {}, {}
        for name, grad in grads.items():
            direction = grad + weight_decay * params[name] if weight_decay else grad
            if momentum:
                buffers[name] = state.momentum[name] * momentum + direction
                direction = direction + momentum * buffers[name] if nesterov else buffers[name]
            updates[name] = direction * -rate.to(grad.dtype)
        return updates, SGDState(momentum=buffers)

    settings = f"momentum={momentum}, nesterov={nesterov}, weight_decay={weight_decay}"
    return Transform(init, update, f"sgd(lr={describe_schedule(schedule)}, {settings})", schedule)
