"""A wrapper for training a few parameters of a large model (adapters, LoRA, a new head): is it a few that are trained?

    peft_aware(base)(outputs, batch) = base(outputs, batch)

What it adds is ``check_trained``, which is asked once, when the step is made. The two usual accidents look alike until
the bill comes: nothing trains, because the adapters were frozen together with the model; or all of it does.

References:
    E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685, 2021.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trainfn.batch import Batch
from trainfn.errors import ModelError
from trainfn.loss.base import Loss, LossSum, marked_like
from trainfn.loss.registry import resolve


class PeftWarning(UserWarning):
    """Every parameter is trained, where a few were meant to be."""


def peft_aware(base: str | Loss) -> Loss:
    """Return ``base`` with a function ``check_trained(trained, frozen)``, which looks at the names of the parameters.

    Args:
        base: a registered name or a function ``loss(outputs, batch)``.

    Returns:
        A loss with the values of ``base``. Its ``check_trained`` takes the names of the parameters with and without
        gradients, raises ModelError if none has, and warns (:class:`PeftWarning`) if all have. Wrappers around the loss
        hand it on; if ``base`` has one of its own, that is asked too.

    Raises:
        ConfigError: ``base`` is neither.

    >>> loss = peft_aware("mse")
    >>> loss.check_trained(trained=["lora.a", "lora.b"], frozen=["weight"])
    >>> loss.check_trained(trained=[], frozen=["weight"])
    Traceback (most recent call last):
        ...
    trainfn.errors.ModelError: No parameter is trained.
      expected: some with requires_grad, the adapters or the head
      got: 1 frozen: weight
      try: add the adapters after the base model is frozen, or call requires_grad_() on them
    """
    strategy = resolve(base)
    inherited = getattr(strategy, "check_trained", None)

    @marked_like(strategy)
    def loss(outputs: Any, batch: Batch) -> LossSum | Tensor:
        return strategy(outputs, batch)

    def check_trained(trained: Sequence[str], frozen: Sequence[str]) -> None:
        if inherited is not None:
            inherited(trained, frozen)
        _check_trained(trained, frozen)

    loss.check_trained = check_trained  # type: ignore[attr-defined]
    return loss


def _check_trained(trained: Sequence[str], frozen: Sequence[str]) -> None:
    if not trained:
        raise ModelError(
            "No parameter is trained.",
            expected="some with requires_grad, the adapters or the head",
            got=f"{len(frozen)} frozen{_few(frozen)}",
            hint="add the adapters after the base model is frozen, or call requires_grad_() on them",
        )
    if not frozen:
        warnings.warn(
            f"Every parameter is trained ({len(trained)}{_few(trained)}), but the loss is peft_aware. For LoRA, "
            "adapters or a new head, freeze the base model's parameters first: base.requires_grad_(False).",
            PeftWarning,
            stacklevel=5,  # where make_step was called
        )


def _few(names: Sequence[str]) -> str:
    listed = ", ".join(list(names)[:3])
    return f": {listed}{', ...' if len(names) > 3 else ''}" if names else ""
