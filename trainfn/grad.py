"""Gradients as a monoid: sums that add, whatever they are summed over.

    gradients : (params, buffers, batch) -> Gradients
    merge     : (Gradients, Gradients) -> Gradients        associative; commutative in everything but the buffers
    fold      : merge over micro-batches, the buffers threaded through in order

The gradient of a sum over a batch is the sum of the gradients of its parts, so accumulation, a short last window and
uneven padding are one addition, and the single division by the total weight is the update's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainfn.batch import Batch
from trainfn.errors import ModelError
from trainfn.forward import make_apply, make_arguments, tensors_in_place
from trainfn.loss import Loss, LossSum, as_loss_sum, low_precision_safe, takes_target
from trainfn.precision import LossScale, backward_unit, cast, lowered
from trainfn.precision import resolve as resolve_precision
from trainfn.recompute import explained, recomputing
from trainfn.state import Buffers, Params
from trainfn.tree import evolve, map_leaves, record, widened


@record
class Gradients:
    """What one or more micro-batches contribute to a step. Sums, never means.

    Attributes:
        grads: gradient of ``total`` by name of trained parameter.
        total: summed loss, [].
        weight: what the sums are over, [].
        micro_batches: how many, [] int64.
        buffers: the model's buffers after the last micro-batch.
    """

    grads: Params
    total: Tensor
    weight: Tensor
    micro_batches: Tensor
    buffers: Buffers


class GradientsFn(Protocol):
    """``(params, buffers, batch) -> Gradients``; with a loss scale for the backward where precision has one."""

    def __call__(
        self, params: Params, buffers: Buffers, batch: Batch, /, scale: LossScale | None = None
    ) -> Gradients: ...


ForwardFn = Callable[[Params, Buffers, Batch], Any]
Criterion = Callable[[Any, Batch], LossSum]
LossFn = Callable[[Params, Buffers, Batch], LossSum]


def make_forward(
    model: nn.Module, precision: str = "32-true", checkpoint: Sequence[str] = (), *, targets: bool = False
) -> ForwardFn:
    """Return ``(params, buffers, batch) -> outputs``: the model applied as a function, in the precision's dtype.

    The model's own tensors are not read; tied weights are tied again. Buffers that the forward changes in place are
    changed in the dict given. The modules named in ``checkpoint`` are recomputed in the backward; under a compiler it
    is the caller who says so, by :func:`trainfn.recompute.recomputing` around the program. With ``targets`` the model
    is given the batch's targets, too.
    """
    arguments, apply_to = make_arguments(model, targets=targets), make_apply(model)
    dtype = resolve_precision(precision).compute
    low = lowered(model) if dtype is not None else frozenset()

    def apply(params: Params, buffers: Buffers, batch: Batch) -> Any:
        args, kwargs = cast(arguments(batch), dtype)
        tensors = params | buffers
        if low:  # in the model's order: that of a set is another in every process, and so would the program be
            tensors |= {name: cast(tensor, dtype) for name, tensor in tensors.items() if name in low}
        with recomputing(model, checkpoint) if checkpoint and not torch.compiler.is_compiling() else nullcontext():
            outputs = apply_to(tensors, args, kwargs)
        for name, old in buffers.items():
            new = tensors[name]  # a forward may also put a new tensor in a buffer's place
            if new.dtype != old.dtype:  # lowered: what has not changed keeps all its digits
                new = torch.where(new == old.to(new.dtype), old, new.to(old.dtype))
            buffers[name] = new
        return outputs

    return apply


def make_criterion(loss: Loss, precision: str = "32-true") -> Criterion:
    """Return ``(outputs, batch) -> LossSum``: a loss, and what it returned made a sum.

    Under a 16-bit precision a loss that does not make its sums in float32 by itself is given float32 outputs.
    """
    strategy = low_precision_safe(loss) if resolve_precision(precision).compute is not None else loss
    return lambda outputs, batch: as_loss_sum(strategy(outputs, batch), batch)


def make_loss(model: nn.Module, loss: Loss, precision: str = "32-true", checkpoint: Sequence[str] = ()) -> LossFn:
    """Return ``(params, buffers, batch) -> LossSum``: :func:`make_forward`, then :func:`make_criterion`."""
    forward = make_forward(model, precision, checkpoint, targets=takes_target(loss))
    criterion = make_criterion(loss, precision)
    return lambda params, buffers, batch: criterion(forward(params, buffers, batch), batch)


def make_gradients(
    model: nn.Module, loss: Loss, precision: str = "32-true", checkpoint: Sequence[str] = ()
) -> GradientsFn:
    """Return ``(params, buffers, batch) -> Gradients``, by ``torch.autograd``.

    A trained parameter that the loss does not depend on has a gradient of zeros. Nothing given is written to: the
    forward runs on copies of the buffers. Works under ``no_grad``, and inside one compiled program, where the
    parameters must require grad, as ``init`` makes them, or be views of what does.
    A loss scale is in the backward only: what is returned are the gradients themselves.

    Raises:
        ModelError: (from the returned function) the loss does not depend on any trained parameter; or a module in
            ``checkpoint`` cannot be run a second time.

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
    plain = make_gradients_of(make_loss(model, loss, precision, checkpoint))
    if not checkpoint:
        return plain

    def gradients(params: Params, buffers: Buffers, batch: Batch, /, scale: LossScale | None = None) -> Gradients:
        with explained(checkpoint):
            return plain(params, buffers, batch, scale=scale)

    return gradients


def make_gradients_of(apply: LossFn) -> GradientsFn:
    """Return the gradients of ``(params, buffers, batch) -> LossSum``, as :func:`make_gradients` does of a model's."""

    def gradients(params: Params, buffers: Buffers, batch: Batch, /, scale: LossScale | None = None) -> Gradients:
        is_program = torch.compiler.is_compiling()
        with torch.enable_grad(), nullcontext() if is_program else tensors_in_place():
            # A program differentiates with respect to what it is given, or views of it; its caller gives it leaves.
            trained = {
                name: param if is_program or param.is_leaf else param.detach().requires_grad_()
                for name, param in params.items()
                if param.requires_grad
            }
            fresh = {name: buffer.clone() for name, buffer in buffers.items()}
            result = apply(params | trained, fresh, batch)
            if not result.total.requires_grad:
                raise ModelError(
                    "The loss does not depend on any trained parameter.",
                    expected="a total that requires grad",
                    got="a constant",
                    hint="look for no_grad, detach or .data in the model or the loss",
                )
            unit = None if scale is None else backward_unit(scale, result.weight.detach()).to(result.total.dtype)
            found = torch.autograd.grad(result.total, list(trained.values()), grad_outputs=unit, allow_unused=True)
        grads = _named(found, trained)
        if unit is not None:
            grads = {name: grad / unit.to(grad.dtype) for name, grad in grads.items()}
        return Gradients(
            grads=grads,
            total=result.total.detach(),
            weight=result.weight.detach(),
            micro_batches=torch.ones((), dtype=torch.int64, device=result.total.device),
            buffers={name: buffer.detach() for name, buffer in fresh.items()},
        )

    return gradients


def _named(found: Sequence[Tensor | None], trained: Params) -> Params:
    """Return gradients by name, detached; zeros where there is none."""
    grads, sparse = {}, []
    for (name, param), grad in zip(trained.items(), found, strict=True):
        if grad is None:
            grad = torch.zeros_like(param)
        elif grad.is_sparse:
            sparse.append(name)
        grads[name] = grad.detach() if grad.requires_grad else grad
    if sparse:
        raise ModelError(
            "A gradient is sparse, which no optimizer here takes.",
            where=", ".join(sparse),
            hint="make the layer dense: nn.Embedding(..., sparse=False)",
        )
    return grads


def merge(left: Gradients, right: Gradients) -> Gradients:
    """Return the sum of two contributions; the buffers are those of ``right``, the later one.

    >>> def one(g):
    ...     return Gradients(grads={"w": torch.tensor(g)}, total=torch.tensor(g), weight=torch.tensor(1.0),
    ...                      micro_batches=torch.tensor(1), buffers={})
    >>> both = merge(one(1.0), one(2.0))
    >>> float(both.grads["w"]), float(both.weight), int(both.micro_batches)
    (3.0, 2.0, 2)
    """
    return Gradients(
        grads=map_leaves(torch.add, left.grads, right.grads),
        total=left.total + right.total,
        weight=left.weight + right.weight,
        micro_batches=left.micro_batches + right.micro_batches,
        buffers=right.buffers,
    )


def fold(
    gradients: GradientsFn,
    params: Params,
    buffers: Buffers,
    batches: Sequence[Batch],
    *,
    scale: LossScale | None = None,
) -> Gradients:
    """Return the merged contributions of micro-batches, taken in order; each sees the buffers the last one left.

    Sums of several are made in float32 or wider: in bfloat16, 256 and 1 are 256.
    """
    result = gradients(params, buffers, batches[0], scale=scale)
    if len(batches) > 1:
        result = evolve(result, grads=map_leaves(widened, result.grads))
    for batch in batches[1:]:
        result = merge(result, gradients(params, result.buffers, batch, scale=scale))
    return result
