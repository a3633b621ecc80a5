"""Positions as JSON: what a data set's or a loader's ``state_dict()`` returns, written without pickle, and back.

JSON has lists and dicts with string keys. What it has not is written as ``{"~": kind, "of": ...}``: tuples (Python's
generator wants its state as one), dicts with other keys, bytes, tensors and arrays (PyTorch's and NumPy's generators).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainfn.errors import CheckpointError, DataError

_TAG = "~"


def to_json(value: Any, where: str = "state_dict()") -> Any:
    """Return a state as JSON data.

    Raises:
        DataError: something in it has no such form; it is named.

    >>> to_json({"at": (1, 2), 3: b"x"})
    {'~': 'dict', 'of': [['at', {'~': 'tuple', 'of': [1, 2]}], [3, {'~': 'bytes', 'of': 'eA=='}]]}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        kind = str(value.dtype).removeprefix("torch.")
        return {_TAG: "tensor", "of": [kind, list(value.shape), _text(flat.tobytes())]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {_TAG: "array", "of": [value.dtype.str, list(value.shape), _text(value.tobytes())]}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    if type(value) is list:
        return [to_json(each, f"{where}[{at}]") for at, each in enumerate(value)]
    if type(value) is tuple:
        return {_TAG: "tuple", "of": [to_json(each, f"{where}[{at}]") for at, each in enumerate(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {_TAG: "bytes", "of": _text(bytes(value))}
    if isinstance(value, Mapping):
        pairs = [(key, to_json(each, f"{where}[{key!r}]")) for key, each in value.items()]
        if all(type(key) is str for key, _ in pairs) and _TAG not in value:
            return dict(pairs)
        return {_TAG: "dict", "of": [[to_json(key, f"a key of {where}"), each] for key, each in pairs]}
    raise DataError(
        "The position of a stream cannot be saved.",
        where=where,
        expected="numbers, texts, bytes, tensors, arrays, and lists, tuples and dicts of them",
        got=f"{type(value).__name__} {value!r:.60}",
        hint="checkpoints hold no pickle: let state_dict() say it in numbers and texts",
    )


def from_json(value: Any) -> Any:
    """Return the state that :func:`to_json` turned into ``value``.

    Raises:
        CheckpointError: it is not of that form.

    >>> from_json(to_json({"at": (1, 2), 3: b"x"}))
    {'at': (1, 2), 3: b'x'}
    """
    if isinstance(value, list):
        return [from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: from_json(each) for key, each in value.items()}
    kind, of = value[_TAG], value.get("of", [])
    try:
        if kind == "tuple":
            return tuple(from_json(each) for each in of)
        if kind == "dict":
            return {from_json(key): from_json(each) for key, each in of}
        if kind == "bytes":
            return base64.b64decode(of, validate=True)
        dtype, shape, raw = of[0], of[1], bytearray(base64.b64decode(of[2], validate=True))
        if kind == "array":
            return np.frombuffer(raw, np.dtype(dtype)).reshape(shape).copy()
        if kind == "tensor":
            return torch.from_numpy(np.frombuffer(raw, np.uint8)).view(_dtype(dtype)).reshape(shape).clone()
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise CheckpointError("The position of the stream is not one.", got=f"{kind!r:.40}: {error!r:.80}") from error
    raise CheckpointError("The position of the stream is not one.", got=f"{kind!r:.40}")


def owner_of(data: Any, workers: int) -> Any:
    """Return the object that knows the position: the loader, or the data set, where no worker has a copy of it.

    None where nothing does, or where its state leaves something out.

    >>> owner_of([1, 2], 0) is None
    True
    """
    parts = [data]
    if isinstance(data, DataLoader) and not workers:
        parts.append(data.dataset)
    elif not isinstance(data, DataLoader) and workers:
        parts = []  # in the workers there are copies of it
    for part in parts:
        if all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict")):
            return None if _has_shuffle_buffer(part) else part
    return None


def _has_shuffle_buffer(data: Any) -> bool:
    """Return whether this is an iterable data set of Hugging Face's with a buffer, whose examples its state leaves out.

    "Examples from shuffle buffers are lost when resuming", says its ``load_state_dict`` (datasets 5.2).
    """
    part = getattr(data, "_ex_iterable", None)
    while part is not None:
        if getattr(part, "buffer_size", 0) > 1:
            return True
        part = getattr(part, "ex_iterable", None)
    return False


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(name)
    return found
