"""Training as a fold: ``state = reduce(step, batches, state)``.

| room | what is in it |
|---|---|
| ``errors`` | one family of exceptions |
| ``tree`` | records, named leaves, maps over trees |
| ``state`` | ``TrainState``, ``Report``, ``init`` |
| ``batch`` | how a batch is read and divided |
| ``loss`` | ``LossSum``, the strategies, the registry |
| ``optim`` | ``Transform`` pairs, clipping, schedules |
| ``forward`` | how a batch meets a model's forward |
| ``grad`` | gradients as a monoid: ``gradients``, ``merge``, ``fold`` |
| ``health`` | ``Verdict``: whether a step may be applied |
| ``step`` | ``make_step``: the composition |
| ``engine`` | ``compile``: the same step, fast |
| ``data`` | ``order``, ``Loader``, data sets |
| ``store`` | checkpoints and history |
| ``task`` | ``TrainConfig`` |
| ``plan``, ``header`` | what is decided before the first step, and how it is said |
| ``observers`` | what watches a run |
| ``fit`` | ``fit``, ``run``, ``evaluate`` |
"""

from trainfn import data, errors, loss, optim, tree
from trainfn.engine import CompiledStep, compile
from trainfn.fit import FitResult, evaluate, fit, run
from trainfn.grad import Gradients, fold, merge
from trainfn.health import Verdict
from trainfn.loss import LossSum
from trainfn.optim import Transform
from trainfn.plan import Plan, plan
from trainfn.state import Health, Report, TrainState, init
from trainfn.step import Step, make_step
from trainfn.store import Manifest, load, save
from trainfn.task import TrainConfig

__all__ = [
    "CompiledStep",
    "FitResult",
    "Gradients",
    "Health",
    "LossSum",
    "Manifest",
    "Plan",
    "Report",
    "Step",
    "TrainConfig",
    "TrainState",
    "Transform",
    "Verdict",
    "compile",
    "data",
    "errors",
    "evaluate",
    "fit",
    "fold",
    "init",
    "load",
    "loss",
    "make_step",
    "merge",
    "optim",
    "plan",
    "run",
    "save",
    "tree",
]
