"""``seeded``: random draws of data as a function of the seed and the number of the batch."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, cursor: int) -> Iterator[None]:
    """Seed the global generators from (seed, cursor), and put them back after (CPU only; numpy's is the slow one).

    >>> with seeded(0, 1):
    ...     one = torch.rand(2)
    >>> with seeded(0, 1):
    ...     bool((torch.rand(2) == one).all())
    True
    """
    numpy = sys.modules.get("numpy")
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    drawn = int.from_bytes(hashlib.sha256(f"{seed}:{cursor}".encode()).digest()[:8], "little")
    try:
        torch.default_generator.manual_seed(drawn)
        random.seed(drawn)
        if numpy:
            numpy.random.seed(drawn % 2**32)
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
