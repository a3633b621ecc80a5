"""Weight decay: decoupled from the gradient or added to it, on all parameters or on some.

    decoupled : update = ... - lr weight_decay p
    L2        : g = g + weight_decay p

References:
    I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, 2019.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trainfn.optim.transform import Hyper, narrow, value_at
from trainfn.state import Params

Decay = Callable[[str, Tensor], bool]
"""From a parameter's name and the parameter to whether weight decay applies to it. Reads shape and dtype, not data."""


def matrices_only(name: str, param: Tensor) -> bool:
    """Decay weights of two or more dimensions; leave biases and the scales of norms alone.

    >>> import torch
    >>> matrices_only("weight", torch.ones(2, 3)), matrices_only("bias", torch.ones(2))
    (True, False)
    """
    return param.ndim >= 2


def make_shrinkage(
    weight_decay: Hyper, decay: Decay | None
) -> Callable[[Tensor, Tensor], Callable[[str, Tensor], Tensor | float]]:
    """Return ``(step, rate) -> (name, param) -> rate weight_decay param``, or 0 for what is not decayed."""

    def at(step: Tensor, rate: Tensor) -> Callable[[str, Tensor], Tensor | float]:
        share = rate * value_at(weight_decay, step)

        def shrinkage(name: str, param: Tensor) -> Tensor | float:
            if not weight_decay or (decay is not None and not decay(name, param)):
                return 0.0
            return share.to(param.dtype) * param

        return shrinkage

    return at


def by_decay(params: Params, weight_decay: float, decay: Decay | None) -> list[tuple[list[str], float]]:
    """Return the names of what is decayed with the decay, and those of all else with 0; without empty groups.

    >>> import torch
    >>> by_decay({"w": torch.ones(2, 2), "b": torch.ones(2)}, 0.1, matrices_only)
    [(['w'], 0.1), (['b'], 0.0)]
    """
    decayed = {name: None for name, param in params.items() if weight_decay and (decay is None or decay(name, param))}
    groups = [([*decayed], weight_decay), ([name for name in params if name not in decayed], 0.0)]
    return [(names, share) for names, share in groups if names]


def with_l2(grads: Params, params: Params, weight_decay: Hyper, decay: Decay | None, step: Tensor) -> Params:
    """Return the gradients of the loss plus ``weight_decay / 2`` times the squared 2-norm of what is decayed."""
    if not weight_decay:
        return grads
    share = value_at(weight_decay, step)
    return {
        name: grad + narrow(share, grad.dtype) * params[name] if decay is None or decay(name, params[name]) else grad
        for name, grad in grads.items()
    }
