"""When something is due between two steps of a run."""

from __future__ import annotations

import attrs

from trainfn.plan import Plan


@attrs.frozen
class Due:
    """What is due after a step: an evaluation, a checkpoint, an estimate of the noise, a row, the row of an epoch.

    An evaluation that is due only because the run ends is not ``scheduled``: had it gone on, there would be none.
    """

    evaluation: bool
    scheduled: bool
    checkpoint: bool
    noise: bool
    row: bool
    epoch: bool


def what_is_due(planned: Plan, cursor: int, *, now: bool = False, end: bool = False) -> Due:
    """Return what is due after so many steps.

    Args:
        planned: the run.
        cursor: the number of steps.
        now: whether a checkpoint is due for another reason than their number.
        end: whether the run ends here for another reason.

    >>> import torch, trainfn
    >>> made = trainfn.plan(torch.nn.Linear(1, 1), (torch.ones(6, 1), torch.ones(6, 1)), loss="mse", batch_size=2,
    ...                     max_epochs=2, log_every=4, health_every=None, device="cpu")
    >>> [cursor for cursor in range(1, 7) if what_is_due(made, cursor).row]
    [4, 6]
    >>> [cursor for cursor in range(1, 7) if what_is_due(made, cursor).epoch]
    [3, 6]
    """
    config, end = planned.config, end or cursor >= planned.stop

    def every(steps: int | None) -> bool:
        return steps is not None and cursor % steps == 0

    epoch = every(planned.loader.batches_per_epoch)
    scheduled = bool(planned.val_loaders) and (every(config.eval_every) if config.eval_every else epoch)
    evaluation = scheduled or (bool(planned.val_loaders) and end)
    checkpoint = config.out_dir is not None and (end or now or every(config.save_every))
    noise = every(config.noise_scale_every)
    # A checkpoint closes a row, so that a run that resumes from it writes the rows it would have written anyway.
    row = evaluation or checkpoint or noise or end or every(config.log_every) or every(config.health_every)
    row |= epoch and planned.patience.by_epoch  # which may end the run
    return Due(evaluation, scheduled, checkpoint, noise, row, epoch)


def next_due(planned: Plan, cursor: int) -> int:
    """Return the number of steps after ``cursor`` at which something may be due next, by these numbers alone.

    >>> import torch, trainfn
    >>> made = trainfn.plan(torch.nn.Linear(1, 1), (torch.ones(6, 1), torch.ones(6, 1)), loss="mse", batch_size=2,
    ...                     max_epochs=9, log_every=4, health_every=None, device="cpu")
    >>> [next_due(made, cursor) for cursor in (0, 3, 4, 25)]
    [3, 4, 6, 27]
    """
    config = planned.config
    every = (
        config.eval_every,
        config.save_every,
        config.noise_scale_every,
        config.log_every,
        config.health_every,
        planned.loader.batches_per_epoch,
    )
    return min(planned.stop, *(cursor + steps - cursor % steps for steps in every if steps is not None))
