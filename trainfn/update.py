"""``Update``: the one place where sums are divided and anything changes.

    norms -> verdict -> divide by weight, clip -> optimizer -> select by verdict -> EMA, loss scale, counters -> state'

A decision is made on the device before anything is changed; what changes is selected by it. The parts are open, so that
the engine can have the optimizer's part done by a kernel that writes in place.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.grad import Gradients
from trainfn.health import OnSpike, Verdict, add_up, is_applied, judge, judge_spike, track
from trainfn.norms import leaf_norms
from trainfn.optim import Transform
from trainfn.optim.clip import clip_factor
from trainfn.optim.moments import power_minus_one
from trainfn.optim.transform import wide
from trainfn.precision import LossScale, next_scale
from trainfn.state import Baseline, Params, Report, TrainState, trainable
from trainfn.tree import Tree, evolve, record, select


@record
class Decision:
    """What is decided of a step before anything is changed.

    Attributes:
        verdict: [] int64.
        applied: whether it is applied, [] bool; ``skipped`` is the opposite.
        factor: what summed gradients are multiplied by, [] float64: one over the weight, and the clipping.
        baseline: what is usual, with this step in it.
        report: outcome.
    """

    verdict: Tensor
    applied: Tensor
    skipped: Tensor
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
            if state.lr_factor is not None:  # every optimizer's update is proportional to its learning rate
                updates = {name: update * state.lr_factor.to(update.dtype) for name, update in updates.items()}
            new = select(decision.applied, {name: param + updates[name] for name, param in params.items()}, params)
            return evolve(
                state,
                **self.counted(state, found, decision),
                report=decision.report,
                params=state.params | new,
                buffers=select(decision.applied, found.buffers, state.buffers),
                opt=select(decision.applied, opt, state.opt),
                ema=self._averaged(state, new, decision),
            )

    def decide(self, state: TrainState, found: Gradients, norms: Tensor | None = None) -> Decision:
        """Return whether the update may be applied, and how large it is."""
        _check_agree(state, averaged=self.ema is not None, scaled=self.scaled)
        norms = leaf_norms(found.grads) if norms is None else norms
        summed_norm = torch.linalg.vector_norm(norms)
        total, weight = wide(found.total), wide(found.weight)
        loss, grad_norm = total / weight, summed_norm / weight
        verdict = judge(total, weight, summed_norm, state.scale)
        verdict = verdict.masked_fill(state.health.halted, int(Verdict.HALTED))
        baseline = state.health.baseline
        if self.on_spike != "off":
            verdict, baseline = judge_spike(baseline, verdict, loss, grad_norm, skip=self.on_spike != "warn")
        clipped = 1.0 if self.clip_norm is None else clip_factor(grad_norm, self.clip_norm)
        lr = torch.full_like(loss, float("nan")) if self.optimizer.lr is None else wide(self.optimizer.lr(state.step))
        report = Report(
            loss=loss,
            weight=weight,
            grad_norm=grad_norm,
            grad_norms=norms / weight,
            lr=lr if state.lr_factor is None else lr * state.lr_factor,
            verdict=verdict,
        )
        applied = is_applied(verdict)
        return Decision(
            verdict=verdict,
            applied=applied,
            skipped=~applied,
            factor=clipped / weight,
            baseline=baseline,
            report=report,
        )

    def counted(self, state: TrainState, found: Gradients, decision: Decision) -> dict[str, Tree]:
        """Return the fields of a state that count and judge, after the step: step, loss scale, health, statistics."""
        verdict, skipped = decision.verdict, decision.skipped
        return {
            "step": state.step + decision.applied,
            "scale": _rescale(state.scale, verdict),
            "health": track(
                state.health,
                verdict,
                skipped,
                decision.baseline,
                halt_after=self.halt_after,
                on_spike=self.on_spike,
            ),
            "stats": add_up(state.stats, verdict, skipped, decision.report.weight, found.micro_batches),
        }

    def average_share(self, step: Tensor, skipped: Tensor) -> Tensor:
        """Return the share of the newest parameters in their moving average after update ``step``, [] float64.

        The average is ``sum_i decay^(t - i) p_i``, weights made to sum to 1. As with Adam's moments, the correction of
        the bias of a beginning at 0; here in a recursion that is never biased. Nothing of a step that is not applied:
        -0.0 and not 0.0, because an average of -0.0 plus 0.0 is 0.0, another bit pattern.
        """
        assert self.ema is not None
        share = (self.ema - 1.0) / power_minus_one(self.ema, wide(step) + 1.0)
        return share.masked_fill(skipped, -0.0)

    def _averaged(self, state: TrainState, new: Params, decision: Decision) -> Params | None:
        if state.ema is None:
            return None
        share = self.average_share(state.step, decision.skipped)
        moved = {
            # Not by lerp, which compares the share with 1/2 for every element.
            name: mean + share.to(mean.dtype) * (new[name].to(mean.dtype) - mean)
            for name, mean in state.ema.items()
        }
        return select(decision.applied, moved, state.ema)


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
