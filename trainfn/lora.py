"""Low-rank adapters: a few numbers trained beside a model that stays as it is, written in the format of PEFT.

    y = W x + (alpha / rank) B A x          A [rank, in] random, B [out, rank] zero at first

:func:`add` puts them beside linear layers chosen by name and freezes all else, so that ``fit`` trains them alone;
``loss="peft_aware(...)"`` makes sure that it does. :func:`save` writes what the package ``peft`` reads, and
:func:`load` reads what it writes.

References:
    E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685, 2021.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainfn.errors import CheckpointError, ConfigError, ModelError, suggest
from trainfn.store.disk import commit, read
from trainfn.store.tensors import decode, encode, entries

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_MOST_BYTES = 1 << 34
_NOT_PLAIN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


class Adapted(nn.Module):
    """A linear layer and an adapter beside it.

    Attributes:
        base: the layer, frozen: ``nn.Linear``, or transformers' ``Conv1D``, whose weight is the transpose of that.
        lora_A: [rank, in].
        lora_B: [out, rank].
    """

    def __init__(self, base: nn.Module, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        weight = cast(Tensor, base.weight)
        inputs, outputs = _sizes(base)
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, **like))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of x [..., in], and what the adapter adds to it, [..., out]."""
        added = F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)
        return cast(Tensor, self.base(x)) + added * (self.alpha / self.rank)

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that both come to: for modules that read it past the forward, as PyTorch's do."""
        return cast(Tensor, self.base.weight) + self.change()

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        return cast("Tensor | None", self.base.bias)

    def change(self) -> Tensor:
        """Return what the adapter comes to, in the form of the layer's weight."""
        product = (self.lora_B @ self.lora_A) * (self.alpha / self.rank)
        return product.mT if _is_transposed(self.base) else product


def add(
    model: nn.Module, patterns: str | Sequence[str], *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0
) -> nn.Module:
    """Put adapters beside the linear layers of a model whose names match, freeze all else, and return the model.

    The model's outputs stay what they were, until the adapters are trained. Parameters that are to be trained in full
    besides, such as a new head, are told so after it: ``model.head.requires_grad_()``.

    Args:
        model: it is changed.
        patterns: one or more patterns as of a shell, for names as of ``named_modules``: ``"*.attn.*"``.
        rank: of the product that is added.
        alpha: over ``rank``, what it is scaled by.
        dropout: of the adapters' input.

    Raises:
        ConfigError: a pattern that the name of no linear layer matches, or that of one with adapters; a layer under
            several names; a model that is such a layer itself; an option out of range.

    >>> model = add(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "0", rank=2)
    >>> [name for name, param in model.named_parameters() if param.requires_grad]
    ['0.lora_A', '0.lora_B']
    """
    wrong = {
        f"rank={rank!r} (expected an int >= 1)": isinstance(rank, bool) or not isinstance(rank, int) or rank < 1,
        f"alpha={alpha!r} (expected a number > 0)": not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf),
        f"dropout={dropout!r} (expected a number in [0, 1))": not (
            isinstance(dropout, (int, float)) and 0 <= dropout < 1
        ),
    }
    if any(wrong.values()):
        raise ConfigError("Adapters cannot be made so.", got="; ".join(text for text, is_so in wrong.items() if is_so))
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen = _chosen(model, wanted)
    model.requires_grad_(False)
    for name, layer in chosen.items():
        _put(model, name, Adapted(layer, rank=rank, alpha=alpha, dropout=dropout))
    for adapter in adapters(model).values():
        adapter.lora_A.requires_grad_()
        adapter.lora_B.requires_grad_()
    return model


def _chosen(model: nn.Module, wanted: list[str]) -> dict[str, nn.Module]:
    """Return the layers that the patterns name."""
    there = [name for name in adapters(model) if any(fnmatchcase(name, each) for each in wanted)]
    if there:
        raise ConfigError(
            "There are adapters beside these layers already.",
            got=", ".join(there[:4]),
            hint="lora.merge(model) adds them into the layers first; or begin with the model as it was",
        )
    inside = tuple(f"{name}." for name in adapters(model))
    if _is_linear(model):
        raise ConfigError(
            "The model is a linear layer itself, and nothing can be put in its place.",
            got=type(model).__name__,
            hint='lora.add(nn.Sequential(model), "0")',
        )
    names = [name for name, each in model.named_modules() if _is_linear(each) and not name.startswith(inside)]
    unmatched = [each for each in wanted if not any(fnmatchcase(name, each) for name in names)]
    if unmatched or not wanted:
        raise ConfigError(
            "No linear layer has such a name.",
            expected="patterns for names of layers, such as '*.attn.*'",
            got="; ".join(f"{each!r} ({suggest(each, names)})" for each in unmatched) or "no pattern",
        )
    chosen = {name: model.get_submodule(name) for name in names if any(fnmatchcase(name, each) for each in wanted)}
    places = [(name, each) for name, each in model.named_modules(remove_duplicate=False) if _is_linear(each)]
    for name, layer in chosen.items():
        if others := [other for other, each in places if each is layer and other != name]:
            raise ConfigError(
                "A layer is in the model under several names, and would be adapted under one.",
                got=f"{name} is {', '.join(others)}",
                hint="choose other layers, or make copies of it",
            )
    return chosen


def adapters(model: nn.Module) -> dict[str, Adapted]:
    """Return the adapted layers of a model by name.

    >>> list(adapters(add(nn.Sequential(nn.Linear(4, 4)), "0")))
    ['0']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def merge(model: nn.Module) -> nn.Module:
    """Add the adapters into the layers that they are beside, take them away, and return the model.

    Raises:
        ModelError: there are none; or a layer's weight is also another one's, which would be changed with it.

    >>> model = merge(add(nn.Sequential(nn.Linear(4, 4)), "0"))
    >>> type(model[0]).__name__
    'Linear'
    """
    found = _some(model)
    for name, adapter in found.items():
        weight = cast(Tensor, adapter.base.weight)
        others = [other for other, param in model.named_parameters(remove_duplicate=False) if param is weight]
        if len(others) > 1:
            raise ModelError("A weight is tied, so nothing can be added to it.", where=name, got=", ".join(others))
    for name, adapter in found.items():
        with torch.no_grad():
            cast(Tensor, adapter.base.weight).add_(adapter.change())
        _put(model, name, adapter.base)
    return model


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a model's adapters as PEFT does, ``adapter_model.safetensors`` and ``adapter_config.json``.

    After a run: ``save(result.model(), folder)``.

    Returns:
        The folder, which is new, or exists once all of it is on the disk.

    Raises:
        ModelError: the model has no adapters, or they differ in what one configuration holds.
        CheckpointError: it cannot be written, or something is there.
    """
    found = _some(model)
    kinds = {(each.rank, each.alpha, each.dropout.p, _is_transposed(each.base)) for each in found.values()}
    if len(kinds) > 1:
        got = "; ".join(map(str, sorted(kinds)))
        raise ModelError("The adapters differ in rank, alpha, dropout or the kind of their layers.", got=got)
    rank, alpha, dropout, transposed = next(iter(kinds))
    tensors = {
        f"{_PREFIX}{name}.lora_{side}.weight": cast(Tensor, getattr(each, f"lora_{side}")).detach()
        for name, each in found.items()
        for side in "AB"
    }
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(found),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "task_type": None,
        "inference_mode": True,
    }
    target = Path(folder)
    if target.exists():
        raise CheckpointError("Something is there already.", where=str(target), hint="choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    commit(target, {WEIGHTS: encode(tensors), CONFIG: json.dumps(config, indent=2).encode()})
    return target


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put the adapters that are written in a folder, by :func:`save` or by PEFT, beside a model's layers.

    Args:
        model: the one that they were trained for; it is changed, frozen but for them, and returned.
        folder: holds ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        CheckpointError: a file that is missing or damaged, or holds something else; layers that the model lacks.
    """
    place = Path(folder)
    weights, config = (_read(place / name) for name in (WEIGHTS, CONFIG))
    entries(weights, where=place / WEIGHTS, metadata=True)
    tensors = decode(weights)
    try:
        written = json.loads(config)
        rank, alpha, dropout = int(written["r"]), float(written["lora_alpha"]), float(written["lora_dropout"])
        kind = written["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("This is no configuration of adapters.", where=str(place / CONFIG)) from error
    odd = [name for name in _NOT_PLAIN if written.get(name)]
    names = {name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
    expected = {f"{_PREFIX}{name}.lora_{side}.weight" for name in names for side in "AB"}
    if kind != "LORA" or odd or set(tensors) != expected:
        got = ", ".join([*odd, *sorted(set(tensors) ^ expected)[:4]]) or str(kind)
        raise CheckpointError("These adapters are not of the plain kind.", where=str(place), got=got)
    known = {name for name, each in model.named_modules() if _is_linear(each)}
    if names - known:
        missing = [f"{name} ({suggest(name, known)})" for name in sorted(names - known)]
        raise CheckpointError("The model lacks layers that adapters are for.", where=str(place), got="; ".join(missing))
    for name in sorted(names):
        inputs, outputs = _sizes(model.get_submodule(name))
        for side, wanted in (("A", [rank, inputs]), ("B", [outputs, rank])):
            found = list(tensors[f"{_PREFIX}{name}.lora_{side}.weight"].shape)
            if found != wanted:
                sizes = {"expected": str(wanted), "got": str(found)}
                raise CheckpointError("An adapter is of another size.", where=f"{name}.lora_{side}", **sizes)
    add(model, sorted(names), rank=rank, alpha=alpha, dropout=dropout)
    for name, adapter in adapters(model).items():
        for side in "AB":
            with torch.no_grad():
                getattr(adapter, f"lora_{side}").copy_(tensors[f"{_PREFIX}{name}.lora_{side}.weight"])
    return model


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError("There is no such file.", where=str(path))
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise CheckpointError("The file is too large for adapters.", where=str(path), got=f"{size:,} bytes")
    return read(path, size=size, exact=True)


def _some(model: nn.Module) -> dict[str, Adapted]:
    found = adapters(model)
    if not found:
        raise ModelError("The model has no adapters.", got=type(model).__name__, hint="trainfn.lora.add(model, ...)")
    return found


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return how many numbers a linear layer takes, and how many it gives."""
    first, second = cast(Tensor, layer.weight).shape
    return (first, second) if _is_transposed(layer) else (second, first)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and getattr(getattr(module, "weight", None), "ndim", 0) == 2
