"""A look at the data before the first step: what would spoil a run, or stop it later, with how often it occurs.

While the first batch goes through the model, it is seen which table of embeddings reads which field, and how many
classes there are outputs for. Some batches, from all over the data, are then held to that. What is looked for:

- ids that an embedding has no row for, as a tokenizer with too large a vocabulary makes them
- labels that are no class of the model, and targets that are no numbers
- features that are NaN
- sequences too short to hold a next token
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from trainfn.batch import TARGET_NAMES, Batch, inputs, target
from trainfn.data import Feed
from trainfn.errors import DataError, ModelError
from trainfn.forward import warn_of_unread
from trainfn.loss import Reading, logits_of, reading_of
from trainfn.tree import describe, map_leaves, named_leaves

EXAMPLES = 256
"""How many examples are looked at, in at most eight batches."""


class DataWarning(UserWarning):
    """Some of the data teaches nothing."""


@attrs.define
class _Seen:
    """How often something is wrong in a sample, and the worst of it."""

    wrong: int = 0
    of: int = 0
    worst: Any = None

    def count(self, bad: Tensor, values: Tensor, valid: Tensor | None = None) -> None:
        found = int(bad.sum())
        self.of += int(valid.sum()) if valid is not None else bad.numel()
        if found and self.worst is None:
            spoilt = values[bad]
            self.worst = spoilt.max().item() if bool((spoilt > 0).any()) else spoilt.min().item()
        self.wrong += found

    def rate(self, what: str) -> str:
        return f"{self.wrong:,} of {self.of:,} {what} looked at ({self.wrong / max(self.of, 1):.2g} of them)"


@contextmanager
def guarding(model: nn.Module, loss: Any, batch: Batch, loaders: dict[str, Feed]) -> Iterator[None]:
    """Look at the data while ``batch`` goes through the model, in the body of this context.

    Args:
        model: it is called once in the body.
        loss: the loss; without a mark (:class:`trainfn.loss.Reading`), nothing is known of labels.
        batch: what it is called with.
        loaders: what to look at, by what it is called.

    Raises:
        DataError: (in the body) the data holds what cannot be trained on, with its rate.

    Warns:
        DataWarning: some sequences, but not all, are too short.
        ForwardWarning: a field of the batch is read neither by the model nor by the loss.

    >>> model, batch = nn.Linear(2, 2), (torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    >>> from trainfn.data import Loader
    >>> from trainfn.loss import classification
    >>> with guarding(model, classification(), batch, {"data": Loader(batch, batch_size=3)}):
    ...     outputs = model(batch[0])
    Traceback (most recent call last):
        ...
    trainfn.errors.DataError: Labels are out of range for the model's outputs.
      where: data
      expected: classes 0 to 1, for logits float32[3, 2]
      got: 2; 1 of 3 labels looked at (0.33 of them)
      try: number the classes from 0, or give the model more outputs
    """
    kept = {where: _check_features(where, loader) for where, loader in loaders.items()}
    reading = reading_of(loss)
    if reading is not None:
        warn_of_unread(model, batch)
    hooks = [
        module.register_forward_pre_hook(_table_check(name, batch, kept))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]

    def look(module: nn.Module, args: Any, outputs: Any) -> None:
        for where, batches in kept.items():
            if reading is not None:
                _check_targets(where, batches, outputs, reading)

    hooks.append(model.register_forward_hook(look))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_features(where: str, loader: Feed) -> list[Batch]:
    """Look at the features of a sample; return its batches without them: all that is needed later, and little of it."""
    seen: dict[str, _Seen] = {}
    kept = []
    for batch in loader.sample(EXAMPLES):
        kept.append(_without_features(batch))
        positional, named = inputs(batch)
        for name, leaf in named_leaves({**{f"input {at}": each for at, each in enumerate(positional)}, **named}):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim and leaf.numel():
                bad = leaf.isnan().reshape(len(leaf), -1).any(1)
                seen.setdefault(name, _Seen()).count(bad, bad)
    for name, found in seen.items():
        if found.wrong:
            raise DataError(
                "Features are NaN.",
                where=f"{where}, {name}",
                expected="numbers",
                got=found.rate("examples"),
                hint="fill or drop missing values where the data is made; check_data=False trains on it as it is",
            )
    return kept


def _without_features(batch: Batch) -> Batch:
    def kept(leaf: Any) -> Any:
        return None if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    if isinstance(batch, dict):
        return {name: leaf if name in TARGET_NAMES else map_leaves(kept, leaf) for name, leaf in batch.items()}
    if isinstance(batch, tuple) and len(batch) > 1:
        return (*(map_leaves(kept, leaf) for leaf in batch[:-1]), batch[-1])
    return batch


def _table_check(name: str, batch: Batch, kept: dict[str, list[Batch]]) -> Callable[[nn.Module, Any], None]:
    def look(module: nn.Module, args: Any) -> None:
        rows, ids = int(module.num_embeddings), args[0] if args else None  # type: ignore[arg-type]
        if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
            return
        field = _field_of(batch, ids)
        if field is None:
            if int(ids.max()) >= rows or int(ids.min()) < 0:
                raise DataError(
                    "An embedding is asked for rows that it does not have.",
                    where=f"{name} ({type(module).__name__}), over {describe(ids)}",
                    expected=f"0 to {rows - 1}",
                    got=f"{int(ids.min())} to {int(ids.max())}",
                    hint="if it is of positions, the sequences are too long for the model: make them shorter",
                )
            return
        for where, batches in kept.items():
            seen = _Seen()
            for each in batches:
                found = _leaves(each).get(field)
                if found is not None:
                    seen.count((found < 0) | (found >= rows), found)
            if seen.wrong:
                raise DataError(
                    "Ids are beyond the model's embedding.",
                    where=f"{where}, {field}; {name} has {rows} rows",
                    expected=f"ids 0 to {rows - 1}",
                    got=f"{seen.worst}; {seen.rate('ids')}",
                    hint="give the model an embedding as large as the tokenizer's vocabulary, or use its tokenizer",
                )

    return look


def _leaves(batch: Batch) -> dict[str, Tensor]:
    named = {name or "input": leaf for name, leaf in named_leaves(batch)}
    return {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor)}


def _field_of(batch: Batch, ids: Tensor) -> str | None:
    for name, leaf in _leaves(batch).items():
        if leaf.shape == ids.shape and leaf.dtype == ids.dtype and bool((leaf == ids).all()):
            return name
    return None


def _check_targets(where: str, batches: list[Batch], outputs: Any, reading: Reading) -> None:
    seen, short = _Seen(), _Seen()
    logits = None
    if reading.target != "numbers":
        try:
            logits = logits_of(outputs)
        except ModelError:
            return  # the loss will say so, or knows better
        if logits.ndim < 2 or (reading.shift and logits.ndim != 3):
            return  # likewise
    for batch in batches:
        labels = _labels(batch, reading)
        if labels is None:
            continue
        if reading.shift and labels.ndim == 2:
            lengths = _lengths(batch, labels)
            short.count(lengths < 2, lengths)
        if reading.target == "numbers":
            seen.count(labels.isnan(), labels) if labels.is_floating_point() else None
        elif labels.is_floating_point() and reading.target == "classes":
            return  # check_labels says so
        else:
            valid = labels != reading.ignore_index if labels.dtype != torch.bool else torch.ones_like(labels)
            seen.count(valid & _outside(labels, logits, reading), labels, valid)
    if seen.wrong:
        raise _bad_targets(where, seen, logits, reading)
    if short.wrong:
        text = f"{short.rate('sequences')} have fewer than 2 tokens, which hold no next one to learn."
        if short.wrong == short.of:
            hint = "join short texts (trainfn.data.Packed), or make longer windows"
            raise DataError("The sequences are too short for the task.", where=where, got=text, hint=hint)
        warnings.warn(f"{where}: {text}", DataWarning, stacklevel=2)


def _outside(labels: Tensor, logits: Tensor | None, reading: Reading) -> Tensor:
    if reading.target == "labels":
        return ~((labels >= 0) & (labels <= 1)) if labels.dtype != torch.bool else torch.zeros_like(labels)
    assert logits is not None
    classes = logits.shape[1] if logits.ndim == 4 else logits.shape[-1]
    return (labels < 0) | (labels >= classes)


def _bad_targets(where: str, seen: _Seen, logits: Tensor | None, reading: Reading) -> DataError:
    if reading.target == "numbers":
        return DataError(
            "Targets are NaN.", where=where, got=seen.rate("targets"), hint="drop examples without a target"
        )
    got = f"{seen.worst}; {seen.rate('labels')}"
    if reading.target == "labels":
        expected = f"0 and 1, or numbers between, and {reading.ignore_index} for what is not known"
        return DataError("Labels are out of range.", where=where, expected=expected, got=got)
    assert logits is not None
    classes = logits.shape[1] if logits.ndim == 4 else logits.shape[-1]
    return DataError(
        "Labels are out of range for the model's outputs.",
        where=where,
        expected=f"classes 0 to {classes - 1}, for logits {describe(logits)}",
        got=got,
        hint="number the classes from 0, or give the model more outputs",
    )


def _labels(batch: Batch, reading: Reading) -> Tensor | None:
    fields = batch if isinstance(batch, dict) else {}
    named = [name for name in TARGET_NAMES if name in fields]
    pair = isinstance(batch, tuple) and len(batch) > 1
    if len(named) == 1 or pair:
        found = target(batch)
    elif reading.shift and not named:  # the tokens are the labels
        only = [value for name, value in inputs(batch)[1].items() if name != "attention_mask"]
        single = only[0] if len(only) == 1 else fields.get("input_ids")
        found = cast(Any, single if fields else batch[0] if isinstance(batch, tuple) else batch)
    else:
        return None
    return found if isinstance(found, Tensor) and not found.is_complex() else None


def _lengths(batch: Batch, labels: Tensor) -> Tensor:
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        return (mask != 0).sum(1)
    return torch.full((len(labels),), labels.shape[1])
