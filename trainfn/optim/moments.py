"""First and second moments of the gradient, the state that Adam and its descendants share.

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2

Each begins at 0, so that after t steps its weights sum to 1 - b^t, by which it is divided. Where b is a schedule they
sum to 1 - b(1) ... b(t), and that sum is carried along, as the moment of a gradient that is always 1:

    w = b w + (1 - b)

References:
    D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, by_decay
from trainfn.optim.settings import PREDICATE, RATE, Rules, pair_of_shares
from trainfn.optim.transform import Fused, Hyper, Scalar, narrow, value_at, wide
from trainfn.state import Params
from trainfn.tree import record


@record
class AdamState:
    """First and second moments, by parameter name.

    Attributes:
        mu: first moments.
        nu: second moments.
        mu_weight: what the weights in ``mu`` sum to, [] float64; None unless the decay rate is a schedule.
        nu_weight: what the weights in ``nu`` sum to, likewise.
        nu_age: what weight times age sums to over the squares in ``nu``, in steps, [] float64; None except in RAdam,
            likewise.
    """

    mu: Params
    nu: Params
    mu_weight: Tensor | None = None
    nu_weight: Tensor | None = None
    nu_age: Tensor | None = None


def zeros(params: Params) -> Params:
    """Return a zero for every element of every parameter."""
    return {name: torch.zeros_like(param) for name, param in params.items()}


def zero_like_step(params: Params) -> Tensor:
    """Return a 0 of the precision of schedules, on the parameters' device, [] float64.

    >>> zero_like_step({"w": torch.ones(2)})
    tensor(0., dtype=torch.float64)
    """
    device = next(iter(params.values())).device if params else None
    return wide(torch.zeros((), device=device))


def init_moments(params: Params, betas: tuple[Hyper, Hyper]) -> AdamState:
    """Return the moments before the first step."""
    mu_weight, nu_weight = [zero_like_step(params) if callable(beta) else None for beta in betas]
    return AdamState(mu=zeros(params), nu=zeros(params), mu_weight=mu_weight, nu_weight=nu_weight)


def next_moments(grads: Params, state: AdamState, betas: tuple[Hyper, Hyper], step: Tensor) -> AdamState:
    """Return the moments with one more gradient in them."""
    beta1, beta2 = value_at(betas[0], step), value_at(betas[1], step)
    return AdamState(
        mu={name: next_mean(state.mu[name], grad, beta1) for name, grad in grads.items()},
        nu={name: next_square(state.nu[name], grad, beta2) for name, grad in grads.items()},
        mu_weight=_next_weight(state.mu_weight, beta1),
        nu_weight=_next_weight(state.nu_weight, beta2),
        nu_age=_next_age(state.nu_age, state.nu_weight, beta2),
    )


def next_mean(mean: Tensor, newest: Tensor, beta: Scalar) -> Tensor:
    """Return the running mean with one more value in it.

    >>> next_mean(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), 0.75)
    tensor([0.2500, 1.0000])
    """
    return torch.lerp(mean, newest, narrow(1.0 - beta, mean.dtype))


def next_square(nu: Tensor, grad: Tensor, beta: Scalar) -> Tensor:
    """Return the running mean of squared gradients with one more in it."""
    if isinstance(beta, Tensor):
        # In bfloat16 a tensor of 0.999 is 1.0, while 1 - 0.999 keeps three digits.
        return next_mean(nu, grad * grad, beta)
    return nu * beta + grad * grad * (1.0 - beta)


def adam_direction(state: AdamState, scale: Tensor, step: Tensor, *, betas: tuple[Hyper, Hyper], eps: Hyper) -> Params:
    """Return ``scale (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`` for every parameter.

    Args:
        state: the moments, the gradient of this step included.
        scale: [] float64.
        step: [] int64, updates applied before this one: t - 1.
        betas: decay rates that the moments were made with.
        eps: added to the root of the second moment.
    """
    # Scalars once a step, and one division an element: (s1 / d1) m / (sqrt(v) / r2 + eps) with both sides times r2.
    root2 = sum_of_weights(state.nu_weight, betas[1], step).sqrt()
    size = scale / sum_of_weights(state.mu_weight, betas[0], step) * root2
    least = value_at(eps, step) * root2
    direction = {}
    for name, mu in state.mu.items():
        denominator = state.nu[name].sqrt() + least.to(mu.dtype)
        direction[name] = size.to(mu.dtype) * (mu / denominator)
    return direction


def sum_of_weights(carried: Tensor | None, beta: Hyper, step: Tensor) -> Tensor:
    """Return what the weights of a moment sum to: what was carried along, or ``1 - beta^t`` for a plain number.

    >>> float(sum_of_weights(None, 0.5, torch.tensor(1)))
    0.75
    """
    if callable(beta):
        assert carried is not None, "a scheduled decay rate carries the sum of its weights"
        return carried
    return one_minus_power(beta, wide(step) + 1.0)


def power(base: float, t: Tensor) -> Tensor:
    """Return ``base^t`` for a base >= 0 and t > 0, as exp(t log b): a pow in the elementwise loop halves its speed."""
    return torch.exp(t * math.log(base)) if base > 0.0 else torch.zeros_like(t)


def one_minus_power(base: float, t: Tensor) -> Tensor:
    """Return ``1 - base^t``, which corrects the bias of a running mean that began at 0."""
    return -power_minus_one(base, t)


def power_minus_one(base: float, t: Tensor) -> Tensor:
    """Return ``base^t - 1`` for a base >= 0 and t > 0, with all digits where it is small."""
    return torch.expm1(t * math.log(base)) if base > 0.0 else torch.full_like(t, -1.0)


def make_fused_adam(
    kernel: Callable[..., None],
    betas: tuple[Hyper, Hyper],
    eps: Hyper,
    weight_decay: Hyper,
    decay: Decay | None,
) -> Fused | None:
    """Return Adam's update as one call of ``kernel`` for what is decayed and one for what is not, in place.

    None if a setting that the kernel takes as a number is a schedule.
    """
    if any(callable(setting) for setting in (*betas, eps, weight_decay)):
        return None

    def fused(step: Tensor, lr: Tensor, skipped: Tensor) -> Callable[[Params, Params, AdamState], None]:
        t, rate, found = (step + 1).float(), lr.float(), skipped.float()

        def write(params: Params, grads: Params, state: AdamState) -> None:
            for names, share in by_decay(params, cast(float, weight_decay), decay):
                kernel(
                    [params[name] for name in names],
                    [grads[name] for name in names],
                    [state.mu[name] for name in names],
                    [state.nu[name] for name in names],
                    [],
                    [t] * len(names),
                    lr=rate,
                    beta1=betas[0],
                    beta2=betas[1],
                    weight_decay=share,
                    eps=eps,
                    amsgrad=False,
                    maximize=False,
                    found_inf=found,
                )

        return write

    return fused


def adam_rules(lr: Hyper, betas: tuple[Hyper, Hyper], eps: Hyper, weight_decay: Hyper, decay: Decay | None) -> Rules:
    """Return the settings that Adam and its descendants share, with what they have to be."""
    return {
        "lr": (lr, RATE),
        **pair_of_shares("betas", betas),
        "eps": (eps, RATE),
        "weight_decay": (weight_decay, RATE),
        "decay": (decay, PREDICATE),
    }


def _next_weight(weight: Tensor | None, beta: Scalar) -> Tensor | None:
    return None if weight is None else weight * beta + (1.0 - beta)


def _next_age(age: Tensor | None, weight: Tensor | None, beta: Scalar) -> Tensor | None:
    # What is there grows a step older, and each weight smaller; the newest has age 0.
    return None if age is None or weight is None else (age + weight) * beta
