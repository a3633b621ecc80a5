"""Checkpoints: a state saved as ``run/step_00001234/``, verified before it is trusted, loaded only where it fits.

A step directory is named after the state's ``cursor`` (batches consumed), which only grows. It holds
``state.safetensors``, every tensor of the state by dotted name, and ``manifest.json``, what is known about it and the
hash of every byte. Nothing in it can run code.

``save`` returns when the step would survive power loss. ``load`` takes ``like``: the structure comes from code, the
bits from the disk, and every difference between the two is an error.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from trainfn.errors import CheckpointError
from trainfn.state import TrainState
from trainfn.store import disk
from trainfn.store.disk import CheckpointDamagedError
from trainfn.store.manifest import Manifest, serialise
from trainfn.store.sealed import STATE, belongs, build, indented, seal, unseal
from trainfn.store.strict_json import Json, canonical, loads

MANIFEST = "manifest.json"
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

    >>> import tempfile, torch, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     save(state, run).name, trainfn.tree.digest(load(run, like=state)) == trainfn.tree.digest(state)
    ('step_00000000', True)
    """
    run = Path(path)
    if is_step(run):
        raise CheckpointError("A checkpoint cannot be saved inside another.", where=run, hint=f"save to {run.parent}")
    notes = loads(canonical({"config": dict(config or {}), "metrics": dict(metrics or {})}))
    manifest, files = seal(
        state,
        {},
        config=notes["config"],
        optimizer=optimizer,
        data=data,
        metrics=notes["metrics"],
        tied={name: tuple(others) for name, others in (tied or {}).items()},
    )
    target = run / step_name(manifest.cursor)
    there = os.path.lexists(target)
    if there and _holds_same(target, manifest):
        with disk.reporting(target, 0):
            disk.sync_directory(run)  # whoever renamed it may have died before doing so
    else:
        disk.commit(target, files | {MANIFEST: serialise(manifest)}, displace=there)
    return target


def load(path: RunPath, like: TrainState) -> TrainState:
    """Return the newest verified state of a run, or the state of one step directory; see :func:`restore`.

    >>> import tempfile, torch, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     step = save(state, run)
    ...     load(run, like=state).cursor, load(step, like=state).cursor
    (0, 0)
    """
    return restore(path, like)[0]


def restore(
    path: RunPath,
    like: TrainState | Callable[[Manifest], TrainState],
    *,
    also: Callable[[Manifest], Iterable[str]] | None = None,
) -> tuple[TrainState, Manifest]:
    """Return a saved state, bit for bit as it was saved, and its manifest.

    Of a run directory, the newest step that verifies is taken; newer ones that do not are named, with their reasons,
    in one warning. Of a step directory, that step or nothing is taken.

    Args:
        path: a run directory, or one step directory in it.
        like: gives the structure, and each leaf's dtype, shape, device, memory layout and ``requires_grad``. It is
            not written to and shares no memory with the result. Its numbers do not matter. A function is given the
            manifest, and returns it.
        also: says what else differs, one line each, to be reported in the same error.

    Raises:
        CheckpointError: there is nothing to load, nothing verifies, or what was saved differs from ``like`` in names,
            dtypes, shapes or kinds of leaves: all differences are listed, and nothing is cast.
        CheckpointDamagedError: the one step directory that was asked for does not verify.

    >>> import tempfile, torch, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     _ = save(state, run, metrics={"val_loss": float("nan")})
    ...     loaded, manifest = restore(run, like=state)
    >>> manifest.cursor, manifest.metrics, manifest.tensors["params.weight"]
    (0, {'val_loss': nan}, TensorEntry(dtype='float32', shape=(1, 2)))
    """
    step, manifest, raw = choose(Path(path))
    like = like(manifest) if callable(like) else like
    return build(manifest, raw, like, where=step, others=also(manifest) if also else ()), manifest


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


def glance(step: RunPath) -> Manifest:
    """Return the manifest of a step directory without reading its tensors: their file's size is all that is checked.

    Raises:
        CheckpointError: as :func:`verify`, but for the tensors' bytes.

    >>> import tempfile, torch, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     glance(save(state, run)).tensors["params.bias"].shape
    (1,)
    """
    path = Path(step)
    manifest = belongs(path, MANIFEST, called=step_name)
    for name, entry in manifest.files.items():
        disk.check(path / name, size=entry.size)
    return manifest


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
    return [Path(path, name) for name in sorted(names, key=cursor_of)]


def cursor_of(step: RunPath) -> int:
    """Return the cursor that a step directory is named after.

    >>> cursor_of("run/step_00000012")
    12
    """
    return int(Path(step).name.removeprefix("step_"))


def told(step: Path, error: Exception) -> str:
    """Return what is wrong with a step, in one line."""
    return f"{step.name}: {' '.join(str(error).split())}"


def choose(path: Path) -> tuple[Path, Manifest, bytes]:
    """Return the step that :func:`restore` takes, its manifest, and the bytes of its tensors, verified."""
    if is_step(path):
        return path, *_read(path)
    bad: list[str] = []
    for step in reversed(steps(path)):
        try:
            chosen = step, *_read(step)
        except CheckpointError as error:
            bad.append(told(step, error))
            continue
        if bad:
            newer = f"Newer checkpoints than {step} were passed over, because they are unusable:{indented(bad)}"
            warnings.warn(newer, CheckpointWarning, stacklevel=3)
        return chosen
    if bad:
        raise CheckpointError("None of the run's checkpoints is usable.", where=path, got=indented(bad))
    raise CheckpointError(
        "There is no checkpoint.", where=path, expected="a run directory that holds step_XXXXXXXX directories"
    )


def _read(step: Path) -> tuple[Manifest, bytes]:
    """Return the manifest and the tensors' bytes of a step directory, both verified."""
    manifest, files = unseal(step, MANIFEST, called=step_name)
    return manifest, files[STATE]


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


def is_step(path: Path) -> bool:
    """Return whether a path has the name of a step directory, whatever is there."""
    return _STEP_NAME.fullmatch(path.absolute().name) is not None


def step_name(cursor: int) -> str:
    """Return the name of the directory of the checkpoint after batch ``cursor``."""
    return f"step_{cursor:08d}"
