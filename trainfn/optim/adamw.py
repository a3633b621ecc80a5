"""AdamW: Adam with decoupled weight decay.

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2,    t = step + 1
    update = - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

References:
    D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, 2015.
    I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, 2019.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.optim.schedule import as_schedule, describe_schedule
from trainfn.optim.transform import Schedule, Transform, wide
from trainfn.state import Params
from trainfn.tree import record


@record
class AdamState:
    """First and second moments, by parameter name."""

    mu: Params
    nu: Params


def adamw(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Transform:
    """Return AdamW. Defaults are those of ``torch.optim.AdamW``.

    Args:
        lr: a number, or a schedule of the updates applied.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: fraction of ``lr`` by which each parameter shrinks.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> optimizer, params = adamw(lr=0.1), {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params, torch.tensor(0))
    >>> updates["w"]
    tensor([-0.1010])
    """
    beta1, beta2 = betas
    wrong = [
        f"{name}={value}"
        for name, value, fits in (
            ("betas[0]", beta1, 0.0 <= beta1 < 1.0),
            ("betas[1]", beta2, 0.0 <= beta2 < 1.0),
            ("eps", eps, 0.0 <= eps < math.inf),
            ("weight_decay", weight_decay, 0.0 <= weight_decay < math.inf),
        )
        if not fits
    ]
    if wrong:
        raise ConfigError(
            "A setting of adamw is out of range.",
            expected="betas in [0, 1), eps >= 0, weight_decay >= 0",
            got=", ".join(wrong),
        )
    schedule = as_schedule(lr)

    def init(params: Params) -> AdamState:
        return AdamState(
            mu={name: torch.zeros_like(param) for name, param in params.items()},
            nu={name: torch.zeros_like(param) for name, param in params.items()},
        )

    def update(grads: Params, state: AdamState, params: Params, step: Tensor) -> tuple[Params, AdamState]:
        rate, t = schedule(step), wide(step) + 1.0
        # Scalars once a step, and exp(t log b) for b^t: a pow in the elementwise loop halves its speed.
        size1 = rate / _one_minus_power(beta1, t)
        root2 = _one_minus_power(beta2, t).sqrt()
        updates, mu, nu = {}, {}, {}
        for name, grad in grads.items():
            param, dtype = params[name], params[name].dtype
            mu[name] = torch.lerp(state.mu[name], grad, 1.0 - beta1)
            nu[name] = state.nu[name] * beta2 + grad * grad * (1.0 - beta2)
            denominator = nu[name].sqrt() / root2.to(dtype) + eps
            updates[name] = -(size1.to(dtype) * (mu[name] / denominator) + (rate * weight_decay).to(dtype) * param)
        return updates, AdamState(mu=mu, nu=nu)

    name = f"adamw(lr={describe_schedule(schedule)}, betas=({beta1}, {beta2}), eps={eps}, weight_decay={weight_decay})"
    return Transform(init, update, name, schedule)


def _one_minus_power(beta: float, t: Tensor) -> Tensor:
    return 1.0 - torch.exp(t * math.log(beta)) if beta > 0.0 else torch.ones_like(t)
