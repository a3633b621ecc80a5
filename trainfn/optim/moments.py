"""First and second moments of the gradient, the state that Adam and its descendants share.

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2

References:
    D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, 2015.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainfn.optim.decay import Decay
from trainfn.optim.settings import FRACTION, NON_NEGATIVE, PREDICATE, RATE, Rules
from trainfn.optim.transform import Schedule
from trainfn.state import Params
from trainfn.tree import record


@record
class AdamState:
    """First and second moments, by parameter name."""

    mu: Params
    nu: Params


def zeros(params: Params) -> Params:
    """Return a zero for every element of every parameter."""
    return {name: torch.zeros_like(param) for name, param in params.items()}


def init_moments(params: Params) -> AdamState:
    """Return the moments before the first step."""
    return AdamState(mu=zeros(params), nu=zeros(params))


def next_moments(grads: Params, state: AdamState, beta1: float, beta2: float) -> AdamState:
    """Return the moments with one more gradient in them."""
    return AdamState(
        mu={name: torch.lerp(state.mu[name], grad, 1.0 - beta1) for name, grad in grads.items()},
        nu={name: next_square(state.nu[name], grad, beta2) for name, grad in grads.items()},
    )


def next_square(nu: Tensor, grad: Tensor, beta: float) -> Tensor:
    """Return the running mean of squared gradients with one more in it."""
    return nu * beta + grad * grad * (1.0 - beta)


def adam_direction(state: AdamState, scale: Tensor, t: Tensor, *, betas: tuple[float, float], eps: float) -> Params:
    """Return ``scale (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`` for every parameter.

    Args:
        state: the moments, the gradient of step ``t`` included.
        scale: [] float64.
        t: [] float64, gradients in the moments; 1 at the first step.
        betas: decay rates that the moments were made with.
        eps: added to the root of the second moment.
    """
    # Scalars once a step: what divides a moment is not computed for each of its elements.
    size1, root2 = scale / one_minus_power(betas[0], t), one_minus_power(betas[1], t).sqrt()
    direction = {}
    for name, mu in state.mu.items():
        denominator = state.nu[name].sqrt() / root2.to(mu.dtype) + eps
        direction[name] = size1.to(mu.dtype) * (mu / denominator)
    return direction


def power(base: float, t: Tensor) -> Tensor:
    """Return ``base^t`` for a base >= 0 and t > 0, as exp(t log b): a pow in the elementwise loop halves its speed."""
    return torch.exp(t * math.log(base)) if base > 0.0 else torch.zeros_like(t)


def one_minus_power(base: float, t: Tensor) -> Tensor:
    """Return ``1 - base^t``, which corrects the bias of a running mean that began at 0."""
    return 1.0 - power(base, t)


def adam_rules(
    lr: float | Schedule, betas: tuple[float, float], eps: float, weight_decay: float, decay: Decay | None
) -> Rules:
    """Return the settings that Adam and its descendants share, with what they have to be."""
    return {
        "lr": (lr, RATE),
        "betas[0]": (betas[0], FRACTION),
        "betas[1]": (betas[1], FRACTION),
        "eps": (eps, NON_NEGATIVE),
        "weight_decay": (weight_decay, NON_NEGATIVE),
        "decay": (decay, PREDICATE),
    }
