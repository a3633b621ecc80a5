"""How a batch meets a model's forward: arguments by name, read once from the signature.

The rule, in order: fields of a dict go to the parameters of the same name; if one required parameter and one input
field are left over, they belong together; targets are passed only to a parameter that requires them (so a model that
can compute its own loss does not compute it twice), or to ``labels`` of a model that makes its ``decoder_input_ids`` of
them. Tuples and tensors go in by position. A cache of keys and values is for generating text: a forward that has a
``use_cache`` is told not to make one, unless the batch says otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from trainfn.batch import Batch, inputs
from trainfn.errors import ModelError
from trainfn.tree import describe

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def make_arguments(model: nn.Module) -> Callable[[Batch], Arguments]:
    """Return the function that turns a batch into ``(args, kwargs)`` for this model's forward.

    Raises:
        ModelError: (from the returned function) the batch's fields do not meet the signature; both are shown.

    >>> import torch
    >>> arguments = make_arguments(nn.Linear(2, 1))
    >>> arguments({"features": torch.ones(3, 2), "y": torch.ones(3)})[1]["input"].shape
    torch.Size([3, 2])
    """
    signature = inspect.signature(model.forward)
    parameters = list(signature.parameters.values())
    named = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD]
    required = [p.name for p in parameters if p.name in named and p.default is p.empty]
    by_position = [p.name for p in parameters if p.kind in _POSITIONAL]
    room = float("inf") if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(by_position)
    makes_decoder_inputs = {"labels", "decoder_input_ids"} <= set(named)
    takes_any_name = not named and any(p.kind is p.VAR_KEYWORD for p in parameters)

    def arguments(batch: Batch) -> Arguments:
        args, kwargs = chosen(batch)
        takes_cache = "use_cache" in named and "use_cache" not in {*by_position[: len(args)], *kwargs}
        return args, kwargs | {"use_cache": False} if takes_cache else kwargs

    def chosen(batch: Batch) -> Arguments:
        if not isinstance(batch, dict):
            args, _ = inputs(batch)
            if not len(required) <= len(args) <= room or not set(required) <= set(by_position):
                raise mismatch(batch)
            return args, {}
        _, fields = inputs(batch)
        if takes_any_name:
            return (), fields
        kwargs = {name: value for name, value in fields.items() if name in named}
        kwargs |= {name: batch[name] for name in required if name in batch}
        if makes_decoder_inputs and "labels" in batch and "decoder_input_ids" not in batch:
            kwargs["labels"] = batch["labels"]
        missing = [name for name in required if name not in kwargs]
        spare = [name for name in fields if name not in kwargs]
        if (len(missing) == 1 and len(spare) == 1) or (not kwargs and len(spare) == 1 and len(missing) <= 1 and named):
            kwargs[(missing or named)[0]] = fields[spare[0]]
        elif missing or not kwargs:
            raise mismatch(batch)
        return (), kwargs

    def mismatch(batch: Batch) -> ModelError:
        return ModelError(
            "The model's forward does not take what the batch holds.",
            where=f"{type(model).__name__}.forward{signature}",
            expected=f"inputs called {', '.join(required or named)}" if required or named else "no inputs",
            got=f"a batch of {describe(batch)}",
            hint="name the batch's fields after forward's parameters, or pass a tuple (inputs, target)",
        )

    return arguments
