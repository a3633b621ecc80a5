"""The one cross-entropy under all losses over classes: a sum over labels, and what it is a sum over.

    each[n] = - sum over c of q[n, c] w[c] log softmax(x[n])[c]  +  z (log sum over c of exp x[n, c])^2
    q[n]    = (1 - s) onehot(labels[n]) + s / C
    total   = sum of each[n],  weight = sum of w[labels[n]],   both over the labels that are not ignored

in nats. Without class weights w is 1 and the weight is the number of labels that count. s is label smoothing (Szegedy
et al.), z the weight of the z-loss (Chowdhery et al.), which keeps the softmax normaliser near 1. Letters: N labels,
C classes.

References:
    C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", https://arxiv.org/abs/1512.00567,
    2016.
    A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", https://arxiv.org/abs/2204.02311, 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from trainfn.errors import ConfigError, ModelError
from trainfn.loss.base import LossSum, check_count, check_number
from trainfn.tree import widened

CrossEntropy = Callable[[Tensor, Tensor], LossSum]
"""``reduce(logits [N, C, ...], labels [N, ...])``, the labels int64."""


def make_cross_entropy(
    *,
    ignore_index: int = -100,
    class_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> CrossEntropy:
    """Return the reduction of logits and int64 labels to a LossSum.

    Args:
        ignore_index: label that does not count.
        class_weights: what each class counts for, [C]. A tensor on the logits' device is used without a copy.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1].
        z_loss: weight of the squared log normaliser; PaLM uses 1e-4.
        chunk_size: labels to reduce at a time, for logits [N, C]. No copy of all logits in float32 is held then.

    Raises:
        ConfigError: an option is out of range, or ``chunk_size`` is combined with class weights.
        ModelError: (from the reduction) the logits have another number of classes than there are weights.

    >>> reduce = make_cross_entropy(class_weights=[1.0, 3.0])
    >>> reduce(torch.tensor([[100.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 1]))
    LossSum(total=tensor(0.), weight=tensor(4.))
    """
    check_number("label_smoothing", label_smoothing, least=0.0, most=1.0)
    check_number("z_loss", z_loss, least=0.0)
    table = None if class_weights is None else weights_tensor("class_weights", class_weights)
    check_count("chunk_size", chunk_size, optional=True)
    if chunk_size is not None and table is not None:
        raise ConfigError("Class weights and chunk_size do not go together.", hint="leave one of them out")

    def reduce(logits: Tensor, labels: Tensor) -> LossSum:
        counted = labels != ignore_index
        if chunk_size is not None:
            total, _ = cast(Any, _Chunked).apply(logits, labels, counted, label_smoothing, z_loss, chunk_size)
            return LossSum(total=total, weight=counted.sum().to(total.dtype))
        wide = widened(logits)
        weights = None
        if table is not None:
            if table.shape[0] != logits.shape[1]:
                raise ModelError(
                    "The logits have another number of classes than there are class weights.",
                    expected=f"{table.shape[0]} classes",
                    got=f"logits {list(logits.shape)}",
                )
            # In two steps: a conversion on the host would be copied from memory that a CUDA graph cannot rely on.
            weights = table.to(wide.device, non_blocking=True).to(wide.dtype)
        # Over pixels the summed kernel adds atomically, in any order (torch's list of nondeterministic operations).
        total = F.cross_entropy(
            wide,
            labels,
            weight=weights,
            ignore_index=ignore_index,
            reduction="sum" if logits.ndim == 2 else "none",
            label_smoothing=label_smoothing,
        )
        total = total.sum() if total.ndim else total
        if z_loss:
            normaliser = torch.where(counted, wide.logsumexp(1), 0.0)
            total = total + z_loss * normaliser.square().sum()
        if weights is None:
            return LossSum(total=total, weight=counted.sum().to(total.dtype))
        return LossSum(total=total, weight=torch.where(counted, weights[labels * counted], 0.0).sum())

    return reduce


def weights_tensor(name: str, values: Sequence[float] | Tensor) -> Tensor:
    """Return weights for classes as a tensor [C]; reads their values, so it belongs where a loss is built.

    Raises:
        ConfigError: not a list of finite numbers >= 0 of which at least one is positive.

    >>> weights_tensor("class_weights", [1, 2])
    tensor([1., 2.], dtype=torch.float64)
    """
    table = values.detach() if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.float64)
    fits = table.ndim == 1 and table.numel() > 0 and not table.dtype.is_complex
    if not fits or not bool((table.isfinite() & (table >= 0)).all() & (table > 0).any()):
        raise ConfigError(
            f"{name} cannot weigh classes.",
            expected="one finite number >= 0 for each class, not all of them 0",
            got=repr(values),
        )
    return table


class _Chunked(torch.autograd.Function):
    """Summed cross-entropy that keeps its input and one number per row; the softmax is made again in the backward.

    Memory besides logits and their gradient, both in the logits' dtype: a few chunks of [chunk, C] in float32.
    The idea is that of Y.-L. Hsu et al., "Liger Kernel", https://arxiv.org/abs/2410.10989, 2024, without the kernel.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, labels: Tensor, counted: Tensor, smoothing: float, z_loss: float, size: int
    ) -> tuple[Tensor, Tensor]:
        sums, normalisers = [], []
        for start in range(0, max(logits.shape[0], 1), size):
            part = slice(start, start + size)
            targets, counts = labels[part], counted[part]
            wide = widened(logits[part])  # (chunk, C)
            normaliser = wide.logsumexp(1)  # (chunk)
            each = normaliser - (1.0 - smoothing) * wide.gather(1, (targets * counts)[:, None])[:, 0]
            if smoothing:
                each = each - smoothing * wide.mean(1)
            if z_loss:
                each = each + z_loss * normaliser.square()
            sums.append(torch.where(counts, each, 0.0).sum())
            normalisers.append(normaliser)
        return torch.stack(sums).sum(), torch.cat(normalisers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, labels, counted, ctx.smoothing, ctx.z_loss, ctx.size = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, labels, counted, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, counted, normalisers = ctx.saved_tensors
        found = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ctx.size):
            part = slice(start, start + ctx.size)
            wide, counts = widened(logits[part]), counted[part, None]
            # What was kept has no graph; where this is differentiated again, it needs one.
            normaliser = wide.logsumexp(1, keepdim=True) if torch.is_grad_enabled() else normalisers[part, None]
            wide = torch.exp(wide - normaliser)  # (chunk, C), the softmax
            if ctx.z_loss:
                wide = wide * (1.0 + 2.0 * ctx.z_loss * normaliser)
            if ctx.smoothing:
                wide = wide - ctx.smoothing / logits.shape[1]
            right = torch.full_like(normaliser, ctx.smoothing - 1.0)
            wide = wide.scatter_add(1, labels[part, None] * counts, right)
            found[part] = wide * torch.where(counts, grad, 0.0)
        return found, None, None, None, None, None
