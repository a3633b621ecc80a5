"""The same examples on every run and every machine, no stop-watch, and one thread.

The nets are small: a second thread costs more than it helps, and on a busy machine ten times as much. Processes that
tests start inherit the setting, because another number of threads can mean other last bits.
"""

from __future__ import annotations

import os
import tempfile

import torch
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
# What the tests compile is kept from one run of them to the next, but not among the user's own programs.
os.environ.setdefault("XDG_CACHE_HOME", os.path.join(tempfile.gettempdir(), "trainfn-tests"))
torch.set_num_threads(1)

settings.register_profile("trainfn", deadline=None, derandomize=True)
settings.load_profile("trainfn")
