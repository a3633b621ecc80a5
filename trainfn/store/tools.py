"""What to ask of checkpoints: what is in one, whether it is whole, and how two of them differ. Nothing is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import attrs
import torch
from torch import Tensor

from trainfn.errors import CheckpointError
from trainfn.store import checkpoint, tensors
from trainfn.store.checkpoint import RunPath, choose, glance, is_step, steps, told
from trainfn.store.disk import CheckpointDamagedError
from trainfn.store.manifest import Manifest
from trainfn.store.sealed import indented
from trainfn.tree import describe


@attrs.frozen(kw_only=True)
class Difference:
    """How one leaf of two states differs.

    Attributes:
        name: its dotted name.
        kind: ``"same"`` is bit for bit; ``"form"`` is another dtype or shape.
        a: its dtype and shape there, or its number; None if it is absent.
        b: likewise.
        largest: the largest absolute difference of two elements: 0 if they are the same, infinity where only one is
            NaN, and NaN where there is nothing to subtract.
    """

    name: str
    kind: Literal["same", "numbers", "form", "only in a", "only in b"]
    a: str | None
    b: str | None
    largest: float


def inspect(path: RunPath) -> Manifest:
    """Return what is known about a checkpoint, without reading its tensors.

    Args:
        path: a step directory, or a run directory, of which the newest step is taken whose manifest can be read.

    Raises:
        CheckpointError: there is none.

    >>> import tempfile, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     _ = trainfn.save(state, run, metrics={"val_loss": 0.5})
    ...     inspect(run).metrics
    {'val_loss': 0.5}
    """
    if is_step(Path(path)):
        return glance(path)
    bad = []
    for step in reversed(steps(path)):
        try:
            return glance(step)
        except CheckpointError as error:
            bad.append(told(step, error))
    raise CheckpointError("There is no checkpoint that can be read.", where=path, got=indented(bad) if bad else None)


def verify(path: RunPath) -> Manifest:
    """Check every byte of a step, or of every step of a run; return the manifest of the newest.

    Raises:
        CheckpointDamagedError: a step is not as it was written; of a run, all such steps are listed.
        CheckpointError: there is nothing to verify, or it cannot be read.

    >>> verify("/nonexistent")
    Traceback (most recent call last):
        ...
    trainfn.errors.CheckpointError: There is no checkpoint.
      where: /nonexistent
    """
    if is_step(Path(path)) or (not steps(path) and Path(path, checkpoint.MANIFEST).exists()):
        return checkpoint.verify(path)
    found, bad = [], []
    for step in steps(path):
        try:
            found.append(checkpoint.verify(step))
        except CheckpointError as error:
            bad.append(told(step, error))
    if bad:
        raise CheckpointDamagedError("Some checkpoints do not verify.", where=path, got=indented(bad))
    if not found:
        raise CheckpointError("There is no checkpoint.", where=path)
    return found[-1]


def diff(a: RunPath, b: RunPath) -> list[Difference]:
    """Return how each leaf of two checkpoints differs, sorted by name.

    Args:
        a, b: step directories, or run directories, of which the newest step that verifies is taken.

    Raises:
        CheckpointError: one of them cannot be read.

    >>> import tempfile, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     step = trainfn.save(state, run)
    ...     {found.kind for found in diff(run, step)}
    {'same'}
    """
    (_, first, raw_first), (_, second, raw_second) = choose(Path(a)), choose(Path(b))
    one: dict[str, Tensor | int] = {**tensors.decode(raw_first), **first.scalars}
    two: dict[str, Tensor | int] = {**tensors.decode(raw_second), **second.scalars}
    return [_difference(name, one.get(name), two.get(name)) for name in sorted(one.keys() | two.keys())]


def _difference(name: str, a: Tensor | int | None, b: Tensor | int | None) -> Difference:
    def made(kind: Literal["same", "numbers", "form", "only in a", "only in b"], largest: float) -> Difference:
        return Difference(name=name, kind=kind, a=_say(a), b=_say(b), largest=largest)

    if a is None or b is None:
        return made("only in b" if a is None else "only in a", math.nan)
    if isinstance(a, int) and isinstance(b, int):
        return made("same" if a == b else "numbers", float(abs(a - b)))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
        return made("form", math.nan)
    if a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return made("same", 0.0)
    wide = torch.complex128 if a.is_complex() else torch.float64
    gaps = (a.to(wide) - b.to(wide)).abs()
    gaps[(a == b) | (a.isnan() & b.isnan())] = 0.0  # infinities of one sign leave NaN
    return made("numbers", float(gaps.nan_to_num(nan=math.inf).max()))


def _say(leaf: Tensor | int | None) -> str | None:
    if isinstance(leaf, Tensor):
        return describe(leaf)
    return None if leaf is None else str(leaf)
