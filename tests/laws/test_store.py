"""Laws of the store: save then load is the identity, and nothing that was altered is believed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.crash.faults import make_state
from trainfn import tree
from trainfn.errors import CheckpointError
from trainfn.state import TrainState
from trainfn.store import History, restore, rows, save, tensors, verify
from trainfn.store.strict_json import canonical, line, loads

in_one_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def leaves(draw: st.DrawFn) -> Tensor:
    """Any bits, in any dtype that can be stored, laid out in any way, trained or not."""
    dtype, shape = draw(st.sampled_from([*tensors.DTYPES.values()])), draw(SHAPES)
    size = math.prod(shape) * dtype.itemsize
    bits = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        bits = bytes(byte & 1 for byte in bits)
    leaf = torch.frombuffer(bytearray(bits), dtype=dtype).reshape(shape) if bits else torch.empty(shape, dtype=dtype)
    way = draw(st.sampled_from(["as it is", "transposed", "strided", "expanded"]))
    if way == "transposed":
        leaf = leaf.permute(tuple(reversed(range(leaf.ndim))))
    elif way == "strided" and leaf.ndim:
        leaf = leaf[::2]
    elif way == "expanded":
        leaf = leaf.expand(2, *leaf.shape)
    return leaf.requires_grad_(draw(st.booleans()) and (dtype.is_floating_point or dtype.is_complex))


TREES = st.recursive(
    st.none() | leaves() | st.integers(-(2**70), 2**70),
    lambda trees: st.lists(trees, max_size=3) | st.tuples(trees, trees) | st.dictionaries(NAMES, trees, max_size=3),
    max_leaves=5,
)


@st.composite
def states(draw: st.DrawFn) -> TrainState:
    """Any leaves anywhere; some share memory."""
    params = draw(st.dictionaries(NAMES, leaves(), max_size=3))
    opt = draw(TREES)
    return attrs.evolve(
        make_state(),
        step=torch.tensor(draw(st.integers(0, 2**62))),
        params=params,
        buffers=draw(st.dictionaries(NAMES, leaves(), max_size=2)),
        opt=(opt, {name: leaf[:1] for name, leaf in params.items() if leaf.ndim}),
        ema=draw(st.none() | st.just({name: leaf.detach() for name, leaf in params.items()})),
        seed=draw(st.integers(0, 2**63 - 1)),
        cursor=draw(st.integers(0, 10**12)),
    )


def facts(state: TrainState) -> list[Any]:
    """All that a loaded state must share with the saved one, leaf by leaf: the bits, and what they are taken for."""

    def fact(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        packed = leaf.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        bits = bytes(packed.untyped_storage().tolist())
        return leaf.dtype, leaf.shape, leaf.device, leaf.requires_grad, bits

    return [(name, fact(leaf)) for name, leaf in tree.named_leaves(state)]


def storages(state: TrainState) -> set[int]:
    leaves = [leaf for _, leaf in tree.named_leaves(state) if isinstance(leaf, Tensor)]
    return {leaf.untyped_storage().data_ptr() for leaf in leaves} - {0}


def blank(state: TrainState) -> TrainState:
    """The same structure, with other numbers."""

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return -1
        return torch.zeros_like(leaf, requires_grad=leaf.requires_grad)

    return tree.map_leaves(other, state)


@in_one_directory
@given(state=states())
def test_save_then_load_is_the_identity(state: TrainState, tmp_path: Path) -> None:
    names = [name for name, _ in tree.named_leaves(state)]
    assume(len(set(names)) == len(names))
    like = blank(state)
    saved, untouched = facts(state), facts(like)
    step = save(state, tmp_path)
    loaded, manifest = restore(step, like)
    assert facts(loaded) == facts(state) == saved
    assert facts(like) == untouched
    assert not storages(loaded) & (storages(state) | storages(like))
    assert (manifest.cursor, manifest.step, manifest.seed) == (state.cursor, int(state.step), state.seed)
    shutil.rmtree(step)


@given(named=st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), leaves(), max_size=4))
@settings(deadline=None)
def test_what_is_written_is_what_the_format_says(named: dict[str, Tensor]) -> None:
    data = bytes(tensors.encode(named))
    assert data == safetensors.torch.save({name: leaf.detach().clone().contiguous() for name, leaf in named.items()})
    oracle = safetensors.torch.load(data)
    found = tensors.entries(data)
    assert {name: (f"torch.{entry.dtype}", entry.shape) for name, entry in found.items()} == {
        name: (str(leaf.dtype), tuple(leaf.shape)) for name, leaf in oracle.items()
    }
    assert found.keys() == named.keys()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=10,
).filter(lambda value: value not in ("NaN", "Infinity", "-Infinity"))


@given(JSON)
def test_json_is_strict_and_gives_back_what_it_was_given(value: Any) -> None:
    try:
        data = canonical(value)
    except CheckpointError:
        assume(False)
    assert repr(loads(data)) == repr(value) or loads(data) == value  # keys come back sorted
    assert canonical(loads(data)) == data
    assert canonical(loads(line(value))) == data

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(data, parse_constant=refuse)
    json.loads(line(value), parse_constant=refuse)


@in_one_directory
@given(whole=st.lists(st.dictionaries(st.text(max_size=3), st.floats(width=32)), max_size=4), torn=st.integers(0, 200))
def test_a_torn_history_is_a_shorter_one(whole: list[dict[str, Any]], torn: int, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.unlink(missing_ok=True)
    for row in whole:
        History(path).append(row)
    if not whole:
        assert list(rows(path)) == []
        return
    data = path.read_bytes()[: len(path.read_bytes()) - torn]
    path.write_bytes(data)
    left = data.count(b"\n")
    assert repr(list(rows(path))) == repr(whole[:left])
    History(path).append({"after": 1})
    assert repr(list(rows(path))) == repr([*whole[:left], {"after": 1}])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_state(5, width=1), tmp_path_factory.mktemp("run"), metrics={"loss": math.nan})


def altered(path: Path, versions: Iterator[bytes]) -> Iterator[None]:
    """Let the file hold each version in turn, and its own bytes again at the end."""
    own = path.read_bytes()
    try:
        for version in versions:
            path.write_bytes(version)
            yield
    finally:
        path.write_bytes(own)


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_every_truncation_is_refused(small: Path, name: str) -> None:
    data = (small / name).read_bytes()
    for _ in altered(small / name, (data[:length] for length in range(len(data)))):
        with pytest.raises(CheckpointError):
            verify(small)
    verify(small)


def flips(data: bytes, stride: int) -> Iterator[bytes]:
    """The data with one bit flipped, for every ``stride``-th bit."""
    for bit in range(0, len(data) * 8, stride):
        yield data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]


@pytest.mark.parametrize(("name", "stride"), [("manifest.json", 5), ("state.safetensors", 3)])
def test_a_flipped_bit_is_refused(small: Path, name: str, stride: int) -> None:
    for _ in altered(small / name, flips((small / name).read_bytes(), stride)):
        with pytest.raises(CheckpointError):
            verify(small)
    verify(small)


def test_control_the_library_and_a_json_parser_take_flipped_bits(small: Path) -> None:
    taken = 0
    for data in flips((small / "state.safetensors").read_bytes(), 3):
        try:
            safetensors.torch.load(data)
        except Exception:
            continue
        taken += 1
    assert taken > 100
    taken = 0
    for data in flips((small / "manifest.json").read_bytes(), 5):
        try:
            json.loads(data)
        except ValueError:
            continue
        taken += 1
    assert taken > 100
