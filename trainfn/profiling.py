"""``profile``: where the time of a few steps of a run goes, by ``torch.profiler``."""

from __future__ import annotations

import os
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from trainfn.errors import ConfigError
from trainfn.loop import run
from trainfn.plan import plan
from trainfn.task.config import OF_WHOLE_RUNS, given_settings


@attrs.frozen(kw_only=True)
class Profile:
    """What a few steps have taken. ``print(profile)`` shows the table.

    Attributes:
        table: the operations that took longest, as text.
        trace: the file for chrome://tracing or https://ui.perfetto.dev, or None.
        seconds: wall time of a step, the profiler's own work included.
    """

    table: str
    trace: Path | None
    seconds: float

    def __str__(self) -> str:
        where = "" if self.trace is None else f"\ntrace in {self.trace}"
        return f"{self.table}\n{self.seconds * 1e3:.3f} ms a step under the profiler{where}"


def profile(
    model: nn.Module,
    data: object,
    *,
    steps: int = 5,
    warmup: int = 3,
    trace: str | os.PathLike[str] | None = None,
    rows: int = 20,
    **settings: Any,
) -> Profile:
    """Take a few steps of a run under the profiler: the very steps that ``fit`` takes, without what it does in between.

    Nothing is written but the trace; the model's own tensors are not changed.

    Args:
        model, data: as for :func:`trainfn.fit`.
        steps: how many are profiled.
        warmup: how many are taken before: they compile, and allocate.
        trace: a file for the trace, ``"trace.json"``.
        rows: lines of the table.
        **settings: what ``fit`` would be given, ``config`` and ``max_steps`` included: by it, ``compile="auto"``
            chooses as for that run. ``out_dir`` and ``resume``, rollbacks and evaluations are left aside.

    Raises:
        ConfigError: counts that are none, a run of fewer steps than these, or a trace that would be a directory; and
            what :func:`trainfn.plan` raises.

    >>> x, y = torch.ones(8, 2), torch.zeros(8, dtype=torch.long)
    >>> found = profile(nn.Linear(2, 2), (x, y), loss="classification", steps=2, device="cpu")
    >>> "aten::addmm" in found.table, found.trace
    (True, None)
    """
    counts = all(isinstance(count, int) for count in (steps, warmup))
    if not counts or steps < 1 or warmup < 0:
        raise ConfigError("A profile needs steps.", expected="steps >= 1, warmup >= 0", got=f"{steps=}, {warmup=}")
    if trace is not None and Path(trace).is_dir():
        raise ConfigError("A trace is a file.", where=str(trace), hint=f"trace={str(Path(trace, 'trace.json'))!r}")
    limits = {"max_steps", "max_epochs", "max_seconds"}
    given = given_settings(settings.pop("config", None), settings)
    chosen = {name: value for name, value in given.items() if name not in OF_WHOLE_RUNS or name in limits}
    long = {} if limits & chosen.keys() else {"max_steps": steps + warmup}
    made = plan(model, data, **chosen | long | {"progress": False})
    if made.stop < steps + warmup:
        raise ConfigError(
            "The run is shorter than what is to be profiled.",
            expected=f"at least steps + warmup = {steps + warmup} steps",
            got=f"{made.stop}",
        )
    on_gpu = made.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    states: Any = run(made)
    with closing(states):
        for _ in islice(states, warmup):
            pass
        _wait(on_gpu)
        with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
            began = time.perf_counter()
            for _ in range(steps):
                with torch.profiler.record_function("trainfn step"):
                    next(states)
            _wait(on_gpu)
            seconds = (time.perf_counter() - began) / steps
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    if trace is not None:
        Path(trace).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(os.fspath(trace))
    table = profiler.key_averages().table(sort_by=order, row_limit=rows)
    return Profile(table=table, trace=None if trace is None else Path(trace), seconds=seconds)


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
