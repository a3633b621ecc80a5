"""How a model is applied: as a function of its tensors, to arguments that are found by name in the batch.

The rule for arguments, in order: fields of a dict go to the parameters of the same name; if one required parameter and
one input field are left over, they belong together; targets are passed only to a parameter that requires them (so a
model that can compute its own loss does not compute it twice), or to ``labels`` of a model that makes its
``decoder_input_ids`` of them. Tuples and tensors go in by position; where the one input is itself a tuple or a dict,
``((a, b), y)`` or ``({"a": a, "b": b}, y)``, and the forward takes its parts, those do. A forward whose only required
parameter is called ``batch`` is given all inputs of a dict as one. What describes an input (``attention_mask``,
``token_type_ids``, ``position_ids``) is passed when it is taken. A field that the forward has no parameter for is left
to the loss; it is an error where a parameter of nearly the same name is left without a value, ``attn_mask`` beside
``attention_mask``, and ``fit`` warns of it where the loss is one of ours, which reads no such field. A cache of keys
and values is for generating text: a forward that has a ``use_cache`` is told not to make one, unless the batch says
otherwise.
"""

from __future__ import annotations

import difflib
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from trainfn.batch import TARGET_NAMES, Batch, inputs, target
from trainfn.errors import ModelError
from trainfn.tree import describe

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

Apply = Callable[[dict[str, Tensor], tuple[Any, ...], dict[str, Any]], Any]
"""``(tensors, args, kwargs) -> outputs``."""

_COMPANIONS = ("attention_mask", "token_type_ids", "position_ids")
_LARGE = 2**20  # numbers in a tensor that is not held for longer than it may be needed
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class ForwardWarning(UserWarning):
    """A field of the batch is not passed to the model."""


def make_arguments(model: nn.Module, *, targets: bool = False) -> Callable[[Batch], Arguments]:
    """Return the function that turns a batch into ``(args, kwargs)`` for this model's forward.

    Args:
        model: its forward's signature is read, now.
        targets: pass the batch's targets, too, to a parameter that is called like one: for a model whose output holds
            its loss.

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
    looked_at: set[tuple[str, ...]] = set()
    takes_any_name = not named and any(p.kind is p.VAR_KEYWORD for p in parameters)

    def arguments(batch: Batch) -> Arguments:
        args, kwargs = chosen(batch)
        if targets:
            kwargs = kwargs | wanted(batch, by_position[: len(args)])
        takes_cache = "use_cache" in named and "use_cache" not in {*by_position[: len(args)], *kwargs}
        return args, kwargs | {"use_cache": False} if takes_cache else kwargs

    def chosen(batch: Batch) -> Arguments:
        if not isinstance(batch, dict):
            args, _ = inputs(batch)
            if len(args) == 1 and isinstance(args[0], dict) and (len(required) > 1 or set(args[0]) <= set(named)):
                return by_name(args[0], batch)
            if len(args) == 1 and isinstance(args[0], (tuple, list)) and len(required) > 1:
                args = tuple(args[0])
            if not len(required) <= len(args) <= room or not set(required) <= set(by_position):
                raise mismatch(batch)
            return args, {}
        return by_name(inputs(batch)[1], batch)

    def by_name(fields: dict[str, Any], batch: Batch) -> Arguments:
        if takes_any_name:
            return (), fields
        if required == ["batch"] and "batch" not in fields and fields:
            return (), {"batch": fields}
        kwargs = {name: value for name, value in fields.items() if name in named}
        if isinstance(batch, dict):
            kwargs |= {name: batch[name] for name in required if name in batch}
            if makes_decoder_inputs and "labels" in batch and "decoder_input_ids" not in batch:
                kwargs["labels"] = batch["labels"]
        missing = [name for name in required if name not in kwargs]
        spare = [name for name in fields if name not in kwargs]
        lone = [name for name in spare if name not in _COMPANIONS] or spare
        free = [name for name in named if name not in kwargs]
        alone = not set(kwargs) - set(_COMPANIONS) and len(missing) <= 1 and free
        if len(lone) == 1 and (len(missing) == 1 or alone):
            kwargs[(missing or free)[0]] = fields[lone[0]]
            spare.remove(lone[0])
        elif missing or not kwargs:
            raise mismatch(batch)
        if spare and not torch.compiler.is_compiling() and (form := (*spare, "", *kwargs)) not in looked_at:
            refuse_misspelt(spare, kwargs, batch)
            looked_at.add(form)  # a forward is called at every step, and its batches have the same fields
        return (), kwargs

    def wanted(batch: Batch, filled: Sequence[str]) -> dict[str, Any]:
        """Return the batch's target under the name that the forward has for it; nothing if there is no such pair."""
        theirs = [name for name in TARGET_NAMES if name in named and name not in filled]
        if isinstance(batch, dict):
            ours = [name for name in TARGET_NAMES if name in batch]
            return {(name if name in named else theirs[0]): batch[name] for name in ours if theirs}
        return {theirs[0]: target(batch)} if theirs and isinstance(batch, (tuple, list)) and len(batch) > 1 else {}

    def refuse_misspelt(spare: Sequence[str], kwargs: dict[str, Any], batch: Batch) -> None:
        free = [name for name in named if name not in kwargs and name not in TARGET_NAMES]
        meant = {name: difflib.get_close_matches(name, free, n=1) for name in spare}
        for name, near in meant.items():
            if near:
                raise ModelError(
                    f"The batch's field {name!r} would not reach the model.",
                    where=f"{type(model).__name__}.forward{signature}",
                    got=f"a batch of {describe(batch)}",
                    hint=f"did you mean {near[0]!r}? rename the field, or leave it out of the data",
                )

    def mismatch(batch: Batch) -> ModelError:
        return ModelError(
            "The model's forward does not take what the batch holds.",
            where=f"{type(model).__name__}.forward{signature}",
            expected=f"inputs called {', '.join(required or named)}" if required or named else "no inputs",
            got=f"a batch of {describe(batch)}",
            hint="name the batch's fields after forward's parameters, or pass a tuple (inputs, target)",
        )

    return arguments


def warn_of_unread(model: nn.Module, batch: Batch) -> None:
    """Warn of the fields of a batch that its forward is not given: for a loss that does not read them either.

    Nothing is said of what describes an input, unless it is a mask and the forward takes another.

    Warns:
        ForwardWarning: of each field, with the signature and what the batch holds.

    >>> warn_of_unread(nn.Linear(2, 1), {"x": torch.ones(3, 2), "y": torch.ones(3)})
    """
    if not isinstance(batch, dict):
        return
    signature = inspect.signature(model.forward)
    _, passed = make_arguments(model)(batch)
    given = {id(value) for value in passed.values()}
    free = [name for name in signature.parameters if name not in passed]
    for name, value in inputs(batch)[1].items():
        is_other_mask = name == "attention_mask" and any("mask" in other for other in free)
        if id(value) not in given and (name not in _COMPANIONS or is_other_mask):
            warnings.warn(
                f"The batch's field {name!r} is not passed to the model: "
                f"{type(model).__name__}.forward{signature} has no such parameter. The batch holds {describe(batch)}. "
                "To choose what is passed: task=TaskSpec(inputs=[...]).",
                ForwardWarning,
                stacklevel=2,
            )


def make_apply(model: nn.Module) -> Apply:
    """Return ``(tensors, args, kwargs) -> outputs``: the model called with these tensors in place of its own.

    Does what ``torch.func.functional_call(..., tie_weights=True)`` does, which looks the whole model through at every
    call: 130 us for 24 tensors, and half the seconds that a trace takes. Here a table of places is kept, and made anew
    when the model is found to have changed.

    Args of what is returned: tensors by name, tied ones once; what a forward puts in a buffer's place is put into the
    dict.

    >>> apply = make_apply(nn.Linear(2, 1, bias=False))
    >>> apply({"weight": torch.tensor([[1.0, 2.0]])}, (torch.ones(2),), {})
    tensor([3.])
    """
    table: list[_Places] = []

    def refresh() -> None:
        if not table or not table[0].are_up_to_date():
            table[:] = [_Places(model)]

    # Not traced. So says torch.compiler.assume_constant_result, which imports the compiler first, for 1 s.
    refresh._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def apply(tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refresh()
        call = table[0].call_traced if torch.compiler.is_compiling() else table[0].call
        return call(tensors, args, kwargs)

    return apply


class _Places:
    """Where a model keeps its tensors."""

    def __init__(self, model: nn.Module) -> None:
        names = [*model.named_parameters(), *model.named_buffers()]
        called = {id(tensor): name for name, tensor in names}
        modules = list(model.modules())
        self._model = model
        self._rooms = [
            (module, kind, key, called[id(tensor)])
            for module in modules
            for kind in ("_parameters", "_buffers")
            for key, tensor in getattr(module, kind).items()
            if tensor is not None
        ]
        rooms = [(getattr(module, kind), key, name) for module, kind, key, name in self._rooms]
        self._places = [(home, key, name, home[key]) for home, key, name in rooms]
        self._large: list[tuple[dict[str, Any], str, str]] | None = None  # of what is given
        self._buffers = [(module, key, name) for module, kind, key, name in self._rooms if kind == "_buffers"]
        homes: list[dict[str, Any]] = [
            home for each in modules for home in (each._parameters, each._buffers, each._modules)
        ]
        self._empty, self._homes = [home for home in homes if not home], [home for home in homes if home]
        self._sizes = list(map(len, self._homes))
        self._keys = list(chain.from_iterable(self._homes))
        self._values = list(chain.from_iterable(map(dict.values, self._homes)))

    def are_up_to_date(self) -> bool:
        return (  # at every call, so without a loop in Python
            not any(self._empty)
            and list(map(len, self._homes)) == self._sizes
            and list(chain.from_iterable(self._homes)) == self._keys
            and all(map(is_, chain.from_iterable(map(dict.values, self._homes)), self._values))
        )

    def call(self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(tensors)
        try:
            for home, key, name, _ in self._places:
                if name in given:
                    home[key] = given[name]
            return self._model(*args, **kwargs)
        finally:
            self._note_buffers(tensors, given)
            self._hold(given) if _held.stack else self._put_back()

    def call_traced(self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what :meth:`call` does, in few steps for a compiler to follow.

        What is put back is what was found, by way of the modules: a program does the same at each call.
        """
        given = dict(tensors)
        own = []
        for module, kind, key, name in self._rooms:
            home = getattr(module, kind)
            own.append(home[key])
            if name in given:
                home[key] = given[name]
        try:
            return self._model(*args, **kwargs)
        finally:
            self._note_buffers(tensors, given)
            for (module, kind, key, _), old in zip(self._rooms, own, strict=True):
                getattr(module, kind)[key] = old

    def _note_buffers(self, tensors: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        for module, key, name in self._buffers:
            new = module._buffers.get(key)
            if name in given and new is not None and new is not given[name]:
                tensors[name] = new

    def _hold(self, given: dict[str, Tensor]) -> None:
        _held.stack[-1].append(self._put_back)
        if self._large is None:
            large = {name for name, tensor in given.items() if tensor.numel() >= _LARGE}
            self._large = [(home, key, name) for home, key, name, _ in self._places if name in large]
        for home, key, name in self._large:
            tensor = given.get(name)
            if tensor is not None and tensor.grad_fn is not None:  # a copy in another dtype
                # When the gradients of all its uses are known, nothing is left to compute with it: it goes then, before
                # its gradient is converted, and not at the end.
                tensor.register_hook(partial(_let_go, home, key))  # type: ignore[no-untyped-call]

    def _put_back(self) -> None:
        for home, key, _, own in self._places:
            home[key] = own


def _let_go(home: dict[str, Any], key: str, gradient: Tensor) -> None:
    home[key] = None  # and not the model's own, which whoever needs one after all would take for it


class _Held(threading.local):
    def __init__(self) -> None:
        self.stack: list[list[Callable[[], None]]] = []


_held = _Held()


class tensors_in_place:
    """Leave the tensors of what is applied inside where they are until the end, when the model's own come back.

    A model that recomputes activations (``torch.utils.checkpoint``) reads its tensors in the backward once more.
    """

    def __enter__(self) -> None:
        _held.stack.append([])

    def __exit__(self, *_: object) -> None:
        for put_back in reversed(_held.stack.pop()):
            put_back()
