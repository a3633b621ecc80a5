"""Optimizers and schedules: pairs of pure functions.

| name | what it is |
|---|---|
| ``Transform`` | ``init(params)``, ``update(grads, opt_state, params, step)`` |
| ``adam``, ``adamw``, ``nadam``, ``radam``, ``lamb`` | optimizers by two moments of the gradient |
| ``sgd``, ``lion``, ``muon`` | optimizers by its momentum |
| ``adagrad``, ``rmsprop``, ``adafactor`` | optimizers by its square |
| ``clip_by_global_norm``, ``clip_by_value``, ``adaptive_clip`` | limits on gradients |
| ``chain`` | one Transform after another |
| ``partition``, ``matrices_and_others`` | another Transform for each group of parameters; the groups that Muon wants |
| ``freeze`` | which parameters stay as they are |
| ``matrices_only`` | which parameters weight decay is for |
| ``constant``, ``linear``, ``cosine``, ``polynomial``, ``inverse_sqrt``, ``piecewise`` | schedules of one phase |
| ``warmup_constant``, ``warmup_cosine``, ``warmup_linear``, ``warmup_stable_decay``, ``one_cycle`` | of several |

A hyper-parameter (``Hyper``) is a number or a schedule, of any name: rates, decay rates, weight decay, limits.
"""

from trainfn.optim.adafactor import AdafactorState, adafactor
from trainfn.optim.adagrad import AdagradState, adagrad
from trainfn.optim.adam import adam
from trainfn.optim.adamw import adamw
from trainfn.optim.clip import adaptive_clip, clip_by_global_norm, clip_by_value
from trainfn.optim.decay import Decay, matrices_only
from trainfn.optim.freeze import freeze
from trainfn.optim.lamb import lamb
from trainfn.optim.lion import LionState, lion
from trainfn.optim.moments import AdamState
from trainfn.optim.muon import MuonState, muon
from trainfn.optim.nadam import NadamState, nadam
from trainfn.optim.partition import Labels, matrices_and_others, partition
from trainfn.optim.phases import one_cycle, warmup_constant, warmup_cosine, warmup_linear, warmup_stable_decay
from trainfn.optim.radam import radam
from trainfn.optim.rmsprop import RMSpropState, rmsprop
from trainfn.optim.schedule import constant, cosine, inverse_sqrt, linear, piecewise, polynomial
from trainfn.optim.sgd import SGDState, sgd
from trainfn.optim.transform import Frozen, Hyper, Schedule, Transform, chain

__all__ = [
    "AdafactorState",
    "AdagradState",
    "AdamState",
    "Decay",
    "Frozen",
    "Hyper",
    "Labels",
    "LionState",
    "MuonState",
    "NadamState",
    "RMSpropState",
    "SGDState",
    "Schedule",
    "Transform",
    "adafactor",
    "adagrad",
    "adam",
    "adamw",
    "adaptive_clip",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "constant",
    "cosine",
    "freeze",
    "inverse_sqrt",
    "lamb",
    "linear",
    "lion",
    "matrices_and_others",
    "matrices_only",
    "muon",
    "nadam",
    "one_cycle",
    "partition",
    "piecewise",
    "polynomial",
    "radam",
    "rmsprop",
    "sgd",
    "warmup_constant",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]
