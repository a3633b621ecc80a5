"""Clipping by the global norm.

    g = g min(1, max_norm / |g|),    |g| the 2-norm over all tensors together

References:
    R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.optim.transform import Transform
from trainfn.state import Params
from trainfn.tree import Tree, norm


def clip_by_global_norm(max_norm: float) -> Transform:
    """Return the Transform that scales all gradients by one factor so that their norm is at most ``max_norm``.

    ``make_step(clip_norm=)`` does the same with the norm it has already measured.

    Raises:
        ConfigError: ``max_norm`` is not a positive number.

    >>> clip = clip_by_global_norm(1.0)
    >>> clip.update({"w": torch.tensor([3.0, 4.0])}, clip.init({}), {}, torch.tensor(0))[0]["w"]
    tensor([0.6000, 0.8000])
    """
    check_max_norm(max_norm)

    def update(grads: Params, state: Tree, params: Params, step: Tensor) -> tuple[Params, Tree]:
        factor = clip_factor(norm(grads), max_norm)
        return {name: grad * factor.to(grad.dtype) for name, grad in grads.items()}, state

    return Transform(lambda params: (), update, f"clip_by_global_norm({max_norm:g})")


def clip_factor(grad_norm: Tensor, max_norm: float) -> Tensor:
    """Return ``min(1, max_norm / grad_norm)``, [] in the norm's dtype; 1 for a norm of 0."""
    return torch.clamp(max_norm / grad_norm, max=1.0)


def check_max_norm(max_norm: float) -> None:
    """Raise unless ``max_norm`` is a positive, finite number.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(max_norm, (int, float)) or not 0.0 < max_norm < math.inf:
        raise ConfigError("The clip norm is out of range.", expected="a number > 0", got=repr(max_norm))
