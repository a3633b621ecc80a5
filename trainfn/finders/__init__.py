"""What is found out by a few steps before a run: a learning rate, and how large a batch may be.

| file | what it is |
|---|---|
| ``lr`` | ``find_lr``: a sweep over learning rates |
| ``batch_size`` | ``find_batch_size``: doubling, then bisection |
| ``memory`` | ``Gauge``: how much memory is left, and taken |
"""

from trainfn.finders.batch_size import BatchSizeSearch, Trial, find_batch_size
from trainfn.finders.lr import LRSweep, find_lr

__all__ = ["BatchSizeSearch", "LRSweep", "Trial", "find_batch_size", "find_lr"]
