"""Reading reports: from the device to numbers, and from those of some steps, or of an epoch, to columns of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from trainfn.health import Verdict, ailing
from trainfn.result import Row
from trainfn.state import NUMBERS, TrainState, trainable

_APPLIED = frozenset(int(verdict) for verdict in Verdict if verdict.applied)


@attrs.define
class EpochSums:
    """What an epoch has come to so far. Losses and norms are of the steps that were applied.

    Attributes:
        epoch: its number.
        steps: taken; those among them that were refused are ``skipped``.
        examples: in these steps; 0 where batches come from a function.
        total: sum of ``loss * weight``.
        norms: sum of the gradient norms; ``highest`` and ``lowest`` are the largest and the smallest.
        seconds: of training.

    >>> sums = EpochSums()
    >>> for loss, weight in ((2.0, 3.0), (1.0, 1.0)):
    ...     sums.add([loss, weight, 0.5, 1e-3, 0])
    >>> sums.row()["loss"]
    1.75
    """

    epoch: int = 0
    steps: int = 0
    skipped: int = 0
    examples: int = 0
    total: float = 0.0
    weight: float = 0.0
    norms: float = 0.0
    highest: float = 0.0
    lowest: float | None = None
    seconds: float = 0.0

    def add(self, line: Sequence[float]) -> None:
        """Add a step: its loss, weight, gradient norm, learning rate and verdict."""
        loss, weight, norm, _, verdict = line
        self.steps += 1
        if verdict not in _APPLIED:
            self.skipped += 1
            return
        self.total += loss * weight
        self.weight += weight
        self.norms += norm
        self.highest = max(self.highest, norm)
        self.lowest = norm if self.lowest is None else min(self.lowest, norm)

    def row(self) -> Row:
        """Return them as columns: the sums divided, once."""
        applied = self.steps - self.skipped
        return {
            "steps": self.steps,
            "steps_skipped": self.skipped,
            **({"examples": self.examples} if self.examples else {}),
            "loss": self.total / self.weight if self.weight else math.nan,
            "weight": self.weight,
            "grad_norm_mean": self.norms / applied if applied else math.nan,
            "grad_norm_max": self.highest if applied else math.nan,
            "grad_norm_min": math.nan if self.lowest is None else self.lowest,
        }


def read_reports(reports: list[Tensor], state: TrainState) -> tuple[list[list[float]], Row]:
    """Return loss, weight, gradient norm, rate and verdict of reports in rows, and what all steps have added up."""
    stats, scale = state.stats, state.scale
    heads = [torch.stack(reports)[:, :NUMBERS]] if reports else []
    totals = [stats.seen, stats.micro_batches, stats.outcomes] + ([] if scale is None else [scale.factor])
    found = iter(fetched([*heads, *totals]))
    table: list[list[float]] = next(found) if reports else []
    seen, micro, outcomes, *factor = found
    row: Row = {
        "applied": int(sum(outcomes[verdict] for verdict in Verdict if verdict.applied)),
        "skipped": int(sum(outcomes[verdict] for verdict in Verdict if not verdict.applied)),
        "micro_batches": int(micro),
        "seen": seen,
    }
    return table, (row | {"scale": factor[0]} if factor else row)


def fetched(values: Sequence[Tensor]) -> list[Any]:
    """Return the numbers in tensors of one device; from a GPU by one copy into page-locked memory, waited for alone.

    >>> fetched([torch.tensor(3), torch.tensor([0.5, 1.0])])
    [3, [0.5, 1.0]]
    """
    if not values[0].is_cuda:
        return [value.tolist() for value in values]
    row = torch.cat([value.reshape(-1).to(torch.float64) for value in values])
    landed = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
    landed.copy_(row, non_blocking=True)
    torch.cuda.current_stream(row.device).record_event().synchronize()
    return taken_apart(landed, values)


def taken_apart(row: Tensor, values: Sequence[Tensor]) -> list[Any]:
    """Return the numbers in a row of all elements, one after another, in the shapes of ``values``.

    >>> taken_apart(torch.arange(3.0), [torch.tensor(3), torch.tensor([1, 1])])
    [0.0, [1.0, 2.0]]
    """
    parts = torch.split(row, [value.numel() for value in values])
    return [part.view(value.shape).tolist() for part, value in zip(parts, values, strict=True)]


def summary(table: list[list[float]], verdicts: list[Verdict]) -> Row:
    """Return the columns that these steps make; the loss is the weighted mean over those that were applied."""
    good = [line for line, verdict in zip(table, verdicts, strict=True) if verdict.applied]
    weight = sum(line[1] for line in good)
    return {
        "loss": sum(line[0] * line[1] for line in good) / weight if good else math.nan,
        "weight": weight,
        "grad_norm": table[-1][2],
        "lr": table[-1][3],
        "verdict": next((v for v in verdicts if v != Verdict.OK), Verdict.OK).name.lower(),
    }


def tensor_health(state: TrainState) -> Row:
    """Read the gradient norm of each tensor at the last step, and say which ones ail."""
    norms = dict(zip(trainable(state.params), state.report.grad_norms.tolist(), strict=True))
    return {"grad_norms": {name: float(f"{value:.4g}") for name, value in norms.items()}, **ailing(norms)}
