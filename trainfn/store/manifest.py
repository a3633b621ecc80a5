"""The manifest of a checkpoint: what its files are, what is in them, and what made them, as JSON that protects itself.

A manifest is refused unless its bytes are the one canonical serialisation of what they say, and its ``digest`` is the
SHA-256 of the canonical serialisation of the rest. So a flipped bit, a cut, an edited number and a doubled key are all
seen before any field is believed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import attrs
import cattrs

from trainfn.errors import CheckpointError
from trainfn.store.disk import CheckpointDamagedError
from trainfn.store.strict_json import Json, canonical, loads

FORMAT = 1

MIGRATIONS: dict[int, Callable[[dict[str, Json]], dict[str, Json]]] = {}
"""By format: a pure function from the fields of a manifest of that format to those of the next one.

Empty, because there is only one. Whoever changes what a checkpoint is makes FORMAT larger, adds a line here, and leaves
the checkpoint of the old format under ``tests/golden`` to be loaded for ever.
"""

MAX_MANIFEST_BYTES = 64 << 20


@attrs.frozen(kw_only=True)
class FileEntry:
    """A file of the checkpoint: its length in bytes and the SHA-256 of its contents, in hex."""

    size: int
    sha256: str


@attrs.frozen(kw_only=True)
class TensorEntry:
    """A tensor of the checkpoint: its dtype's name without ``torch.``, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@attrs.frozen(kw_only=True)
class Manifest:
    """All that is known about a checkpoint besides the numbers in it.

    Attributes:
        format: version of this form.
        trainfn: version of this package that wrote it; likewise ``torch`` and ``python``.
        created: ISO 8601 time, UTC.
        step: updates applied.
        cursor: batches consumed; the checkpoint's directory is named after it.
        seed: what the run's randomness is derived from.
        config: the run's settings.
        config_sha256: SHA-256 of ``canonical(config)``, in hex.
        optimizer: identity of the optimizer, free text.
        data: fingerprint of the data set, or None.
        metrics: what was measured when it was saved.
        tied: parameter name -> the other names that the model knows it by.
        files: file name -> its size and hash.
        tensors: dotted name -> dtype and shape, for every tensor of the state.
        scalars: dotted name -> value, for every host int of the state.
    """

    format: int = FORMAT
    trainfn: str
    torch: str
    python: str
    created: str
    step: int
    cursor: int
    seed: int
    config: dict[str, Json]
    config_sha256: str
    optimizer: str
    data: str | None
    metrics: dict[str, Json]
    tied: dict[str, tuple[str, ...]]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    scalars: dict[str, int]


def serialise(manifest: Manifest) -> bytes:
    """Return the contents of ``manifest.json``: the canonical JSON of the fields and of their digest.

    Raises:
        CheckpointError: a field holds something that is not JSON, or all of it is longer than ``parse``'s callers read.
    """
    fields = _converter.unstructure(manifest)
    raw = canonical(fields | {"digest": sha256(canonical(fields))})
    if len(raw) > MAX_MANIFEST_BYTES:
        expected = f"at most {MAX_MANIFEST_BYTES} bytes"
        raise CheckpointError("The manifest is too long.", expected=expected, got=f"{len(raw)} bytes")
    return raw


def parse(raw: bytes, *, where: object = None) -> Manifest:
    """Return the manifest that ``serialise`` turned into ``raw``.

    Raises:
        CheckpointDamagedError: not the bytes that anything like this module wrote.
        CheckpointError: intact, but of another format, or with fields that are unknown, missing or of a wrong type
            (all of them are named).

    >>> parse(b"{}")
    Traceback (most recent call last):
    trainfn.store.disk.CheckpointDamagedError: The manifest is not one.
      got: KeyError('digest')
    """
    try:
        fields = loads(raw)
        is_canonical, digest = canonical(fields) == raw, fields.pop("digest")
        rest = canonical(fields)
    except (ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
        raise CheckpointDamagedError("The manifest is not one.", where=where, got=repr(error)[:80]) from error
    if not is_canonical or digest != sha256(rest):
        raise CheckpointDamagedError("The manifest is not as it was written: its digest or form is off.", where=where)
    while type(fields.get("format")) is int and fields["format"] in MIGRATIONS:
        fields = MIGRATIONS[fields["format"]](fields)
        rest = canonical(fields)
    if fields.get("format") != FORMAT:
        raise CheckpointError(
            "The checkpoint has a format that this version of trainfn does not know.",
            where=where,
            expected=f"format {FORMAT}",
            got=f"format {fields.get('format')!r}, written by trainfn {fields.get('trainfn')!r}",
            hint="load it with the version that wrote it",
        )
    try:
        manifest = _converter.structure(fields, Manifest)
    except cattrs.BaseValidationError as error:
        raise _misformed("; ".join(cattrs.transform_error(error)), where) from error
    if canonical(_converter.unstructure(manifest)) != rest:
        raise _misformed("a container of the wrong kind", where)
    return manifest


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of ``data`` in hex."""
    return hashlib.sha256(data).hexdigest()


def _misformed(got: str, where: object) -> CheckpointError:
    return CheckpointError("The manifest's fields are not those of its format.", where=where, got=got)


def _exactly(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


_converter = cattrs.Converter(forbid_extra_keys=True, unstruct_collection_overrides={tuple: list})
_converter.register_structure_hook(int, _exactly)
_converter.register_structure_hook(str, _exactly)
