"""When a run has to stop, and what it says then: the verdict, the examples, and where the numbers went wrong.

Because a step is pure and a batch is a function of its number, the step that went wrong can be taken again: it is
diagnosed, and kept as a capsule (the state and the batch) for :func:`trainfn.replay`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainfn.batch import Batch
from trainfn.diagnose import Diagnosis, diagnose
from trainfn.errors import CheckpointError, DivergenceError, listed
from trainfn.health import SPIKES, Verdict
from trainfn.plan import Plan
from trainfn.state import Report, TrainState
from trainfn.store import save_capsule
from trainfn.tree import evolve, named_leaves

_REMEDIES = {
    "parameter": "if the model was finite when it was made, an update has spoilt it: look at lr, its schedule, and eps",
    "buffer": "if the model was finite when it was made, a forward has spoilt it: look for examples of extreme size",
    "batch": "mend these examples or leave them out",
    "cast": 'scale the inputs down, or use precision="bf16-mixed" or "32-true"',
    "module": "look in this module for logarithms, roots, quotients and masks that mask everything; lower lr",
    "loss": "look in the loss for logarithms, roots and quotients; lower lr",
    "gradient": "look there for the derivatives of roots, norms and quotients at 0; lower lr",
    "sum": "lower lr, or the size of the loss",
    "none": "lower lr, or lower clip_norm, or warm up for longer",
}


def make_halt_check(planned: Plan) -> Callable[[TrainState, bool], bool]:
    """Return ``(state, row is due) -> whether the run has to stop``."""

    def must_halt(state: TrainState, row: bool) -> bool:
        # To ask is free on a CPU and a sync on a GPU, where it waits for the next row. Nothing is lost by that: from
        # the step on at which the run had to stop, the device has refused every one.
        return (planned.device.type == "cpu" or row) and bool(state.health.halted)

    return must_halt


def make_finite_check(planned: Plan) -> Callable[[TrainState, Path | None], DivergenceError | None]:
    """Return ``(state, last checkpoint) -> error``, an error if a tensor has lost its finiteness in this run.

    Verdicts are about losses and gradients. An update of a finite gradient may still be infinite (a schedule that gives
    NaN, an eps of 0, a float16 parameter), and so may a statistic of a finite batch.
    """
    is_asked = bool(planned.val_loaders) or planned.config.out_dir is not None
    before = _not_finite(planned.state) if is_asked else set()  # a mask may be -inf from the beginning

    def spoilt(state: TrainState, checkpoint: Path | None) -> DivergenceError | None:
        lost = [name for name in _not_finite(state) if name not in before]
        if lost:
            return DivergenceError(
                "Training was halted: the state is no longer finite, though losses and gradients were.",
                where=f"by step {state.cursor}: {listed(lost, 8)}",
                expected="finite parameters, moments and buffers",
                hint="for parameters and moments, look at lr, its schedule, eps, and float16; for buffers, look for "
                f"examples of extreme size. This state was not saved; the last checkpoint is {checkpoint or 'none'}",
            )
        return None

    return spoilt


def divergence(
    planned: Plan, state: TrainState, cursor: int, report: Report, keep: Callable[[TrainState], Path | None]
) -> DivergenceError:
    """Return the error that ends the run, with the diagnosis of the step that was refused, and its capsule.

    Args:
        planned: the run.
        state: the last state.
        cursor: number of the batch that made the run halt. No step was applied since: the state that it was refused on
            is this one, but for what has been counted.
        report: on its step.
        keep: saves a state.
    """
    examples = planned.loader.indices(cursor).tolist()
    batch = planned.to_device(planned.loader.batch(cursor))
    health = evolve(state.health, halted=torch.zeros_like(state.health.halted))
    before = evolve(state, cursor=cursor, health=health)
    found: Diagnosis | None = None
    try:
        found = diagnose(planned.step.step, before, batch)
        said = [*found.lines, *_bad_examples(found, examples)]
    except Exception as failure:  # which must not hide why the run ends
        said = [f"The step could not be replayed: {type(failure).__name__}: {failure}"]
    cause = "none" if found is None else found.cause
    what = f"{int(state.health.streak)} steps in a row gave non-finite numbers"
    verdict = Verdict(int(report.verdict))
    if verdict in SPIKES:
        what = "a step stood out from its recent past"
        said = [_spike(verdict, report, state), *said[1:]]
    capsule, kept = _keep(planned, before, batch, examples, found)
    error = DivergenceError(
        f"Training was halted: {what}.",
        where=f"step {cursor + 1}, examples [{listed(examples)}]",
        got="\n    ".join(said),
        hint="\n    ".join([_REMEDIES[cause], kept, _saved(cause, state, keep)]),
    )
    error.diagnosis, error.capsule = found, capsule
    return error


def _spike(verdict: Verdict, report: Report, state: TrainState) -> str:
    mean = state.health.baseline.mean
    usual = f"loss {float(mean[0]):.4g}, gradient norm {float(mean[2].exp()):.4g}"
    now = f"loss {float(report.loss):.4g}, gradient norm {float(report.grad_norm):.4g}"
    return f"{verdict.sentence}; it has {now}, where {usual} are usual"


def _saved(cause: str, state: TrainState, keep: Callable[[TrainState], Path | None]) -> str:
    if cause in ("parameter", "buffer"):
        return "the state is not saved, because it is not finite"
    try:
        checkpoint = keep(state)
    except CheckpointError as failure:  # which must not hide why the run ends
        return f"the state is intact, but could not be saved: {failure.what}"
    return f"the state is intact, and saved in {checkpoint}" if checkpoint else "the state is saved only with out_dir="


def _not_finite(state: TrainState) -> set[str]:
    whole = {"params": state.params, "buffers": state.buffers, "opt": state.opt, "ema": state.ema}
    with torch.no_grad():
        return {name for name, leaf in named_leaves(whole) if leaf.is_floating_point() and not leaf.isfinite().all()}


def _bad_examples(found: Diagnosis, examples: list[int]) -> list[str]:
    rows = sorted({row for one in found.spoilt if one.to_blame for row in one.rows if row < len(examples)})
    return [f"in the data set, these rows are examples {listed([examples[row] for row in rows])}"] if rows else []


def _keep(
    planned: Plan, before: TrainState, batch: Batch, examples: list[int], found: Diagnosis | None
) -> tuple[Path | None, str]:
    """Save the step as a capsule in the run directory; return where, and a sentence for people."""
    config = planned.config
    if config.out_dir is None:
        return None, "pass out_dir= to have the step kept for trainfn.replay"
    notes: dict[str, Any] = {
        "examples": list(examples),
        "loss": planned.record["config"]["loss"],
        "optimizer": planned.optimizer.name,
        "precision": config.precision,
        "accumulate": config.accumulate,
        "ema": before.ema is not None,
        "diagnosis": None if found is None else found.to_json(),
    }
    try:
        path = save_capsule(config.out_dir, before, batch, notes)
    except CheckpointError as error:  # this must not hide why the run ends
        return None, f"the step could not be kept: {error.what}"
    return path, f'trainfn.replay("{path}", step) takes the step again'
