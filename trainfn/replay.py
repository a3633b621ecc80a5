"""``replay``: the step that a run was halted at, taken again from its capsule."""

from __future__ import annotations

import os

from trainfn.diagnose import Diagnosis, diagnose
from trainfn.engine import CompiledStep
from trainfn.errors import ConfigError
from trainfn.state import init
from trainfn.step import Step
from trainfn.store import load_capsule, read_notes


def replay(path: str | os.PathLike[str], step: Step | CompiledStep) -> Diagnosis:
    """Take the step in a capsule once more, eagerly and watched; return what made its numbers non-finite.

    A run that is halted leaves such a capsule, ``run/capsule_00001234/``: the state before the step, and its batch. The
    model, and so the code that went wrong, is the caller's: change it, and see whether the diagnosis changes.

    Args:
        path: the capsule's directory.
        step: made as for the run, with the same kind of optimizer (its numbers do not matter), ``precision`` and
            ``accumulate``. Its model is called, and its own tensors are neither read nor written to.

    Raises:
        ConfigError: the step has another precision or accumulation than the run had.
        CheckpointDamagedError: a file is absent, or not as it was written.
        CheckpointError: the capsule's state does not fit the step's model and optimizer: all differences are listed.

    >>> import tempfile, torch, trainfn
    >>> model, optimizer = torch.nn.Linear(2, 2), trainfn.optim.adamw()
    >>> step = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    >>> batch = (torch.full((3, 2), float("nan")), torch.zeros(3, dtype=torch.long))
    >>> with tempfile.TemporaryDirectory() as run:      # as `fit` does when it halts
    ...     capsule = trainfn.store.save_capsule(run, trainfn.init(model, optimizer), batch, notes={})
    ...     replay(capsule, step).cause
    'batch'
    """
    plain = step.step if isinstance(step, CompiledStep) else step
    notes = read_notes(path)
    given = {"precision": plain.precision, "accumulate": plain.accumulate}
    differ = [name for name, value in given.items() if notes.get(name, value) != value]
    if differ:
        raise ConfigError(
            "The step is not made as it was in the run.",
            where=os.fspath(path),
            expected=", ".join(f"{name}={notes[name]!r}" for name in differ),
            got=", ".join(f"{name}={given[name]!r}" for name in differ),
            hint="pass the run's settings to make_step",
        )
    like = init(plain.model, plain.optimizer, ema=bool(notes.get("ema")), precision=plain.precision)
    capsule = load_capsule(path, like=like)
    return diagnose(plain, capsule.state, capsule.batch)
