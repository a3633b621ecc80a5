"""``TaskSpec``: what kind of problem it is, as one frozen value; it chooses loss, collator, metrics and shapes.

What each kind chooses is in the table of :mod:`trainfn.task.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from trainfn.batch import TARGET_NAMES
from trainfn.data.collate import Collator
from trainfn.data.collators import collator, collator_names
from trainfn.errors import ConfigError, listed, suggest
from trainfn.loss import Loss, make
from trainfn.task.fields import finish, select, unlearned
from trainfn.task.kinds import FIELDS, KINDS, SHAPES, kind_answer, kinds_renamed
from trainfn.task.settings import short
from trainfn.task.written import Form, Migration, Written


def _names(value: Any) -> Any:
    if isinstance(value, str):
        return {value: value}
    return {name: name for name in value} if isinstance(value, (list, tuple)) and _are_words(value) else value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _shape_table(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: tuple(shape) if isinstance(shape, list) else shape for name, shape in value.items()}


def _are_words(value: Any) -> bool:
    return all(isinstance(each, str) for each in value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and _are_words(value) and all(map(fits, value.values()))


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(side is None or _is_id(side) for side in value)


def _word(value: Any) -> bool:
    return isinstance(value, str)


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_word, "a text"),
    "inputs": (lambda value: _is_table(value, _word), "names, or a dict of names"),
    "target": (lambda value: value is None or _word(value), "a name"),
    "loss": (lambda value: value is None or _word(value), "a name"),
    "loss_options": (lambda value: _is_table(value, lambda _: True), "a dict of options by name"),
    "metrics": (lambda value: value is None or (isinstance(value, tuple) and _are_words(value)), "a list of names"),
    "ignore_index": (lambda value: isinstance(value, int) and not isinstance(value, bool), "an int"),
    "ignore": (lambda value: isinstance(value, tuple) and _are_words(value), "roles of special tokens"),
    "collate_options": (lambda value: _is_table(value, lambda _: True), "a dict of options by name"),
    "special_tokens": (lambda value: _is_table(value, _is_id), "a dict of ids, ints >= 0"),
    "shapes": (lambda value: _is_table(value, _is_shape), "a dict of shapes: ints >= 0, or None for any size"),
}


@attrs.frozen(kw_only=True)
class TaskSpec(Written):
    """A task: ``fit(model, data, task=TaskSpec(kind="regression", target="price"))``.

    What is None is chosen by ``kind``, see :mod:`trainfn.task.kinds`.

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
        ignore: roles of ``special_tokens`` that are not learned, such as ``("pad",)`` for text that comes padded and
            without a mask: where they are a label, it does not count.
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
    metrics: tuple[str, ...] | None = attrs.field(default=None, converter=_several)
    ignore_index: int = -100
    ignore: tuple[str, ...] = attrs.field(default=(), converter=_several)
    collate: str | None = None
    collate_options: dict[str, Any] = attrs.field(factory=dict)
    special_tokens: dict[str, int] = attrs.field(factory=dict)
    shapes: dict[str, tuple[int | None, ...]] = attrs.field(factory=dict, converter=_shape_table)

    form: ClassVar[Form] = Form(
        what="The task",
        version=1,
        migrations={0: Migration(name="kinds by other names", change=kinds_renamed)},
        answer=suggest,
    )

    @classmethod
    def mistakes(cls, fields: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the fields that there are, each for itself and together; a line each."""
        of = {field.name: field.converter(fields[field.name]) if field.converter else fields[field.name]
              for field in attrs.fields(cls) if field.name in fields}  # fmt: skip
        wrong = [
            f"{name}={short(of[name])} (expected {expected})"
            for name, (fits, expected) in _TYPES.items()
            if name in of and not fits(of[name])
        ]
        words: dict[str, Any] = {"modality": SHAPES, "collate": collator_names()}
        for name, known in words.items():
            if of.get(name) is not None and not (_word(of[name]) and of[name] in known):
                wrong.append(f"{name}={short(of[name])} ({suggest(str(of[name]), known)})")
        if "kind" in of and not (_word(of["kind"]) and of["kind"] in KINDS):
            wrong.insert(0, f"kind={short(of['kind'])} ({kind_answer(str(of['kind']))})")
        return wrong or _contradictions(of)

    @property
    def title(self) -> str:
        """What the task is called: its name, or its kind."""
        return self.name or self.kind

    @property
    def modality_in_use(self) -> str:
        """The modality: the one given, or the kind's."""
        return self.modality or KINDS[self.kind].modality

    @property
    def loss_in_use(self) -> str:
        """The name of the loss: the one given, or the kind's."""
        return self.loss or KINDS[self.kind].loss

    @property
    def metrics_in_use(self) -> tuple[str, ...]:
        """The metrics: those given, or the kind's."""
        return KINDS[self.kind].metrics if self.metrics is None else self.metrics

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
        chosen, done = base.select, base.finish
        if self.inputs or self.target:
            chosen = partial(select, inputs=self.inputs, target=self.target, optional=predicting)
        if self.ignore and not predicting:
            ids = tuple(self.special_tokens[role] for role in self.ignore)
            done = partial(unlearned, finishing=done, ids=ids, ignore_index=self.ignore_index)
        if self.shapes:
            done = partial(finish, finishing=done, shapes=self.shapes)
        return attrs.evolve(base, select=chosen, finish=done)

    def example(self, examples: int = 2) -> dict[str, Tensor]:
        """Return a batch of the task's form, all zeros: to try a model on, or to export it with.

        Args:
            examples: how many examples it holds.

        >>> TaskSpec(kind="vision_classification", shapes={"image": (1, 8, 8)}).example()["image"].shape
        torch.Size([2, 1, 8, 8])
        """
        modality, kind = self.modality_in_use, KINDS[self.kind]
        shapes = {name: shape for name, shape in self.shapes.items() if name not in TARGET_NAMES}
        shapes = shapes or dict.fromkeys(self.inputs.values() or [FIELDS[modality]], SHAPES[modality])
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
        if task not in KINDS:
            raise ConfigError("There is no task of this kind.", got=repr(task), hint=kind_answer(task))
        return TaskSpec(kind=task)
    if not isinstance(task, Mapping):
        raise ConfigError("The task is neither a kind nor a TaskSpec.", expected=", ".join(KINDS), got=repr(task))
    return TaskSpec.of(task)


def _contradictions(of: Mapping[str, Any]) -> list[str]:
    """Return in what fields of the right types contradict each other; a line each."""
    wrong, inputs, tokens = [], of.get("inputs", {}), of.get("special_tokens", {})
    if of.get("target") is not None and of["target"] in inputs:
        wrong.append(f"target={of['target']!r} is one of the inputs")
    if len(set(inputs.values())) < len(inputs):
        wrong.append(f"inputs={inputs!r} gives two fields one name")
    absent = [role for role in of.get("ignore", ()) if role not in tokens]
    if absent:
        wrong.append(f"ignore={listed(absent)} (no such special token; {suggest(absent[0], tokens)})")
    return wrong
