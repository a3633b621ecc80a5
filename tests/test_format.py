"""Formats of checkpoints: every one there has been is read for ever, later ones are refused, older ones are migrated.

python -m tests.test_format      # writes the golden checkpoint of the present format, once, when it is new
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn
from trainfn.errors import CheckpointError
from trainfn.store import manifest as form
from trainfn.store.manifest import sha256
from trainfn.store.strict_json import canonical
from trainfn.tree import map_leaves, map_named, named_leaves

GOLDEN = Path(__file__).parent / "golden"
CURSOR = 3


def blank() -> trainfn.TrainState:
    """A state with all that one can have: buffers, moments, an average, a loss scale, tied and frozen parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    model[0].bias.requires_grad_(False)
    return trainfn.init(model, trainfn.optim.adamw(lr=0.1), seed=7, ema=True, precision="16-mixed")


def filled() -> trainfn.TrainState:
    """The same with numbers that follow from the leaves' places alone."""
    like = blank()
    place = {name: index for index, (name, _) in enumerate(named_leaves(like))}

    def number(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return {"seed": 7, "cursor": CURSOR}[name]
        made = (torch.arange(leaf.numel()) + 16 * place[name]).reshape(leaf.shape)
        return made.to(leaf.dtype).requires_grad_(leaf.requires_grad)

    return map_named(number, like)


def write() -> None:
    run = GOLDEN / f"format_{form.FORMAT}"
    trainfn.save(
        filled(),
        run,
        config={"batch_size": 4, "nested": {"list": [1, None, "text"]}},
        optimizer="adamw(lr=0.1)",
        tied={"2.weight": ["3.weight"]},
        data="0123456789abcdef",
        metrics={"loss": float("nan"), "val_loss": 0.5},
    )


def test_there_is_a_golden_checkpoint_of_every_format() -> None:
    assert [path.name for path in sorted(GOLDEN.glob("*"))] == [f"format_{n}" for n in range(1, form.FORMAT + 1)]


@pytest.mark.parametrize("run", sorted(GOLDEN.glob("*")), ids=lambda run: run.name)
def test_it_is_loaded_to_the_bit(run: Path) -> None:
    manifest = trainfn.verify(run)
    assert (manifest.format, manifest.cursor, manifest.seed) == (form.FORMAT, CURSOR, 7)
    assert manifest.config == {"batch_size": 4, "nested": {"list": [1, None, "text"]}}
    assert (manifest.tied, manifest.data) == ({"2.weight": ("3.weight",)}, "0123456789abcdef")
    assert repr(manifest.metrics) == "{'loss': nan, 'val_loss': 0.5}"
    loaded, expected = dict(named_leaves(trainfn.load(run, like=blank()))), dict(named_leaves(filled()))
    assert loaded.keys() == expected.keys()
    for name, leaf in expected.items():
        assert torch.equal(loaded[name], leaf) if isinstance(leaf, Tensor) else loaded[name] == leaf, name


def sealed(fields: dict[str, Any]) -> bytes:
    return canonical(fields | {"digest": sha256(canonical(fields))})


def fields_of(step: Path) -> dict[str, Any]:
    fields = json.loads((step / "manifest.json").read_bytes())
    del fields["digest"]
    return fields


def older(tmp_path: Path, **other: Any) -> Path:
    """A checkpoint of a format 0 that never was: it called the cursor "batches", and knew no data."""
    step = trainfn.save(filled(), tmp_path)
    fields = fields_of(step)
    fields["batches"] = fields.pop("cursor")
    del fields["data"]
    (step / "manifest.json").write_bytes(sealed(fields | {"format": 0} | other))
    return step


def from_0(fields: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in fields.items() if name != "batches"}
    return rest | {"format": 1, "cursor": fields["batches"], "data": None}


def test_an_older_format_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = older(tmp_path)
    with pytest.raises(CheckpointError, match="format 0"):
        trainfn.load(step, like=blank())
    monkeypatch.setitem(form.MIGRATIONS, 0, from_0)
    assert trainfn.inspect(step).cursor == CURSOR
    loaded = trainfn.load(tmp_path, like=blank())
    assert map_leaves(lambda leaf: leaf, loaded).cursor == CURSOR
    assert torch.equal(loaded.params["0.weight"], filled().params["0.weight"])


def test_control_what_a_migration_leaves_out_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = older(tmp_path)
    monkeypatch.setitem(form.MIGRATIONS, 0, lambda fields: fields | {"format": 1})
    with pytest.raises(CheckpointError, match=r"(?s)fields are not those.*(batches|cursor)"):
        trainfn.load(step, like=blank())


@pytest.mark.parametrize("number", [2, -1, 10**30, "1", None, [1], True, 1.0])
def test_other_formats_are_refused_by_name(tmp_path: Path, number: Any) -> None:
    step = trainfn.save(filled(), tmp_path)
    (step / "manifest.json").write_bytes(sealed(fields_of(step) | {"format": number}))
    with pytest.raises(CheckpointError, match="format"):
        trainfn.load(step, like=blank())


if __name__ == "__main__":
    write()
