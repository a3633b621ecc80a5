"""The first micro-batch, tried: what does not fit is found before any work is done."""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn.attention import watched
from trainfn.batch import Batch, micro_batches
from trainfn.data import Feed
from trainfn.errors import DataError, ModelError, TrainfnError
from trainfn.faults import is_out_of_memory, memory_error
from trainfn.loss import LossSum
from trainfn.precision import check_buffers
from trainfn.state import TrainState
from trainfn.step import Step, surroundings
from trainfn.task.guard import guarding
from trainfn.tree import batch_length, describe, leaves, named_leaves


def first_loss(step: Step, state: TrainState, batch: Batch, loaders: dict[str, Feed]) -> tuple[LossSum, dict[str, int]]:
    """Run a batch's first micro-batch through model and loss, and look at the data while it goes through.

    Args:
        step: its model, loss and precision are used.
        state: read, not changed.
        batch: on the state's device.
        loaders: the data to look at, by what it is called; see :mod:`trainfn.task.guard`.

    Returns:
        The loss, and how often which kernel of attention was called; see :mod:`trainfn.attention`.

    Raises:
        ConfigError: the kernel of attention that was asked for cannot run.
        DataError, ModelError: data, model and loss do not go together.
        StepMemoryError: it does not fit into memory.

    >>> import trainfn
    >>> model, optimizer = torch.nn.Linear(2, 2), trainfn.optim.sgd(lr=0.1)
    >>> step = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    >>> batch = torch.ones(3, 2), torch.tensor([0, 1, 1])
    >>> float(first_loss(step, trainfn.init(model, optimizer), batch, {})[0].weight)
    3.0
    """
    batch_length(batch)
    part = micro_batches(batch, step.accumulate)[0]
    buffers: dict[str, Tensor] = {}
    where = f"{type(step.model).__name__}, a micro-batch of {describe(part)}"

    def forward() -> LossSum:
        buffers.update({name: buffer.clone() for name, buffer in state.buffers.items()})
        return step.loss(state.params, buffers, part)

    try:
        with (
            surroundings(step.model, state, training=True),
            torch.no_grad(),
            guarding(step.model, step.strategy, part, loaders),
        ):
            found = watched(forward, step.attention, where)
    except (TrainfnError, Warning):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise memory_error(error, "the plan", part, batch_length(part), step.accumulate) from error
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        kind = DataError if isinstance(error, IndexError) or _objects(part) else ModelError
        raise kind(
            "The first batch does not go through the model and the loss.",
            where=where,
            got=f"{type(error).__name__}: {text}",
            hint=_remedy(text, part),
        ) from error
    check_buffers(step.model, state.buffers, buffers, step.precision)
    return found


def _objects(part: Batch) -> dict[str, str]:
    """Return the fields that hold something else than tensors, and what."""
    return {name: type(leaf).__name__ for name, leaf in named_leaves(part) if not isinstance(leaf, Tensor)}


def _remedy(text: str, part: Batch) -> str:
    if objects := _objects(part):
        name, kind = next(iter(objects.items()))
        words = "tokenize texts (trainfn.data.Tokenized)" if kind == "str" else "make tensors of them"
        return f"{name} holds {kind} objects, which no layer takes: {words} in the data set or in collate="
    if "dtype" not in text and "scalar type" not in text:
        return "compare the shapes, and the ids and labels with the model's sizes; the cause is shown above"
    if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in leaves(part)):
        return 'the data is float64, as NumPy makes it, and the model is not: x.astype("float32"), x.float()'
    return (
        "make tensors of the model's own in the dtype of what they meet (dtype=x.dtype), or use precision="
        '"32-true"; the cause is shown above'
    )
