"""The gradients of a step in packs, merged over its micro-batches outside of any program.

A program that hands out a gradient for each parameter is as quick to compile as the model alone: its kernels for equal
layers are equal, and compiled once. One that joins them has a kernel for each place in the pack. So, but for small
models, they are joined here, by one call that joins all (the first micro-batch) or adds all (the others).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.engine.layout import Layout
from trainfn.grad import Gradients, GradientsFn
from trainfn.state import TrainState
from trainfn.tree import evolve, widened


def summed(layout: Layout, gradients: GradientsFn, views: TrainState, batches: Sequence[Batch]) -> Gradients:
    """Return the merged contributions of micro-batches, as :func:`trainfn.grad.fold` does, gradients in packs.

    Args:
        layout: says what is joined.
        gradients: of one micro-batch, by name.
        views: the state.
        batches: the micro-batches, in order.
    """
    found = gradients(views.params, views.buffers, batches[0], scale=views.scale)
    with torch.no_grad():
        sums = evolve(found, grads={pack.name: pack.join(found.grads) for pack in layout.trained})
        if len(batches) == 1:
            return sums
        # Sums of several are made in float32 or wider, and in memory of our own: a gradient may be the batch itself.
        grads = {name: _own(grad, found.grads.get(name)) for name, grad in sums.grads.items()}
        sums = evolve(sums, grads=grads)
        leaves = layout.split(grads)
    for batch in batches[1:]:
        found = gradients(views.params, sums.buffers, batch, scale=views.scale)
        with torch.no_grad():
            torch._foreach_add_(list(leaves.values()), [found.grads[name].to(leaves[name].dtype) for name in leaves])
            sums = evolve(
                found,
                grads=grads,
                total=sums.total + found.total,
                weight=sums.weight + found.weight,
                micro_batches=sums.micro_batches + found.micro_batches,
            )
    return sums


def _own(pack: Tensor, given: Tensor | None) -> Tensor:
    wide = widened(pack)
    return wide.clone() if wide is given else wide
