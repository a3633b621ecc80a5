"""``find_batch_size``: the largest batch whose whole step fits into memory, by doubling and then by bisection.

On a GPU a size fits if two steps of it run without an out-of-memory error, within the memory that is left. On a host an
error never comes, the process is killed; so there the memory of each try is measured, a larger one is foreseen as
a straight line over the batch size that rises a tenth more than from the try before, or than from the state alone, and
is not tried if it would not fit. So the size that is found may be some hundredths smaller than the largest.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainfn.batch import Batch
from trainfn.data import is_stream
from trainfn.data.forms import read_data_loader
from trainfn.data.passes import is_loader
from trainfn.data.source import is_function, kind_of
from trainfn.errors import ConfigError, StepMemoryError
from trainfn.faults import is_out_of_memory
from trainfn.finders.memory import Gauge, release, set_aside
from trainfn.loop import run
from trainfn.loss import Loss
from trainfn.optim import Transform
from trainfn.plan import Plan, plan
from trainfn.task import TaskSpec, TrainConfig
from trainfn.task.config import OF_WHOLE_RUNS, given_settings
from trainfn.tree import leaves

DECIDED = (
    "batch_size",
    "max_steps",
    "max_epochs",
    "out_dir",
    "resume",
    "on_divergence",
    "fast_dev_run",
    "warmup_steps",
)
_STEPS = 2
_CARE = 1.1  # how much steeper the memory of a host may rise than it has


@attrs.frozen
class Trial:
    """A batch size that was looked at.

    Attributes:
        batch_size: examples in a micro-batch.
        fits: whether its step fits.
        bytes: memory above what was taken before: measured, or foreseen where ``tried`` is False; None where an error
            said that there is none.
        tried: whether it was run.
    """

    batch_size: int
    fits: bool
    bytes: int | None
    tried: bool


@attrs.frozen(kw_only=True)
class BatchSizeSearch:
    """What a search for a batch size found.

    Attributes:
        batch_size: the largest that fits, for ``fit(batch_size=...)``.
        limit: the bytes that a step was allowed to take.
        most: the largest size that was in question: all examples of the data, or what the caller said.
        trials: all that was looked at, in order.
    """

    batch_size: int
    limit: int
    most: int
    trials: tuple[Trial, ...]


def find_batch_size(
    model: nn.Module,
    data: object,
    *,
    loss: str | Loss | None = None,
    task: str | TaskSpec | None = None,
    optimizer: Transform | None = None,
    collate: str | Callable[[list[Any]], Batch] | None = None,
    config: TrainConfig | str | os.PathLike[str] | None = None,
    most: int | None = None,
    headroom: float = 0.1,
    max_memory: int | None = None,
    **settings: Any,
) -> BatchSizeSearch:
    """Return the largest ``batch_size`` whose whole step fits into memory; nothing that was given is changed.

    A step is forward, backward and update over ``accumulate`` micro-batches, with the state that ``fit`` would have.
    Steps are taken in ``compile="eager"`` unless said otherwise, over the first batches of the data: where examples
    differ in length, later ones may need more, which ``headroom`` is for.

    Args:
        model, data, loss, task, optimizer, collate: as for :func:`trainfn.fit`. Of a ``DataLoader`` all but its batch
            size is read.
        config: as for :func:`trainfn.fit`; what it says of a whole run (its length, its directory, its evaluations) is
            left aside.
        most: the largest size to consider; the number of examples over ``accumulate`` if None. A stream, of which that
            is not known, needs it.
        headroom: share of the memory to leave free, in [0, 1).
        max_memory: bytes that a step may take; what is left on the device, or on the host and in its control group
            (and never more than that), if None. ``headroom`` is taken off it.
        **settings: settings of ``fit`` that memory depends on, such as ``accumulate``, ``precision``, ``ema``,
            ``checkpoint`` and ``device``.

    Returns:
        The size, and what was tried.

    Raises:
        StepMemoryError: not even one example fits.
        ConfigError: a setting that the search itself decides; batches that come made; a stream without ``most``;
            or the host's memory cannot be measured. What :func:`trainfn.plan` and a step raise otherwise, unless it is
            for want of memory.

    >>> import torch
    >>> x = torch.randn(8, 4)
    >>> found = find_batch_size(nn.Linear(4, 2), (x, x[:, :2]), loss="mse", device="cpu")
    >>> found.batch_size, [trial.batch_size for trial in found.trials]
    (8, [2, 4, 8])
    """
    _check(most, headroom, max_memory, settings)
    chosen = given_settings(config, settings, aside=(*DECIDED, *OF_WHOLE_RUNS))
    arguments: dict[str, Any] = {"loss": loss, "task": task, "optimizer": optimizer}
    data, brought = _examples(data, most)
    arguments |= {"collate": brought.pop("collate", None) if collate is None else collate}
    arguments |= {"compile": "eager", "on_spike": "off"} | brought | chosen | {"max_steps": _STEPS}

    def planned(batch_size: int) -> Plan:
        return plan(model, data, **arguments | {"batch_size": batch_size})

    first = _first(planned)
    device, examples = first.device, first.loader.examples
    most = max(1, min(most or examples, examples // first.config.accumulate))
    at_rest = _bytes_at_rest(first)
    del first
    _try(planned, min(2, most))  # what is allocated once, at the first step of all, is not measured
    arguments["check_data"] = False
    trials: list[Trial] = []
    with set_aside():
        gauge = Gauge(device)
        free = gauge.free() if max_memory is None else min(max_memory, gauge.free())
        limit = int(free * (1 - headroom))

        def fits(batch_size: int) -> bool:
            measured = [(trial.batch_size, trial.bytes) for trial in trials if trial.tried and trial.bytes]
            foreseen = _foreseen([(0, at_rest), *measured], batch_size)
            if gauge.on_host and trials and foreseen > limit:
                trials.append(Trial(batch_size, False, foreseen, tried=False))
            else:
                with gauge.watching():
                    error = _try(planned, batch_size)
                taken = None if error else gauge.peak
                trials.append(Trial(batch_size, taken is not None and taken <= limit, taken, tried=True))
                release(device)
            return trials[-1].fits

        found = largest(fits, most)
    if found == 0:
        needed = trials[-1].bytes
        raise _no_memory("an out-of-memory error" if needed is None else f"{needed:,} bytes", limit)
    return BatchSizeSearch(batch_size=found, limit=limit, most=most, trials=tuple(trials))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` that fits, where all smaller ones do; 0 if 1 does not.

    Doubling finds the order of magnitude, bisection the number: 2 log2(found) questions. It begins with 2: a model with
    BatchNorm refuses a batch of 1.

    >>> asked = []
    >>> largest(lambda size: asked.append(size) or size <= 11, 100), asked
    (11, [2, 4, 8, 16, 12, 10, 11])
    """
    good, bad = 0, most + 1
    for size in itertools.chain((2**power for power in range(1, most.bit_length()) if 2**power < most), (most,)):
        if not fits(size):
            bad = size
            break
        good = size
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _examples(data: Any, most: int | None) -> tuple[Any, dict[str, Any]]:
    """Return data that batches of any size can be made of, and what a ``DataLoader`` says besides the size of its."""
    if is_function(data) or (is_stream(data) and is_loader(data)):
        raise ConfigError(
            "These batches are made already, so there is no size to search for.",
            where="data",
            got=kind_of(data),
            hint="pass the examples: tensors, a data set, or an iterable of them",
        )
    if is_stream(data) and most is None:
        raise ConfigError(
            "A stream does not say how many examples there are.",
            where=f"data, {kind_of(data)}",
            expected="most=, the largest size to consider",
        )
    if not isinstance(data, DataLoader) or is_stream(data):
        return data, {}
    read = read_data_loader(data)
    own = {name: value for name, value in read.settings.items() if name != "batch_size"}
    return read.dataset, own | ({} if read.collate is None else {"collate": read.collate})


def _first(planned: Callable[[int], Plan]) -> Plan:
    """Return a plan of the smallest size that there is memory for: it tells the device, the data and the state."""
    try:
        return planned(2)
    except StepMemoryError:
        pass
    try:
        return planned(1)
    except StepMemoryError as error:
        raise _no_memory("an out-of-memory error") from error


def _no_memory(got: str, limit: int | None = None) -> StepMemoryError:
    return StepMemoryError(
        "There is not enough memory for a step over one example.",
        expected=None if limit is None else f"at most {limit:,} bytes",
        got=got,
        hint='shorter examples, precision="bf16-mixed", checkpoint="blocks.*", or a smaller model',
    )


def _try(planned: Callable[[int], Plan], batch_size: int) -> bool:
    """Take steps of a size; return whether there was not enough memory. All that they made is freed on return."""
    try:
        for _ in run(planned(batch_size)):
            pass
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, StepMemoryError) or is_out_of_memory(error)):
            raise
        return True
    return False


def _bytes_at_rest(made: Plan) -> int:
    """Return the bytes of the state and of one set of gradients: what a step takes however small its batch is."""
    state = sum(leaf.numel() * leaf.element_size() for leaf in leaves(made.state) if isinstance(leaf, Tensor))
    return state + sum(leaf.numel() * leaf.element_size() for leaf in made.state.params.values())


def _foreseen(known: list[tuple[int, int]], batch_size: int) -> int:
    """Return the memory of a size from that of the largest that is known, carefully.

    It rises from there as from the one before it, or as from the least: the heap may have had room for the last step.
    """
    *others, (large, high) = sorted(known)
    rise = max(((high - low) / (large - small) for small, low in (others[:1] + others[-1:])), default=0.0)
    return math.ceil(high + _CARE * (batch_size - large) * max(rise, 0.0))


def _check(most: int | None, headroom: float, max_memory: int | None, settings: dict[str, Any]) -> None:
    wrong = [f"{name} (the search decides it)" for name in settings if name in DECIDED]
    for name, count in (("most", most), ("max_memory", max_memory)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            wrong.append(f"{name}={count!r} (expected an int >= 1, or None)")
    if isinstance(headroom, bool) or not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
        wrong.append(f"headroom={headroom!r} (expected a number in [0, 1))")
    if wrong:
        raise ConfigError("There is no such search.", got="; ".join(wrong))
