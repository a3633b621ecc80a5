"""Training as a fold: ``state = reduce(step, batches, state)``."""

from trainfn import loss, optim
from trainfn.engine import CompiledStep, compile
from trainfn.state import TrainState, Report, init
from trainfn.step import make_step
