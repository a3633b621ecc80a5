"""Losses: functions ``loss(outputs, batch)`` that return a sum and its weight.

| name | what it is |
|---|---|
| ``LossSum`` | a total and the weight it is a sum over |
| ``language_modeling`` | next-token cross-entropy, shifted |
| ``classification`` | cross-entropy over classes |
| ``register``, ``resolve``, ``names`` | losses by name |
"""

from trainfn.loss.base import Loss, LossSum, as_loss_sum, logits_of
from trainfn.loss.classification import classification
from trainfn.loss.language_modeling import language_modeling
from trainfn.loss.registry import names, register, resolve

__all__ = [
    "Loss",
    "LossSum",
    "as_loss_sum",
    "classification",
    "language_modeling",
    "logits_of",
    "names",
    "register",
    "resolve",
]
