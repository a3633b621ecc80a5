"""Named tensors as safetensors bytes, and back, with a header check of our own before anything is built.

The layout (https://github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian; the header, a
JSON object ``{name: {"dtype", "shape", "data_offsets"}}``; the data. The library's parser takes repeated names and
headers that cost it gigabytes, so neither reaches it.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from trainfn.errors import CheckpointError
from trainfn.store.disk import CheckpointDamagedError
from trainfn.store.manifest import TensorEntry

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 1 << 18
MAX_RANK = 64
"""PyTorch's own limit for most kernels."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""What a checkpoint can hold, by the format's name for it."""


_LAID_OUT = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64",
    "U64",
)  # fmt: skip
"""The library lays tensors out by dtype, in this order from the last to the first, and then by name."""


def encode(named: dict[str, Tensor]) -> memoryview:
    """Return the tensors as safetensors bytes. They are copied to the host and packed; the originals are untouched.

    The bytes are those of ``safetensors.torch.save``. That function holds Python's lock for as long as it takes; here
    PyTorch copies tensor by tensor without it, so that whoever trains meanwhile goes on.

    Raises:
        CheckpointError: a tensor is of a dtype or layout that the format lacks, or holds no data (all are named).

    >>> decode(encode({"w": torch.ones(2, dtype=torch.bfloat16)}))
    {'w': tensor([1., 1.], dtype=torch.bfloat16)}
    """
    wrong = [f"{name}: {t.dtype}, {t.layout}, {t.device}" for name, t in named.items() if not _fits(t)]
    if wrong:
        raise CheckpointError(
            "Some tensors cannot be stored.",
            expected="dense tensors with data, of dtype " + ", ".join(_name(dtype) for dtype in DTYPES.values()),
            got="; ".join(wrong),
        )
    assert sys.byteorder == "little", "the format is little-endian, and numbers are copied as they are"
    codes = {dtype: code for code, dtype in DTYPES.items()}
    ordered = sorted(named, key=lambda name: (-_LAID_OUT.index(codes[named[name].dtype]), name))
    header, spans, end = {}, {}, 0
    for name in ordered:
        tensor, begin = named[name], end
        end += tensor.numel() * tensor.element_size()
        spans[name] = (begin, end)
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    raw = torch.empty(len(head) + end, dtype=torch.uint8)
    raw[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for name, (begin, stop) in spans.items():
        if begin < stop:
            place = raw[len(head) + begin : len(head) + stop].view(named[name].dtype)
            place.view(named[name].shape).copy_(named[name].detach())
    return memoryview(raw.numpy())  # type: ignore[arg-type]


def decode(data: bytes | memoryview) -> dict[str, Tensor]:
    """Return the tensors of safetensors bytes that :func:`entries` has accepted, in memory of their own."""
    try:
        return dict(safetensors.torch.load(bytes(data)))
    except SafetensorError as error:
        raise _damaged(str(error)) from error


def entries(data: bytes | memoryview, *, where: object = None, metadata: bool = False) -> dict[str, TensorEntry]:
    """Return the dtype and shape of every tensor by name, having checked that the header describes all of the data.

    Args:
        data: the file's contents.
        where: for messages.
        metadata: let the header hold the text that other writers put there. It is not read.

    Raises:
        CheckpointDamagedError: the header is cut, too long, no JSON, repeats a name, has an entry of another form,
            or the tensors overlap, leave gaps, or do not end where the data does.

    >>> entries(encode({"w": torch.ones(2, 3)}))
    {'w': TensorEntry(dtype='float32', shape=(2, 3))}
    """
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise _damaged(f"a header of {length} bytes in a file of {len(data)}", where)
    try:
        header = json.loads(bytes(data[8 : 8 + length]).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"a header that is not strict JSON ({error})", where) from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise _damaged(f"a header that is not an object of at most {MAX_TENSORS} tensors", where)
    if metadata and _is_text(header.get("__metadata__")):
        del header["__metadata__"]
    spans, found = [(0, 0), (len(data) - 8 - length,) * 2], {}
    for name, entry in header.items():
        parsed = _entry(entry)
        if parsed is None:
            raise _damaged(f"a malformed entry for {name!r:.80}", where)
        found[name], span = parsed
        spans.append(span)
    spans.sort()
    if any(before[1] != after[0] for before, after in itertools.pairwise(spans)):
        raise _damaged("tensors that overlap, leave gaps, or end elsewhere than the data", where)
    return found


def _entry(entry: Any) -> tuple[TensorEntry, tuple[int, int]] | None:
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end], **others} if (
            not others
            and code in DTYPES
            and len(shape) <= MAX_RANK
            and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            and end - begin == math.prod(shape) * DTYPES[code].itemsize
        ):
            return TensorEntry(dtype=_name(DTYPES[code]), shape=tuple(shape)), (begin, end)
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, dict) and all(type(text) is str for text in value.values())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _damaged(got: str, where: object = None) -> CheckpointDamagedError:
    return CheckpointDamagedError("The tensors' file is not well formed.", where=where, got=got)


def _fits(tensor: Tensor) -> bool:
    return tensor.dtype in DTYPES.values() and tensor.layout is torch.strided and not tensor.is_meta


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
