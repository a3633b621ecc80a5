"""``TaskSpec``: what kind of problem it is, as one frozen value; it chooses loss, collator, metrics and shapes.

| kind | modality | loss | metrics | collator |
|---|---|---|---|---|
| ``language_modeling`` | text | language_modeling | accuracy, perplexity | text |
| ``masked_language_modeling`` | text | masked_language_modeling | accuracy | mlm; text without a ``mask`` token |
| ``seq2seq`` | text | seq2seq | accuracy | text |
| ``text_classification`` | text | classification | accuracy | text |
| ``vision_classification`` | image | vision_classification | accuracy | image |
| ``segmentation`` | image | segmentation | accuracy | image |
| ``multi_label`` | table | multi_label | multi_label_f1 | that of the modality |
| ``regression`` | table | mse | root_mean_squared_error | that of the modality |
| ``tabular`` | table | classification | accuracy | table |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from trainfn.batch import TARGET_NAMES
from trainfn.data.collate import Collator
from trainfn.data.collators import collator, collator_names
from trainfn.errors import ConfigError, suggest
from trainfn.loss import Loss, make
from trainfn.task.fields import finish, select

VERSION = 1
"""The version of the form that :meth:`TaskSpec.to_json` writes."""


class _Kind(NamedTuple):
    modality: str
    loss: str
    metrics: tuple[str, ...]
    label: tuple[int, ...] | None  # shape of one label; None: that of the first input, as for tokens and pixels


_KINDS = {
    "language_modeling": _Kind("text", "language_modeling", ("accuracy", "perplexity"), None),
    "masked_language_modeling": _Kind("text", "masked_language_modeling", ("accuracy",), None),
    "seq2seq": _Kind("text", "seq2seq", ("accuracy",), None),
    "text_classification": _Kind("text", "classification", ("accuracy",), ()),
    "vision_classification": _Kind("image", "vision_classification", ("accuracy",), ()),
    "segmentation": _Kind("image", "segmentation", ("accuracy",), None),
    "multi_label": _Kind("table", "multi_label", ("multi_label_f1",), (2,)),
    "regression": _Kind("table", "mse", ("root_mean_squared_error",), ()),
    "tabular": _Kind("table", "classification", ("accuracy",), ()),
}
_SHAPES: dict[str, tuple[int | None, ...]] = {"text": (16,), "image": (3, 32, 32), "table": (8,)}
_FIELDS = {"text": "input_ids", "image": "pixel_values", "table": "features"}
_OTHER_NAMES = {
    "causal_lm": "language_modeling",
    "mlm": "masked_language_modeling",
    "masked_lm": "masked_language_modeling",
}


def _names(value: Any) -> Any:
    if isinstance(value, str):
        return {value: value}
    return dict(value) if isinstance(value, Mapping) else {name: name for name in value}


def _metric_names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value if value is None else tuple(value)


def _shape_table(value: Mapping[str, Sequence[int | None]]) -> Any:
    return {name: tuple(shape) for name, shape in value.items()} if isinstance(value, Mapping) else value


@attrs.frozen(kw_only=True)
class TaskSpec:
    """A task: ``fit(model, data, task=TaskSpec(kind="regression", target="price"))``.

    What is None is chosen by ``kind``, see the table of this module.

    Attributes:
        kind: what is predicted.
        name: what the task is called in the run header and in checkpoints; the kind if empty.
        modality: ``"text"``, ``"image"`` or ``"table"``: which collator is used.
        inputs: fields of an item that the model is given, and under which names, ``{"review": "input_ids"}``; a list of
            names keeps them. If empty, all but the target. Tuples are given the names in order.
        target: field that is to be predicted; if None, the one called ``labels``, ``label``, ``targets``, ``target`` or
            ``y``, or the last one of a tuple.
        loss: name of the loss.
        loss_options: keywords of the function in :mod:`trainfn.loss` that makes it.
        metrics: what is measured on the evaluation data.
        ignore_index: label that does not count: for the loss, for metrics by name, and what padding is labelled with.
        collate: name of the collator.
        collate_options: its keywords; see :func:`trainfn.data.collator`.
        special_tokens: ids of tokens by role: ``pad`` fills up, ``mask`` masks, and no other one is masked.
        shapes: shape of one example's field, ``{"pixel_values": (3, None, None)}``; None is any size. Every batch is
            held to it.

    Raises:
        ConfigError: fields that are unknown, or contradict each other; all of them together.

    >>> TaskSpec(kind="vision_classification").metrics_in_use
    ('accuracy',)
    """

    kind: str
    name: str = ""
    modality: str | None = None
    inputs: dict[str, str] = attrs.field(factory=dict, converter=_names)
    target: str | None = None
    loss: str | None = None
    loss_options: dict[str, Any] = attrs.field(factory=dict)
    metrics: tuple[str, ...] | None = attrs.field(default=None, converter=_metric_names)
    ignore_index: int = -100
    collate: str | None = None
    collate_options: dict[str, Any] = attrs.field(factory=dict)
    special_tokens: dict[str, int] = attrs.field(factory=dict)
    shapes: dict[str, tuple[int | None, ...]] = attrs.field(factory=dict, converter=_shape_table)

    def __attrs_post_init__(self) -> None:
        wrong = []
        if self.kind not in _KINDS:
            wrong.append(f"kind={self.kind!r} ({suggest(str(self.kind), _KINDS)})")
        if self.modality not in (None, *_SHAPES):
            wrong.append(f"modality={self.modality!r} ({suggest(str(self.modality), _SHAPES)})")
        if self.collate is not None and self.collate not in collator_names():
            wrong.append(f"collate={self.collate!r} ({suggest(str(self.collate), collator_names())})")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            wrong.append(f"ignore_index={self.ignore_index!r} (expected an int)")
        if self.target is not None and self.target in self.inputs:
            wrong.append(f"target={self.target!r} is one of the inputs")
        if len(set(self.inputs.values())) < len(self.inputs):
            wrong.append(f"inputs={self.inputs!r} gives two fields one name")
        tokens = self.special_tokens.items()
        bad = [name for name, number in tokens if isinstance(number, bool) or not isinstance(number, int) or number < 0]
        if bad:
            wrong.append(f"special_tokens: {', '.join(bad)} (expected ids, ints >= 0)")
        sides = [side for shape in self.shapes.values() for side in shape if side is not None]
        if any(isinstance(side, bool) or not isinstance(side, int) or side < 0 for side in sides):
            wrong.append(f"shapes={self.shapes!r} (expected ints >= 0, or None for any size)")
        if wrong:
            raise ConfigError("The task cannot be used.", got="\n    ".join(["", *wrong]))

    @property
    def title(self) -> str:
        """What the task is called: its name, or its kind."""
        return self.name or self.kind

    @property
    def modality_in_use(self) -> str:
        """The modality: the one given, or the kind's."""
        return self.modality or _KINDS[self.kind].modality

    @property
    def loss_in_use(self) -> str:
        """The name of the loss: the one given, or the kind's."""
        return self.loss or _KINDS[self.kind].loss

    @property
    def metrics_in_use(self) -> tuple[str, ...]:
        """The metrics: those given, or the kind's."""
        return _KINDS[self.kind].metrics if self.metrics is None else self.metrics

    @property
    def collator_in_use(self) -> str:
        """The name of the collator: the one given, or what kind and modality ask for."""
        if self.collate is not None:
            return self.collate
        masks = self.kind == "masked_language_modeling" and "mask" in self.special_tokens
        return "mlm" if masks else self.modality_in_use

    def make_loss(self) -> Loss:
        """Return the loss, made with its options.

        Raises:
            ConfigError: there is none of this name, or it has no such option.

        >>> TaskSpec(kind="regression", loss="huber", loss_options={"delta": 2.0}).make_loss().__name__
        'loss'
        """
        options = dict(self.loss_options)
        if self.ignore_index != -100:
            options.setdefault("ignore_index", self.ignore_index)
        return make(self.loss_in_use, **options)

    def make_collator(self, *, predicting: bool = False) -> Collator:
        """Return the collator: fields by name, then stacked, then held to the shapes.

        Args:
            predicting: items may lack the target.

        Raises:
            ConfigError: an option that is unknown, or missing.

        >>> spec = TaskSpec(kind="text_classification", inputs={"review": "input_ids"}, target="stars")
        >>> spec.make_collator()([{"review": [1, 2], "stars": 4, "author": "me"}])
        {'input_ids': tensor([[1, 2]]), 'labels': tensor([4]), 'attention_mask': tensor([[1, 1]])}
        """
        name = self.collator_in_use
        options = dict(self.collate_options)
        if name in ("text", "mlm"):
            options.setdefault("ignore_index", self.ignore_index)
            options |= {"pad_id": self.special_tokens["pad"]} if "pad" in self.special_tokens else {}
        if name == "mlm":
            options |= {"mask_id": self.special_tokens["mask"]} if "mask" in self.special_tokens else {}
            options.setdefault("special_ids", sorted(self.special_tokens.values()))
        base = collator(name, **options)
        chosen = base.select
        if self.inputs or self.target:
            chosen = partial(select, inputs=self.inputs, target=self.target, optional=predicting)
        finished = partial(finish, finishing=base.finish, shapes=self.shapes) if self.shapes else base.finish
        return attrs.evolve(base, select=chosen, finish=finished)

    def example(self, examples: int = 2) -> dict[str, Tensor]:
        """Return a batch of the task's form, all zeros: to try a model on, or to export it with.

        Args:
            examples: how many examples it holds.

        >>> TaskSpec(kind="vision_classification", shapes={"image": (1, 8, 8)}).example()["image"].shape
        torch.Size([2, 1, 8, 8])
        """
        modality, kind = self.modality_in_use, _KINDS[self.kind]
        shapes = {name: shape for name, shape in self.shapes.items() if name not in TARGET_NAMES}
        shapes = shapes or dict.fromkeys(self.inputs.values() or [_FIELDS[modality]], _SHAPES[modality])
        sizes = {name: tuple(8 if side is None else side for side in shape) for name, shape in shapes.items()}
        dtype = torch.int64 if modality == "text" else torch.float32
        batch = {name: torch.zeros(examples, *size, dtype=dtype) for name, size in sizes.items()}
        label = next((self.shapes[name] for name in TARGET_NAMES if name in self.shapes), kind.label)
        if label is None:
            first = next(iter(sizes.values()))
            label = first[1:] if self.kind == "segmentation" else first
        numbers = torch.float32 if self.kind in ("regression", "multi_label") else torch.int64
        batch["labels"] = torch.zeros(examples, *(8 if side is None else side for side in label), dtype=numbers)
        return batch

    def evolve(self, **changes: Any) -> TaskSpec:
        """Return the task with some fields changed.

        >>> TaskSpec(kind="regression").evolve(loss="l1").loss_in_use
        'l1'
        """
        return make_task(attrs.asdict(self) | changes)

    def to_json(self) -> dict[str, Any]:
        """Return the task as a JSON object, with the version of its form.

        >>> TaskSpec.from_json(TaskSpec(kind="regression").to_json()) == TaskSpec(kind="regression")
        True
        """
        written: dict[str, Any] = json.loads(json.dumps({"version": VERSION} | attrs.asdict(self)))
        return written

    @staticmethod
    def from_json(written: Mapping[str, Any]) -> TaskSpec:
        """Return the task that :meth:`to_json` wrote.

        Raises:
            ConfigError: it is of another version, or has unknown fields.

        >>> TaskSpec.from_json({"version": 0, "kind": "regression"})
        Traceback (most recent call last):
            ...
        trainfn.errors.ConfigError: This task was written in another form.
          expected: version 1
          got: version 0
        """
        if written.get("version") != VERSION:
            raise ConfigError(
                "This task was written in another form.",
                expected=f"version {VERSION}",
                got=f"version {written.get('version')}",
            )
        return make_task({name: value for name, value in written.items() if name != "version"})


def make_task(task: str | TaskSpec | Mapping[str, Any]) -> TaskSpec:
    """Return the task that a kind's name, or fields by name, stand for; a task is returned as it is.

    Raises:
        ConfigError: there is no such kind or field; the nearest one is given.

    >>> make_task("vision_clasification")
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: There is no task of this kind.
      got: 'vision_clasification'
      try: did you mean 'vision_classification'?
    """
    if isinstance(task, TaskSpec):
        return task
    if isinstance(task, str):
        if task not in _KINDS:
            hint = f"here it is called {_OTHER_NAMES[task]!r}" if task in _OTHER_NAMES else suggest(task, _KINDS)
            raise ConfigError("There is no task of this kind.", got=repr(task), hint=hint)
        return TaskSpec(kind=task)
    if not isinstance(task, Mapping):
        raise ConfigError("The task is neither a kind nor a TaskSpec.", expected=", ".join(_KINDS), got=repr(task))
    known = [field.name for field in attrs.fields(TaskSpec)]
    unknown = [f"{name} ({suggest(name, known)})" for name in task if name not in known]
    if unknown:
        raise ConfigError("A task has no such field.", got="; ".join(unknown))
    return TaskSpec(**dict(task))


def kinds() -> list[str]:
    """Return the kinds of task, each of which is a preset: ``fit(model, data, task="regression")``.

    >>> "segmentation" in kinds()
    True
    """
    return list(_KINDS)
