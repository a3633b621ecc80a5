"""``predict``: what a trained model says of data, whose targets are not needed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainfn.attention import attending
from trainfn.batch import Batch
from trainfn.data import Collator, Feed, Loader, Stream, is_stream, make_feed, to_device
from trainfn.data.collate import unchanged
from trainfn.data.collators import Collate, choose_collator
from trainfn.data.forms import as_tensor, is_frame, read_data_loader
from trainfn.engine import CompiledStep
from trainfn.errors import ConfigError, DataError, ModelError, TrainfnError
from trainfn.forward import make_arguments
from trainfn.grad import make_forward
from trainfn.state import Params, TrainState
from trainfn.step import Step, surroundings
from trainfn.tree import batch_length, describe, map_outputs


@attrs.frozen(kw_only=True, eq=False)
class Reader:
    """How a run has read its data, so that data to predict of is read likewise.

    Attributes:
        collate: makes a batch of items; None stacks them.
        columns: which columns of a frame are features; all of them if None.
        batch_size: examples at a time.
    """

    collate: Collate | None = None
    columns: tuple[str, ...] | None = None
    batch_size: int = 32

    def loader(self, data: object) -> Feed:
        """Return the batches of some data, in its own order."""
        if isinstance(data, (Loader, Stream)):
            return data
        collate = self.collate
        if isinstance(data, DataLoader) and not is_stream(data):
            read = read_data_loader(data)
            data, collate = read.dataset, read.collate or collate
        if is_frame(data):
            frame: Any = data
            wanted = list(self.columns or map(str, frame.columns))
            missing = [name for name in wanted if name not in frame.columns]
            if missing:
                got = ", ".join(map(str, frame.columns))
                raise DataError("The frame lacks columns.", expected=", ".join(missing), got=got)
            data = {"features": torch.stack([as_tensor(frame[name], name).float() for name in wanted], 1)}
        if isinstance(collate, Collator) and collate.draws:  # masks, for one: they are for learning
            collate = attrs.evolve(collate, finish=unchanged, draws=False)
        return make_feed(data, batch_size=self.batch_size, shuffle=False, collate=collate)


def predict(
    step: Step | CompiledStep,
    state: TrainState,
    data: object,
    *,
    batch_size: int = 32,
    collate: str | Callable[[list[Any]], Batch] | None = None,
    ema: bool | None = None,
) -> Any:
    """Return the model's outputs for data, in the order of its examples.

    In evaluation mode and without gradients, in the step's precision and on the state's device; the module's modes and
    the global random generators are as before.

    The outputs have the form that the model gives them: a tensor, a tuple, a dict, an object. Tensors with one entry
    for each example of a batch are concatenated along their first dimension. Anything else (a number over the whole
    batch) is as the model gave it where there was one batch, and otherwise a list with one entry for each batch.

    Args:
        step: what the state is trained with; its model and precision are used.
        state: read, not changed.
        data: a batch, or anything that ``fit`` takes, without a target or with one, which is not read. Of a tuple the
            last one is the target, unless the forward needs it as an input.
        batch_size: examples at a time. Changes memory, not meaning.
        collate: as for ``fit``. One that draws (masks) only stacks here.
        ema: use the moving average of the parameters; if None, whenever the state has one.

    Raises:
        ConfigError: ``ema=True`` of a state that has none; something else in place of a step or a state.
        DataError: the data cannot be read, or the outputs of its batches differ in shape, as those of texts do that are
            padded to different lengths.
        ModelError: the data does not go through the model.

    >>> import trainfn
    >>> model, optimizer = torch.nn.Linear(2, 3), trainfn.optim.sgd(lr=0.1)
    >>> step = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    >>> predict(step, trainfn.init(model, optimizer), torch.ones(5, 2), batch_size=2).shape
    torch.Size([5, 3])
    """
    reader = Reader(collate=choose_collator(collate), batch_size=batch_size)
    return predict_read(step, state, reader.loader(data), ema=ema)


def predict_read(
    step: Step | CompiledStep, state: TrainState, loader: Feed, *, limit: int | None = None, ema: bool | None = None
) -> Any:
    """Return the model's outputs for the batches of a loader, the first ``limit`` of them if they have no end.

    Raises: as for :func:`predict`.
    """
    if loader.endless and limit is None:
        raise DataError(
            "A function of batches has no end, so there is no predicting of all of them.",
            hint="call it, and pass a batch: result.predict(batch(0))",
        )
    parts, lengths = [], []
    with predicting(step, state, ema=ema) as outputs_of:
        for batch in itertools.islice(loader.one_pass(), limit):
            lengths.append(batch_length(batch))
            parts.append(outputs_of(to_device(batch, state.step.device)))
    return _joined(parts, lengths)


def step_of(step: Step | CompiledStep, state: TrainState) -> Step:
    """Return a step as it was before it was compiled.

    Raises:
        ConfigError: it is none, or the state is none.
    """
    plain = step.step if isinstance(step, CompiledStep) else step
    if not (isinstance(plain, Step) and isinstance(state, TrainState)):
        raise ConfigError(
            "A step and a state are asked, in this order.",
            expected="what trainfn.make_step made, and a state that it trains",
            got=f"{type(step).__name__}, {type(state).__name__}",
            hint="after fit: result.predict(data), result.generate(prompt)",
        )
    return plain


@contextmanager
def predicting(
    step: Step | CompiledStep, state: TrainState, *, ema: bool | None = None
) -> Iterator[Callable[[Batch], Any]]:
    """Yield ``batch -> outputs``: a state's model, set to evaluate, without gradients and without targets.

    Raises:
        ConfigError: ``ema=True`` of a state that has none.
        ModelError: (from the function) the batch does not go through the model.
    """
    plain = step_of(step, state)
    forward, params = make_forward(plain.model, plain.precision), chosen_params(state, ema)
    arguments = make_arguments(plain.model)

    def read(batch: Batch) -> Batch:
        if isinstance(batch, (tuple, list)):
            for whole in (batch, (*batch, None)):  # with a target, or with inputs alone
                with contextlib.suppress(ModelError):
                    arguments(whole)
                    return whole
        return batch

    def outputs_of(batch: Batch) -> Any:
        buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
        try:
            return forward(params, buffers, read(batch))
        except (TrainfnError, Warning):
            raise
        except Exception as error:
            raise ModelError(
                "The data does not go through the model.",
                where=f"{type(plain.model).__name__}, a batch of {describe(batch)}",
                got=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
                hint="its fields, shapes and dtypes have to be those that the model was trained on",
            ) from error

    with attending(plain.attention), surroundings(plain.model, state, training=False):
        yield outputs_of


def chosen_params(state: TrainState, ema: bool | None) -> Params:
    """Return the parameters to predict with: their moving average if there is one, or ``ema`` says so.

    Raises:
        ConfigError: ``ema=True`` of a state that has none.
    """
    if ema and state.ema is None:
        raise ConfigError("The run kept no moving average.", got="ema=True", hint="train with ema=0.999")
    averaged = (state.ema or {}) if ema is None or ema else {}
    return state.params | {name: value.to(state.params[name].dtype) for name, value in averaged.items()}


def _joined(parts: Sequence[Any], lengths: Sequence[int]) -> Any:
    def join(*leaves: Any) -> Any:
        is_row = [
            isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == length
            for leaf, length in zip(leaves, lengths, strict=True)
        ]
        if len(leaves) == 1 or not all(is_row):
            return leaves[0] if len(leaves) == 1 else list(leaves)
        shapes = sorted({tuple(leaf.shape[1:]) for leaf in leaves})
        if len(shapes) > 1:
            raise DataError(
                "The outputs of some batches have another shape than those of others.",
                expected=f"one shape for each example, as {list(shapes[0])}",
                got=", ".join(str(list(shape)) for shape in shapes[1:4]),
                hint="pad all data to one length, make batch_size as large as the data, or predict batch by batch",
            )
        return torch.cat(cast(list[Tensor], list(leaves)))

    return map_outputs(join, *parts)
