"""``make_step``: the composition that gives a training step its meaning. Eager, and the reference for every other mode.

step = update . fold(merge) . map(gradients)

update: norms -> verdict -> divide by weight, clip -> optimizer -> select by verdict -> EMA, loss scale -> TrainState'
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import get_args

import attrs
import torch
from torch import Tensor, nn

from trainfn.batch import Batch, micro_batches
from trainfn.errors import ConfigError, suggest
from trainfn.grad import (
    Criterion,
    ForwardFn,
    Gradients,
    GradientsFn,
    fold,
    make_criterion,
    make_forward,
    make_gradients,
)
from trainfn.health import OnSpike, Verdict, add_up, is_applied, judge, judge_spike, track
from trainfn.loss import Loss, LossSum, resolve
from trainfn.metric import Metric, MetricSum
from trainfn.optim import Transform
from trainfn.optim.clip import check_max_norm, clip_factor
from trainfn.optim.moments import one_minus_power
from trainfn.optim.transform import wide
from trainfn.precision import LossScale, next_scale
from trainfn.precision import resolve as resolve_precision
from trainfn.state import Baseline, Buffers, Params, Report, TrainState, trainable
from trainfn.tree import evolve, leaf_norms, record, select


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

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        """Return the state after one step. Neither ``state`` nor ``batch`` nor the global RNG is written to."""
        with surroundings(self.model, state, training=True):
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
        with surroundings(self.model, state, training=False):
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
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ConfigError("accumulate is out of range.", expected="an int >= 1", got=repr(accumulate))
    if clip_norm is not None:
        check_max_norm(clip_norm)
    if ema is not None and not 0.0 <= ema < 1.0:
        raise ConfigError("The EMA decay is out of range.", expected="a number in [0, 1), or None", got=repr(ema))
    if halt_after is not None and (isinstance(halt_after, bool) or not isinstance(halt_after, int) or halt_after < 1):
        raise ConfigError("halt_after is out of range.", expected="an int >= 1, or None", got=repr(halt_after))
    if on_spike not in get_args(OnSpike):
        raise ConfigError(
            "There is no such answer to a spike.", got=repr(on_spike), hint=suggest(str(on_spike), get_args(OnSpike))
        )
    strategy = resolve(loss)
    _check_trained(strategy, model, optimizer)
    return Step(
        model=model,
        strategy=strategy,
        forward=make_forward(model, precision),
        criterion=make_criterion(strategy, precision),
        gradients=make_gradients(model, strategy, precision),
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
    )


@record
class Decision:
    """What is decided of a step before anything is changed.

    Attributes:
        verdict: [] int64.
        applied: whether it is applied, [] bool.
        factor: what summed gradients are multiplied by, [] float64: one over the weight, and the clipping.
        baseline: what is usual, with this step in it.
        report: outcome.
    """

    verdict: Tensor
    applied: Tensor
    factor: Tensor
    baseline: Baseline
    report: Report


@attrs.frozen(kw_only=True, eq=False)
class Update:
    """``(state, Gradients) -> state``: the one place where sums are divided and anything changes.

    Attributes:
        optimizer: the Transform that is applied.
        clip_norm, ema, on_spike, halt_after: as in :func:`make_step`.
        scaled: whether the state has a loss scale.
    """

    optimizer: Transform
    clip_norm: float | None = None
    ema: float | None = None
    on_spike: OnSpike = "off"
    halt_after: int | None = None
    scaled: bool = False

    def __call__(self, state: TrainState, found: Gradients, norms: Tensor | None = None) -> TrainState:
        """Return the state after the update.

        Args:
            state: before it.
            found: gradients of the whole batch, summed.
            norms: of each parameter's gradient, [parameters] float64, where gradients are packs of several.
        """
        with torch.no_grad():
            decision = self.decide(state, found, norms)
            params = {name: param.detach() for name, param in trainable(state.params).items()}
            factor = decision.factor
            grads = {name: (g * factor.to(g.dtype)).to(params[name].dtype) for name, g in found.grads.items()}
            updates, opt = self.optimizer.update(grads, state.opt, params, state.step)
            new = select(decision.applied, {name: param + updates[name] for name, param in params.items()}, params)
            return evolve(
                self.conclude(state, found, decision),
                params=state.params | new,
                buffers=select(decision.applied, found.buffers, state.buffers),
                opt=select(decision.applied, opt, state.opt),
                ema=self._averaged(state, new, decision.applied),
            )

    def decide(self, state: TrainState, found: Gradients, norms: Tensor | None = None) -> Decision:
        """Return whether the update may be applied, and how large it is."""
        _check_agree(state, averaged=self.ema is not None, scaled=self.scaled)
        norms = leaf_norms(found.grads) if norms is None else norms
        summed_norm = torch.linalg.vector_norm(norms)
        total, weight = wide(found.total), wide(found.weight)
        loss, grad_norm = total / weight, summed_norm / weight
        verdict = judge(total, weight, summed_norm, state.scale)
        verdict = torch.where(state.health.halted, int(Verdict.HALTED), verdict)
        baseline = state.health.baseline
        if self.on_spike != "off":
            verdict, baseline = judge_spike(baseline, verdict, loss, grad_norm, skip=self.on_spike != "warn")
        factor = torch.reciprocal(weight)
        if self.clip_norm is not None:
            factor = factor * clip_factor(grad_norm, self.clip_norm)
        lr = self.optimizer.lr
        report = Report(
            loss=loss,
            weight=weight,
            grad_norm=grad_norm,
            grad_norms=norms / weight,
            lr=torch.full_like(loss, float("nan")) if lr is None else wide(lr(state.step)),
            verdict=verdict,
        )
        return Decision(verdict=verdict, applied=is_applied(verdict), factor=factor, baseline=baseline, report=report)

    def conclude(self, state: TrainState, found: Gradients, decision: Decision) -> TrainState:
        """Return the state with counters, loss scale, health and report after the step, and all else as it was."""
        verdict, applied = decision.verdict, decision.applied
        return evolve(
            state,
            step=state.step + applied,
            scale=_rescale(state.scale, verdict),
            health=track(
                state.health,
                verdict,
                applied,
                decision.baseline,
                halt_after=self.halt_after,
                on_spike=self.on_spike,
            ),
            stats=add_up(state.stats, verdict, applied, decision.report.weight, found.micro_batches),
            report=decision.report,
        )

    def average_share(self, step: Tensor) -> Tensor:
        """Return the share of the newest parameters in their moving average after update ``step``, [] float64.

        The average is ``sum_i decay^(t - i) p_i``, weights made to sum to 1. As with Adam's moments, the correction of
        the bias of a beginning at 0; here in a recursion that is never biased.
        """
        assert self.ema is not None
        return (1.0 - self.ema) / one_minus_power(self.ema, wide(step) + 1.0)

    def _averaged(self, state: TrainState, new: Params, applied: Tensor) -> Params | None:
        if state.ema is None:
            return None
        share = self.average_share(state.step)
        moved = {
            name: torch.lerp(mean, new[name].to(mean.dtype), share.to(mean.dtype)) for name, mean in state.ema.items()
        }
        return select(applied, moved, state.ema)


def finished(before: TrainState, after: TrainState) -> TrainState:
    """Return a transition's result as the next step's input: one batch further, the trained parameters marked so."""
    for name in trainable(before.params):
        after.params[name].requires_grad_()
    return evolve(after, cursor=before.cursor + 1, seed=before.seed)


@contextmanager
def surroundings(model: nn.Module, state: TrainState, *, training: bool, draws: bool = True) -> Iterator[None]:
    """Hold what a forward reads besides its arguments: modes, whether to record gradients, draws by (seed, cursor).

    With ``draws=False`` the generators are left alone: what is known to draw nothing has no use for them.
    """
    with _mode(model, training), _seeded(state) if draws else nullcontext(), torch.set_grad_enabled(training):
        yield


def generators(state: TrainState) -> list[torch.Generator]:
    """Return the global generators that a forward draws from: the CPU's, and that of the state's GPU."""
    own = [torch.cuda.default_generators[state.step.get_device()]] if state.step.is_cuda else []
    return [torch.default_generator, *own]


def _rescale(scale: LossScale | None, verdict: Tensor) -> LossScale | None:
    if scale is None:
        return None
    says = is_applied(verdict) | (verdict == int(Verdict.OVERFLOW)) | (verdict >= int(Verdict.LOSS_SPIKE_SKIPPED))
    return next_scale(scale, overflow=verdict == int(Verdict.OVERFLOW), counted=says)


def _check_agree(state: TrainState, *, averaged: bool, scaled: bool) -> None:
    """Raise unless the state was made for this step. Looks at what there is, not at numbers."""
    if (state.ema is not None) != averaged:
        raise ConfigError(
            "The state and the step disagree about the moving average of the parameters.",
            expected="init(..., ema=True) together with make_step(..., ema=decay)",
            got=f"a state {'without' if averaged else 'with'} ema, a step {'with' if averaged else 'without'}",
        )
    if (state.scale is not None) != scaled:
        raise ConfigError(
            "The state and the step disagree about the precision.",
            expected="init(..., precision=) and make_step(..., precision=) alike",
            got=f"a state {'without' if scaled else 'with'} a loss scale, a step {'with' if scaled else 'without'}",
        )


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


@contextmanager
def _seeded(state: TrainState) -> Iterator[None]:
    used = generators(state)
    before = [generator.get_state() for generator in used]
    for generator in used:
        generator.manual_seed(_mix(state.seed, state.cursor))
    try:
        yield
    finally:
        for generator, old in zip(used, before, strict=True):
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
