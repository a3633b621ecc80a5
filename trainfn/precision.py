"""Precision as a policy of explicit casts: what parameters are stored in, what the forward runs in, how fp16 is scaled.

| name | parameters | forward and backward | loss scale |
|---|---|---|---|
| ``32-true`` | as the model has them | as they are | none |
| ``bf16-mixed`` | as the model has them (float32) | bfloat16 | none |
| ``16-mixed`` | as the model has them (float32) | float16 | dynamic, in the state |
| ``bf16-true`` | bfloat16 | bfloat16 | none |

A mixed forward reads a 16-bit copy of each parameter, made once a step by one cast through which the gradient flows
back in float32. Floating inputs and persistent buffers are cast with them. What normalises by running statistics
(BatchNorm and its kin) keeps float32 parameters and statistics, which PyTorch's kernels take beside 16-bit inputs; and
buffers that are not persistent keep their dtype: they are tables that the model computes for itself, such as rotary
frequencies. Losses make their sums in float32, whatever the outputs are in.

The scale of float16 follows the rule of ``torch.amp.GradScaler``: half of it after an overflow, twice of it after
2,000 good steps in a row.

References:
    P. Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, 2018.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trainfn.errors import ConfigError, suggest
from trainfn.tree import T, map_leaves, record

_FIRST_SCALE = 65_536.0
_GROWTH_INTERVAL = 2_000


_MEANT = ', or say precision="bf16-true" if this is meant'


class PrecisionWarning(UserWarning):
    """Numbers will be rounded where that may not have been meant."""


@attrs.frozen
class Precision:
    """A precision policy.

    Attributes:
        name: what Lightning calls it.
        stored: dtype that parameters are stored in; None leaves them as the model has them.
        compute: dtype of the forward and backward; None leaves everything as it is.
        scaled: whether the loss is scaled before the backward.
    """

    name: str
    stored: torch.dtype | None = None
    compute: torch.dtype | None = None
    scaled: bool = False


POLICIES = {
    policy.name: policy
    for policy in (
        Precision("32-true"),
        Precision("bf16-mixed", compute=torch.bfloat16),
        Precision("16-mixed", compute=torch.float16, scaled=True),
        Precision("bf16-true", stored=torch.bfloat16, compute=torch.bfloat16),
    )
}


@record
class LossScale:
    """What the loss is multiplied by before a float16 backward, so that small gradients do not vanish.

    Attributes:
        factor: [] float32.
        good: [] int64, steps without an overflow since the factor last changed.
    """

    factor: Tensor
    good: Tensor


def resolve(name: str) -> Precision:
    """Return the policy of this name.

    Raises:
        ConfigError: there is none; the nearest name is given.

    >>> resolve("bf16-mixed").compute
    torch.bfloat16
    >>> resolve("bf16")
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: There is no precision of this name.
      got: 'bf16'
      try: did you mean 'bf16-true'?
    """
    if name not in POLICIES:
        raise ConfigError("There is no precision of this name.", got=repr(name), hint=suggest(str(name), POLICIES))
    return POLICIES[name]


def lowered(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters and buffers that a 16-bit forward takes in 16 bits.

    >>> sorted(lowered(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
    ['0.bias', '0.weight']
    """
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            continue
        tensors: dict[str, Tensor | None] = dict(module._parameters)
        tensors |= {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        names |= {
            f"{path}.{name}" if path else name
            for name, tensor in tensors.items()
            if tensor is not None and tensor.is_floating_point()
        }
    return frozenset(names)


def cast(tree: T, dtype: torch.dtype | None) -> T:
    """Return the tree with its floating tensors in ``dtype``; those that are in it already are the same objects.

    >>> cast({"x": torch.ones(1), "ids": torch.ones(1, dtype=torch.long)}, torch.bfloat16)
    {'x': tensor([1.], dtype=torch.bfloat16), 'ids': tensor([1])}
    """
    if dtype is None:
        return tree
    return map_leaves(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree
    )


def first_scale(device: torch.device) -> LossScale:
    """Return the scale before the first step, 65,536."""
    return LossScale(
        factor=torch.tensor(_FIRST_SCALE, device=device), good=torch.zeros((), dtype=torch.int64, device=device)
    )


def next_scale(scale: LossScale, *, overflow: Tensor, counted: Tensor) -> LossScale:
    """Return the scale after a step.

    Args:
        scale: the scale of the step.
        overflow: [] bool, whether a gradient was not finite.
        counted: [] bool, whether the step says anything about the scale; one over an empty batch does not.

    >>> scale, no, yes = first_scale(torch.device("cpu")), torch.tensor(False), torch.tensor(True)
    >>> next_scale(scale, overflow=yes, counted=yes).factor
    tensor(32768.)
    >>> next_scale(scale, overflow=no, counted=yes)
    LossScale(factor=tensor(65536.), good=tensor(1))
    """
    good = torch.where(overflow, 0, scale.good + counted)
    doubled = scale.factor * 2.0
    grows = (good >= _GROWTH_INTERVAL) & torch.isfinite(doubled)
    factor = torch.where(overflow, scale.factor * 0.5, torch.where(grows, doubled, scale.factor))
    return LossScale(factor=factor, good=torch.where(good >= _GROWTH_INTERVAL, 0, good))


def backward_unit(scale: LossScale, weight: Tensor) -> Tensor:
    """Return what a micro-batch's summed loss is multiplied by, [] float32: the scale over the weight's power of two.

    The scale is meant for the mean, as everywhere else; a sum over thousands of tokens would overflow with it. A power
    of two changes no digit.

    >>> backward_unit(first_scale(torch.device("cpu")), torch.tensor(1000.0))
    tensor(128.)
    """
    return scale.factor / torch.exp2(torch.floor(torch.log2(weight.float().clamp(min=1.0))))


def check_precision(model: nn.Module, name: str) -> None:
    """Warn of parameters that are in 16 bits though the policy means to keep them in 32: no digits come back by a cast.

    >>> import pytest
    >>> with pytest.warns(PrecisionWarning, match="bfloat16 already"):
    ...     check_precision(nn.Linear(2, 2, dtype=torch.bfloat16), "bf16-mixed")
    """
    halves = (torch.bfloat16, torch.float16)
    low = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad and p.dtype in halves}
    if not low or resolve(name).stored in low.values():
        return
    dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in low.values()}))
    text = (
        f"{len(low)} trained parameters are in {dtypes} already, {next(iter(low))} first: with {name!r} there "
        "is no float32 master copy, and small updates will be rounded away. Load the model in float32 "
        f"(dtype=torch.float32, model.float()){_MEANT if name != 'bf16-true' else ''}."
    )
    warnings.warn(text, PrecisionWarning, stacklevel=3)


def check_buffers(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str) -> None:
    """Warn of buffers that a forward has written to in 16 bits, where a slow average would stand still."""
    if resolve(name).compute is None:
        return
    low = lowered(model)
    written = [key for key in after if key in low and not torch.equal(before[key], after[key])]
    if written:
        text = (
            f"The forward writes to buffers that {name} takes in 16 bits: {', '.join(written)}. Register them with "
            "persistent=False to keep their precision."
        )
        warnings.warn(text, PrecisionWarning, stacklevel=3)
