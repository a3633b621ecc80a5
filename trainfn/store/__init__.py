"""What survives the process: checkpoints that are whole or absent, and the run's history.

| file | what it is |
|---|---|
| ``checkpoint`` | ``save``, ``load``, ``restore``, ``verify``, ``steps``: a state as a verified step directory |
| ``manifest`` | ``Manifest``: what is known about a checkpoint, as JSON that protects itself |
| ``tensors`` | named tensors as safetensors bytes, and the checks before they are believed |
| ``history`` | ``History``, ``rows``, ``cut``: one JSON object per line |
| ``strict_json`` | JSON that keeps non-finite floats and stays strict |
| ``disk`` | regular files only; written, fsynced, renamed, fsynced |
"""

from trainfn.store.checkpoint import CheckpointWarning, load, restore, save, steps, verify
from trainfn.store.disk import CheckpointDamagedError, CheckpointWriteError
from trainfn.store.history import History, cut, rows
from trainfn.store.manifest import Manifest

__all__ = [
    "CheckpointDamagedError",
    "CheckpointWarning",
    "CheckpointWriteError",
    "History",
    "Manifest",
    "cut",
    "load",
    "restore",
    "rows",
    "save",
    "steps",
    "verify",
]
