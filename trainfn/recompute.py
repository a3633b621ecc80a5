"""Activation checkpointing: modules whose forward is run again in the backward, instead of keeping what it made.

Memory for time: of a chosen module only the inputs are kept, and its forward is run twice. What the second run reads is
what the first one read. The parameters are those of the call, which a functional forward has taken out of the module
again by then; the buffers are copies from before the first run, so that a running mean is advanced once; the random
numbers are drawn from the same state of the generators.

References:
    T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174, 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainfn.errors import ConfigError, ModelError, TrainfnError, suggest


def matching(model: nn.Module, patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the modules that patterns choose, outermost only: what is inside one is recomputed with it.

    Args:
        model: any module.
        patterns: one or more patterns as of a shell, for names as of ``named_modules``: ``"blocks.*"``.

    Raises:
        ConfigError: patterns that no module's name matches.

    >>> matching(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Tanh(), nn.Tanh())), ["1*", "0"])
    ('0', '1')
    >>> matching(nn.ModuleDict({"blocks": nn.ModuleList([nn.Tanh()])}), "block.*")
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: No module to checkpoint has such a name.
      expected: patterns for names of modules, such as 'blocks.*'
      got: 'block.*' (did you mean 'blocks.*'?)
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns or ())
    # A list of modules has no forward of its own: it is what is in it that is called.
    names = [name for name, module in model.named_modules() if name and type(module).forward is not nn.Module.forward]
    wrong = [pattern for pattern in wanted if not any(fnmatchcase(name, pattern) for name in names)]
    if wrong:
        known = set(names) | {f"{name.rpartition('.')[0]}.*" for name in names if "." in name}
        raise ConfigError(
            "No module to checkpoint has such a name.",
            expected="patterns for names of modules, such as 'blocks.*'",
            got="; ".join(f"{pattern!r} ({suggest(pattern, known)})" for pattern in wrong),
        )
    found: list[str] = []
    for name in names:  # a module comes before what is inside it
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if not is_inside and any(fnmatchcase(name, pattern) for pattern in wanted):
            found.append(name)
    return tuple(found)


@contextmanager
def recomputing(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let these modules be recomputed in the backward of what is run inside; afterwards they are as before.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    >>> with recomputing(net, ["0"]):
    ...     net(torch.ones(1, 2)).sum().backward()
    >>> "forward" in vars(net[0])
    False
    """
    modules = [model.get_submodule(name) for name in names]
    before = [(module, vars(module).get("forward")) for module in modules]
    for name, module in zip(names, modules, strict=True):
        vars(module)["forward"] = partial(_forward, name, module, module.forward)
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


@contextmanager
def explained(names: Sequence[str]) -> Iterator[None]:
    """Raise a ModelError for what PyTorch raises of a module whose second run is not the first one again.

    >>> with explained(["0"]):
    ...     raise RuntimeError("... has been modified by an inplace operation: ...")
    Traceback (most recent call last):
        ...
    trainfn.errors.ModelError: The input of a checkpointed module was written to in place.
      where: 0
      got: a write by what came after it
      try: write x = x + y for x += y, inplace=False for inplace=True; or leave the module out of checkpoint=
    """
    from torch.utils.checkpoint import CheckpointError

    try:
        yield
    except CheckpointError as error:
        raise ModelError(
            "A checkpointed module did something else in its second run.",
            where=", ".join(names),
            expected="a forward that gives the same for the same inputs, parameters and buffers",
            got=str(error).strip().splitlines()[0],
            hint="look for caches and lists that the forward writes to; or leave the module out of checkpoint=",
        ) from error
    except RuntimeError as error:
        if isinstance(error, TrainfnError) or "modified by an inplace operation" not in str(error):
            raise
        raise _written(", ".join(names), "what came after it") from error


def _written(where: str, culprit: str) -> ModelError:
    return ModelError(
        "The input of a checkpointed module was written to in place.",
        where=where,
        got=f"a write by {culprit}",
        hint="write x = x + y for x += y, inplace=False for inplace=True; or leave the module out of checkpoint=",
    )


def _forward(name: str, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if torch.compiler.is_compiling():  # a program holds on to the tensors themselves
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    run = _Run(name, module, forward, args, kwargs)
    outputs = checkpoint(run, *args, use_reentrant=False, **kwargs)
    run.check("its own forward")
    return outputs


class _Run:
    """A module's forward, to be run now and once more."""

    def __init__(self, name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.name, self.is_first = name, True
        self.body = _Body(module, forward)
        self.params = {f"module.{key}": param for key, param in module.named_parameters(remove_duplicate=False)}
        buffers = module.named_buffers(remove_duplicate=False)
        self.buffers = {f"module.{key}": buffer.clone() for key, buffer in buffers}
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.inputs = [(value, value._version) for value in inputs]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_first:
            self.is_first = False
            return self.body(*args, **kwargs)
        self.check("what came after it")
        return functional_call(self.body, self.params | self.buffers, args, kwargs)

    def check(self, culprit: str) -> None:
        """Raise if an input was written to: the second run would read something else, and its gradient be wrong."""
        if any(value._version != version for value, version in self.inputs):
            raise _written(self.name, culprit)


class _Body(nn.Module):
    """Only the forward of a module: its hooks have been called, or will be, around it."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.run = module, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)
