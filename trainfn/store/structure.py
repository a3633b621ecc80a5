"""How a state and a checkpoint correspond: leaves by dotted name, and where the two differ."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor

from trainfn import tree
from trainfn.errors import CheckpointError
from trainfn.state import TrainState
from trainfn.store.manifest import Manifest

_MAX_NEAR_PAIRS = 10_000  # names are compared to find renamed ones; more pairs than this would take seconds


def leaves(state: TrainState) -> dict[str, Any]:
    """Return the state's leaves by dotted name, each a tensor or an int."""
    named: dict[str, Any] = {}
    wrong = []
    for name, leaf in tree.named_leaves(state):
        if name in named:
            wrong.append(f"{name}: two leaves have this name")
        elif not isinstance(leaf, Tensor) and type(leaf) is not int:
            wrong.append(f"{name}: {type(leaf).__name__}")
        named[name] = leaf
    if wrong:
        raise CheckpointError(
            "The state has leaves that a checkpoint cannot hold.",
            expected="tensors and ints, each with a dotted name of its own",
            got="; ".join(wrong),
        )
    return named


def differences(manifest: Manifest, like: dict[str, Any]) -> list[str]:
    """Return one line for every leaf in which a checkpoint and ``like`` differ, sorted by name."""
    have = {name: f"{entry.dtype}{list(entry.shape)}" for name, entry in manifest.tensors.items()}
    have |= dict.fromkeys(manifest.scalars, "int")
    want = {name: tree.describe(leaf) for name, leaf in like.items()}
    missing, extra = want.keys() - have.keys(), sorted(have.keys() - want.keys())
    lines = {name: f"{name}: only in the checkpoint, as {have[name]}" for name in extra}
    for name in missing:
        near = difflib.get_close_matches(name, extra, n=1) if len(missing) * len(extra) <= _MAX_NEAR_PAIRS else []
        lines[name] = f"{name}: not in the checkpoint, expected {want[name]}" + "".join(f"; is it {n}?" for n in near)
    for name in want.keys() & have.keys():
        if have[name] != want[name]:
            lines[name] = f"{name}: expected {want[name]}, got {have[name]}"
        elif isinstance(like[name], Tensor) and like[name].is_meta:
            lines[name] = f"{name}: `like` has it on the meta device, which holds no numbers"
    return [lines[name] for name in sorted(lines)]
