"""Adafactor: second moments of a matrix from their row and column means, so that its state is vectors.

    r = r + w (mean_columns g^2 - r),    c = c + w (mean_rows g^2 - c),    w = t^beta2_decay,    t = step + 1
    v = r c / max(mean r, eps1)                      for a vector: v = v + w (g^2 - v)
    u = g / sqrt(max(v, eps1^2)),    a = max(eps2, rms(p)) min(lr, 1 / sqrt(t))
    update = - a u / max(1, rms(u) / d) - lr weight_decay p

References:
    N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv:1804.04235, 2018.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainfn.optim.decay import Decay, make_shrinkage
from trainfn.optim.schedule import as_schedule
from trainfn.optim.settings import NON_NEGATIVE, PREDICATE, RATE, Rule, call, check, is_number, or_schedule
from trainfn.optim.transform import Hyper, Transform, narrow, value_at, wide
from trainfn.state import Params
from trainfn.tree import record

_DECAY_POWER = or_schedule(Rule("in [-1, 0]", lambda value: is_number(value) and -1.0 <= value <= 0.0))
_AT_LEAST_1 = or_schedule(Rule(">= 1", lambda value: NON_NEGATIVE.holds(value) and value >= 1.0))


@record
class AdafactorState:
    """Mean squares by parameter name: of rows and of columns of matrices, and of each element of vectors."""

    row: Params
    column: Params
    nu: Params


def adafactor(
    lr: Hyper = 1e-2,
    *,
    beta2_decay: Hyper = -0.8,
    eps: tuple[Hyper | None, Hyper] = (None, 1e-3),
    d: Hyper = 1.0,
    weight_decay: Hyper = 0.0,
    decay: Decay | None = None,
) -> Transform:
    """Return Adafactor. Settings are those of ``torch.optim.Adafactor``. Not elementwise.

    Args:
        lr: largest relative step: a number, or a schedule of the updates applied; the numbers below may be schedules
            too.
        beta2_decay: power of t that weighs the newest square, in [-1, 0].
        eps: least root mean square of a gradient (the dtype's epsilon if None), and least root mean square that a
            parameter counts as having.
        d: largest root mean square of an update before ``a``, >= 1.
        weight_decay: fraction of ``lr`` by which each parameter shrinks.
        decay: ``(name, param) -> bool``, which parameters shrink; all if None.

    Raises:
        ConfigError: a setting is out of range; all that are, together.

    >>> optimizer, params = adafactor(lr=0.1), {"w": torch.full((2, 2), 3.0)}
    >>> state = optimizer.init(params)
    >>> [tuple(state.row["w"].shape), tuple(state.column["w"].shape), state.nu]
    [(2, 1), (1, 2), {}]
    >>> optimizer.update({"w": torch.ones(2, 2)}, state, params, torch.tensor(0))[0]["w"][0]
    tensor([-0.3000, -0.3000])
    """
    check(
        "adafactor",
        {
            "lr": (lr, RATE),
            "beta2_decay": (beta2_decay, _DECAY_POWER),
            "eps[0]": (eps[0], Rule(">= 0, a schedule, or None", lambda value: value is None or RATE.holds(value))),
            "eps[1]": (eps[1], RATE),
            "d": (d, _AT_LEAST_1),
            "weight_decay": (weight_decay, RATE),
            "decay": (decay, PREDICATE),
        },
    )
    schedule, shrinkage = as_schedule(lr), make_shrinkage(weight_decay, decay)

    def init(params: Params) -> AdafactorState:
        matrices = {name: param for name, param in params.items() if param.ndim >= 2}
        return AdafactorState(
            row={name: param.new_zeros((*param.shape[:-1], 1)) for name, param in matrices.items()},
            column={name: param.new_zeros((*param.shape[:-2], 1, param.shape[-1])) for name, param in matrices.items()},
            nu={name: torch.zeros_like(param) for name, param in params.items() if name not in matrices},
        )

    def update(grads: Params, state: AdafactorState, params: Params, step: Tensor) -> tuple[Params, AdafactorState]:
        rate, t = schedule(step), wide(step) + 1.0
        shrink = shrinkage(step, rate)
        newest = torch.exp(torch.log(t) * value_at(beta2_decay, step))
        relative = torch.minimum(rate, torch.rsqrt(t))
        floor = None if eps[0] is None else value_at(eps[0], step)
        least_size, most_rms = value_at(eps[1], step), value_at(d, step)
        row, column, nu, updates = {}, {}, {}, {}
        for name, grad in grads.items():
            param, dtype = params[name], grad.dtype
            least = torch.finfo(param.dtype).eps if floor is None else floor
            weight = newest.to(dtype)
            if grad.ndim >= 2:
                row[name] = torch.lerp(state.row[name], _mean_square(grad, -1), weight)  # (..., rows, 1)
                column[name] = torch.lerp(state.column[name], _mean_square(grad, -2), weight)  # (..., 1, columns)
                square = row[name] * column[name] / row[name].mean(dim=-2, keepdim=True).clamp(min=narrow(least, dtype))
            else:
                square = nu[name] = torch.lerp(state.nu[name], grad * grad, weight)
            direction = square.clamp(min=narrow(least * least, dtype)).rsqrt() * grad
            size = relative * _rms(param).clamp(min=least_size) / (_rms(direction) / most_rms).clamp(min=1.0)
            updates[name] = -(size.to(dtype) * direction + shrink(name, param))
        return updates, AdafactorState(row=row, column=column, nu=nu)

    name = call("adafactor", lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay, decay=decay)
    return Transform(init, update, name, schedule)


def _mean_square(grad: Tensor, dim: int) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(grad, dim=dim, keepdim=True)
    return length.square() / max(1, grad.shape[dim])


def _rms(x: Tensor) -> Tensor:
    return wide(torch.linalg.vector_norm(x)) / math.sqrt(max(1, x.numel()))
