"""Optimizers and schedules: pairs of pure functions.

| name | what it is |
|---|---|
| ``Transform`` | ``init(params)``, ``update(grads, opt_state, params, step)`` |
| ``adamw``, ``sgd`` | optimizers |
| ``clip_by_global_norm`` | one factor for all gradients |
| ``chain`` | one Transform after another |
| ``constant``, ``warmup_cosine`` | schedules of the updates applied |
"""

from trainfn.optim.adamw import AdamState, adamw
from trainfn.optim.clip import clip_by_global_norm
from trainfn.optim.schedule import constant, warmup_cosine
from trainfn.optim.sgd import SGDState, sgd
from trainfn.optim.transform import Schedule, Transform, chain

__all__ = [
    "AdamState",
    "SGDState",
    "Schedule",
    "Transform",
    "adamw",
    "chain",
    "clip_by_global_norm",
    "constant",
    "sgd",
    "warmup_cosine",
]
