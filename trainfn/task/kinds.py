"""The kinds of task, and what each chooses.

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

from typing import Any, NamedTuple

from trainfn.errors import suggest


class Kind(NamedTuple):
    """What a kind of task chooses where a task says nothing."""

    modality: str
    loss: str
    metrics: tuple[str, ...]
    label: tuple[int, ...] | None  # shape of one label; None: that of the first input, as for tokens and pixels


KINDS = {
    "language_modeling": Kind("text", "language_modeling", ("accuracy", "perplexity"), None),
    "masked_language_modeling": Kind("text", "masked_language_modeling", ("accuracy",), None),
    "seq2seq": Kind("text", "seq2seq", ("accuracy",), None),
    "text_classification": Kind("text", "classification", ("accuracy",), ()),
    "vision_classification": Kind("image", "vision_classification", ("accuracy",), ()),
    "segmentation": Kind("image", "segmentation", ("accuracy",), None),
    "multi_label": Kind("table", "multi_label", ("multi_label_f1",), (2,)),
    "regression": Kind("table", "mse", ("root_mean_squared_error",), ()),
    "tabular": Kind("table", "classification", ("accuracy",), ()),
}
SHAPES: dict[str, tuple[int | None, ...]] = {"text": (16,), "image": (3, 32, 32), "table": (8,)}
FIELDS = {"text": "input_ids", "image": "pixel_values", "table": "features"}
OTHER_NAMES = {
    "causal_lm": "language_modeling",
    "image_classification": "vision_classification",
    "masked_lm": "masked_language_modeling",
    "mlm": "masked_language_modeling",
    "seq2seq_lm": "seq2seq",
    "sequence_classification": "text_classification",
}


def kinds() -> list[str]:
    """Return the kinds of task, each of which is a preset: ``fit(model, data, task="regression")``.

    >>> "segmentation" in kinds()
    True
    """
    return list(KINDS)


def kind_answer(name: str) -> str:
    """Return what is said about the name of a kind that there is not.

    >>> kind_answer("mlm"), kind_answer("regresion")
    ("here it is called 'masked_language_modeling'", "did you mean 'regression'?")
    """
    return f"here it is called {OTHER_NAMES[name]!r}" if name in OTHER_NAMES else suggest(name, KINDS)


def kinds_renamed(fields: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a task with the kind under its present name, and what was done.

    >>> kinds_renamed({"kind": "mlm"})
    ({'kind': 'masked_language_modeling'}, ['kind mlm -> masked_language_modeling'])
    """
    old = fields.get("kind")
    if not isinstance(old, str) or old not in OTHER_NAMES:
        return fields, []
    return fields | {"kind": OTHER_NAMES[old]}, [f"kind {old} -> {OTHER_NAMES[old]}"]
