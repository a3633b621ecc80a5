"""Examples of like length in one batch, so that little of it is padding: an order, as a function of (seed, epoch).

The epoch's :func:`trainfn.data.order` is cut into groups of 50 batches (fewer, where an epoch has less than 200).
Within a group the examples are sorted by length and cut into batches, and the batches are shuffled. Which examples are
in a group, which of equal length share a batch, and where a batch comes are drawn anew each epoch; each example still
comes once an epoch. A short last batch stays the last, and has the shortest of its group.

References:
    ``transformers.trainer_pt_utils.get_length_grouped_indices``, whose groups and sizes these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainfn.data.order import order

_GROUP = 50
_LEAST = 4  # groups an epoch, where it has as many batches


def order_by_length(
    positions: Tensor, lengths: Tensor, *, batch_size: int, seed: int, epoch: int = 0, used: int | None = None
) -> Tensor:
    """Return which example stands at each position of an epoch, examples of like length being near each other.

    Args:
        positions: in [0, used), any shape, int64.
        lengths: of each example, [examples] int64.
        batch_size: examples in a batch.
        seed: the run's seed.
        epoch: number of the pass over the data.
        used: positions in an epoch; fewer than there are examples where a short last batch is left out.

    >>> lengths = torch.arange(40) % 4
    >>> lengths[order_by_length(torch.arange(20), lengths, batch_size=2, seed=0)].view(10, 2).tolist()
    [[3, 3], [3, 3], [2, 1], [1, 1], [0, 0], [3, 3], [3, 3], [2, 2], [1, 1], [0, 0]]
    """
    used = len(lengths) if used is None else used
    group = batch_size * max(1, min(_GROUP, used // (batch_size * _LEAST)))
    found = torch.empty_like(positions)
    numbers = positions // group
    for number in torch.unique(numbers).tolist():
        examples = _group(number * group, min(used, (number + 1) * group), lengths, batch_size, seed, epoch, number)
        chosen = numbers == number
        found[chosen] = examples[positions[chosen] - number * group]
    return found


def _group(start: int, stop: int, lengths: Tensor, batch_size: int, seed: int, epoch: int, number: int) -> Tensor:
    """Return the examples at the positions from ``start`` to ``stop``, which are those of one group."""
    drawn = order(torch.arange(start, stop), len(lengths), seed=seed, epoch=epoch)
    by_length = drawn[torch.sort(lengths[drawn], descending=True, stable=True).indices]
    full = len(by_length) // batch_size
    rows = by_length[: full * batch_size].view(full, batch_size)
    if full > 1:  # other draws than those that made the group
        rows = rows[order(torch.arange(full), full, seed=seed, epoch=(epoch << 20) + number + 1)]
    return torch.cat([rows.reshape(-1), by_length[full * batch_size :]])


def length_of(item: Any) -> int:
    """Return how long the sequences in an item are, all together; 0 where there are none.

    >>> length_of({"input_ids": [1, 2, 3], "labels": torch.zeros(2), "score": 0.5}), length_of(("text", 1))
    (5, 4)
    """
    if isinstance(item, Mapping):
        return sum(map(length_of, item.values()))
    if isinstance(item, tuple):
        return sum(map(length_of, item))
    if isinstance(item, (Tensor, np.ndarray)):
        return int(item.shape[0]) if item.ndim else 0
    return len(item) if isinstance(item, (list, str, bytes)) else 0
