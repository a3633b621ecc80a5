"""``find_lr``: one short run over rates that grow step by step, and the rate that it suggests.

    rate(s) = start (end / start)^(s / (steps - 1))

Because the rate is a schedule and the state a value, there is nothing to put back afterwards. The sweep ends before its
last step where the loss is no longer finite, or where its running mean is above the first one by more than all that it
has fallen, and by more than four times the noise of the first steps.

Losses are then smoothed by a window that looks both ways, so that they do not lag behind the rates. The suggestion is
the middle, on the logarithmic axis, of the valley that they go down: from where a fifth of the fall is done, from the
mean of the first tenth of the steps, to where they are least. It is a heuristic, and lower than the best rate more
often than higher.

References:
    L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, 2017 (the sweep).
    J. Howard, S. Gugger, "fastai: A Layered API for Deep Learning", arXiv:2002.04688, 2020, whose ``lr_find`` suggests
    a rate inside the longest valley, too.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from trainfn.batch import Batch
from trainfn.errors import ConfigError, MissingPackageError
from trainfn.health import Verdict
from trainfn.loop import run
from trainfn.loss import Loss
from trainfn.optim import Schedule, Transform, adamw, matrices_only
from trainfn.optim.transform import wide
from trainfn.plan import plan
from trainfn.task import TaskSpec, TrainConfig
from trainfn.task.config import OF_WHOLE_RUNS, given_settings

DECIDED = ("lr", "warmup_steps", "max_steps", "max_epochs", "out_dir", "resume", "on_divergence", "fast_dev_run")
_FEWEST = 10
_LEFT = 12.0  # over the root of the number of steps: what 95 of 100 sweeps over nothing but noise seem to fall by less


@attrs.frozen(kw_only=True)
class LRSweep:
    """What a sweep over learning rates found.

    Attributes:
        rates: of the steps that were taken, growing.
        losses: the loss that each step began with, in the unit of the loss.
        smoothed: the same without the noise.
        suggestion: a rate to train with; None if the loss never fell by more than its noise.
        ended: why there are no more steps, in words.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    ended: str

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw losses over rates, with the suggestion, into a file; return its path.

        Args:
            path: a file whose ending matplotlib knows: ``.png``, ``.svg``, ``.pdf``.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingPackageError(
                "Drawing a sweep needs matplotlib.", where="LRSweep.plot", hint="pip install matplotlib"
            ) from error
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot(
            xlabel="learning rate", ylabel="loss", xscale="log", title=f"The sweep ended: {self.ended}"
        )
        axes.plot(self.rates, self.losses, ".", color="0.7", label="loss of a step")
        axes.plot(self.rates, self.smoothed, label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="C1", linestyle="--", label=f"suggestion {self.suggestion:.1e}")
        axes.legend()
        figure.savefig(path)
        return Path(path)


def find_lr(
    model: nn.Module,
    data: object,
    *,
    loss: str | Loss | None = None,
    task: str | TaskSpec | None = None,
    optimizer: Callable[[Schedule], Transform] | None = None,
    collate: str | Callable[[list[Any]], Batch] | None = None,
    config: TrainConfig | str | os.PathLike[str] | None = None,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    **settings: Any,
) -> LRSweep:
    """Train for some steps while the learning rate grows, and suggest one; nothing that was given is changed.

    Args:
        model, data, loss, task, collate: as for :func:`trainfn.fit`.
        config: as for :func:`trainfn.fit`; what it says of a whole run (its length, its directory, its evaluations) is
            left aside.
        optimizer: makes an optimizer of a learning rate: ``trainfn.optim.sgd``, ``lambda lr: sgd(lr, momentum=0.9)``;
            AdamW as in ``fit`` if None.
        start, end: the first and the last rate, both > 0.
        steps: how many rates are tried at most, >= 10.
        **settings: settings of ``fit`` that the steps are taken with, such as ``batch_size`` and ``precision``.

    Returns:
        Rates, losses and the suggestion.

    Raises:
        ConfigError: a range or a number of steps that cannot be; an optimizer that is made already; a
            setting that the sweep itself decides, such as ``max_steps``. What :func:`trainfn.plan` raises otherwise.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(256, 4)
    >>> found = find_lr(nn.Linear(4, 2), (x, (x[:, 0] > 0).long()), loss="classification", device="cpu")
    >>> 1e-3 < found.suggestion < 1
    True
    """
    _check(optimizer, start, end, steps, settings)
    schedule = _Growing(start, end, steps)
    chosen = given_settings(config, settings, aside=(*DECIDED, *OF_WHOLE_RUNS))
    made = plan(
        model,
        data,
        loss=loss,
        task=task,
        optimizer=(optimizer or partial(adamw, decay=matrices_only))(schedule),
        collate=collate,
        **{"compile": "eager", "on_spike": "off"} | chosen | {"max_steps": steps},
    )
    rates: list[float] = []
    losses: list[float] = []
    ended = f"it came to the last rate, {end:g}"
    for state in run(made):
        rate, value = float(state.report.lr), float(state.report.loss)
        verdict = Verdict(int(state.report.verdict))
        if verdict in (Verdict.OVERFLOW, Verdict.EMPTY):  # nothing was learned at this rate: it comes again
            continue
        if not (math.isfinite(value) and verdict.applied):
            ended = f"loss or gradient was not finite at {rate:.1e}"
            break
        rates.append(rate)
        losses.append(value)
        if has_diverged(losses, steps):
            ended = f"the loss diverged at {rate:.1e}"
            break
    smooth = smoothed(losses, steps / 40)
    return LRSweep(
        rates=tuple(rates),
        losses=tuple(losses),
        smoothed=tuple(smooth),
        suggestion=suggested(rates, losses, smooth, steps),
        ended=ended,
    )


def smoothed(values: Sequence[float], width: float) -> list[float]:
    """Return the means of values under a bell whose standard deviation is ``width`` places.

    >>> smoothed([1.0, 1.0, 1.0], 1.0)
    [1.0, 1.0, 1.0]
    """
    reach = range(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    found = []
    for place in range(len(values)):
        bell = {place + far: math.exp(-0.5 * (far / width) ** 2) for far in reach if 0 <= place + far < len(values)}
        found.append(sum(weight * values[at] for at, weight in bell.items()) / sum(bell.values()))
    return found


def has_diverged(losses: Sequence[float], steps: int) -> bool:
    """Return whether the running mean is above the first one by all that it has fallen, and by the noise.

    >>> has_diverged([2.0] * 50 + [1.0] * 20 + [2.0] * 20, 100), has_diverged([2.0] * 50 + [1.0] * 20 + [5.0] * 20, 100)
    (False, True)
    """
    early = _early(steps)
    if len(losses) <= early:
        return False
    means, mean = [], 0.0
    for count, value in enumerate(losses, 1):
        mean = 0.9 * mean + 0.1 * value
        means.append(mean / (1 - 0.9**count))
    first, least = means[early - 1], min(range(len(means)), key=means.__getitem__)
    return means[-1] > first + max(first - means[least], 4 * _noise(losses[: max(early, least + 1)]))


def suggested(rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float], steps: int) -> float | None:
    """Return the middle of the valley of the smoothed losses; None if there is none.

    >>> rates = [10.0 ** (power / 10 - 5) for power in range(50)]
    >>> falling = [3.0] * 20 + [3.0 - 0.1 * place for place in range(20)] + [4.0] * 10
    >>> f"{suggested(rates, falling, falling, 50):.2g}", suggested(rates, [3.0] * 50, [3.0] * 50, 50)
    ('0.013', None)
    """
    if len(losses) < 2:
        return None
    early = losses[: _early(steps)]
    least = min(range(len(smooth)), key=smooth.__getitem__)
    first = sum(early) / len(early)
    fall = first - smooth[least]
    if fall <= _LEFT * _noise(losses[: least + 1]) / math.sqrt(steps):
        return None
    begins = max((place for place in range(least) if smooth[place] >= first - 0.2 * fall), default=least)
    return math.sqrt(rates[begins] * rates[least])


def _early(steps: int) -> int:
    """Return how many steps are taken to be at rates too small to change anything."""
    return max(5, steps // 10)


def _noise(losses: Sequence[float]) -> float:
    """Return the mean difference of neighbours, which a trend over many steps hardly changes."""
    return sum(abs(after - before) for before, after in itertools.pairwise(losses)) / max(len(losses) - 1, 1)


class _Growing:
    def __init__(self, start: float, end: float, steps: int) -> None:
        self._start, self._rise = start, math.log(end / start) / (steps - 1)

    def __call__(self, step: torch.Tensor) -> torch.Tensor:
        return torch.exp(wide(step) * self._rise) * self._start

    def __repr__(self) -> str:
        return "growing"


def _check(optimizer: object, start: float, end: float, steps: int, settings: dict[str, Any]) -> None:
    wrong = [f"{name} (the sweep decides it)" for name in settings if name in DECIDED]
    if optimizer is not None and not callable(optimizer):
        wrong.append(f"optimizer={type(optimizer).__name__} (expected what makes one of a rate: trainfn.optim.adamw)")
    numbers = all(isinstance(rate, (int, float)) and 0 < rate < math.inf for rate in (start, end))
    if not (numbers and start < end):
        wrong.append(f"start={start!r}, end={end!r} (expected 0 < start < end)")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < _FEWEST:
        wrong.append(f"steps={steps!r} (expected an int >= {_FEWEST})")
    if wrong:
        raise ConfigError("There is no such sweep.", got="; ".join(wrong))
