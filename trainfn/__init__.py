"""Training as a fold: ``state = reduce(step, batches, state)``.

| room | what is in it |
|---|---|
| ``errors`` | one family of exceptions |
| ``tree`` | records, named leaves, maps over trees |
| ``precision`` | what runs in 16 bits, and the loss scale |
| ``state`` | ``TrainState``, ``Report``, ``init`` |
| ``batch`` | how a batch is read and divided |
| ``loss`` | ``LossSum``, the strategies, the registry |
| ``optim`` | ``Transform`` pairs, clipping, schedules |
| ``forward`` | how a batch meets a model's forward |
| ``attention`` | which kernel attention runs by |
| ``grad`` | gradients as a monoid: ``gradients``, ``merge``, ``fold`` |
| ``health`` | ``Verdict``: whether a step may be applied |
| ``update`` | ``Update``: where sums are divided and anything changes |
| ``step`` | ``make_step``: the composition |
| ``metric`` | sums that add, and what they come to |
| ``per_sample`` | gradients of each example, and the gradient noise scale |
| ``engine`` | ``compile``: the same step, fast |
| ``diagnose`` | ``diagnose``: a step that went wrong, run again and watched |
| ``data`` | ``order``, ``Loader``, ``split``, data sets, collators |
| ``store`` | checkpoints, capsules and history |
| ``task`` | ``TrainConfig``, ``TaskSpec`` |
| ``lora`` | low-rank adapters, in PEFT's format |
| ``faults`` | memory that is not there; errors between two steps |
| ``directory``, ``signals`` | what is continued and kept in the run directory; being told to stop |
| ``trial`` | the first micro-batch, tried |
| ``predict``, ``generate`` | what a trained model says of data, and continues a text with |
| ``limits``, ``flops`` | what ends a run early; operations of a step, and peaks of devices |
| ``plan``, ``header``, ``summary`` | what is decided before the first step, and how it is said; parameters as a table |
| ``evaluation``, ``halt``, ``rollback`` | what measures a run, ends it, and sends it back |
| ``observers``, ``loggers``, ``progress`` | the points at which a run is watched; what is logged and shown |
| ``reports``, ``recorder``, ``due`` | rows of steps and epochs, and when something is due |
| ``loop`` | ``run``; what is done between two steps |
| ``fit``, ``result`` | ``fit``; ``FitResult`` |
| ``replay``, ``profiling`` | a halted step, taken again; ``profile``: where the time of a step goes |
| ``finders`` | ``find_lr``, ``find_batch_size``: what a few steps tell before a run |
"""

from trainfn import data, errors, loggers, lora, loss, metric, optim, per_sample, tree
from trainfn.data import split
from trainfn.diagnose import Diagnosis, diagnose
from trainfn.engine import CompiledStep, compile
from trainfn.evaluation import evaluate
from trainfn.finders import BatchSizeSearch, LRSweep, find_batch_size, find_lr
from trainfn.fit import fit
from trainfn.generate import generate
from trainfn.grad import Gradients, fold, merge
from trainfn.health import Verdict
from trainfn.loop import run
from trainfn.loss import LossSum
from trainfn.optim import Transform
from trainfn.plan import Plan, plan
from trainfn.predict import predict
from trainfn.profiling import Profile, profile
from trainfn.replay import replay
from trainfn.result import FitResult
from trainfn.state import Health, Report, TrainState, init
from trainfn.step import Step, make_step
from trainfn.store import Difference, Manifest, average, diff, inspect, load, load_params, save, verify
from trainfn.summary import summary
from trainfn.task import TaskSpec, TrainConfig

__all__ = [
    "BatchSizeSearch",
    "CompiledStep",
    "Diagnosis",
    "Difference",
    "FitResult",
    "Gradients",
    "Health",
    "LRSweep",
    "LossSum",
    "Manifest",
    "Plan",
    "Profile",
    "Report",
    "Step",
    "TaskSpec",
    "TrainConfig",
    "TrainState",
    "Transform",
    "Verdict",
    "average",
    "compile",
    "data",
    "diagnose",
    "diff",
    "errors",
    "evaluate",
    "find_batch_size",
    "find_lr",
    "fit",
    "fold",
    "generate",
    "init",
    "inspect",
    "load",
    "load_params",
    "loggers",
    "lora",
    "loss",
    "make_step",
    "merge",
    "metric",
    "optim",
    "per_sample",
    "plan",
    "predict",
    "profile",
    "replay",
    "run",
    "save",
    "split",
    "summary",
    "tree",
    "verify",
]
