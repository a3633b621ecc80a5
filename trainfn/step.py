"""``make_step``: the composition that gives a training step its meaning. Eager, and the reference for every other mode.

step = update . fold(merge) . map(gradients)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import get_args

import attrs
import torch
from torch import nn

from trainfn.attention import Attention, attending, check_attention
from trainfn.batch import Batch, micro_batches
from trainfn.errors import ConfigError, suggest
from trainfn.grad import (
    Criterion,
    ForwardFn,
    GradientsFn,
    fold,
    make_criterion,
    make_forward,
    make_gradients,
)
from trainfn.health import OnSpike
from trainfn.loss import Loss, LossSum, resolve, takes_target
from trainfn.loss.base import check_count
from trainfn.metric import Metric, MetricSum
from trainfn.optim import Transform
from trainfn.optim.clip import check_max_norm
from trainfn.precision import resolve as resolve_precision
from trainfn.recompute import matching
from trainfn.state import Buffers, Params, TrainState, trainable
from trainfn.tree import evolve
from trainfn.update import Update


@attrs.frozen(eq=False)
class Step:
    """A pure function ``step(state, batch) -> state``; made by :func:`make_step`.

    Its parts are open, so that other ways to run it (see :func:`trainfn.compile`) are made of the same parts.

    Attributes:
        model: the module whose forward is applied; its own tensors are never read or written.
        strategy: the loss as it was given or registered, ``(outputs, batch) -> LossSum`` or a mean.
        forward: ``(params, buffers, batch) -> outputs``.
        criterion: ``(outputs, batch) -> LossSum``.
        gradients: ``(params, buffers, batch) -> Gradients``.
        update: ``(state, Gradients) -> state``.
        accumulate: number of micro-batches a batch is divided into.
        precision: name of the policy, see :mod:`trainfn.precision`.
        optimizer: the Transform that ``update`` applies.
        checkpoint: names of the modules that are run again in the backward of ``gradients``.
        attention: name of the kernel of attention, see :mod:`trainfn.attention`.
    """

    model: nn.Module
    strategy: Loss
    forward: ForwardFn
    criterion: Criterion
    gradients: GradientsFn
    update: Update
    accumulate: int
    precision: str
    optimizer: Transform
    checkpoint: tuple[str, ...] = ()
    attention: str = "auto"

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        """Return the state after one step. Neither ``state`` nor ``batch`` nor the global RNG is written to."""
        with attending(self.attention), surroundings(self.model, state, training=True):
            return finished(state, self.transition(state, batch))

    def transition(self, state: TrainState, batch: Batch) -> TrainState:
        """Return the step's tensors: the part that is traced. ``seed`` and ``cursor`` are handed through."""
        parts = micro_batches(batch, self.accumulate)
        found = fold(self.gradients, state.params, state.buffers, parts, scale=state.scale)
        return self.update(state, found)

    def loss(self, params: Params, buffers: Buffers, batch: Batch) -> LossSum:
        """Return the summed loss of one batch: the forward, then the criterion."""
        return self.criterion(self.forward(params, buffers, batch), batch)

    def evaluate(
        self, state: TrainState, batch: Batch, *, metrics: Sequence[Metric] = (), params: Params | None = None
    ) -> dict[str, LossSum | MetricSum]:
        """Return the sums of one batch, ``"loss"`` and each metric by name, in evaluation mode, without gradients.

        Args:
            state: read for its parameters, buffers and device.
            batch: any batch.
            metrics: measured on the outputs that the loss is made of.
            params: used in place of the state's parameters of the same names, for example ``state.ema``.
        """
        with attending(self.attention), surroundings(self.model, state, training=False):
            chosen = {name: value.to(state.params[name].dtype) for name, value in (params or {}).items()}
            buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
            outputs = self.forward(state.params | chosen, buffers, batch)
            return {"loss": self.criterion(outputs, batch)} | {
                metric.name: metric.measure(outputs, batch) for metric in metrics
            }


def make_step(
    model: nn.Module,
    *,
    loss: str | Loss,
    optimizer: Transform,
    accumulate: int = 1,
    clip_norm: float | None = None,
    ema: float | None = None,
    precision: str = "32-true",
    on_spike: OnSpike = "off",
    halt_after: int | None = None,
    checkpoint: str | Sequence[str] | None = None,
    attention: Attention = "auto",
) -> Step:
    """Return the pure function ``step(state, batch) -> state`` that trains ``model``.

    One step computes the gradient of the mean loss over the whole batch, clips it, and applies the optimizer. When
    the loss or any gradient is not finite, or nothing in the batch counts, parameters, buffers, optimizer state, EMA
    and ``step`` stay as they are; ``report.verdict`` says why.

    Args:
        model: any module; it is called as a function of the state's tensors. If it is in evaluation mode it is run
            in training mode; submodules put in evaluation mode inside a training model stay so.
        loss: a registered name or a function ``loss(outputs, batch)``.
        optimizer: a Transform from :mod:`trainfn.optim`.
        accumulate: divide each batch into this many micro-batches. Changes memory, not meaning.
        clip_norm: largest 2-norm of the mean gradient; None for no clipping.
        ema: decay of the moving average of the parameters, in [0, 1); needs ``init(..., ema=True)``.
        precision: name of a policy, see :mod:`trainfn.precision`; the same as in ``init(..., precision=)``.
        on_spike: what to do about a loss or gradient norm far above its recent past, see :mod:`trainfn.health`:
            ``"off"``, ``"warn"`` (apply it and say so), ``"skip"``, or ``"halt"`` (skip it and every step after it).
        halt_after: this many steps in a row with non-finite numbers, and no step after them is applied; None for never.
        checkpoint: one or more patterns for names of modules, such as ``"blocks.*"``, that are run again in the
            backward and keep nothing but their inputs until then. Changes memory and time, not meaning; see
            :mod:`trainfn.recompute`.
        attention: the kernel that ``scaled_dot_product_attention`` runs by: ``"auto"``, ``"flash"``, ``"efficient"``,
            ``"math"`` or ``"cudnn"``; see :mod:`trainfn.attention`.

    Raises:
        ConfigError: a setting is out of range.

    >>> import trainfn
    >>> model = nn.Linear(2, 2)
    >>> optimizer = trainfn.optim.sgd(lr=0.1)
    >>> step = make_step(model, loss="classification", optimizer=optimizer)
    >>> state = trainfn.init(model, optimizer)
    >>> after = step(state, (torch.ones(3, 2), torch.tensor([0, 1, 1])))
    >>> int(state.step), int(after.step), after.cursor
    (0, 1, 1)
    """
    check_count("accumulate", accumulate)
    if clip_norm is not None:
        check_max_norm(clip_norm)
    if ema is not None and not 0.0 <= ema < 1.0:
        raise ConfigError("The EMA decay is out of range.", expected="a number in [0, 1), or None", got=repr(ema))
    check_count("halt_after", halt_after, optional=True)
    if on_spike not in get_args(OnSpike):
        raise ConfigError(
            "There is no such answer to a spike.", got=repr(on_spike), hint=suggest(str(on_spike), get_args(OnSpike))
        )
    check_attention(attention)
    strategy = resolve(loss)
    _check_trained(strategy, model, optimizer)
    recomputed = matching(model, checkpoint)
    return Step(
        model=model,
        strategy=strategy,
        forward=make_forward(model, precision, targets=takes_target(strategy)),
        criterion=make_criterion(strategy, precision),
        gradients=make_gradients(model, strategy, precision, recomputed),
        update=Update(
            optimizer=optimizer,
            clip_norm=clip_norm,
            ema=ema,
            on_spike=on_spike,
            halt_after=halt_after,
            scaled=resolve_precision(precision).scaled,
        ),
        accumulate=accumulate,
        precision=precision,
        optimizer=optimizer,
        checkpoint=recomputed,
        attention=attention,
    )


def finished(before: TrainState, after: TrainState) -> TrainState:
    """Return a transition's result as the next step's input: one batch further, the trained parameters marked so."""
    for name in trainable(before.params):
        after.params[name].requires_grad_()
    return evolve(after, cursor=before.cursor + 1, seed=before.seed)


def surroundings(
    model: nn.Module, state: TrainState, *, training: bool, draws: bool = True
) -> AbstractContextManager[None]:
    """Hold what a forward reads besides its arguments: modes, whether to record gradients, draws by (seed, cursor).

    With ``draws=False`` the generators are left alone: what is known to draw nothing has no use for them.
    """
    if model.training == training == torch.is_grad_enabled():
        return _seeded(state) if draws else _AS_IT_IS
    return _surroundings(model, state, training=training, draws=draws)


_AS_IT_IS = nullcontext()


@contextmanager
def _surroundings(model: nn.Module, state: TrainState, *, training: bool, draws: bool) -> Iterator[None]:
    with _mode(model, training), _seeded(state) if draws else nullcontext(), torch.set_grad_enabled(training):
        yield


def generators(state: TrainState) -> list[torch.Generator]:
    """Return the global generators that a forward draws from: the CPU's, and that of the state's GPU."""
    own = [torch.cuda.default_generators[state.step.get_device()]] if state.step.is_cuda else []
    return [torch.default_generator, *own]


def _check_trained(loss: Loss, model: nn.Module, optimizer: Transform) -> None:
    """Let a loss that wants to know what is trained, such as ``peft_aware``, have its say."""
    check = getattr(loss, "check_trained", None)
    if check is not None:
        frozen = [
            name
            for name, param in model.named_parameters()
            if not param.requires_grad or (optimizer.frozen is not None and optimizer.frozen(name, param))
        ]
        check([name for name, _ in model.named_parameters() if name not in set(frozen)], frozen)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    if model.training == training:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _seeded:
    def __init__(self, state: TrainState) -> None:
        self._used, self._seed = generators(state), _mix(state.seed, state.cursor)

    def __enter__(self) -> None:
        self._before = [generator.get_state() for generator in self._used]
        for generator in self._used:
            generator.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        for generator, old in zip(self._used, self._before, strict=True):
            generator.set_state(old)


def _mix(seed: int, cursor: int) -> int:
    """Hash (seed, cursor) to 64 bits, so that neighbouring batches and seeds share no draws.

    Two rounds of the finalizer of G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014.
    """
    mask = 2**64 - 1
    value = 0
    for word in (seed, cursor):
        value = (value + word + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value
