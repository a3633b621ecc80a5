"""Distillation: cross-entropy with the labels, mixed with the distance from a teacher's softened distribution.

    total = (1 - alpha) * base's total  +  alpha * T^2 * sum over n of KL(softmax(teacher[n] / T) || softmax(x[n] / T))

in nats, both over the labels that are not ignored; the weight is their number. T^2 keeps the size of the soft part's
gradient whatever T is. Letters: N labels (examples or tokens), C classes or vocabulary.

References:
    G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531,
    2015.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.errors import ConfigError, DataError, suggest
from trainfn.loss.base import Loss, LossSum, check_number, logits_of, widens
from trainfn.loss.cross_entropy import make_cross_entropy
from trainfn.loss.reading import Reading, aligned_tokens, examples, next_tokens, reads
from trainfn.tree import describe, widened

Base = Literal["classification", "language_modeling", "masked_language_modeling", "seq2seq"]
Teacher = Callable[[Batch], Any]

_READERS: dict[str, Callable[[Tensor, Batch, int], tuple[Tensor, Tensor]]] = {
    "classification": examples,
    "language_modeling": next_tokens,
    "masked_language_modeling": aligned_tokens,
    "seq2seq": aligned_tokens,
}


def distillation(
    *,
    teacher: Teacher | None = None,
    temperature: float = 2.0,
    alpha: float = 0.5,
    base: Base = "classification",
    ignore_index: int = -100,
) -> Loss:
    """Return the loss that trains a student to answer as a teacher does, and as the labels say.

    Args:
        teacher: a function of the batch that returns logits, or what holds them; it is called without gradients and
            is to be frozen and in evaluation mode. None reads the batch's field ``teacher_logits``.
        temperature: T, which softens both distributions, > 0.
        alpha: share of the teacher's part, in [0, 1].
        base: which loss the labels are for: it decides shape, shift and what counts.
        ignore_index: label that does not count, for either part.

    Raises:
        ConfigError: an option is out of range, or there is no such base.
        DataError: (from the loss) the batch holds no teacher logits, or the teacher's have another shape than the
            student's; labels that do not fit.
        ModelError: (from the loss) logits that do not fit the base.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> batch = {"teacher_logits": logits, "labels": torch.tensor([1])}
    >>> distillation(alpha=1.0)(logits, batch)
    LossSum(total=tensor(0.), weight=tensor(1.))
    """
    check_number("alpha", alpha, least=0.0, most=1.0)
    check_number("temperature", temperature, least=0.0)
    if temperature == 0:
        raise ConfigError("temperature is out of range.", expected="a number > 0", got=repr(temperature))
    if base not in _READERS:
        raise ConfigError("There is no such loss to distil.", got=repr(base), hint=suggest(str(base), _READERS))
    read, reduce = _READERS[base], make_cross_entropy(ignore_index=ignore_index)

    @widens
    @reads(Reading(ignore_index=ignore_index, shift=read is next_tokens))
    def loss(outputs: Any, batch: Batch) -> LossSum:
        logits = logits_of(outputs)
        rows, labels = read(logits, batch, ignore_index)  # (N, C), (N)
        hard = reduce(rows, labels)
        if alpha == 0.0:
            return hard
        known = _teacher_logits(teacher, batch, logits)
        student = torch.log_softmax(widened(rows) / temperature, dim=1)
        wanted = torch.log_softmax(known.reshape(rows.shape).to(student.dtype) / temperature, dim=1)
        share = wanted.exp()
        # A class that the teacher rules out (a logit of -inf) adds nothing: 0 log 0 = 0.
        each = torch.where(share > 0, share * (wanted - student), 0.0).sum(1)
        soft = torch.where(labels != ignore_index, each, 0.0).sum()
        total = alpha * temperature**2 * soft
        return LossSum(total=total if alpha == 1.0 else (1.0 - alpha) * hard.total + total, weight=hard.weight)

    return loss


def _teacher_logits(teacher: Teacher | None, batch: Batch, logits: Tensor) -> Tensor:
    if teacher is not None:
        with torch.no_grad():
            known = logits_of(teacher(batch)).detach()
    elif isinstance(batch, dict) and isinstance(batch.get("teacher_logits"), Tensor):
        known = logits_of(batch["teacher_logits"]).detach()
    else:
        raise DataError(
            "The batch holds no logits of a teacher.",
            where="teacher_logits",
            expected=f"a field teacher_logits {list(logits.shape)}",
            got=describe(batch),
            hint="pass teacher=, a function of the batch, or store its logits with the data",
        )
    if known.shape != logits.shape:
        raise DataError(
            "The teacher's logits do not have the shape of the student's.",
            expected=f"teacher logits {list(logits.shape)}",
            got=describe(known),
            hint="teacher and student need the same classes or vocabulary",
        )
    return known
