"""Files made to harm: refused within two seconds, by an error of the house, and nothing in them is run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainfn
from tests.crash.faults import make_state
from tests.deadline import deadline
from trainfn.errors import CheckpointError
from trainfn.store import save
from trainfn.store.manifest import sha256
from trainfn.store.strict_json import canonical

STORE = Path(trainfn.__file__).parent / "store"
STATE, MANIFEST = "state.safetensors", "manifest.json"


class Planted:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (os.environ["PLANTED"],)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    return tmp_path / "planted"


@pytest.fixture(autouse=True)
def _two_seconds() -> Iterator[None]:
    with deadline(2):
        yield


def packed(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape: Any = (1,), begin: Any = 0, end: Any = 4, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def twice(name: str) -> bytes:
    one = json.dumps(entry())
    return f'{{"{name}":{one},"{name}":{one}}}'.encode()


def bomb() -> bytes:
    return pickle.dumps(Planted())


TENSORS: dict[str, Callable[[], bytes]] = {
    "a pickle": bomb,
    "a pickle after a length": lambda: packed(bomb()),
    "a pickle as data": lambda: packed({"x": entry((4,), 0, 4, "U8")}, bomb()),
    "a zip archive, as torch.save writes": lambda: b"PK\3\4" + bytes(200),
    "a tar archive": lambda: b"x".ljust(257, b"\0") + b"ustar\0" + bytes(300),
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "empty": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "a length of 2**64 - 1": lambda: b"\xff" * 8 + b"{}",
    "a length of 2**63": lambda: struct.pack("<Q", 1 << 63) + b"{}",
    "a length past the end": lambda: struct.pack("<Q", 100) + b"{}",
    "a length of 0": lambda: struct.pack("<Q", 0),
    "a length of 1": lambda: struct.pack("<Q", 1) + b"{",
    "64 MiB of spaces": lambda: packed(b" " * (64 << 20)),
    "65 MiB of header": lambda: packed(b" " * (65 << 20)),
    "arrays in arrays": lambda: packed(b"[" * 1_000_000),
    "objects in objects": lambda: packed(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "a number of a million digits": lambda: packed(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "an exponent": lambda: packed(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', bytes(4)),
    "NaN as an offset": lambda: packed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[NaN,4]}}', bytes(4)),
    "a name twice": lambda: packed(twice("a"), bytes(4)),
    "an empty name twice": lambda: packed(twice(""), bytes(4)),
    "half a surrogate": lambda: packed(b'{"\\ud800":1}'),
    "not UTF-8": lambda: packed(b'{"\xff":1}'),
    "a byte-order mark": lambda: packed(b"\xef\xbb\xbf{}"),
    "a list": lambda: packed([]),
    "null": lambda: packed(b"null"),
    "text": lambda: packed(b'"text"'),
    "metadata that is no text": lambda: packed({"__metadata__": {"a": [1]}, "x": entry()}, bytes(4)),
    "metadata that is a list": lambda: packed({"__metadata__": [], "x": entry()}, bytes(4)),
    "an entry that is null": lambda: packed({"x": None}),
    "an entry without a shape": lambda: packed({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "an entry with code": lambda: packed({"x": entry() | {"__reduce__": "os.system"}}, bytes(4)),
    "a dtype that is no dtype": lambda: packed({"x": entry(dtype="O")}, bytes(4)),
    "a dtype that is a list": lambda: packed({"x": entry() | {"dtype": ["F32"]}}, bytes(4)),
    "2**62 elements": lambda: packed({"x": entry((1 << 62,), 0, 1 << 64)}),
    "dimensions that overflow to 1": lambda: packed({"x": entry((1 << 32, 1 << 32), 0, 0)}),
    "dimensions with a 0 among them": lambda: packed({"x": entry((1 << 62, 0), 0, 4)}, bytes(4)),
    "a million dimensions": lambda: packed({"x": entry([1] * 1_000_000)}, bytes(4)),
    "a negative dimension": lambda: packed({"x": entry((-1,))}, bytes(4)),
    "a negative offset": lambda: packed({"x": entry((2,), -4, 4)}, bytes(4)),
    "offsets the wrong way round": lambda: packed({"x": entry((1,), 4, 0)}, bytes(4)),
    "an offset past the end": lambda: packed({"x": entry((1,), 4, 8)}, bytes(4)),
    "offsets of text": lambda: packed({"x": entry((1,), "0", "4")}, bytes(4)),
    "tensors on top of each other": lambda: packed({"x": entry(), "y": entry()}, bytes(4)),
    "a gap": lambda: packed({"x": entry(), "y": entry((1,), 8, 12)}, bytes(12)),
    "something after the last": lambda: packed({"x": entry()}, bytes(4) + bomb()),
}
"""47 contents of a file of tensors."""


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, tmp_path: Path, planted: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(TENSORS[case]())
    like = make_state()
    with pytest.raises(CheckpointError):
        trainfn.load_params(path, like)
    assert not planted.exists()


def forged(step: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((step / MANIFEST).read_bytes())
    del fields["digest"]
    edit(fields)
    (step / MANIFEST).write_bytes(canonical(fields | {"digest": sha256(canonical(fields))}))


def link(step: Path, name: str, to: str) -> None:
    (step / name).unlink()
    (step / name).symlink_to(to)


def other(step: Path, name: str, make: Callable[[Path], object]) -> None:
    (step / name).unlink()
    make(step / name)


STEPS: dict[str, Callable[[Path], object]] = {
    "state links to a device": lambda step: link(step, STATE, "/dev/zero"),
    "manifest links to a device": lambda step: link(step, MANIFEST, "/dev/zero"),
    "manifest links to itself": lambda step: link(step, MANIFEST, MANIFEST),
    "manifest links out of the run": lambda step: link(step, MANIFEST, "/etc/passwd"),
    "state is a FIFO": lambda step: other(step, STATE, os.mkfifo),
    "manifest is a FIFO": lambda step: other(step, MANIFEST, os.mkfifo),
    "state is a directory": lambda step: other(step, STATE, Path.mkdir),
    "manifest is a pickle": lambda step: (step / MANIFEST).write_bytes(bomb()),
    "manifest is Python": lambda step: (step / MANIFEST).write_text("__import__('os').mkdir('planted')"),
    "manifest is YAML with a tag": lambda step: (step / MANIFEST).write_text("!!python/object/apply:os.mkdir [x]"),
    "manifest is deep": lambda step: (step / MANIFEST).write_bytes(b'{"a":' * 500_000),
    "manifest is a terabyte of nothing": lambda step: os.truncate(step / MANIFEST, 1 << 40),
    "state is a terabyte of nothing": lambda step: os.truncate(step / STATE, 1 << 40),
    "a file outside": lambda step: forged(
        step, lambda fields: fields["files"].update({"../../../etc/passwd": {"size": 1, "sha256": "0"}})
    ),
    "an absolute file": lambda step: forged(
        step, lambda fields: fields["files"].update({"/etc/passwd": {"size": 1, "sha256": "0"}})
    ),
    "a size of -1": lambda step: forged(step, lambda fields: fields["files"][STATE].update(size=-1)),
    "a size of 2**70": lambda step: forged(step, lambda fields: fields["files"][STATE].update(size=1 << 70)),
    "a cursor of 10**4000": lambda step: forged(step, lambda fields: fields.update(cursor=10**4000)),
    "another cursor": lambda step: forged(step, lambda fields: fields.update(cursor=-3)),
    "an empty directory": lambda step: (shutil.rmtree(step), step.mkdir()),
    "a planted pickle instead of both": lambda step: [(step / n).write_bytes(bomb()) for n in (STATE, MANIFEST)],
}
"""21 directories."""


@pytest.mark.parametrize("case", STEPS)
def test_steps(case: str, tmp_path: Path, planted: Path) -> None:
    step = save(make_state(3), tmp_path / "run")
    STEPS[case](step)
    like = make_state()
    for look in (trainfn.verify, lambda path: trainfn.load(path, like), lambda path: trainfn.load_params(path, like)):
        with pytest.raises(CheckpointError):
            look(step)
    assert not planted.exists()


def test_control_a_planted_pickle_does_run(tmp_path: Path, planted: Path) -> None:
    torch.save({"x": Planted()}, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert planted.exists()


def test_control_good_files_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(packed({"__metadata__": {"format": "pt"}, "weight": entry((1,))}, bytes(4)))
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1))
    like = trainfn.init(model, trainfn.optim.sgd(lr=0.1))
    assert trainfn.load_params(path, like).params["weight"].item() == 0.0


# What could run code is not there

FORBIDDEN = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "yaml",
    "tarfile",
    "zipfile",
    "runpy",
    "importlib",
    "ctypes",
}
CALLS = {"eval", "exec", "compile", "__import__", "load_module", "loads_pickle"}


def dangerous(source: str) -> list[str]:
    """Return what in a module's source could run what a file says.

    >>> dangerous("import pickle as p; from yaml import load; torch.load(x); eval(y); json.loads(z)")
    ['import pickle', 'import yaml', 'torch.load', 'eval']
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {n.name}" for n in node.names if n.name.partition(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FORBIDDEN:
            found.append(f"import {node.module}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name in ("torch.load", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load"):
                found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(STORE.glob("*.py")), ids=lambda path: path.name)
def test_no_load_path_can_run_code(path: Path) -> None:
    found = dangerous(path.read_text())
    assert [name for name in found if name != "import importlib.metadata"] == []  # reads this package's own version


def test_control_the_check_sees_what_could() -> None:
    assert dangerous("import pickle as p; from yaml import load; torch.load(x); eval(y); import zipfile, json") == [
        "import pickle", "import yaml", "import zipfile", "torch.load", "eval",
    ]  # fmt: skip
