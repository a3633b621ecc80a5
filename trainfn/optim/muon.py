"""Muon: momentum made orthogonal, for weight matrices.

    b = momentum b + (1 - momentum) g,    u = (1 - momentum) g + momentum b  if nesterov else  b
    update = - lr scale(rows, columns) NS(u) - lr weight_decay p
    NS     : x = u / |u|, then num_steps times  x = a x + (b A + c A^2) x,  A = x x^T    (singular values go to about 1)

References:
    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon/,
    2024.
    J. Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982, 2025 (match_rms_adamw).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.optim.decay import Decay, make_shrinkage
from trainfn.optim.moments import next_mean, zeros
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import PREDICATE, RATE, SHARE, Rule, call, check, is_number, one_of
from trainfn.optim.transform import Hyper, Scalar, Transform, narrow, value_at
from trainfn.state import Params
from trainfn.tree import record

Scaling = Literal["original", "match_rms_adamw"]

_MOST_STEPS = 99  # as torch.optim.Muon
_THREE_NUMBERS = Rule("three numbers", lambda value: len(value) == 3 and all(map(is_number, value)))


@record
class MuonState:
    """Momentum, by parameter name."""

    momentum: Params


def muon(
    lr: Hyper = 1e-3,
    *,
    weight_decay: Hyper = 0.1,
    momentum: Hyper = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: Hyper = 1e-7,
    ns_steps: int = 5,
    adjust_lr: Scaling = "original",
    decay: Decay | None = None,
) -> Transform:
    """Return Muon. Settings are those of ``torch.optim.Muon``. Not elementwise; the iteration runs in bfloat16.

    It is meant for the matrices of hidden layers: ``partition(matrices_and_others, ...)`` gives embeddings, heads,
    biases and the scales of norms another optimizer.

    Args:
        lr: a number, or a schedule of the updates applied; the numbers below may be schedules too.
        weight_decay: fraction of ``lr`` by which each parameter shrinks.
        momentum: decay rate of the buffer, in [0, 1).
        nesterov: look ahead along the buffer.
        ns_coefficients: a, b and c of the Newton-Schulz iteration, three numbers.
        eps: least norm that the iteration divides by.
        ns_steps: iterations.
        adjust_lr: ``"original"`` scales by sqrt(max(1, rows / columns)), ``"match_rms_adamw"`` by
            0.2 sqrt(max(rows, columns)), with which learning rates and decays of AdamW can be used.
        decay: ``(name, param) -> bool``, which parameters shrink; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together. From ``init``: a parameter is not a matrix.

    >>> optimizer, params = muon(lr=0.1, weight_decay=0.0), {"w": torch.zeros(2, 2)}
    >>> grads = {"w": torch.diag(torch.tensor([5.0, 3.0]))}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params, torch.tensor(0))
    >>> [round(float(value), 1) for value in torch.linalg.svdvals(updates["w"])]
    [0.1, 0.1]
    >>> optimizer.init({"w": torch.zeros(2, 2), "bias": torch.zeros(2)})
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: Muon trains matrices only.
      where: bias
      expected: parameters of 2 dimensions
      got: bias: [2]
      try: give these another one: partition(matrices_and_others, {"matrices": muon(), "others": adamw()})
    """
    check(
        "muon",
        {
            "lr": (lr, RATE),
            "weight_decay": (weight_decay, RATE),
            "momentum": (momentum, SHARE),
            "ns_coefficients": (ns_coefficients, _THREE_NUMBERS),
            "eps": (eps, RATE),
            "ns_steps": (
                ns_steps,
                Rule(
                    f"an int in [0, {_MOST_STEPS}]", lambda value: isinstance(value, int) and 0 <= value <= _MOST_STEPS
                ),
            ),
            "adjust_lr": (adjust_lr, one_of("original", "match_rms_adamw")),
            "decay": (decay, PREDICATE),
        },
    )
    schedule, shrinkage = as_schedule(lr), make_shrinkage(weight_decay, decay)

    def init(params: Params) -> MuonState:
        _check_matrices(params)
        return MuonState(momentum=zeros(params))

    def update(grads: Params, state: MuonState, params: Params, step: Tensor) -> tuple[Params, MuonState]:
        rate, least, kept = schedule(step), value_at(eps, step), value_at(momentum, step)
        shrink = shrinkage(step, rate)
        updates, buffers = {}, {}
        for name, grad in grads.items():
            buffers[name] = next_mean(state.momentum[name], grad, kept)
            ahead = torch.lerp(grad, buffers[name], narrow(kept, grad.dtype)) if nesterov else buffers[name]
            direction = _orthogonalize(ahead, ns_coefficients, ns_steps, least).to(grad.dtype)
            size = (rate * _scale(grad, adjust_lr)).to(grad.dtype)
            updates[name] = -(size * direction + shrink(name, params[name]))
        return updates, MuonState(momentum=buffers)

    name = call(
        "muon",
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        ns_coefficients=ns_coefficients,
        eps=eps,
        ns_steps=ns_steps,
        adjust_lr=adjust_lr,
        decay=decay,
    )
    return Transform(init, update, name, schedule)


def _orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: Scalar) -> Tensor:
    """Return ``matrix`` with its singular values moved to about [0.7, 1.2], in bfloat16, by products alone."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16().T if tall else matrix.bfloat16()  # (short, long): the smaller of the two Gram matrices
    x = x / x.norm().clamp(min=narrow(eps, x.dtype))
    for _ in range(num_steps):
        gram = x @ x.T  # (short, short)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _scale(matrix: Tensor, adjust_lr: Scaling) -> float:
    rows, columns = matrix.shape
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(1, columns)))


def _check_matrices(params: Params) -> None:
    others = {name: list(param.shape) for name, param in params.items() if param.ndim != 2}
    if others:
        raise ConfigError(
            "Muon trains matrices only.",
            where=", ".join(others),
            expected="parameters of 2 dimensions",
            got=", ".join(f"{name}: {shape}" for name, shape in others.items()),
            hint='give these another one: partition(matrices_and_others, {"matrices": muon(), "others": adamw()})',
        )
