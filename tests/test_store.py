"""Checkpoints, manifests and histories: what is kept, what is refused, and what the refusals say."""

from __future__ import annotations

import json
import math
import os
import pickle
import socket
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import trainfn.store
from tests.crash.faults import hidden, make_state
from tests.deadline import deadline
from trainfn import tree
from trainfn.errors import CheckpointError, TrainfnError
from trainfn.store import (
    CheckpointDamagedError,
    CheckpointWarning,
    History,
    cut,
    load,
    restore,
    rows,
    save,
    steps,
    tensors,
    verify,
)
from trainfn.store.manifest import sha256
from trainfn.store.strict_json import canonical

STATE, MANIFEST = "state.safetensors", "manifest.json"


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """Nothing here may wait: not for a FIFO's writer, not for a gigabyte of header."""
    with deadline(10):
        yield


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return save(make_state(3), tmp_path / "run")


def forge(step: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest and give it a digest that is right, as someone would who means harm."""
    fields = json.loads((step / MANIFEST).read_bytes())
    del fields["digest"]
    edit(fields)
    (step / MANIFEST).write_bytes(canonical(fields | {"digest": sha256(canonical(fields))}))


def forge_tensors(step: Path, data: bytes) -> None:
    """Replace the tensors' file, and have the manifest vouch for it."""
    (step / STATE).write_bytes(data)
    forge(step, lambda fields: fields["files"].update({STATE: {"size": len(data), "sha256": sha256(data)}}))


def packed(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


# Saving


def test_exports_are_what_they_claim() -> None:
    assert sorted(trainfn.store.__all__) == trainfn.store.__all__
    assert all(hasattr(trainfn.store, name) for name in trainfn.store.__all__)


def test_a_step_is_two_files_that_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        step = save(make_state(12), tmp_path / "a" / "run")
    finally:
        os.umask(before)
    assert step == tmp_path / "a" / "run" / "step_00000012"
    assert sorted(os.listdir(step)) == [MANIFEST, STATE]
    assert hidden(step.parent) == []
    assert step.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in step.iterdir()} == {0o640}


def test_the_manifest_says_what_was_saved(tmp_path: Path) -> None:
    config = {"lr": 3e-4, "betas": (0.9, 0.95), "clip_norm": None, "name": "gpt"}
    step = save(
        make_state(3),
        tmp_path,
        config=config,
        optimizer="adamw",
        tied={"head.weight": ["embed.weight"]},
        data="abc",
        metrics={"val_loss": math.nan, "best": -math.inf},
    )
    manifest = verify(step)
    assert (manifest.format, manifest.step, manifest.cursor, manifest.seed) == (1, 3, 3, 7)
    assert manifest.config == config | {"betas": [0.9, 0.95]}
    assert manifest.config_sha256 == sha256(canonical(config))
    assert (manifest.optimizer, manifest.data, manifest.tied) == ("adamw", "abc", {"head.weight": ("embed.weight",)})
    assert math.isnan(manifest.metrics["val_loss"])
    assert manifest.metrics["best"] == -math.inf
    assert manifest.torch == torch.__version__
    assert manifest.scalars == {"seed": 7, "cursor": 3}
    assert manifest.tensors["params.weight"] == tensors.TensorEntry(dtype="float32", shape=(2, 4))
    assert manifest.tensors.keys() >= {"step", "opt.exp_avg.bias", "health.streak", "report.loss"}


def test_saving_twice_is_harmless(step: Path) -> None:
    before = {file.name: file.stat() for file in step.iterdir()}
    assert save(make_state(3), step.parent, metrics={"other": 1}) == step
    assert {file.name: file.stat() for file in step.iterdir()} == before


def test_a_saved_step_is_never_overwritten_with_other_numbers(step: Path) -> None:
    other = attrs.evolve(make_state(3), step=torch.tensor(2))
    with pytest.raises(CheckpointError, match="saved before, with other numbers"):
        save(other, step.parent)
    assert tree.digest(load(step, make_state())) == tree.digest(make_state(3))
    assert hidden(step.parent) == []


@pytest.mark.parametrize("damage", ["empty", "flipped", "a file", "a link", "an empty directory"])
def test_a_damaged_step_is_replaced(step: Path, tmp_path: Path, damage: str) -> None:
    elsewhere = step.rename(tmp_path / "elsewhere") if damage.startswith("a") else step
    if damage == "empty":
        (step / STATE).write_bytes(b"")
    elif damage == "flipped":
        (step / STATE).write_bytes(bytes([*(step / STATE).read_bytes()[:-1], 1]))
    elif damage == "a file":
        step.write_bytes(b"")
    elif damage == "a link":
        step.symlink_to(elsewhere)
    else:
        step.mkdir()
    assert save(make_state(3), step.parent) == step
    assert verify(step).cursor == 3
    assert os.listdir(step.parent) == [step.name]
    assert os.path.isdir(elsewhere)


def test_what_cannot_be_judged_is_not_replaced(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(step, lambda fields: fields.update(format=2))
    with pytest.raises(CheckpointError, match="format 2, written by trainfn"):
        save(make_state(3), step.parent)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(CheckpointError, match="Permission denied"):
            save(make_state(3), step.parent)
    assert os.listdir(step.parent) == [step.name]


def test_a_run_directory_may_not_be_a_step(step: Path) -> None:
    with pytest.raises(CheckpointError, match="inside another"):
        save(make_state(4), step)


def test_every_leaf_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    odd = {
        "a": torch.zeros(2, dtype=torch.complex128),
        "b": torch.eye(2).to_sparse(),
        "c": torch.empty(2, device="meta"),
    }
    with pytest.raises(CheckpointError, match=r"opt\.a: .*complex128.*opt\.b: .*sparse.*opt\.c: .*meta"):
        save(attrs.evolve(make_state(), opt=odd), tmp_path / "run")
    odd = {"x": 1.5, "y": True, "a.b": torch.ones(1), "a": {"b": torch.ones(1)}}
    with pytest.raises(CheckpointError, match=r"opt\.x: float; opt\.y: bool; opt\.a\.b: two leaves have this name"):
        save(attrs.evolve(make_state(), opt=odd), tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_views_are_stored_as_what_they_show(tmp_path: Path) -> None:
    base = torch.complex(torch.arange(12.0), torch.ones(12)).reshape(3, 4)
    opt = {"conj": base.conj(), "imag": base.conj().imag, "column": base[:, 1], "again": base, "same": base}
    state = attrs.evolve(make_state(), opt=opt)
    loaded = load(save(state, tmp_path), state)
    assert all(torch.equal(loaded.opt[name], opt[name]) for name in opt)


@pytest.mark.parametrize("what", ["config", "metrics"])
def test_every_value_that_is_not_json_is_named(tmp_path: Path, what: str) -> None:
    odd = {"lr": 1.0, "path": Path("x"), "deep": [{"loss": torch.tensor(1.0)}], "text": "NaN", "keys": {1: 2}}
    with pytest.raises(CheckpointError) as raised:
        save(make_state(), tmp_path / "run", **{what: odd})
    for name in ("path", "deep.0.loss", "text", "keys"):
        assert f"{what}.{name}: " in str(raised.value)
    assert os.listdir(tmp_path) == []


# Loading


def test_every_difference_is_reported_together_and_in_order(step: Path) -> None:
    state = make_state(3)
    weight = state.params["weight"].detach()
    like = attrs.evolve(
        state,
        params={"weigth": weight, "bias": state.params["bias"].to(torch.bfloat16)},
        buffers={"mean": torch.zeros(2)},
        opt={"exp_avg": {"weight": weight.T, "bias": torch.empty(2, device="meta")}},
        seed=torch.tensor(7),
    )
    before = tree.digest(attrs.evolve(like, opt=None))
    with pytest.raises(CheckpointError) as raised:
        load(step.parent, like)
    assert raised.value.got.split("\n    ")[1:] == [
        "buffers.mean: not in the checkpoint, expected float32[2]",
        "opt.exp_avg.bias: `like` has it on the meta device, which holds no numbers",
        "opt.exp_avg.weight: expected float32[4, 2], got float32[2, 4]",
        "params.bias: expected bfloat16[2], got float32[2]",
        "params.weight: only in the checkpoint, as float32[2, 4]",
        "params.weigth: not in the checkpoint, expected float32[2, 4]; is it params.weight?",
        "seed: expected int64[], got int",
    ]
    assert tree.digest(attrs.evolve(like, opt=None)) == before


def test_a_difference_is_no_reason_to_walk_back(tmp_path: Path) -> None:
    save(make_state(1, width=4), tmp_path)
    save(make_state(2, width=5), tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load(tmp_path, make_state(width=4))


def test_loaded_tensors_take_the_layout_of_like(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 4, 5)
    state = attrs.evolve(make_state(), buffers={"image": image})
    like = attrs.evolve(state, buffers={"image": image.to(memory_format=torch.channels_last)})
    loaded = load(save(state, tmp_path), like).buffers["image"]
    assert loaded.stride() == like.buffers["image"].stride()
    assert torch.equal(loaded, image)


def test_the_newest_verified_step_wins_and_one_warning_names_the_rest(tmp_path: Path) -> None:
    for cursor in range(1, 5):
        save(make_state(cursor), tmp_path)
    (tmp_path / "step_00000004" / MANIFEST).unlink()
    (tmp_path / "step_00000003" / STATE).write_bytes(b"short")
    with pytest.warns(CheckpointWarning) as caught:
        state, manifest = restore(tmp_path, make_state())
    assert manifest.cursor == 2
    assert tree.digest(state) == tree.digest(make_state(2))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "step_00000004: The file cannot be read: No such file" in message
    assert "step_00000003: The file has the wrong size." in message
    with pytest.raises(CheckpointDamagedError):
        load(tmp_path / "step_00000004", make_state())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path / "step_00000001", make_state()).cursor == 1


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load(tmp_path, make_state())
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load(tmp_path / "absent", make_state())
    for cursor in (1, 2):
        (save(make_state(cursor), tmp_path) / MANIFEST).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"(?s)None of the run's .*step_00000002.*step_00000001") as raised:
        load(tmp_path, make_state())
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_steps_are_exact_names_in_order_of_number(tmp_path: Path) -> None:
    good = ["step_00000002", "step_00000010", "step_99999999", "step_100000000"]
    bad = ["step_2", "step_0000002a", "step_000000002", "step_00000003.bak", ".tmp-step_00000004-0", "xstep_00000005"]
    for name in good + bad:
        (tmp_path / name).mkdir()
    assert [step.name for step in steps(tmp_path)] == good
    assert steps(tmp_path / "absent") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Not a directory"):
        steps(tmp_path / "file")


def test_the_current_directory_may_be_the_step(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(step)
    assert load(".", make_state()).cursor == verify(Path()).cursor == 3


# Files that someone, or something, has changed


@pytest.mark.parametrize("name", [STATE, MANIFEST])
@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "directory", "socket", "device", "absent"])
def test_only_regular_files_are_opened(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    path = step / name
    kept = path.rename(tmp_path / "kept")
    if kind.endswith("link"):
        path.symlink_to(kept if kind == "link" else tmp_path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        monkeypatch.chdir(step)  # a socket's path has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("needs root")
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(CheckpointDamagedError):
        verify(step)
    assert not opened or len(os.listdir("/proc/self/fd")) == opened


def test_a_link_to_a_step_is_no_step(step: Path) -> None:
    link = step.parent / "step_00000004"
    link.symlink_to(step)
    with pytest.raises(CheckpointDamagedError, match="Not a directory"):
        verify(link)


def test_swapped_and_renamed_checkpoints_are_refused(tmp_path: Path) -> None:
    one, two = save(make_state(1), tmp_path), save(make_state(2), tmp_path)
    aside = tmp_path / "aside"
    for name in (STATE, MANIFEST):
        for a, b in ((one / name, aside), (two / name, one / name), (aside, two / name)):
            a.rename(b)
        for step in (one, two):
            with pytest.raises(CheckpointDamagedError):
                verify(step)
    # Both files are swapped by now: only the directories' names are wrong.
    for a, b in ((one, aside), (two, one), (aside, two)):
        a.rename(b)
    assert (verify(one).cursor, verify(two).cursor) == (1, 2)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DOUBLED = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    "data",
    {
        "nothing": b"",
        "half a length": b"\0\0\0",
        "a header longer than the file": struct.pack("<Q", 1 << 60) + b"{}",
        "a header too long to parse": struct.pack("<Q", 65 << 20) + bytes(65 << 20),
        "no JSON": packed(b"{]"),
        "not UTF-8": packed('{"a":1}'.encode("utf-16")),
        "nested": packed(b"[" * 100_000),
        "not an object": packed(b"[]"),
        "a name twice": packed(DOUBLED, bytes(4)),
        "metadata": packed({"__metadata__": {"a": "b"}}),
        "an unknown dtype": packed({"a": ENTRY | {"dtype": "F31"}}, bytes(4)),
        "an unknown key": packed({"a": ENTRY | {"x": 1}}, bytes(4)),
        "a negative dimension": packed({"a": ENTRY | {"shape": [-1, -1]}}, bytes(4)),
        "a float dimension": packed({"a": ENTRY | {"shape": [1.0]}}, bytes(4)),
        "a rank of 100": packed({"a": ENTRY | {"shape": [1] * 100}}, bytes(4)),
        "a huge shape": packed({"a": ENTRY | {"shape": [10**9] * 9}}, bytes(4)),
        "offsets that are bools": packed({"a": ENTRY | {"shape": [0], "data_offsets": [True, True]}}),
        "data after the last tensor": packed({"a": ENTRY}, bytes(5)),
        "data that is cut": packed({"a": ENTRY}, bytes(3)),
        "a gap": packed({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 12]}}, bytes(12)),
        "an overlap": packed({"a": ENTRY, "b": ENTRY | {"data_offsets": [0, 4]}}, bytes(4)),
        "too many tensors": packed({str(n): {} for n in range(tensors.MAX_TENSORS + 1)}),
        "other tensors than listed": packed({"a": ENTRY}, bytes(4)),
    }.items(),
    ids=lambda case: case[0],
)
def test_a_hostile_file_is_refused_though_the_manifest_vouches_for_it(step: Path, data: tuple[str, bytes]) -> None:
    forge_tensors(step, data[1])
    with pytest.raises(CheckpointDamagedError, match=r"well formed|not those that the manifest lists"):
        verify(step)


def test_a_manifest_too_long_to_parse_is_not_parsed(step: Path) -> None:
    with open(step / MANIFEST, "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(CheckpointDamagedError, match="wrong size"):
        verify(step)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda fields: fields.update(colour="red"), "colour"),
        (lambda fields: fields.pop("seed"), "seed"),
        (lambda fields: fields.update(cursor="3"), r"expected int @ \$\.cursor"),
        (lambda fields: fields.update(step=3.0), r"expected int @ \$\.step"),
        (lambda fields: fields.update(step=True), r"expected int @ \$\.step"),
        (lambda fields: fields.update(optimizer=None), r"\$\.optimizer"),
        (lambda fields: fields["tensors"]["step"].update(shape="12"), r"\$\.tensors\['step'\]"),
        (lambda fields: fields["tensors"]["step"].update(shape=""), "a container of the wrong kind"),
        (lambda fields: fields.update(files=[]), "files|container"),
        (lambda fields: fields["files"][STATE].update(mode=1), "mode"),
        (lambda fields: fields.update(format=2), "format 2"),
        (lambda fields: fields.update(format=True), "format|bool"),
    ],
)
def test_a_field_that_is_not_of_its_form_is_named(step: Path, edit: Callable[[Any], object], says: str) -> None:
    forge(step, edit)
    with pytest.raises(CheckpointError, match=says):
        verify(step)


@pytest.mark.parametrize(
    "edit",
    [
        lambda fields: fields.update(cursor=4),
        lambda fields: fields.update(seed=8),
        lambda fields: fields["scalars"].pop("cursor"),
        lambda fields: fields.update(files={}),
        lambda fields: fields["files"].update({"../outside": {"size": 1, "sha256": ""}}),
        lambda fields: fields.update(config={"lr": 1}),
        lambda fields: fields["tensors"].pop("step"),
        lambda fields: fields["tensors"]["step"].update(dtype="float64"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(step: Path, edit: Callable[[Any], object]) -> None:
    forge(step, edit)
    with pytest.raises(CheckpointDamagedError):
        verify(step)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"digest": 1}', "[" * 100_000, '{"a": NaN}', "\0" * 100])
def test_what_is_no_manifest_is_refused(step: Path, text: str) -> None:
    (step / MANIFEST).write_text(text)
    with pytest.raises(CheckpointDamagedError):
        verify(step)


def test_a_manifest_in_another_form_is_refused_though_it_says_the_same(step: Path) -> None:
    fields = json.loads((step / MANIFEST).read_bytes())
    (step / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(CheckpointDamagedError, match="digest or form"):
        verify(step)


# History


def test_a_cut_keeps_the_bytes_of_what_stays(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step in range(1, 6):
        history.append({"step": step, "loss": 1 / step})
    history.append({"note": "no step"})
    lines = history.path.read_bytes().splitlines(keepends=True)
    with open(history.path, "ab") as file:
        file.write(b'{"step": 6, "lo')
    cut(history.path, 3)
    assert history.path.read_bytes() == b"".join([*lines[:3], lines[5]])
    before = history.path.stat()
    cut(history.path, 3)
    assert history.path.stat() == before, "nothing to cut, nothing written"
    assert os.listdir(tmp_path) == ["history.jsonl"]


def test_no_history_is_an_empty_one(tmp_path: Path) -> None:
    assert list(rows(tmp_path / "absent.jsonl")) == []
    cut(tmp_path / "absent.jsonl", 3)
    assert os.listdir(tmp_path) == []


def test_a_row_is_there_for_others_when_append_returns(tmp_path: Path) -> None:
    history = History(tmp_path / "run" / "history.jsonl")
    history.append({"step": 1, "loss": math.inf})
    assert history.path.read_text() == '{"step": 1, "loss": "Infinity"}\n'
    assert list(rows(history.path)) == [{"step": 1, "loss": math.inf}]


def test_a_row_that_is_not_json_leaves_no_trace(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    with pytest.raises(CheckpointError, match="loss: Tensor"):
        history.append({"step": 1, "loss": torch.tensor(1.0)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("line", [b"{", b"[1]", b"", b"\xff"])
def test_a_bad_line_before_the_last_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(TrainfnError, match=r"history\.jsonl, line 2"):
        list(rows(path))
