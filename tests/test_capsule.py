"""Capsules: what goes in comes out, bit for bit, and what was altered is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from tests.crash.faults import Disk, flaws
from trainfn.errors import CheckpointError
from trainfn.state import TrainState
from trainfn.store import CheckpointDamagedError, load_capsule, read_notes, save, save_capsule, steps, tensors
from trainfn.store.capsule import BATCH, MANIFEST
from trainfn.store.checkpoint import STATE
from trainfn.store.manifest import parse, serialise, sha256
from trainfn.store.strict_json import canonical
from trainfn.tree import digest

in_one_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def make_state(cursor: int = 0, width: int = 4) -> TrainState:
    """Return a state whose parameters all equal ``cursor``."""
    state = trainfn.init(nn.Linear(width, 2), trainfn.optim.sgd(lr=0.1, momentum=0.9), seed=7)
    params = {name: torch.full_like(param, cursor).requires_grad_() for name, param in state.params.items()}
    return attrs.evolve(state, step=torch.tensor(cursor), params=params, cursor=cursor)


TEXT = st.text(max_size=6) | st.sampled_from(["NaN", "Infinity", "-Infinity", "__metadata__", "a.b", "\ud800"])


@st.composite
def leaves(draw: st.DrawFn) -> Tensor:
    """Any bits in any dtype that can be stored, in any order of dimensions, expanded or strided."""
    dtype = draw(st.sampled_from([*tensors.DTYPES.values()]))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    size = math.prod(shape) * dtype.itemsize
    bits = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        bits = bytes(byte & 1 for byte in bits)
    leaf = torch.frombuffer(bytearray(bits), dtype=dtype).reshape(shape) if bits else torch.empty(shape, dtype=dtype)
    way = draw(st.sampled_from(["plain", "permuted", "strided", "expanded"]))
    if way == "permuted":
        return leaf.permute(draw(st.permutations(range(leaf.ndim))))
    if way == "strided" and leaf.ndim:
        return leaf[::2]
    return leaf.expand(2, *leaf.shape) if way == "expanded" else leaf


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT
batches = st.recursive(
    leaves() | scalars,
    lambda trees: (
        st.lists(trees, max_size=3)
        | st.lists(trees, max_size=3).map(tuple)
        | st.dictionaries(TEXT | st.integers(), trees, max_size=3)
    ),
    max_leaves=6,
)
notes = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5).filter(lambda name: name != "left_out"),
    st.none() | st.integers() | st.floats() | st.just("text") | st.lists(st.booleans(), max_size=2),
    max_size=3,
)


def facts(value: Any) -> Any:
    """All that must come back: types, order, bits, and how the bits lie in memory where they lie densely."""
    if isinstance(value, Tensor):
        packed = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        dense = torch.empty_like(value).stride() == value.stride() and value.numel() > 0
        lies = [(n, stride) for n, stride in zip(value.shape, value.stride(), strict=True) if n > 1] if dense else None
        return "tensor", value.dtype, tuple(value.shape), bytes(packed.untyped_storage().tolist()), lies
    if isinstance(value, dict):
        return type(value), [(facts(key), facts(child)) for key, child in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [facts(child) for child in value]
    return type(value), repr(value)


def forgetful(name: str) -> Callable[[Any], Any]:
    """Return what a batch becomes in a capsule that is not good enough."""

    def by_json(value: Any) -> Any:
        return json.loads(json.dumps(value))

    def contiguous(value: Any) -> Any:
        return value.contiguous()

    return {"json": by_json, "contiguous": contiguous}[name]


@in_one_directory
@given(batch=batches, noted=notes)
def test_what_goes_in_comes_out(batch: Any, noted: dict[str, Any], tmp_path: Path) -> None:
    state = make_state(3)
    before = facts(batch)
    path = save_capsule(tmp_path, state, batch, noted)
    found = load_capsule(path, like=make_state(0))
    assert facts(found.batch) == before == facts(batch)
    assert digest(found.state) == digest(state)
    assert facts(dict(sorted(found.notes.items()))) == facts(dict(sorted(noted.items())))
    assert facts(read_notes(path)) == facts(found.notes)
    shutil.rmtree(path)


def test_control_the_check_sees_lost_types_and_lost_order() -> None:
    assert facts((1, 2)) != facts(forgetful("json")((1, 2)))
    assert facts({1: 2}) != facts(forgetful("json")({1: 2}))
    images = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert facts(images) != facts(forgetful("contiguous")(images))


def test_a_step_from_a_capsule_is_the_step_that_was_to_be_taken(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 2))
    optimizer = trainfn.optim.adamw(lr=0.1)
    step = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    batch = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last), torch.tensor([0, 1, 1, 0])
    state = step(trainfn.init(model, optimizer, seed=5), batch)
    found = load_capsule(save_capsule(tmp_path, state, batch, {}), like=trainfn.init(model, optimizer))
    assert found.batch[0].is_contiguous(memory_format=torch.channels_last)
    assert digest(step(found.state, found.batch)) == digest(step(state, batch))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    batch = {"x": torch.ones(2), "image": object(), "more": [1, {2.5: 1}], "odd": OrderedDict(a=1)}
    path = save_capsule(tmp_path, make_state(), batch, {"loss": 1.0})
    found = load_capsule(path, like=make_state())
    assert facts(found.batch) == facts({"x": torch.ones(2), "image": None, "more": [1, None], "odd": {"a": 1}})
    assert found.notes == {
        "loss": 1.0,
        "left_out": [
            "batch field image of type object is not kept",
            "batch field more.1 of type dict is not kept",
            "batch field odd of type OrderedDict is kept as a plain dict",
        ],
    }
    found = load_capsule(save_capsule(tmp_path, make_state(1), Pair(torch.ones(1), torch.ones(1)), {}), make_state())
    assert found.notes == {"left_out": ["the batch of type Pair is kept as a plain tuple"]}
    assert type(found.batch) is tuple
    found = load_capsule(save_capsule(tmp_path, make_state(2), object(), {}), make_state())
    assert (found.batch, found.notes) == (None, {"left_out": ["the batch of type object is not kept"]})


@pytest.mark.parametrize(
    ("batch", "noted", "message"),
    [
        ({"x": torch.ones(2).to_sparse()}, {}, "Some tensors cannot be stored"),
        ({"x": torch.ones(2, dtype=torch.complex128)}, {}, "0:.x: torch.complex128"),
        ({"x": torch.ones(2, device="meta")}, {}, "Some tensors cannot be stored"),
        (None, {"path": Path()}, "cannot be stored as JSON"),
        (None, {"left_out": []}, "The name left_out is taken"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(
    batch: Any, noted: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_capsule(tmp_path, make_state(), batch, noted)
    assert os.listdir(tmp_path) == []


def test_a_second_capsule_of_the_same_cursor_replaces_the_first_and_no_other_is_touched(tmp_path: Path) -> None:
    other = save_capsule(tmp_path, make_state(4), torch.zeros(1), {})
    path = save_capsule(tmp_path, make_state(5), torch.zeros(1), {"try": 1})
    written = (path / MANIFEST).stat().st_ino
    assert save_capsule(tmp_path, make_state(5), torch.zeros(1), {"try": 1}) == path
    assert (path / MANIFEST).stat().st_ino == written
    for batch, noted in ((torch.zeros(1), {"try": 2}), (torch.ones(1), {"try": 2})):
        assert save_capsule(tmp_path, make_state(5), batch, noted) == path
        found = load_capsule(path, like=make_state())
        assert (found.notes, facts(found.batch)) == (noted, facts(batch))
    (path / BATCH).write_bytes(b"")
    save_capsule(tmp_path, make_state(5), torch.zeros(1), {})
    assert load_capsule(path, like=make_state()).notes == {}
    assert load_capsule(other, like=make_state()).state.cursor == 4
    assert sorted(os.listdir(tmp_path)) == ["capsule_00000004", "capsule_00000005"]


def test_checkpoints_and_capsules_do_not_see_each_other(tmp_path: Path) -> None:
    capsule = save_capsule(tmp_path, make_state(9), None, {})
    assert steps(tmp_path) == []
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        trainfn.load(tmp_path, like=make_state())
    step = save(make_state(3), tmp_path)
    assert steps(tmp_path) == [step]
    assert trainfn.load(tmp_path, like=make_state()).cursor == 3
    renamed = shutil.copytree(capsule, tmp_path / "step_00000009")
    with pytest.raises(CheckpointDamagedError):
        trainfn.load(renamed, like=make_state())
    with pytest.raises(CheckpointDamagedError):
        load_capsule(step, like=make_state())


def test_a_capsule_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_capsule(tmp_path, make_state(width=4), None, {})
    with pytest.raises(CheckpointError, match=r"params\.weight: expected float32\[2, 5\], got float32\[2, 4\]"):
        load_capsule(path, like=make_state(width=5))


def test_the_commit_is_the_checkpoints(tmp_path: Path) -> None:
    with Disk().mounted() as recorded:
        path = save_capsule(tmp_path / "run", make_state(), torch.ones(2), {})
    assert flaws(recorded.events, path) == []
    with Disk(drops=lambda number, call: call == "fsync").mounted() as careless:
        path = save_capsule(tmp_path / "other", make_state(), torch.ones(2), {})
    assert flaws(careless.events, path) != []


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    batch = {"x": torch.ones(2, 1), "name": "a"}
    return save_capsule(tmp_path_factory.mktemp("run"), make_state(5, width=1), batch, {"loss": math.nan})


def check_refused(path: Path, name: str, versions: Iterator[bytes]) -> None:
    """Each of the versions of this file must be refused; its own bytes, put back at the end, must not."""
    own = (path / name).read_bytes()
    try:
        for version in versions:
            (path / name).write_bytes(version)
            with pytest.raises(CheckpointError):
                load_capsule(path, like=make_state(width=1))
    finally:
        (path / name).write_bytes(own)
    load_capsule(path, like=make_state(width=1))


def flips(data: bytes, stride: int) -> Iterator[bytes]:
    for bit in range(0, len(data) * 8, stride):
        yield data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]


@pytest.mark.parametrize("name", [MANIFEST, STATE, BATCH])
def test_a_flipped_bit_and_a_cut_are_refused(small: Path, name: str) -> None:
    data = (small / name).read_bytes()
    check_refused(small, name, flips(data, 41))
    check_refused(small, name, (data[:length] for length in range(0, len(data), 7)))
    check_refused(small, name, iter([data + b"\n"]))


def test_control_the_check_notices_what_is_not_refused(small: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_refused(small, BATCH, iter([(small / BATCH).read_bytes()]))


def test_swapped_files_and_directories_are_refused(small: Path, tmp_path: Path) -> None:
    other = save_capsule(tmp_path, make_state(6, width=1), {"x": torch.zeros(2, 1), "name": "a"}, {})
    for name in (STATE, BATCH, MANIFEST):
        check_refused(small, name, iter([(other / name).read_bytes()]))
    check_refused(small, STATE, iter([(small / BATCH).read_bytes()]))
    moved = shutil.copytree(small, tmp_path / "capsule_00000007")
    with pytest.raises(CheckpointDamagedError, match="does not belong where it is"):
        load_capsule(moved, like=make_state(width=1))
    (moved / BATCH).unlink()
    shutil.move(moved, tmp_path / small.name)
    with pytest.raises(CheckpointDamagedError, match="No such file"):
        load_capsule(tmp_path / small.name, like=make_state(width=1))
    os.symlink(small / BATCH, tmp_path / small.name / BATCH)
    with pytest.raises(CheckpointDamagedError):
        load_capsule(tmp_path / small.name, like=make_state(width=1))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"capsule": 2}, CheckpointError, "a format that this version"),
        ({"more": 1}, CheckpointDamagedError, "the fields"),
        ({"batch": {"value": [1]}}, CheckpointDamagedError, "a batch of another form"),
        ({"batch": {"tensor": "0:", "order": [0, 0]}}, CheckpointDamagedError, "a batch of another form"),
        ({"batch": {"tensor": "1:", "order": [0]}}, CheckpointDamagedError, "a batch of another form"),
        ({"batch": {"value": None}}, CheckpointDamagedError, "tensors that the batch does not have"),
    ],
)
def test_a_well_formed_lie_is_refused(
    changes: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    path = save_capsule(tmp_path, make_state(), torch.ones(1, 2), {})
    manifest = parse((path / MANIFEST).read_bytes())
    config = manifest.config | changes
    lie = attrs.evolve(manifest, config=config, config_sha256=sha256(canonical(config)))
    (path / MANIFEST).write_bytes(serialise(lie))
    with pytest.raises(kind, match=message):
        load_capsule(path, like=make_state())
