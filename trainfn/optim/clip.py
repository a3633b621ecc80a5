"""Clipping of gradients: all by one norm, each element by itself, or each unit by the size of its weights.

    by global norm : g = g min(1, max_norm / |g|),    |g| the 2-norm over all tensors together
    by value       : g = min(max(g, -max_value), max_value)
    adaptive       : g_i = g_i min(1, max_ratio max(|p_i|, eps) / |g_i|),    i one output unit of a tensor

References:
    R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.
    A. Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", arXiv:2102.06171, 2021.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.norms import norm
from trainfn.optim.settings import LIMIT, call, check, describe
from trainfn.optim.transform import Hyper, Scalar, Transform, narrow, rebind, value_at
from trainfn.state import Params
from trainfn.tree import Tree


def clip_by_global_norm(max_norm: Hyper) -> Transform:
    """Return the Transform that scales all gradients by one factor so that their norm is at most ``max_norm``.

    ``make_step(clip_norm=)`` does the same with the norm it has already measured.

    Args:
        max_norm: a number > 0, or a schedule.

    Raises:
        ConfigError: ``max_norm`` is neither a positive number nor a schedule.

    >>> clip = clip_by_global_norm(1.0)
    >>> clip.update({"w": torch.tensor([3.0, 4.0])}, clip.init({}), {}, torch.tensor(0))[0]["w"]
    tensor([0.6000, 0.8000])
    """
    check("clip_by_global_norm", {"max_norm": (max_norm, LIMIT)})

    def update(grads: Params, state: Tree, params: Params, step: Tensor) -> tuple[Params, Tree]:
        factor = clip_factor(norm(grads), value_at(max_norm, step))
        return {name: grad * factor.to(grad.dtype) for name, grad in grads.items()}, state

    written = describe(max_norm) if callable(max_norm) else f"{max_norm:g}"
    bind = rebind(lambda _: clip_by_global_norm(max_norm), None)
    return Transform(_no_state, update, f"clip_by_global_norm({written})", bind=bind)


def clip_by_value(max_value: Hyper) -> Transform:
    """Return the Transform that moves every element of every gradient into [-max_value, max_value].

    Args:
        max_value: a number > 0, or a schedule.

    Raises:
        ConfigError: ``max_value`` is neither a positive number nor a schedule.

    >>> clip = clip_by_value(1.0)
    >>> clip.update({"w": torch.tensor([3.0, -0.5])}, clip.init({}), {}, torch.tensor(0))[0]["w"]
    tensor([ 1.0000, -0.5000])
    """
    check("clip_by_value", {"max_value": (max_value, LIMIT)})

    def update(grads: Params, state: Tree, params: Params, step: Tensor) -> tuple[Params, Tree]:
        most = value_at(max_value, step)
        clipped = {}
        for name, grad in grads.items():
            limit: Any = narrow(most, grad.dtype)  # two numbers or two tensors, which no overload of clamp can say
            clipped[name] = grad.clamp(-limit, limit)
        return clipped, state

    bind = rebind(lambda _: clip_by_value(max_value), None)
    return Transform(_no_state, update, call("clip_by_value", max_value), bind=bind)


def adaptive_clip(max_ratio: Hyper = 0.01, *, eps: Hyper = 1e-3) -> Transform:
    """Return the Transform that keeps each unit's gradient small against its weights. Not elementwise.

    A unit is what lies along the first dimension, such as a linear layer's row or a convolution's filter; a tensor of
    one dimension or none is one unit.

    Args:
        max_ratio: largest norm of a unit's gradient, as a fraction of the norm of its weights; a number or a schedule.
        eps: least norm that a unit's weights count as having, so that zeros can move; a number or a schedule.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> clip = adaptive_clip(0.1)
    >>> params = {"w": torch.tensor([[3.0, 4.0], [3.0, 4.0]])}
    >>> grads = {"w": torch.tensor([[6.0, 8.0], [0.1, 0.0]])}
    >>> clip.update(grads, clip.init(params), params, torch.tensor(0))[0]["w"]
    tensor([[0.3000, 0.4000],
            [0.1000, 0.0000]])
    """
    check("adaptive_clip", {"max_ratio": (max_ratio, LIMIT), "eps": (eps, LIMIT)})

    def update(grads: Params, state: Tree, params: Params, step: Tensor) -> tuple[Params, Tree]:
        ratio, least = value_at(max_ratio, step), value_at(eps, step)
        clipped = {}
        for name, grad in grads.items():
            dtype = grad.dtype
            most = narrow(ratio, dtype) * _unit_norms(params[name]).clamp(min=narrow(least, dtype))
            clipped[name] = grad * torch.clamp(most / _unit_norms(grad), max=1.0)
        return clipped, state

    return Transform(_no_state, update, call("adaptive_clip", max_ratio, eps=eps))


def clip_factor(grad_norm: Tensor, max_norm: Scalar) -> Tensor:
    """Return ``min(1, max_norm / grad_norm)``, [] in the norm's dtype; 1 for a norm of 0."""
    return torch.clamp(max_norm / grad_norm, max=1.0)


def check_max_norm(max_norm: float) -> None:
    """Raise unless ``max_norm`` is a positive, finite number.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not 0.0 < max_norm < math.inf:
        raise ConfigError("The clip norm is out of range.", expected="a number > 0", got=repr(max_norm))


def _no_state(params: Params) -> Tree:
    return ()


def _unit_norms(x: Tensor) -> Tensor:
    """Norms of the units of ``x``, in a shape that broadcasts against it: (units, 1, ..., 1), or [] for one unit."""
    along = tuple(range(1, x.ndim)) if x.ndim >= 2 else None
    norms: Tensor = torch.linalg.vector_norm(x, dim=along, keepdim=along is not None)
    return norms
