"""Going back: a run that diverges goes on from its last healthy checkpoint, without the data that it diverged over.

    c : cursor of the newest checkpoint that verifies and whose losses were finite
    k : cursor at which the run has to stop
    state = load(step_c), cursor = k

The *window* that is skipped is [c, k): every batch since that checkpoint, those that were refused and those before
them, whose updates are undone with the rest. So the cursor only ever grows, draws and data stay functions of it, no
step directory is written twice, and the run is bit for bit a run over the same stream of batches without the window.
What is skipped are batches, not examples: in the next epoch the examples come again, in other company.

Which checkpoints there are decides how far it goes back: those of ``save_every``, of a new best, of a signal, and the
one at the end of a part of the run that was resumed.

Which windows were skipped is in the settings of every later checkpoint, as ``rollbacks``: a run that is resumed has
used as many. With ``rollback_lr_factor`` the learning rate is lowered each time, by a factor in the state that every
update is multiplied by; what it is now is in the column ``lr_factor`` of the history, and in checkpoints. A run that
does not ask for it has no such factor, and no operation more.

References:
    A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311, 2022, section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs

from trainfn.directory import with_factor_of
from trainfn.errors import CheckpointError, warn
from trainfn.health import HealthWarning, forgiven
from trainfn.plan import Plan
from trainfn.state import TrainState
from trainfn.store import Entry, glance, load, steps
from trainfn.tree import evolve

RECORD = "rollbacks"
"""Under this name, the windows are among the settings in a manifest."""


class Rollback:
    """How often a run has gone back, and the going back.

    Attributes:
        windows: (c, k) of each time, in those parts of the run, too, that came before a resume.
        metrics: what the checkpoint says that it went back to last.
    """

    def __init__(self, planned: Plan) -> None:
        self._config = planned.config
        before = [] if planned.previous is None else planned.previous.config.get(RECORD, [])
        self.windows: list[tuple[int, int]] = [(begin, end) for begin, end in before]
        self.metrics: dict[str, Any] = {}

    @property
    def wanted(self) -> bool:
        """Whether the run goes back at all; then it needs a checkpoint from its beginning."""
        return self._config.on_divergence == "rollback" and self._config.out_dir is not None

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint says about it among the settings; nothing, as long as there is nothing to say."""
        return {RECORD: [list(window) for window in self.windows]} if self.windows else {}

    def back(self, state: TrainState, drain: Callable[[], object]) -> TrainState | None:
        """Return the state to go on with instead of this one, with a warning; None if the run has to end.

        Args:
            state: the last state; it gives the structure, and the cursor to go on from.
            drain: waits for the checkpoint that is being written.
        """
        if len(self.windows) >= self._config.max_rollbacks:
            return None
        drain()
        for step in reversed(steps(self._config.out_dir or "")):
            try:
                manifest = glance(step)
                if manifest.cursor > state.cursor or not Entry(cursor=0, metrics=manifest.metrics).healthy:
                    continue
                found = load(step, like=with_factor_of(manifest, state))
            except CheckpointError:
                continue  # an older one will do
            self.windows.append((manifest.cursor, state.cursor))
            self.metrics = dict(manifest.metrics)
            text = (
                f"The run has diverged, and goes on from {step}, without batches {manifest.cursor} to "
                f"{state.cursor - 1}: rollback {len(self.windows)} of {self._config.max_rollbacks}."
            )
            warn(text, HealthWarning)
            lowered = None if state.lr_factor is None else state.lr_factor * self._config.rollback_lr_factor
            return evolve(found, cursor=state.cursor, health=forgiven(found.health), lr_factor=lowered)
        return None

    def row(self, back: TrainState) -> dict[str, float]:
        """Return the columns of the history's row at which a run went back to this state."""
        factor = {} if back.lr_factor is None else {"lr_factor": float(back.lr_factor)}
        return {"rolled_back_to": self.windows[-1][0], **factor}

    def explain(self, error: Exception) -> None:
        """Add to the error that ends the run how often it has gone back."""
        if self.wanted:
            skipped = ", ".join(f"{begin} to {end - 1}" for begin, end in self.windows)
            used = f"It has gone back {len(self.windows)} times" + (f", without batches {skipped}" if skipped else "")
            few = len(self.windows) < self._config.max_rollbacks
            error.add_note(f"{used}; {'there is no healthy checkpoint' if few else 'max_rollbacks allows no more'}.")


class Course:
    """The states of a run, which may be sent back: after ``go_on``, the next one is the step from another state.

    Attributes:
        state: the last one; None before the first.

    >>> plan = attrs.make_class("Plan", ["state"])(3)
    >>> course = Course(plan, lambda plan: iter(range(plan.state, 6)))
    >>> next(course), next(course), course.go_on(1), next(course)
    (3, 4, 1, 1)
    """

    def __init__(self, planned: Plan, run: Callable[[Plan], Iterator[TrainState]]) -> None:
        self._planned, self._run = planned, run
        self._states = run(planned)
        self.state: TrainState | None = None

    def __iter__(self) -> Iterator[TrainState]:
        return self

    def __next__(self) -> TrainState:
        self.state = next(self._states)
        return self.state

    def go_on(self, state: TrainState) -> TrainState:
        """Leave the states that would have come, and go on from this one, which is returned."""
        self.close()
        self._states = self._run(attrs.evolve(self._planned, state=state))
        self.state = state
        return state

    def close(self) -> None:
        """End the workers that fetch batches."""
        close = getattr(self._states, "close", None)
        if close is not None:
            close()
