"""Gradients as a monoid: sums that add, whatever they are summed over.

    gradients : (params, buffers, batch) -> Gradients
    merge     : (Gradients, Gradients) -> Gradients        associative; commutative in everything but the buffers
    fold      : merge over micro-batches, the buffers threaded through in order

The gradient of a sum over a batch is the sum of the gradients of its parts, so accumulation, a short last window and
uneven padding are one addition, and the single division by the total weight is the update's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainfn.batch import Batch
from trainfn.errors import ModelError
from trainfn.forward import make_arguments
from trainfn.loss.base import Loss, LossSum, as_loss_sum
from trainfn.state import Buffers, Params, trainable
from trainfn.tree import map_leaves, record


@record
class Gradients:
    """What one or more micro-batches contribute to a step. Sums, never means.

    Attributes:
        grads: gradient of ``total`` by name of trained parameter.
        total: summed loss, [].
        weight: what the sums are over, [].
        buffers: the model's buffers after the last micro-batch.
    """

    grads: Params
    total: Tensor
    weight: Tensor
    buffers: Buffers


GradientsFn = Callable[[Params, Buffers, Batch], Gradients]
LossFn = Callable[[Params, Buffers, Batch], LossSum]


def make_loss(model: nn.Module, loss: Loss) -> LossFn:
    """Return ``(params, buffers, batch) -> LossSum``: the model applied as a function, then the loss.

    The model's own tensors are not read; tied weights are tied again. Buffers that the forward changes in place are
    changed in the dict given.
    """
    arguments = make_arguments(model)

    def apply(params: Params, buffers: Buffers, batch: Batch) -> LossSum:
        args, kwargs = arguments(batch)
        tensors = params | buffers
        outputs = functional_call(model, tensors, args, kwargs, tie_weights=True)
        for name in buffers:
            buffers[name] = tensors[name]  # a forward may also put a new tensor in a buffer's place
        return as_loss_sum(loss(outputs, batch), batch)

    return apply


def make_gradients(model: nn.Module, loss: Loss) -> GradientsFn:
    """Return ``(params, buffers, batch) -> Gradients``, by ``torch.autograd``.

    A trained parameter that the loss does not depend on has a gradient of zeros. Nothing given is written to: the
    forward runs on copies of the buffers. Works under ``no_grad``, and inside one compiled program, where it
    differentiates with respect to views of the parameters (which must require grad there, as ``init`` makes them).

    Raises:
        ModelError: (from the returned function) the loss does not depend on any trained parameter.

    >>> from trainfn.loss import classification
    >>> gradients = make_gradients(nn.Linear(2, 2, bias=False), classification())
    >>> params = {"weight": torch.zeros(2, 2, requires_grad=True)}
    >>> found = gradients(params, {}, (torch.ones(3, 2), torch.tensor([0, 0, 1])))
    >>> found.grads["weight"]
    tensor([[-0.5000, -0.5000],
            [ 0.5000,  0.5000]])
    >>> found.weight
    tensor(3.)
    """
    apply = make_loss(model, loss)

    def gradients(params: Params, buffers: Buffers, batch: Batch) -> Gradients:
        with torch.enable_grad():
            views = {name: param.view_as(param) for name, param in trainable(params).items()}
            fresh = {name: buffer.clone() for name, buffer in buffers.items()}
            result = apply(params | views, fresh, batch)
            if not result.total.requires_grad:
                raise ModelError(
                    "The loss does not depend on any trained parameter.",
                    expected="a total that requires grad",
                    got="a constant",
                    hint="look for no_grad, detach or .data in the model or the loss",
                )
            found = torch.autograd.grad(result.total, list(views.values()), allow_unused=True)
        grads = {
            name: torch.zeros_like(view) if grad is None else grad.detach()
            for (name, view), grad in zip(views.items(), found, strict=True)
        }
        return Gradients(
            grads=grads,
            total=result.total.detach(),
            weight=result.weight.detach(),
            buffers={name: buffer.detach() for name, buffer in fresh.items()},
        )

    return gradients


def merge(left: Gradients, right: Gradients) -> Gradients:
    """Return the sum of two contributions; the buffers are those of ``right``, the later one.

    >>> def one(g):
    ...     return Gradients(grads={"w": torch.tensor(g)}, total=torch.tensor(g), weight=torch.tensor(1.0), buffers={})
    >>> both = merge(one(1.0), one(2.0))
    >>> float(both.grads["w"]), float(both.weight)
    (3.0, 2.0)
    """
    return Gradients(
        grads=map_leaves(torch.add, left.grads, right.grads),
        total=left.total + right.total,
        weight=left.weight + right.weight,
        buffers=right.buffers,
    )


def fold(gradients: GradientsFn, params: Params, buffers: Buffers, batches: Sequence[Batch]) -> Gradients:
    """Return the merged contributions of micro-batches, taken in order; each sees the buffers the last one left."""
    result = gradients(params, buffers, batches[0])
    for batch in batches[1:]:
        result = merge(result, gradients(params, result.buffers, batch))
    return result
