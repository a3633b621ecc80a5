"""Capsules: one step to take, whole: the state before it and its batch, as ``run/capsule_00001234/``.

A capsule is named after the state's ``cursor`` and holds ``state.safetensors`` and ``batch.safetensors``, the tensors
of the two, and ``capsule.json``: a :class:`trainfn.store.Manifest`, so protected as a checkpoint's is, whose ``config``
holds the notes and the batch's structure. It is committed and verified as a checkpoint is. Nothing in it can run code.

Capsules are evidence, not checkpoints: none is ever loaded to resume from, and none is removed. A second one of the
same cursor takes the place of the first, so that a run that dies at the same place again can say so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.errors import CheckpointError
from trainfn.state import TrainState
from trainfn.store import disk, tensors
from trainfn.store.checkpoint import RunPath
from trainfn.store.disk import CheckpointDamagedError
from trainfn.store.manifest import Manifest, serialise
from trainfn.store.sealed import STATE, build, seal, unseal
from trainfn.store.strict_json import Json

FORMAT = 1
BATCH, MANIFEST = "batch.safetensors", "capsule.json"


@attrs.frozen(kw_only=True, eq=False)
class Capsule:
    """What is in a capsule.

    Attributes:
        state: the state before the step.
        batch: the batch, on the state's device; None where a leaf could not be kept.
        notes: what was noted beside them; ``left_out`` names the leaves that were not kept, if there were any.
    """

    state: TrainState
    batch: Batch
    notes: dict[str, Json]


def save_capsule(path: RunPath, state: TrainState, batch: Batch, notes: Mapping[str, Json]) -> Path:
    """Write a state and a batch into the run directory ``path``; when this returns, they survive power loss.

    Saving the same capsule again is harmless; another one of the same cursor is replaced. A batch may be made of
    tensors, tuples, lists, dicts, ints, floats, strings, bools and None; whatever else is in it is left out, and named
    in the notes.

    Args:
        path: the run directory, made if it is absent.
        state: the state before the step; read, never written to.
        batch: the batch; likewise.
        notes: what else there is to say, as JSON data; NaN and infinities are kept.

    Returns:
        The capsule's directory.

    Raises:
        CheckpointError: a tensor is of a dtype or layout that cannot be stored (all are named), the notes are not
            JSON, or they use the name ``left_out``.
        CheckpointWriteError: the disk is full, failing, or read-only. What was saved before is untouched.

    >>> import tempfile, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     path = save_capsule(run, state, {"x": torch.ones(3, 2)}, {"loss": float("nan")})
    ...     path.name, load_capsule(path, like=state).batch["x"].shape, load_capsule(path, like=state).notes
    ('capsule_00000000', torch.Size([3, 2]), {'loss': nan})
    """
    if "left_out" in notes:
        raise CheckpointError("The name left_out is taken.", where="the notes", hint="call it something else")
    packed: dict[str, Tensor] = {}
    left_out: list[str] = []
    form = _pack(batch, "", packed, left_out)
    noted = dict(notes) | ({"left_out": left_out} if left_out else {})
    config: dict[str, Json] = {"capsule": FORMAT, "batch": form, "notes": noted}
    manifest, files = seal(state, {BATCH: tensors.encode(packed)}, config=config)
    target = Path(path) / _name(state.cursor)
    there = os.path.lexists(target)
    if there and _holds_same(target, manifest):
        with disk.reporting(target, 0):
            disk.sync_directory(target.parent)  # whoever renamed it may have died before doing so
    else:
        disk.commit(target, files | {MANIFEST: serialise(manifest)}, displace=there)
    return target


def load_capsule(path: RunPath, like: TrainState) -> Capsule:
    """Return what :func:`save_capsule` wrote, bit for bit, having checked every byte first.

    Args:
        path: the capsule's directory, under the name that it was saved with.
        like: gives the state's structure, and each leaf's dtype, shape, device, memory layout and ``requires_grad``.
            Not written to; shares no memory with the result; its numbers do not matter.

    Raises:
        CheckpointDamagedError: a file is absent, not a regular file, or not as it was written; or another capsule's.
        CheckpointError: of another format, or of another state than ``like``: all differences are listed.

    >>> import trainfn
    >>> load_capsule("capsule_00000000", trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1)))
    Traceback (most recent call last):
    trainfn.store.disk.CheckpointDamagedError: The file cannot be read: No such file or directory.
      where: capsule_00000000/capsule.json
    """
    where = Path(path)
    manifest, files = _read(where)
    state, packed = build(manifest, files[STATE], like, where=where), tensors.decode(files[BATCH])
    try:
        batch = _unpack(manifest.config["batch"], packed, like.step.device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _contradicts(where, f"a batch of another form ({error!r:.80})") from error
    if packed:
        raise _contradicts(where, f"tensors that the batch does not have: {', '.join(packed)}")
    return Capsule(state=state, batch=batch, notes=manifest.config["notes"])


def read_notes(path: RunPath) -> dict[str, Json]:
    """Return a capsule's notes, verified as by :func:`load_capsule`: what tells which model made it.

    Raises:
        CheckpointError: as :func:`load_capsule`.

    >>> import tempfile, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     read_notes(save_capsule(run, state, torch.ones(1, 2), {"loss": "classification"}))
    {'loss': 'classification'}
    """
    return dict(_read(Path(path))[0].config["notes"])


def _read(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Return the manifest and the contents of the files, verified."""
    manifest, files = unseal(path, MANIFEST, called=_name, others=(BATCH,))
    config = manifest.config
    if config.get("capsule") != FORMAT:
        raise CheckpointError(
            "The capsule has a format that this version of trainfn does not know.",
            where=path / MANIFEST,
            expected=f"format {FORMAT}",
            got=f"format {config.get('capsule')!r}, written by trainfn {manifest.trainfn!r}",
            hint="load it with the version that wrote it",
        )
    if config.keys() != {"capsule", "batch", "notes"} or type(config["notes"]) is not dict:
        raise _contradicts(path, f"the fields {', '.join(config)}")
    return manifest, files


def _holds_same(target: Path, manifest: Manifest) -> bool:
    try:
        there = _read(target)[0]
    except CheckpointError:
        return False
    return (there.files, there.scalars, there.config) == (manifest.files, manifest.scalars, manifest.config)


def _pack(value: Any, where: str, packed: dict[str, Tensor], left_out: list[str]) -> Json:
    """Return a batch's structure as JSON; put its tensors into ``packed``, and name what has no place in either."""
    if isinstance(value, Tensor):
        name = f"{len(packed)}:{where}".encode("ascii", "backslashreplace").decode()
        packed[name] = value
        return {"tensor": name, "order": _order(value)}
    if isinstance(value, dict):
        if all(type(key) in (str, int) for key in value):
            _note_subclass(value, dict, where, left_out)
            pairs = [(key, _pack(child, f"{where}.{key}", packed, left_out)) for key, child in value.items()]
            return {"dict": [[json.dumps(key), child] for key, child in pairs]}
    elif isinstance(value, (tuple, list)):
        kind = tuple if isinstance(value, tuple) else list
        _note_subclass(value, kind, where, left_out)
        return {kind.__name__: [_pack(child, f"{where}.{i}", packed, left_out) for i, child in enumerate(value)]}
    elif type(value) is str:
        return {"text": json.dumps(value)}  # in quotes, so that none is the spelling of NaN
    elif value is None or type(value) in (bool, int, float):
        return {"value": value}
    left_out.append(f"{_field(where)} of type {type(value).__name__} is not kept")
    return {"value": None}


def _unpack(form: Json, packed: dict[str, Tensor], device: torch.device) -> Any:
    """Return the value that :func:`_pack` took apart; takes its tensors out of ``packed``."""
    match form:
        case {"tensor": str(name), "order": [*order]}:
            stored = packed.pop(name)
            if sorted(order) != list(range(stored.ndim)):
                raise ValueError(f"the dimensions {order} of a tensor of {stored.ndim}")
            # Memory from PyTorch's own allocator: kernels, and so bits, can depend on its alignment.
            made = torch.empty([stored.shape[dim] for dim in order], dtype=stored.dtype, device=device)
            return made.permute([order.index(dim) for dim in range(stored.ndim)]).copy_(stored)
        case {"dict": [*pairs]}:
            return {json.loads(key): _unpack(child, packed, device) for key, child in pairs}
        case {"tuple": [*children]}:
            return tuple(_unpack(child, packed, device) for child in children)
        case {"list": [*children]}:
            return [_unpack(child, packed, device) for child in children]
        case {"text": str(text)}:
            return json.loads(text)
        case {"value": None | bool() | int() | float() as value}:
            return value
    raise ValueError(f"the form {form!r:.40}")


def _order(tensor: Tensor) -> list[int]:
    """Return the dimensions as they lie in memory, outermost first: kernels, and so bits, can depend on it."""
    plain = list(range(tensor.ndim))
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return plain
    order = sorted(plain, key=lambda dim: -tensor.stride()[dim])
    return order if tensor.permute(order).is_contiguous() else plain


def _note_subclass(value: Any, kind: type, where: str, left_out: list[str]) -> None:
    if type(value) is not kind:
        left_out.append(f"{_field(where)} of type {type(value).__name__} is kept as a plain {kind.__name__}")


def _field(where: str) -> str:
    return f"batch field {where[1:]}" if where else "the batch"


def _contradicts(path: Path, got: str) -> CheckpointDamagedError:
    what = "The manifest does not belong where it is, or contradicts itself."
    return CheckpointDamagedError(what, where=path / MANIFEST, expected=f"the manifest of {path.name}", got=got)


def _name(cursor: int) -> str:
    return f"capsule_{cursor:08d}"
