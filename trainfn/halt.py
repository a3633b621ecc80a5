"""When a run has to stop, and what it says then: the verdict, the examples, and where the numbers went wrong.

Because a step is pure and a batch is a function of its number, the step that went wrong can be taken again: it is
diagnosed, and kept as a capsule (the state and the batch) for :func:`trainfn.replay`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainfn.batch import Batch
from trainfn.diagnose import Diagnosis, diagnose
from trainfn.errors import CheckpointError, DivergenceError, listed
from trainfn.health import Verdict
from trainfn.plan import Plan
from trainfn.state import TrainState
from trainfn.store import save_capsule
from trainfn.tree import evolve

_REMEDIES = {
    "parameter": "the model is not finite: look at how its weights are made or loaded",
    "buffer": "the model is not finite: look at how its buffers are made or loaded",
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
    config, before = planned.config, _skipped_spikes(planned.state)

    def must_halt(state: TrainState, row: bool) -> bool:
        # Reading the verdicts is free on a CPU and a sync on a GPU, where it waits for the next row. Nothing is lost
        # by that: the device has refused the bad steps already.
        if planned.device.type != "cpu" and not row:
            return False
        if int(state.health.streak) >= config.halt_after:
            return True
        return config.on_spike == "halt" and _skipped_spikes(state) > before

    return must_halt


def divergence(planned: Plan, state: TrainState, cursor: int, checkpoint: Path | None) -> DivergenceError:
    """Return the error that ends the run, with the diagnosis of the step that was refused, and its capsule.

    Args:
        planned: the run.
        state: the last state.
        cursor: number of the batch whose step is to be explained. No step was applied since: the state that it was
            refused on is this one, but for what has been counted.
        checkpoint: where the last good state is saved, or None.
    """
    examples = planned.loader.indices(cursor).tolist()
    batch = planned.to_device(planned.loader.batch(cursor))
    before = evolve(state, cursor=cursor)
    found: Diagnosis | None = None
    try:
        found = diagnose(planned.step.step, before, batch)
        said = [*found.lines, *_bad_examples(found, examples)]
    except Exception as failure:  # which must not hide why the run ends
        said = [f"The step could not be replayed: {type(failure).__name__}: {failure}"]
    capsule, kept = _keep(planned, before, batch, examples, found)
    streak = int(state.health.streak)
    what = f"{streak} steps in a row gave non-finite numbers" if streak else "a step stood out from its recent past"
    intact = "and saved in " + str(checkpoint) if checkpoint else "but saved only with out_dir="
    error = DivergenceError(
        f"Training was halted: {what}.",
        where=f"step {cursor + 1}, examples [{listed(examples)}]",
        got="\n    ".join(said),
        hint=f"{_REMEDIES['none' if found is None else found.cause]}\n    {kept}\n    the state is intact, {intact}",
    )
    error.diagnosis, error.capsule = found, capsule
    return error


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
        "examples": [*examples],
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


def _skipped_spikes(state: TrainState) -> int:
    counts = state.stats.outcomes.tolist()
    return int(counts[Verdict.LOSS_SPIKE_SKIPPED] + counts[Verdict.GRADIENT_SPIKE_SKIPPED])
