"""Measuring a state: the loss and metrics over a data set, and the gradient noise of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainfn.attention import attending
from trainfn.batch import Batch, micro_batches
from trainfn.data import Feed, Loader, Stream, is_stream, make_feed, to_device
from trainfn.data.forms import read_data_loader
from trainfn.engine import CompiledStep
from trainfn.errors import ConfigError
from trainfn.metric import Metric, resolve
from trainfn.optim.transform import wide
from trainfn.per_sample import NoiseScale, noise_scale
from trainfn.plan import Plan
from trainfn.state import TrainState
from trainfn.step import Step, surroundings
from trainfn.tree import map_leaves

Row = dict[str, Any]

_MERGED = 10  # estimates that make one noise scale: one batch alone says little


def evaluate(
    step: Step | CompiledStep,
    state: TrainState,
    data: object,
    *,
    metrics: str | Metric | Sequence[str | Metric] = (),
    batch_size: int = 32,
    collate: str | Callable[[list[Any]], Batch] | None = None,
    ema: bool = False,
) -> dict[str, float]:
    """Return the loss over a data set: one sum over all of it, divided once by one weight; and metrics likewise.

    In evaluation mode and without gradients; the module's modes and the global random generators are as before.

    Args:
        step: what the state is trained with; its model, loss and precision are used.
        state: read, not changed.
        data: anything that ``fit`` takes, or a :class:`trainfn.data.Loader`.
        metrics: names or values from :mod:`trainfn.metric`.
        batch_size: examples at a time. Changes memory, not meaning.
        collate: as for ``fit``.
        ema: use the moving average of the parameters.

    Returns:
        ``{"loss": ..., "weight": ..., ...}``; the loss is NaN when nothing counted.

    Raises:
        ConfigError: a metric that is unknown or does not fit the loss; ``ema`` of a state that has none.

    >>> import trainfn
    >>> model, optimizer = torch.nn.Linear(2, 2), trainfn.optim.sgd(lr=0.1)
    >>> step = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    >>> state = trainfn.init(model, optimizer)
    >>> evaluate(step, state, (torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)), batch_size=2)["weight"]
    5.0
    """
    if isinstance(data, DataLoader) and not is_stream(data):
        read = read_data_loader(data)
        data, collate = read.dataset, collate or read.collate
    loader = data
    if not isinstance(loader, (Loader, Stream)):
        loader = make_feed(data, batch_size=batch_size, shuffle=False, collate=collate)
    if ema and state.ema is None:
        raise ConfigError("The state has no moving average.", got="ema=True", hint="init(..., ema=True)")
    chosen = [metrics] if isinstance(metrics, (str, Metric)) else metrics
    strategy = (step.step if isinstance(step, CompiledStep) else step).strategy
    measured = [resolve(metric, strategy) for metric in chosen]
    return _means(step, state, loader, measured, ema=ema)


def evaluate_plan(planned: Plan, state: TrainState) -> dict[str, float]:
    """Return what a plan evaluates, as the columns of a row: ``val_loss`` and ``val_`` and each metric's name.

    Of several sets, the columns have the set's name in them: ``val_clean_loss``.
    """
    columns: dict[str, float] = {}
    for prefix, loader in planned.val_loaders.items():
        found = _means(planned.step, state, loader, planned.metrics, ema=state.ema is not None)
        columns |= {f"{prefix}_{name}": value for name, value in found.items() if name != "weight"}
    return columns


def noise_columns(planned: Plan, state: TrainState, rows: Sequence[Row]) -> Row:
    """Return the gradient noise of the last batch as columns of a row, and the scale that the last ten rows have made.

    ``noise_trace`` and ``noise_squared_norm`` are sums over ``noise_weight``; ``noise_scale`` is in examples.
    """
    batch = planned.to_device(planned.loader.batch(state.cursor - 1))
    found = _noise(planned.step.step, state, batch)
    shares = [{name: float(getattr(found, name)) for name in _SUMS}]
    shares += [{name: row[f"noise_{name}"] for name in _SUMS} for row in rows if "noise_trace" in row][-_MERGED + 1 :]
    finite = [share for share in shares if all(map(math.isfinite, share.values()))]
    trace, squared_norm = (sum(share[name] for share in finite) for name in ("trace", "squared_norm"))
    scale = trace / squared_norm if squared_norm > 0 else math.nan
    return {f"noise_{name}": value for name, value in shares[0].items()} | {"noise_scale": scale}


def check_noise(planned: Plan) -> None:
    """Raise before the first step what an estimate of the noise would raise later, if one is asked for."""
    if planned.config.noise_scale_every is not None:
        _noise(planned.step.step, planned.state, planned.to_device(planned.loader.batch(0)))


_SUMS = ("trace", "squared_norm", "weight")


def _noise(step: Step, state: TrainState, batch: Batch) -> NoiseScale:
    part = micro_batches(batch, step.accumulate)[0]
    with attending(step.attention), surroundings(step.model, state, training=True):
        return noise_scale(step.loss, state.params, state.buffers, part, chunk_size=8)


def _means(
    step: Step | CompiledStep,
    state: TrainState,
    loader: Feed,
    metrics: Sequence[Metric],
    *,
    ema: bool,
) -> dict[str, float]:
    sums: dict[str, Any] = {}
    params = state.ema if ema else None
    for batch in loader.one_pass():
        found = step.evaluate(state, to_device(batch, state.step.device), metrics=metrics, params=params)
        found["loss"] = map_leaves(wide, found["loss"])
        sums = map_leaves(torch.add, sums, found) if sums else found
    total, weight = sums["loss"].total, sums["loss"].weight
    results = {"loss": float(total / weight), "weight": float(weight)}
    for metric in metrics:
        results |= metric.result(sums[metric.name])
    return results
