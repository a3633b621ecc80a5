"""Checkpoints: a state saved as ``run/step_00001234/``, verified before it is trusted, loaded only where it fits.

A step directory is named after the state's ``cursor`` (batches consumed), which only grows. It holds
``state.safetensors``, every tensor of the state by dotted name, and ``manifest.json``, what is known about it and the
hash of every byte. Nothing in it can run code.

``save`` returns when the step would survive power loss. ``load`` takes ``like``: the structure comes from code, the
bits from the disk, and every difference between the two is an error.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainfn import tree
from trainfn.errors import CheckpointError
from trainfn.state import TrainState
from trainfn.store import disk, structure, tensors
from trainfn.store.disk import CheckpointDamagedError
from trainfn.store.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, parse, serialise, sha256
from trainfn.store.strict_json import Json, canonical, loads

STATE, MANIFEST = "state.safetensors", "manifest.json"
_STEP_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")

RunPath = str | os.PathLike[str]


class CheckpointWarning(UserWarning):
    """Damaged checkpoints were passed over."""


def save(
    state: TrainState,
    path: RunPath,
    *,
    config: Mapping[str, Json] | None = None,
    optimizer: str = "",
    tied: Mapping[str, Sequence[str]] | None = None,
    data: str | None = None,
    metrics: Mapping[str, Json] | None = None,
) -> Path:
    """Write ``state`` into the run directory ``path``; when this returns, it survives power loss.

    Saving the same state twice is harmless. A step that was saved before with other numbers is never overwritten; one
    that is damaged is replaced.

    Args:
        state: read, never written to.
        path: the run directory, made if it is absent.
        config: the run's settings, as JSON data.
        optimizer: identity of the optimizer.
        tied: parameter name -> the other names that the model knows it by.
        data: fingerprint of the data set.
        metrics: what was measured at this step, as JSON data; NaN and infinities are kept.

    Returns:
        The step's directory.

    Raises:
        CheckpointError: the state or the settings hold something that cannot be stored, or this step was saved before
            with other numbers.
        CheckpointWriteError: the disk is full, failing, or read-only. What was saved before is untouched.

    >>> import tempfile, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     save(state, run).name, tree.digest(load(run, like=state)) == tree.digest(state)
    ('step_00000000', True)
    """
    run = Path(path)
    if _is_step(run):
        raise CheckpointError("A checkpoint cannot be saved inside another.", where=run, hint=f"save to {run.parent}")
    named = structure.leaves(state)
    scalars = {name: leaf for name, leaf in named.items() if type(leaf) is int}
    raw = tensors.encode({name: leaf for name, leaf in named.items() if name not in scalars})
    notes = loads(canonical({"config": dict(config or {}), "metrics": dict(metrics or {})}))
    manifest = Manifest(
        trainfn=_version(),
        torch=str(torch.__version__),
        python=platform.python_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        step=int(state.step),
        cursor=state.cursor,
        seed=state.seed,
        config=notes["config"],
        config_sha256=sha256(canonical(notes["config"])),
        optimizer=optimizer,
        data=data,
        metrics=notes["metrics"],
        tied={name: tuple(others) for name, others in (tied or {}).items()},
        files={STATE: FileEntry(size=len(raw), sha256=sha256(raw))},
        tensors=tensors.entries(raw),
        scalars=scalars,
    )
    target = run / _step_name(manifest.cursor)
    there = os.path.lexists(target)
    if there and _holds_same(target, manifest):
        with disk.reporting(target, 0):
            disk.sync_directory(run)  # whoever renamed it may have died before doing so
    else:
        disk.commit(target, {STATE: raw, MANIFEST: serialise(manifest)}, displace=there)
    return target


def load(path: RunPath, like: TrainState) -> TrainState:
    """Return the newest verified state of a run, or the state of one step directory; see :func:`restore`.

    >>> import tempfile, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     step = save(state, run)
    ...     load(run, like=state).cursor, load(step, like=state).cursor
    (0, 0)
    """
    return restore(path, like)[0]


def restore(path: RunPath, like: TrainState) -> tuple[TrainState, Manifest]:
    """Return a saved state, bit for bit as it was saved, and its manifest.

    Of a run directory, the newest step that verifies is taken; newer ones that do not are named, with their reasons,
    in one warning. Of a step directory, that step or nothing is taken.

    Args:
        path: a run directory, or one step directory in it.
        like: gives the structure, and each leaf's dtype, shape, device, memory layout and ``requires_grad``. It is
            not written to and shares no memory with the result. Its numbers do not matter.

    Raises:
        CheckpointError: there is nothing to load, nothing verifies, or what was saved differs from ``like`` in names,
            dtypes, shapes or kinds of leaves: all differences are listed, and nothing is cast.
        CheckpointDamagedError: the one step directory that was asked for does not verify.

    >>> import tempfile, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     _ = save(state, run, metrics={"val_loss": float("nan")})
    ...     loaded, manifest = restore(run, like=state)
    >>> manifest.cursor, manifest.metrics, manifest.tensors["params.weight"]
    (0, {'val_loss': nan}, TensorEntry(dtype='float32', shape=(1, 2)))
    """
    step, manifest, raw = _choose(Path(path))
    if differences := structure.differences(manifest, structure.leaves(like)):
        raise CheckpointError(
            "The checkpoint does not fit the state that it is loaded into.",
            where=step,
            got=_listed(differences),
            hint="make `like` with the model and the optimizer that were saved",
        )
    stored = tensors.decode(raw)

    def placed(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return manifest.scalars[name]
        # Memory from PyTorch's own allocator, with like's strides: kernels, and so bits, can depend on both.
        return torch.empty_like(leaf.detach()).copy_(stored.pop(name)).requires_grad_(leaf.requires_grad)

    return tree.map_named(placed, like), manifest


def verify(step: RunPath) -> Manifest:
    """Return the manifest of a step directory after checking every byte in it.

    Raises:
        CheckpointDamagedError: a file is absent, not a regular file, of another size or hash than the manifest says;
            the manifest is not as it was written; or the directory bears another step's name.
        CheckpointError: written in another format, or unreadable for a reason outside the checkpoint.

    >>> verify("step_00000000")
    Traceback (most recent call last):
    trainfn.store.disk.CheckpointDamagedError: The file cannot be read: No such file or directory.
      where: step_00000000/manifest.json
    """
    return _read(Path(step))[0]


def steps(path: RunPath) -> list[Path]:
    """Return the step directories of a run, oldest first, verified or not; none if the run does not exist.

    >>> steps("/nonexistent")
    []
    """
    try:
        names = [name for name in os.listdir(path) if _STEP_NAME.fullmatch(name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"The run directory could not be read: {error.strerror}.", where=path) from error
    return [Path(path, name) for name in sorted(names, key=lambda name: int(name.removeprefix("step_")))]


def _choose(path: Path) -> tuple[Path, Manifest, bytes]:
    if _is_step(path):
        return path, *_read(path)
    bad: list[str] = []
    for step in reversed(steps(path)):
        try:
            chosen = step, *_read(step)
        except CheckpointError as error:
            bad.append(f"{step.name}: {' '.join(str(error).split())}")
            continue
        if bad:
            newer = f"Newer checkpoints than {step} were passed over, because they are unusable:{_listed(bad)}"
            warnings.warn(newer, CheckpointWarning, stacklevel=3)
        return chosen
    if bad:
        raise CheckpointError("None of the run's checkpoints is usable.", where=path, got=_listed(bad))
    raise CheckpointError(
        "There is no checkpoint.", where=path, expected="a run directory that holds step_XXXXXXXX directories"
    )


def _read(step: Path) -> tuple[Manifest, bytes]:
    """Return the manifest and the tensors' bytes of a step directory, both verified."""
    manifest = parse(disk.read(step / MANIFEST, size=MAX_MANIFEST_BYTES), where=step / MANIFEST)
    own = {"seed": manifest.seed, "cursor": manifest.cursor}
    if (
        step.absolute().name != _step_name(manifest.cursor)
        or manifest.files.keys() != {STATE}
        or manifest.config_sha256 != sha256(canonical(manifest.config))
        or own.items() - manifest.scalars.items()
    ):
        raise CheckpointDamagedError(
            "The manifest does not belong where it is, or contradicts itself.",
            where=step / MANIFEST,
            expected=f"the manifest of {step.name}, with one file {STATE}",
            got=f"that of {_step_name(manifest.cursor)}, with {', '.join(manifest.files)}",
        )
    entry = manifest.files[STATE]
    raw = disk.read(step / STATE, size=entry.size, exact=True)
    if (actual := sha256(raw)) != entry.sha256:
        raise CheckpointDamagedError(
            "The tensors' bytes are not those that were saved.",
            where=step / STATE,
            expected=f"SHA-256 {entry.sha256}",
            got=f"SHA-256 {actual}",
        )
    if tensors.entries(raw, where=step / STATE) != manifest.tensors:
        raise CheckpointDamagedError("The tensors are not those that the manifest lists.", where=step / STATE)
    return manifest, raw


def _holds_same(step: Path, manifest: Manifest) -> bool:
    """Return whether ``step`` holds the state that ``manifest`` describes; False if it is damaged."""
    try:
        there = verify(step)
    except CheckpointDamagedError:
        return False
    if (there.files, there.scalars) != (manifest.files, manifest.scalars):
        raise CheckpointError(
            "This step was saved before, with other numbers.",
            where=step,
            got=f"a checkpoint made {there.created}",
            hint="save to another run directory, or resume from this one",
        )
    return True


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"\n    {line}" for line in lines)


def _is_step(path: Path) -> bool:
    return _STEP_NAME.fullmatch(path.absolute().name) is not None


def _step_name(cursor: int) -> str:
    return f"step_{cursor:08d}"


def _version() -> str:
    try:
        return importlib.metadata.version("trainfn")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
