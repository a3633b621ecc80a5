"""Nothing that was altered is believed: bits, lengths, and what a fuzzer makes of headers and manifests."""

from __future__ import annotations

import json
import math
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.crash.faults import make_state
from tests.deadline import deadline
from trainfn.errors import CheckpointError
from trainfn.store import load, save, tensors, verify
from trainfn.store.manifest import parse, sha256
from trainfn.store.strict_json import canonical, loads
from trainfn.tree import digest

STATE, MANIFEST = "state.safetensors", "manifest.json"


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 20 kB: 15 of tensors, 5 of manifest."""
    made = save(
        make_state(5, width=800),
        tmp_path_factory.mktemp("run"),
        config={"text": "x" * 1500},
        metrics={"loss": math.nan},
    )
    assert 18_000 < sum(path.stat().st_size for path in made.iterdir()) < 24_000
    return made


def refused(step: Path, name: str, versions: Iterator[bytes]) -> int:
    """Hold that the checkpoint is refused with every one of these versions of a file; return how many there were."""
    own, count = (step / name).read_bytes(), 0
    try:
        for version in versions:
            (step / name).write_bytes(version)
            with pytest.raises(CheckpointError):
                verify(step)
            count += 1
    finally:
        (step / name).write_bytes(own)
    verify(step)
    return count


def flipped(data: bytes, bits: range) -> Iterator[bytes]:
    for bit in bits:
        yield data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]


SAMPLED_OR_ALL = pytest.mark.parametrize(
    "stride", [199, pytest.param(1, marks=pytest.mark.slow)], ids=["sampled", "all"]
)


@SAMPLED_OR_ALL
@pytest.mark.parametrize("name", [MANIFEST, STATE])
def test_one_flipped_bit_is_refused(step: Path, name: str, stride: int) -> None:
    data = (step / name).read_bytes()
    bits = range(stride // 2, 8 * len(data), stride)
    assert refused(step, name, flipped(data, bits)) == len(bits)


@SAMPLED_OR_ALL
@pytest.mark.parametrize("name", [MANIFEST, STATE])
def test_a_truncation_is_refused(step: Path, name: str, stride: int) -> None:
    data = (step / name).read_bytes()
    lengths = range(stride // 2, len(data), stride)
    assert refused(step, name, (data[:length] for length in lengths)) == len(lengths)


# --- fuzzing ----------------------------------------------------------------------------------------------------------

TOKENS = [
    b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"-0", b"9" * 400, b"18446744073709551616", b"0.5", b"true", b"null",
    b'"F32"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b"[]", b"{}", b"[" * 2000, b'{"a":' * 2000,
    b'"\\ud800"', b'"\\u0000"', b"\xff", b"\xef\xbb\xbf", b",", b":", b'"', b"\\", b"]", b"}", b" " * 5000, b"\n",
    b'"format": 1', b'"cursor": 5', b'"files"', b'"../../x"', b"[0, 4]", b"[4, 0]", b"[1, 1, 1]", b"NaN", b'"NaN"',
]  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return the data after one to four changes: bits, spans cut, repeated, moved, numbers and tokens put in."""
    made = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        if not made:
            break
        at = draw.randrange(len(made))
        span = min(len(made) - at, draw.choice([1, 2, 5, 20, 100]))
        way = draw.randrange(8)
        if way == 0:
            made[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            del made[at : at + span]
        elif way == 2:
            made[at:at] = made[at : at + span]
        elif way == 3:
            made[at : at + span] = draw.choice(TOKENS)
        elif way == 4:
            made[at:at] = draw.choice(TOKENS)
        elif way == 5:
            other = draw.randrange(len(made))
            made[at : at + span] = made[other : other + span]
        elif way == 6:
            del made[at:]
        else:
            digits = [index for index, byte in enumerate(made) if byte in b"0123456789"]
            if digits:
                made[draw.choice(digits)] = draw.choice(b"0123456789")
    return bytes(made)


@contextmanager
def bounded(size: int) -> Iterator[Callable[[], None]]:
    """Give every case, begun by a call, two seconds, and three times ``size`` and 64 MB of memory on top."""
    hard = resource.getrlimit(resource.RLIMIT_AS)
    count = 0

    def begin() -> None:
        nonlocal count
        anew()
        if count % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + 3 * size + (64 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard[1]))
        count += 1

    with deadline(2) as anew:
        try:
            yield begin
        finally:
            resource.setrlimit(resource.RLIMIT_AS, hard)


def test_control_the_bounds_bite() -> None:
    """In a process of its own: one that has freed much may use that again, and no limit counts it."""
    code = "from tests.laws.test_damage import control; control()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def control() -> None:
    with bounded(1000) as begin:
        begin()
        with pytest.raises(MemoryError):
            bytearray(80 << 20)
        with pytest.raises(TimeoutError):  # noqa: PT012
            while True:
                pass


def tiles(raw: bytes) -> dict[str, tuple[str, list[int]]] | None:
    """The oracle: the header's tensors, if each byte of the data belongs to exactly one of them."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({name for name, _ in pairs}) == len(pairs)
        return dict(pairs)

    try:
        length = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + length].decode("utf-8"), object_pairs_hook=unique), raw[8 + length :]
        owners = [0] * len(data)
        for entry in header.values():
            assert set(entry) == {"dtype", "shape", "data_offsets"}
            begin, end = entry["data_offsets"]
            size = tensors.DTYPES[entry["dtype"]].itemsize
            assert all(type(number) is int and number >= 0 for number in [begin, end, *entry["shape"]])
            for number in entry["shape"]:
                size *= number
            assert end - begin == size
            assert end <= len(data)
            for index in range(begin, end):
                owners[index] += 1
        assert set(owners) <= {1}
        return {name: (str(tensors.DTYPES[e["dtype"]]), e["shape"]) for name, e in header.items()}
    except (AssertionError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return None


FUZZED = pytest.mark.parametrize("cases", [1000, pytest.param(100_000, marks=pytest.mark.slow)])


@FUZZED
def test_mutated_headers(cases: int) -> None:
    """What is accepted is what the oracle accepts, and what comes of it has the dtypes and shapes that it says."""
    draw = random.Random(cases)
    raw = safetensors.torch.save(
        {"w": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(7), "e": torch.ones(0, 4)}
    )
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    accepted = 0
    with bounded(len(raw)) as begin:
        for _ in range(cases):
            if draw.random() < 0.9:
                new = mutated(header, draw)
                case = struct.pack("<Q", len(new)) + new + data
            else:
                case = mutated(raw, draw)
            begin()
            try:
                found = tensors.entries(case)
                decoded = tensors.decode(case)
            except CheckpointError:
                found = None
            if found is None:
                continue
            accepted += 1
            expected = tiles(case)
            assert expected is not None, case
            assert {name: (f"torch.{e.dtype}", list(e.shape)) for name, e in found.items()} == expected
            assert {name: (str(t.dtype), list(t.shape)) for name, t in decoded.items()} == expected
    assert accepted > cases / 100, "names and spaces may change: some have to be accepted"


def forged(data: bytes, draw: random.Random) -> bytes:
    """Return a mutated manifest with the right digest, if it is still an object."""
    fields = loads(data)
    del fields["digest"]
    text = mutated(canonical(fields), draw)
    try:
        again = loads(text)
        if draw.random() < 0.5:
            again["config_sha256"] = sha256(canonical(again["config"]))
        return canonical(again | {"digest": sha256(canonical(again))})
    except (ValueError, TypeError, KeyError, CheckpointError):
        return text


@FUZZED
def test_mutated_manifests(tmp_path: Path, cases: int) -> None:
    """An altered manifest is refused. One that is forged, digest and all, may be taken: then with the saved tensors."""
    draw = random.Random(cases)
    state = make_state(5)
    step = save(state, tmp_path, config={"lr": 0.1, "names": ["a", "b"]}, metrics={"loss": math.nan, "val_loss": 0.5})
    own, like, taken, saved = (step / MANIFEST).read_bytes(), make_state(), 0, digest(state.params)
    with bounded(len(own)) as begin:
        for number in range(cases):
            is_forged = number % 2 == 0
            case = forged(own, draw) if is_forged else mutated(own, draw)
            begin()
            try:
                parse(case)
            except CheckpointError:
                continue
            assert is_forged or case == own, case
            (step / MANIFEST).write_bytes(case)
            try:
                loaded = load(step, like)
            except CheckpointError:
                continue
            assert (loaded.cursor, digest(loaded.params)) == (5, saved)
            taken += 1
    assert taken > cases / 100, "letters in versions and settings may be forged: some have to be taken"
