"""Anything at all as data: what comes out is one of the house's errors, or a run."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trainfn
from trainfn.errors import TrainfnError

shapes = st.lists(st.integers(0, 3), max_size=3)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 2**40)
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.complex_numbers()
    | st.builds(object)
    | shapes.map(torch.zeros)
    | shapes.map(lambda shape: torch.ones(shape, dtype=torch.int64))
    | shapes.map(lambda shape: torch.ones(shape, dtype=torch.complex64))
    | shapes.map(np.ones)
    | shapes.map(lambda shape: np.full(shape, "a"))
    | shapes.map(lambda shape: np.full(shape, None))
)
names = st.sampled_from(["x", "y", "label", "labels", "input", "input_ids", "attention_mask"]) | st.integers(0, 2)
junk = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(names, inner, max_size=3)
        | inner.map(lambda value: lambda index: value)
        | st.lists(inner, max_size=3).map(iter)
    ),
    max_leaves=6,
)


def outcome(data: Any, **given: Any) -> str:
    """The name of the house's error, or of the run; anything else goes through."""
    options = {"max_steps": 1, "batch_size": 2, "device": "cpu", "progress": False, "on_spike": "off"} | given
    if callable(data):
        del options["batch_size"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainfn.fit(nn.Linear(2, 2), data, **options)
        except TrainfnError as error:
            return type(error).__name__
    return "trained"


@settings(max_examples=150, deadline=None)
@given(junk, st.sampled_from(["classification", "mse", "language_modeling"]))
def test_junk_is_answered(data: Any, loss: str) -> None:
    outcome(data, loss=loss)


@settings(max_examples=150, deadline=None)
@given(junk, st.sampled_from(["text_classification", "vision_classification", "tabular"]))
def test_junk_is_answered_with_a_task(data: Any, task: str) -> None:
    outcome(data, task=task)


def test_control_not_everything_is_an_error() -> None:
    assert outcome((torch.ones(4, 2), torch.zeros(4, dtype=torch.long)), loss="classification") == "trained"
    assert outcome([([1.0, 2.0], 1)] * 3, task="tabular") == "trained"
    assert outcome([object()], loss="mse") == "DataError"
