"""Losses: functions ``loss(outputs, batch)`` that return a sum and its weight.

| name | what it is |
|---|---|
| ``LossSum`` | a total and the weight it is a sum over |
| ``language_modeling`` | next-token cross-entropy, shifted |
| ``masked_language_modeling``, ``seq2seq`` | cross-entropy over tokens that are aligned with the logits |
| ``classification``, ``vision_classification`` | cross-entropy over classes |
| ``segmentation`` | cross-entropy over pixels |
| ``multi_label`` | binary cross-entropy over labels that do not exclude each other |
| ``regression`` | squared, absolute or Huber's loss |
| ``distillation`` | a teacher's distribution and the labels |
| ``own`` | what the model computes itself |
| ``low_precision_safe`` | a loss that is given float32 outputs |
| ``peft_aware`` | a loss that has looked at which parameters are trained |
| ``register``, ``resolve``, ``make``, ``names``, ``wrappers`` | losses by name |
| ``widens``, ``reads``, ``Reading``, ``reading_of`` | what a loss says of itself |
"""

from trainfn.loss.base import Loss, LossSum, as_loss_sum, logits_of, takes_target, widens
from trainfn.loss.classification import classification, segmentation, vision_classification
from trainfn.loss.distillation import distillation
from trainfn.loss.language_modeling import language_modeling, masked_language_modeling, seq2seq
from trainfn.loss.low_precision import low_precision_safe
from trainfn.loss.multi_label import multi_label
from trainfn.loss.own import own
from trainfn.loss.peft import PeftWarning, peft_aware
from trainfn.loss.reading import Reading, reading_of, reads
from trainfn.loss.registry import make, names, register, resolve, wrappers
from trainfn.loss.regression import regression

__all__ = [
    "Loss",
    "LossSum",
    "PeftWarning",
    "Reading",
    "as_loss_sum",
    "classification",
    "distillation",
    "language_modeling",
    "logits_of",
    "low_precision_safe",
    "make",
    "masked_language_modeling",
    "multi_label",
    "names",
    "own",
    "peft_aware",
    "reading_of",
    "reads",
    "register",
    "regression",
    "resolve",
    "segmentation",
    "seq2seq",
    "takes_target",
    "vision_classification",
    "widens",
    "wrappers",
]
