"""Fields of items and batches, by the names that a task gives them, and the shapes that it holds them to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainfn.batch import TARGET_NAMES, Batch
from trainfn.data.images import fits
from trainfn.errors import DataError, suggest
from trainfn.tree import describe


def select(item: Any, *, inputs: dict[str, str], target: str | None, optional: bool = False) -> Any:
    """Return an item, or a batch, as a dict of the named fields under the model's names, and the target as ``labels``.

    Args:
        item: a dict; or a tuple, whose parts are given the names in order, the last one being the target.
        inputs: fields and the names that the model has for them; all but the target if empty.
        target: field to predict; the one that is called like one if None.
        optional: whether an item may lack it.

    Raises:
        DataError: the item has no such field.

    >>> select({"a": 1, "b": 2, "c": 3}, inputs={"a": "x"}, target="b")
    {'x': 1, 'labels': 2}
    """
    if isinstance(item, Mapping):
        target = None if optional and target not in item else target
        missing = [name for name in (*inputs, *([target] if target else [])) if name not in item]
        if missing:
            raise DataError(
                "The data has no such field.",
                expected=", ".join(missing),
                got=describe(dict(item)),
                hint=suggest(missing[0], map(str, item)),
            )
        targets = (target,) if target else tuple(name for name in TARGET_NAMES if name in item)
        kept = inputs or {name: name for name in item if name not in targets}
        return {new: item[old] for old, new in kept.items()} | {
            "labels" if name == target else name: item[name] for name in targets
        }
    values = list(item) if isinstance(item, tuple) else [item]
    names = list(inputs.values())
    if target is not None or len(values) not in (len(names), len(names) + 1):
        raise DataError(
            "The data has no fields by name.",
            expected=f"a dict with {', '.join([*inputs, *([target] if target else [])])}",
            got=f"a {type(item).__name__} of {describe(item)}",
            hint="a tuple is given the names of inputs in order, and its last one is the target: leave target out",
        )
    return dict(zip([*names, "labels"], values, strict=False))


def unlearned(batch: Batch, *, finishing: Callable[[Batch], Batch], ids: tuple[int, ...], ignore_index: int) -> Batch:
    """Return a batch after ``finishing`` it, with labels that are one of ``ids`` not counting.

    Without labels, as in language modelling, tokens are their own; they are then given labels, in which padding by the
    ``attention_mask`` does not count either.

    >>> import torch
    >>> unlearned({"input_ids": torch.tensor([[5, 6, 0]])}, finishing=lambda batch: batch, ids=(0,), ignore_index=-100)
    {'input_ids': tensor([[5, 6, 0]]), 'labels': tensor([[   5,    6, -100]])}
    """
    done = finishing(batch)
    if isinstance(done, tuple):
        return (*done[:-1], _without(done[-1], ids, ignore_index))
    if not isinstance(done, dict):
        return done, _without(done, ids, ignore_index)
    name = next((name for name in TARGET_NAMES if name in done), None)
    if name is not None:
        return done | {name: _without(done[name], ids, ignore_index)}
    if "input_ids" not in done:
        raise DataError(
            "There are no labels in which tokens could be ignored.", expected="labels, or input_ids", got=describe(done)
        )
    labels = _without(done["input_ids"], ids, ignore_index)
    if "attention_mask" in done:
        labels = labels.masked_fill(done["attention_mask"] == 0, ignore_index)
    return done | {"labels": labels}


def _without(labels: Tensor, ids: tuple[int, ...], ignore_index: int) -> Tensor:
    return labels.masked_fill(torch.isin(labels, labels.new_tensor(ids)), ignore_index)


def finish(batch: Batch, *, finishing: Callable[[Batch], Batch], shapes: dict[str, tuple[int | None, ...]]) -> Batch:
    """Return a batch after ``finishing`` it, held to the shapes of one example of each field; None is any size.

    Raises:
        DataError: a field that is not there, or of another shape.

    >>> import torch
    >>> finish(torch.zeros(2, 3), finishing=lambda batch: batch + 1, shapes={"x": (3,)}).sum()
    tensor(6.)
    """
    done = finishing(batch)
    named = done if isinstance(done, dict) else dict(enumerate(done)) if isinstance(done, tuple) else {0: done}
    for name, shape in shapes.items():
        found = named.get(name, named.get(0) if len(shapes) == 1 and name not in TARGET_NAMES else None)
        if not isinstance(found, Tensor):
            raise DataError("The task says the shape of a field that is not there.", expected=name, got=describe(done))
        if not fits(found.shape[1:], shape):
            raise DataError(
                "A field does not have the shape that the task says.",
                where=f"field {name}",
                expected=f"{list(shape)} for each example",
                got=str(list(found.shape[1:])),
                hint="change the data where it is made, or the task's shapes",
            )
    return done
