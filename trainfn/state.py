"""``TrainState``: everything the next step reads, as one immutable value, and ``init``, which makes the first one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from trainfn.errors import ConfigError, ModelError
from trainfn.tree import Tree, record

Params = dict[str, Tensor]
"""Tensors by ``named_parameters()`` name; those that are trained have ``requires_grad=True``. Tied ones appear once."""

Buffers = dict[str, Tensor]
"""Tensors by ``named_buffers()`` name, non-persistent ones included: the next step reads those too."""


@record
class Report:
    """What the last step did. 0-d tensors that stay on the device until someone reads them.

    Attributes:
        loss: total over weight, [] (nats per token for language modelling; NaN before the first step).
        weight: what the loss was divided by, [] (tokens, examples, ...).
        grad_norm: 2-norm of the mean gradient before clipping, [] float64.
        lr: learning rate of this step, [] (NaN where the optimizer has none).
        verdict: [] int64, a :class:`trainfn.health.Verdict` code.
    """

    loss: Tensor
    weight: Tensor
    grad_norm: Tensor
    lr: Tensor
    verdict: Tensor


@record
class Health:
    """Counters that gate nothing by themselves but tell the loop when to stop.

    Attributes:
        streak: [] int64, steps skipped in a row for non-finite numbers, up to and including the last.
        skipped: [] int64, steps skipped for non-finite numbers since the first.
    """

    streak: Tensor
    skipped: Tensor


@record
class TrainState:
    """Everything the next step reads, and nothing else. Functions and options are closed over by the step.

    Attributes:
        step: [] int64, updates applied. Schedules and bias corrections read it; a skipped step does not advance it.
        params: trained and frozen parameters by name.
        buffers: buffers by name.
        opt: the optimizer's state, a tree.
        ema: exponential moving average of the trained parameters, or None.
        health: skip counters.
        report: outcome of the last step.
        seed: host int that all randomness of the run is derived from.
        cursor: host int, batches consumed. Draws and data position are pure functions of (seed, cursor).
    """

    step: Tensor
    params: Params
    buffers: Buffers
    opt: Tree
    ema: Params | None
    health: Health
    report: Report
    seed: int
    cursor: int


class Initializer(Protocol):
    """The half of a :class:`trainfn.optim.Transform` that ``init`` needs."""

    @property
    def init(self) -> Callable[[Params], Tree]: ...


def trainable(params: Params) -> Params:
    """Return the parameters that are trained: those with ``requires_grad``."""
    return {name: param for name, param in params.items() if param.requires_grad}


def init(
    model: nn.Module,
    optimizer: Initializer,
    *,
    seed: int = 0,
    ema: bool = False,
    device: torch.device | str | None = None,
) -> TrainState:
    """Return the first state: a copy of the model's tensors, and the optimizer's state for those that are trained.

    The model itself is read and never written to.

    Args:
        model: its parameters with ``requires_grad`` are trained, the others are frozen.
        optimizer: a :class:`trainfn.optim.Transform`.
        seed: what the run's randomness is derived from, in [0, 2**63).
        ema: keep an exponential moving average of the trained parameters, starting from their first values.
        device: where the state lives; where each tensor of the model is, if None.

    Raises:
        ConfigError: the seed is out of range.
        ModelError: nothing to train, or lazy modules that have not seen a batch.

    >>> import trainfn
    >>> state = init(nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> sorted(state.params), int(state.step), state.cursor
    (['bias', 'weight'], 0, 0)
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError("The seed is out of range.", expected="an int in [0, 2**63)", got=repr(seed))
    _check_parameters(model)
    params = {name: _copy(param, device) for name, param in model.named_parameters()}
    buffers = {name: _copy(buffer, device) for name, buffer in model.named_buffers()}
    trained = trainable(params)
    home = next(iter(trained.values())).device

    def number(value: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=home)

    with torch.no_grad():
        return TrainState(
            step=number(0, torch.int64),
            params=params,
            buffers=buffers,
            opt=optimizer.init({name: param.detach() for name, param in trained.items()}),
            ema={name: param.detach().clone() for name, param in trained.items()} if ema else None,
            health=Health(streak=number(0, torch.int64), skipped=number(0, torch.int64)),
            report=Report(
                loss=number(math.nan, torch.float32),
                weight=number(0, torch.float32),
                grad_norm=number(math.nan, torch.float64 if home.type != "mps" else torch.float32),
                lr=number(math.nan, torch.float32),
                verdict=number(0, torch.int64),
            ),
            seed=seed,
            cursor=0,
        )


def _check_parameters(model: nn.Module) -> None:
    lazy = [name for name, param in model.named_parameters() if isinstance(param, nn.UninitializedParameter)]
    if lazy:
        raise ModelError(
            "The model has lazy parameters that have no shape yet.",
            where=", ".join(lazy),
            hint="run one batch through the model before training it",
        )
    if not any(param.requires_grad for param in model.parameters()):
        raise ModelError(
            "The model has nothing to train.",
            expected="at least one parameter with requires_grad=True",
            got=f"{sum(1 for _ in model.parameters())} parameters, all frozen or none at all",
            hint="call requires_grad_() on the parameters that should learn",
        )


def _copy(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    copied = tensor.detach().to(device=device or tensor.device, copy=True)
    return copied.requires_grad_(tensor.requires_grad)
