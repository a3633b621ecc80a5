"""The forms that data comes in: what is read as a tree of tensors, and what a ``DataLoader`` says of itself.

NumPy arrays, and the columns and frames of pandas, are read in place: no copy where PyTorch can use the memory as it
is, and no change of dtype, but for unsigned integers of 16 and 32 bits, which PyTorch cannot gather: they become the
next wider signed ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from trainfn.errors import ConfigError, DataError


def is_array(value: object) -> bool:
    """Return whether a value is a NumPy array, or a column or frame of pandas.

    >>> is_array(np.ones(2)), is_array([1, 2])
    (True, False)
    """
    return isinstance(value, np.ndarray) or is_frame(value) or (hasattr(value, "to_numpy") and hasattr(value, "iloc"))


def is_frame(value: object) -> bool:
    """Return whether a value is a table with named columns: a pandas ``DataFrame``, or what is used like one.

    >>> is_frame(np.ones(2))
    False
    """
    return all(hasattr(value, name) for name in ("columns", "iloc", "to_numpy")) and not isinstance(value, type)


def as_tensors(data: object, name: str = "") -> Any:
    """Return data with its arrays as tensors, which share their memory; anything else in it is left as it is.

    Args:
        data: a tree of dicts and tuples; arrays in lists are examples, not columns, and stay as they are.
        name: what the data is called in a message.

    Raises:
        DataError: an array of strings, objects or dates.

    >>> as_tensors({"x": np.ones(2, dtype=np.float32), "y": torch.arange(2)})
    {'x': tensor([1., 1.]), 'y': tensor([0, 1])}
    """
    if isinstance(data, Mapping):
        return {key: as_tensors(value, f"{name}.{key}" if name else str(key)) for key, value in data.items()}
    if isinstance(data, tuple):
        parts = [as_tensors(value, f"{name}.{at}" if name else str(at)) for at, value in enumerate(data)]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    return as_tensor(data, name) if is_array(data) else data


def as_tensor(array: Any, name: str = "") -> Tensor:
    """Return an array as a tensor of the same dtype, or of the next one that PyTorch can gather.

    Raises:
        DataError: its dtype is none of PyTorch's.

    >>> as_tensor(np.arange(4)[::-1])
    tensor([3, 2, 1, 0])
    """
    found = array if isinstance(array, np.ndarray) else array.to_numpy()
    if found.dtype.kind not in "biufc":
        raise DataError(
            "An array does not hold numbers.",
            where=name or None,
            expected="bools, integers or floats",
            got=f"{type(array).__name__} of dtype {found.dtype}",
            hint="turn words into numbers first; trainfn.data.read_frame(frame, target=...) reads a frame with classes",
        )
    if not found.dtype.isnative:
        found = found.astype(found.dtype.newbyteorder("="))
    if found.dtype in (np.uint16, np.uint32):
        found = found.astype(np.int32 if found.dtype == np.uint16 else np.int64)
    if any(stride < 0 for stride in found.strides):
        found = np.ascontiguousarray(found)
    with warnings.catch_warnings():  # that an array is read-only is no matter: nothing is written into data
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(found)


@attrs.frozen
class LoaderSettings:
    """What a ``torch.utils.data.DataLoader`` was made of.

    Attributes:
        dataset: its map-style data set.
        collate: its collate function; None for PyTorch's own.
        settings: ``batch_size``, ``shuffle``, ``drop_last`` and ``workers``, as ``fit`` calls them.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any] | None
    settings: dict[str, Any]


def read_data_loader(loader: DataLoader[Any]) -> LoaderSettings:
    """Return the data set and the settings of a ``DataLoader``, so that its batches can be had by number.

    How it fetches (``pin_memory``, ``timeout``, ``prefetch_factor``, ``persistent_workers``) changes no batch and is
    not read.

    Raises:
        ConfigError: it draws its order in a way of its own: a sampler, a generator, a function for its workers.
        DataError: it reads a stream.

    >>> read_data_loader(DataLoader([1, 2, 3], batch_size=2, shuffle=True)).settings
    {'batch_size': 2, 'shuffle': True, 'drop_last': False, 'workers': 0}
    """
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(
            "The DataLoader reads a stream, which has no positions to resume at.",
            expected="a DataLoader of a map-style data set (__len__ and __getitem__)",
            got=type(loader.dataset).__name__,
            hint="pass list(dataset) if it fits in memory, or give it __getitem__",
        )
    wrong = []
    if loader.batch_size is None:
        wrong.append("batch_size=None (no batches, or a batch_sampler)")
    elif type(loader.batch_sampler) is not BatchSampler:
        wrong.append(f"batch_sampler={type(loader.batch_sampler).__name__}")
    sampler: Any = loader.sampler
    if type(sampler) is RandomSampler:
        if sampler.replacement or sampler.num_samples != len(loader.dataset):  # type: ignore[arg-type]
            wrong.append(f"RandomSampler(replacement={sampler.replacement}, num_samples={sampler.num_samples})")
    elif type(sampler) is not SequentialSampler:
        wrong.append(f"sampler={type(sampler).__name__}")
    if loader.generator is not None:
        wrong.append("generator (the order comes from fit's seed)")
    if loader.worker_init_fn is not None:
        wrong.append("worker_init_fn (random draws come from fit's seed)")
    if wrong:
        raise ConfigError(
            "The DataLoader draws its batches in a way of its own, which would be lost.",
            expected="shuffle=True or shuffle=False, and a batch_size",
            got="; ".join(wrong),
            hint="pass its data set, ordered as you need it, or a function batch(index) with max_steps",
        )
    plain = loader.collate_fn is default_collate
    return LoaderSettings(
        dataset=loader.dataset,
        collate=None if plain else loader.collate_fn,
        settings={
            "batch_size": loader.batch_size,
            "shuffle": type(sampler) is RandomSampler,
            "drop_last": loader.drop_last,
            "workers": loader.num_workers,
        },
    )
