"""``TrainState``: everything the next step reads, as one immutable value, and ``init``, which makes the first one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from trainfn.errors import ConfigError, ModelError
from trainfn.precision import LossScale, first_scale, lowered, resolve
from trainfn.tree import Tree, record, wide_float, widened

Params = dict[str, Tensor]
"""Tensors by ``named_parameters()`` name; those that are trained have ``requires_grad=True``. Tied ones appear once."""

Buffers = dict[str, Tensor]
"""Tensors by ``named_buffers()`` name, non-persistent ones included: the next step reads those too."""

NUMBERS = 5
"""How many numbers a report begins with: loss, weight, gradient norm, rate, verdict."""


@record
class Report:
    """What the last step did. 0-d tensors that stay on the device until someone reads them.

    Attributes:
        loss: total over weight, [] float64 (nats per token for language modelling; NaN before the first step).
        weight: what the loss was divided by, [] float64 (tokens, examples, ...).
        grad_norm: 2-norm of the mean gradient before clipping, [] float64.
        grad_norms: the same for each trained parameter, [number of them] float64, in their order in the state.
        lr: learning rate of this step, [] float64 (NaN where the optimizer has none).
        verdict: [] int64, a :class:`trainfn.health.Verdict` code.

    A program returns a report as one row of numbers. Its fields are made when one is asked for, as views.
    """

    loss: Tensor
    weight: Tensor
    grad_norm: Tensor
    grad_norms: Tensor
    lr: Tensor
    verdict: Tensor

    @classmethod
    def of(cls, row: Tensor) -> Report:
        """Return the report that a row is: the inverse of :attr:`row`.

        >>> report = Report.of(torch.tensor([0.5, 2.0, 1.0, 1e-3, 3.0, 0.6, 0.8], dtype=torch.float64))
        >>> report.verdict, report.grad_norms
        (tensor(3), tensor([0.6000, 0.8000], dtype=torch.float64))
        """
        report = object.__new__(cls)
        report.__dict__["_row"] = row
        return report

    @property
    def row(self) -> Tensor:
        """All of it in one row, [5 + trained parameters] float64: the numbers, the verdict, the norms."""
        known: Tensor | None = self.__dict__.get("_row")
        if known is not None:
            return known
        numbers = torch.stack([self.loss, self.weight, self.grad_norm, self.lr, self.verdict.to(self.loss.dtype)])
        return torch.cat([numbers, self.grad_norms])

    if not TYPE_CHECKING:  # of a report in a row, fields are not there before they are asked for

        def __getattr__(self, name: str) -> Tensor:
            row = self.__dict__.get("_row")
            if row is None or name not in self.__record_fields__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            loss, weight, grad_norm, lr, verdict = row[:NUMBERS].unbind()
            made = {"loss": loss, "weight": weight, "grad_norm": grad_norm, "lr": lr}
            self.__dict__.update(made, verdict=verdict.to(torch.int64), grad_norms=row[NUMBERS:])
            return self.__dict__[name]


@record
class Baseline:
    """What loss and gradient norm usually are: a robust running mean and spread of three coordinates.

    The coordinates are the loss, its logarithm, and the logarithm of the gradient norm; see :mod:`trainfn.health`.

    Attributes:
        mean: [3] float64.
        spread: [3] float64, a standard deviation.
        last: [3] float64, the coordinates of the last step that was learned from.
        count: [3] int64, steps learned from.
        lasting: [] int64, spikes in a row, up to and including the last step.
    """

    mean: Tensor
    spread: Tensor
    last: Tensor
    count: Tensor
    lasting: Tensor


@record
class Health:
    """What the verdict on the next step is based on besides its own numbers, and when the loop should stop.

    Attributes:
        streak: [] int64, steps skipped in a row for non-finite numbers, up to and including the last.
        halted: [] bool, whether the run has to stop: from then on no step is applied.
        baseline: against which a spike stands out.
    """

    streak: Tensor
    halted: Tensor
    baseline: Baseline


@record
class AccumulationStats:
    """What has been added up since the first step. Updates applied are ``state.step``.

    Attributes:
        micro_batches: [] int64.
        seen: [] float64, what the loss counted in applied steps (tokens, labels, examples).
        outcomes: [16] int64, steps by :class:`trainfn.health.Verdict` code.
    """

    micro_batches: Tensor
    seen: Tensor
    outcomes: Tensor


@record
class TrainState:
    """Everything the next step reads, and nothing else. Functions and options are closed over by the step.

    Attributes:
        step: [] int64, updates applied. Schedules and bias corrections read it; a skipped step does not advance it.
        params: trained and frozen parameters by name.
        buffers: buffers by name.
        opt: the optimizer's state, a tree.
        ema: exponential moving average of the trained parameters, or None; of 16-bit ones in float32.
        scale: loss scale, for float16, or None.
        health: what verdicts are based on.
        stats: what has been added up.
        report: outcome of the last step.
        lr_factor: what updates, and so the learning rate, are multiplied by, [] float64; None for 1, at no cost.
        seed: host int that all randomness of the run is derived from.
        cursor: host int, batches consumed. Draws and data position are pure functions of (seed, cursor).
    """

    step: Tensor
    params: Params
    buffers: Buffers
    opt: Tree
    ema: Params | None
    scale: LossScale | None
    health: Health
    stats: AccumulationStats
    report: Report
    lr_factor: Tensor | None
    seed: int
    cursor: int

    def __getstate__(self) -> dict[str, object]:
        """Return the fields and nothing else: what an engine attaches is of this process."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}


class Initializer(Protocol):
    """The half of a :class:`trainfn.optim.Transform` that ``init`` needs."""

    @property
    def init(self) -> Callable[[Params], Tree]: ...

    @property
    def frozen(self) -> Callable[[str, Tensor], bool] | None: ...


def trainable(params: Params) -> Params:
    """Return the parameters that are trained: those with ``requires_grad``."""
    return {name: param for name, param in params.items() if param.requires_grad}


def init(
    model: nn.Module,
    optimizer: Initializer,
    *,
    seed: int = 0,
    ema: bool = False,
    precision: str = "32-true",
    device: torch.device | str | None = None,
) -> TrainState:
    """Return the first state: a copy of the model's tensors, and the optimizer's state for those that are trained.

    The model itself is read and never written to.

    Args:
        model: its parameters with ``requires_grad`` are trained, the others are frozen.
        optimizer: a :class:`trainfn.optim.Transform`.
        seed: what the run's randomness is derived from, in [0, 2**63).
        ema: keep an exponential moving average of the trained parameters.
        precision: name of a policy, see :mod:`trainfn.precision`; the same as the step's.
        device: where the state lives; where each tensor of the model is, if None.

    Raises:
        ConfigError: the seed is out of range, or there is no such precision.
        ModelError: nothing to train, or lazy modules that have not seen a batch.

    >>> import trainfn
    >>> state = init(nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> sorted(state.params), int(state.step), state.cursor
    (['bias', 'weight'], 0, 0)
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError("The seed is out of range.", expected="an int in [0, 2**63)", got=repr(seed))
    policy = resolve(precision)
    stored = dict.fromkeys(lowered(model), policy.stored) if policy.stored else {}
    frozen = optimizer.frozen or (lambda name, param: False)
    _check_parameters(model, frozen)
    params = {name: _copy(param, device, stored.get(name)) for name, param in model.named_parameters()}
    for name, param in params.items():
        param.requires_grad_(param.requires_grad and not frozen(name, param))
    buffers = {name: _copy(buffer, device, stored.get(name)) for name, buffer in model.named_buffers()}
    trained = {name: param.detach() for name, param in trainable(params).items()}
    first = next(iter(trained.values()))
    home, wide = first.device, wide_float(first)
    with torch.no_grad():
        return TrainState(
            step=torch.zeros((), dtype=torch.int64, device=home),
            params=params,
            buffers=buffers,
            opt=optimizer.init(trained),
            ema={name: widened(param).clone() for name, param in trained.items()} if ema else None,
            scale=first_scale(home) if policy.scaled else None,
            health=Health(
                streak=torch.zeros((), dtype=torch.int64, device=home),
                halted=torch.zeros((), dtype=torch.bool, device=home),
                baseline=Baseline(
                    mean=torch.zeros(3, dtype=wide, device=home),
                    spread=torch.zeros(3, dtype=wide, device=home),
                    last=torch.zeros(3, dtype=wide, device=home),
                    count=torch.zeros(3, dtype=torch.int64, device=home),
                    lasting=torch.zeros((), dtype=torch.int64, device=home),
                ),
            ),
            stats=AccumulationStats(
                micro_batches=torch.zeros((), dtype=torch.int64, device=home),
                seen=torch.zeros((), dtype=wide, device=home),
                outcomes=torch.zeros(16, dtype=torch.int64, device=home),
            ),
            report=Report(
                loss=torch.full((), math.nan, dtype=wide, device=home),
                weight=torch.zeros((), dtype=wide, device=home),
                grad_norm=torch.full((), math.nan, dtype=wide, device=home),
                grad_norms=torch.full((len(trained),), math.nan, dtype=wide, device=home),
                lr=torch.full((), math.nan, dtype=wide, device=home),
                verdict=torch.zeros((), dtype=torch.int64, device=home),
            ),
            lr_factor=None,
            seed=seed,
            cursor=0,
        )


def _check_parameters(model: nn.Module, frozen: Callable[[str, Tensor], bool]) -> None:
    lazy = [name for name, param in model.named_parameters() if isinstance(param, nn.UninitializedParameter)]
    if lazy:
        raise ModelError(
            "The model has lazy parameters that have no shape yet.",
            where=", ".join(lazy),
            hint="run one batch through the model before training it",
        )
    if not any(param.requires_grad and not frozen(name, param) for name, param in model.named_parameters()):
        raise ModelError(
            "The model has nothing to train.",
            expected="at least one parameter with requires_grad=True",
            got=f"{sum(1 for _ in model.parameters())} parameters, all frozen or none at all",
            hint="call requires_grad_() on the parameters that should learn, and look at what the optimizer freezes",
        )
    complex_ones = [name for name, param in model.named_parameters() if param.is_complex() and param.requires_grad]
    if complex_ones:
        raise ModelError(
            "Complex parameters cannot be trained here.",
            where=", ".join(complex_ones),
            hint="hold the real and the imaginary part (torch.view_as_real) and join them in the forward",
        )


def _copy(tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    copied = tensor.detach().to(device=device or tensor.device, dtype=dtype or tensor.dtype, copy=True)
    return copied.requires_grad_(tensor.requires_grad)
