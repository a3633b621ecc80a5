"""``Sums``: the gradients of a step in packs, merged over its micro-batches outside of any program.

A program that hands out a gradient for each parameter is as quick to compile as the model alone: its kernels for equal
layers are equal, and compiled once. One that joins them has a kernel for each place in the pack. So, but for small
models, they are joined here, by one call that copies all (the first micro-batch) or adds all (the others).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.engine.layout import Layout, Pack
from trainfn.grad import Gradients, GradientsFn
from trainfn.state import TrainState
from trainfn.tree import evolve


class Sums:
    """Sums of gradients, in memory that is kept from step to step: new pages each time cost more than the copy.

    Args:
        layout: says what is joined.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._rooms: dict[tuple[str, torch.dtype], tuple[Tensor, list[Tensor]]] = {}

    def fold(self, gradients: GradientsFn, views: TrainState, batches: Sequence[Batch]) -> Gradients:
        """Return the merged contributions of micro-batches, as :func:`trainfn.grad.fold` does, gradients in packs.

        They may be kept until the next call. What is a pack by itself, of one batch, is the gradient as it was given.
        """
        sums: Gradients | None = None
        for batch in batches:
            found = gradients(views.params, (sums or views).buffers, batch, scale=views.scale)
            with torch.no_grad():
                sums = self._begin(found, len(batches)) if sums is None else self._add(sums, found)
        assert sums is not None
        return sums

    def own(self, pack: Tensor) -> bool:
        """Return whether the memory of a pack of gradients is kept here: nobody else reads it."""
        return any(flat is pack for flat, _ in self._rooms.values())

    def _begin(self, found: Gradients, count: int) -> Gradients:
        packs = {}
        for pack in self._layout.trained:
            grads = [found.grads[slot.name] for slot in pack.slots]
            if len(grads) == 1 and count == 1:
                packs[pack.name] = grads[0]
                continue
            # Sums of several are made in float32 or wider: in bfloat16, 256 and 1 are 256.
            wide = torch.promote_types(grads[0].dtype, torch.float32)
            dtype = grads[0].dtype if count == 1 else wide
            flat, leaves = self._room(pack, grads[0], dtype)
            torch._foreach_copy_(leaves, grads)
            packs[pack.name] = flat
        return evolve(found, grads=packs)

    def _add(self, sums: Gradients, found: Gradients) -> Gradients:
        for pack in self._layout.trained:
            _, leaves = self._rooms[pack.name, sums.grads[pack.name].dtype]
            torch._foreach_add_(leaves, [found.grads[slot.name].to(leaves[0].dtype) for slot in pack.slots])
        return evolve(
            found,
            grads=sums.grads,
            total=sums.total + found.total,
            weight=sums.weight + found.weight,
            micro_batches=sums.micro_batches + found.micro_batches,
        )

    def _room(self, pack: Pack, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        key = (pack.name, dtype)
        if key not in self._rooms:
            alone = len(pack.slots) == 1
            # Zeros between the leaves: they are in the norms, and in the update.
            flat = torch.empty_like(like, dtype=dtype) if alone else like.new_zeros(pack.size, dtype=dtype)
            self._rooms[key] = flat, list(pack.split(flat).values())
        return self._rooms[key]
