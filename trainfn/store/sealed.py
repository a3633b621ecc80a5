"""What checkpoints and capsules share: a state as bytes, a directory whose manifest vouches for its files, and back."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Mapping
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
from trainfn.store.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, parse, sha256
from trainfn.store.strict_json import Json, canonical, loads

STATE = "state.safetensors"


def seal(
    state: TrainState, others: Mapping[str, bytes | memoryview], *, config: Mapping[str, Json], **known: Any
) -> tuple[Manifest, dict[str, bytes | memoryview]]:
    """Return the manifest of a directory that holds a state and other files, and the contents of all these files.

    Args:
        state: read, never written to.
        others: file name -> contents, beside those of the state.
        config: JSON data that is hashed by itself.
        **known: other fields of the manifest.

    Raises:
        CheckpointError: the state holds something that cannot be stored, or ``config`` is not JSON.
    """
    named = structure.leaves(state)
    scalars = {name: leaf for name, leaf in named.items() if type(leaf) is int}
    raw = tensors.encode({name: leaf for name, leaf in named.items() if name not in scalars})
    files: dict[str, bytes | memoryview] = {STATE: raw, **others}
    settings = loads(canonical(dict(config)))
    empty: dict[str, Any] = {"optimizer": "", "data": None, "metrics": {}, "tied": {}}
    manifest = Manifest(
        trainfn=_version(),
        torch=str(torch.__version__),
        python=platform.python_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        step=int(state.step),
        cursor=state.cursor,
        seed=state.seed,
        config=settings,
        config_sha256=sha256(canonical(settings)),
        files={name: FileEntry(size=len(data), sha256=sha256(data)) for name, data in files.items()},
        tensors=tensors.entries(raw),
        scalars=scalars,
        **(empty | known),
    )
    return manifest, files


def unseal(
    path: Path, name: str, *, called: Callable[[int], str], others: Iterable[str] = ()
) -> tuple[Manifest, dict[str, bytes]]:
    """Return the manifest of a directory and the contents of its files, every byte verified.

    Args:
        path: the directory.
        name: file name of the manifest.
        called: cursor -> the name that the directory must have.
        others: file names, beside that of the state.

    Raises:
        CheckpointDamagedError: something is absent, not a regular file, or not as it was written.
        CheckpointError: written in another format, or unreadable for a reason outside the directory.
    """
    manifest = belongs(path, name, called=called, others=others)
    files = {}
    for file, entry in manifest.files.items():
        raw = files[file] = disk.read(path / file, size=entry.size, exact=True)
        if (actual := sha256(raw)) != entry.sha256:
            raise CheckpointDamagedError(
                "The tensors' bytes are not those that were saved.",
                where=path / file,
                expected=f"SHA-256 {entry.sha256}",
                got=f"SHA-256 {actual}",
            )
        found = tensors.entries(raw, where=path / file)
        if file == STATE and found != manifest.tensors:
            raise CheckpointDamagedError("The tensors are not those that the manifest lists.", where=path / file)
    return manifest, files


def belongs(path: Path, name: str, *, called: Callable[[int], str], others: Iterable[str] = ()) -> Manifest:
    """Return the manifest of a directory, which is this directory's and agrees with itself. Arguments: :func:`unseal`.

    Raises:
        CheckpointError: as :func:`unseal`, but for the other files.
    """
    manifest = parse(disk.read(path / name, size=MAX_MANIFEST_BYTES), where=path / name)
    own = {"seed": manifest.seed, "cursor": manifest.cursor}
    if (
        path.absolute().name != called(manifest.cursor)
        or manifest.files.keys() != {STATE, *others}
        or manifest.config_sha256 != sha256(canonical(manifest.config))
        or own.items() - manifest.scalars.items()
    ):
        raise CheckpointDamagedError(
            "The manifest does not belong where it is, or contradicts itself.",
            where=path / name,
            expected=f"the manifest of {path.name}, with {', '.join([STATE, *others])}",
            got=f"that of {called(manifest.cursor)}, with {', '.join(manifest.files)}",
        )
    return manifest


def build(manifest: Manifest, raw: bytes, like: TrainState, *, where: Path, others: Iterable[str] = ()) -> TrainState:
    """Return the state in ``raw``, in the structure of ``like``, which is not written to and shares no memory with it.

    ``others`` are differences that the caller has found, reported with those that are found here.

    Raises:
        CheckpointError: what was saved differs from ``like``: all differences are listed.
    """
    if differences := sorted([*others, *structure.differences(manifest, structure.leaves(like))]):
        raise CheckpointError(
            "What was saved does not fit the state that it is loaded into.",
            where=where,
            got=indented(differences),
            hint="make `like` with the model and the optimizer that were saved",
        )
    stored = tensors.decode(raw)

    def placed(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return manifest.scalars[name]
        # Memory from PyTorch's own allocator, with like's strides: kernels, and so bits, can depend on both.
        return torch.empty_like(leaf.detach()).copy_(stored.pop(name)).requires_grad_(leaf.requires_grad)

    return tree.map_named(placed, like)


def indented(lines: Iterable[str]) -> str:
    """Return one line below the other, for a message."""
    return "".join(f"\n    {line}" for line in lines)


def _version() -> str:
    try:
        return importlib.metadata.version("trainfn")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
