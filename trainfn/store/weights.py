"""Weights by name: from a checkpoint or a plain ``.safetensors`` file into a state, and the mean of several.

Only names, shapes and numbers are taken from a file; nothing in it can run code, and its header is checked by
:mod:`trainfn.store.tensors` before anything is built. What is replaced is replaced as a whole or not at all.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainfn.errors import CheckpointError
from trainfn.state import TrainState
from trainfn.store import disk, tensors
from trainfn.store.checkpoint import CheckpointWarning, RunPath, choose
from trainfn.store.sealed import indented
from trainfn.tree import describe, evolve

Rename = Mapping[str, str | None] | Callable[[str], str | None]
"""How a name in the file is called in the model: a function, or prefixes ending at a dot; None leaves it out."""

_MAX_NEAR_PAIRS = 10_000


def load_params(
    path: RunPath | Mapping[str, Tensor],
    like: TrainState,
    *,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
    ema: bool = False,
) -> TrainState:
    """Return ``like`` with parameters and buffers replaced by those of the same names in a file.

    The optimizer's state, the counters and the seed are those of ``like``; a moving average of a replaced parameter
    starts from the new value.

    Args:
        path: a ``.safetensors`` file, a run directory or a step in one (verified first), or tensors by name, such as
            :func:`average` returns.
        like: the state to put them into. Not written to; shares no memory with what is replaced.
        rename: how names in the file are to be read: ``{"module.": ""}``, ``{"head": None}``, or a function.
        strict: every parameter and buffer has to be in the file, and everything in the file in the state. If False,
            what is not is named in one warning. That nothing at all fits is an error in any case.
        cast: take tensors of other dtypes, too.
        ema: of a checkpoint, take the moving average of the parameters.

    Raises:
        CheckpointError: names are missing or not expected, two would get one name, dtypes or shapes differ: all are
            listed, with near names.
        CheckpointDamagedError: the file is not one of tensors, or not as it was written.

    >>> import trainfn
    >>> like = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> state = load_params({"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}, like, rename={"net.": ""})
    >>> state.params["weight"]
    tensor([[1., 1.]], requires_grad=True)
    """
    where = "the tensors that were given" if isinstance(path, Mapping) else os.fspath(path)
    found, wrong = _renamed(_weights(path, ema=ema), rename)
    own = {**like.params, **like.buffers}
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    for name in sorted(own.keys() & found.keys()):
        have, want = found[name], own[name]
        if have.shape != want.shape or (have.dtype != want.dtype and not cast):
            more = "" if have.shape != want.shape else "; cast=True takes it"
            wrong.append(f"{name}: expected {describe(want)}, got {describe(have)}{more}")
    names = _unmatched(missing, unexpected, {name: describe(found[name]) for name in unexpected})
    if strict or not own.keys() & found.keys():
        wrong += names
    if wrong:
        raise CheckpointError(
            "The weights do not fit the state.",
            where=where,
            got=indented(wrong),
            hint="rename= reads names differently, strict=False takes what there is" if strict else None,
        )
    if names:
        warnings.warn(f"Not all weights of {where} were taken:{indented(names)}", CheckpointWarning, stacklevel=2)

    def placed(name: str, leaf: Tensor) -> Tensor:
        if name not in found:
            return leaf
        return torch.empty_like(leaf.detach()).copy_(found[name]).requires_grad_(leaf.requires_grad)

    params = {name: placed(name, leaf) for name, leaf in like.params.items()}
    averaged = like.ema and {
        name: leaf.clone().copy_(params[name].detach()) if name in found else leaf for name, leaf in like.ema.items()
    }
    buffers = {name: placed(name, leaf) for name, leaf in like.buffers.items()}
    return evolve(like, params=params, buffers=buffers, ema=averaged)


def average(paths: Sequence[RunPath], *, ema: bool = False) -> dict[str, Tensor]:
    """Return the mean of the parameters and buffers of several checkpoints, by name: a soup of weights.

    Sums are made in float64 and cast back once. Integers and bools (counters, say) are those of the last checkpoint.

    Args:
        paths: run directories (of which the newest step is taken) or steps.
        ema: take the moving average of the parameters of each.

    Raises:
        CheckpointError: no paths, or checkpoints that differ in names, dtypes or shapes: all differences are listed.

    References:
        Wortsman et al., "Model soups", https://arxiv.org/abs/2203.05482, 2022.

    >>> import tempfile, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     step = trainfn.save(state, run)
    ...     torch.equal(average([step, step])["weight"], state.params["weight"])
    True
    """
    if not paths:
        raise CheckpointError("There is nothing to average.", expected="at least one checkpoint")
    total: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for path in paths:
        found = _weights(path, ema=ema)
        if last and (wrong := _differ(last, found)):
            raise CheckpointError(
                "The checkpoints are not of one model.", where=f"{paths[0]} and {path}", got=indented(wrong)
            )
        for name, tensor in found.items():
            if tensor.is_floating_point() or tensor.is_complex():
                wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
                total[name] = total[name].add_(wide) if name in total else wide.clone()
        last = found
    return {
        name: (total[name] / len(paths)).to(tensor.dtype) if name in total else tensor for name, tensor in last.items()
    }


def _weights(path: RunPath | Mapping[str, Tensor], *, ema: bool) -> dict[str, Tensor]:
    """Return the tensors of a source by the model's names."""
    if isinstance(path, Mapping):
        return dict(path)
    if not Path(path).is_dir():
        file = Path(os.path.realpath(path))  # a cache of downloads holds links to its files
        raw = disk.read(file, size=1 << 62)
        tensors.entries(raw, where=path, metadata=True)
        return tensors.decode(raw)
    _, _, raw = choose(Path(path))
    stored = tensors.decode(raw)

    def below(field: str) -> dict[str, Tensor]:
        return {name.removeprefix(field): leaf for name, leaf in stored.items() if name.startswith(field)}

    averaged = below("ema.") if ema else {}
    if ema and not averaged:
        raise CheckpointError("The run kept no moving average.", where=path, hint="leave out ema=True")
    params = below("params.")
    return params | {name: leaf.to(params[name].dtype) for name, leaf in averaged.items()} | below("buffers.")


def _renamed(found: dict[str, Tensor], rename: Rename | None) -> tuple[dict[str, Tensor], list[str]]:
    made: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    wrong = []
    for name, leaf in found.items():
        new = _new_name(name, rename)
        if new is None:
            continue
        if new in made:
            wrong.append(f"{new}: two names are read as this one, {origin[new]} and {name}")
        made[new], origin[new] = leaf, name
    return made, wrong


def _new_name(name: str, rename: Rename | None) -> str | None:
    if rename is None:
        return name
    if not isinstance(rename, Mapping):
        return rename(name)
    for old in sorted(rename, key=len, reverse=True):  # the longest prefix, ending at a dot or with the name
        if name == old or (name.startswith(old) and (old.endswith(".") or not old or name[len(old)] == ".")):
            new = rename[old]
            return None if new is None else new + name[len(old) :]
    return name


def _unmatched(missing: list[str], unexpected: list[str], have: Mapping[str, str]) -> list[str]:
    lines = []
    for name in missing:
        near = (
            difflib.get_close_matches(name, unexpected, n=1, cutoff=0.5)
            if len(missing) * len(unexpected) <= _MAX_NEAR_PAIRS
            else []
        )
        lines.append(f"{name}: missing" + "".join(f"; is it {n}?" for n in near))
    return lines + [f"{name}: not expected, {have[name]}" for name in unexpected]


def _differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    def form(of: Mapping[str, Tensor], name: str) -> Any:
        return describe(of[name]) if name in of else "absent"

    names = sorted(one.keys() | other.keys())
    return [f"{n}: {form(one, n)} and {form(other, n)}" for n in names if form(one, n) != form(other, n)]
