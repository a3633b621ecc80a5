"""What survives the process: checkpoints that are whole or absent, and the run's history.

| file | what it is |
|---|---|
| ``checkpoint`` | ``save``, ``load``, ``restore``, ``steps``: a state as a verified step directory |
| ``capsule`` | ``save_capsule``, ``load_capsule``, ``read_notes``: one step to take, with its batch, as evidence |
| ``retention`` | ``Retention``, ``keep``, ``prune``, ``clean``: which checkpoints stay, and how the others go |
| ``saver`` | ``Saver``: the checkpoints of a run, written beside the training |
| ``lock`` | ``writing``: one writer for a run directory |
| ``weights`` | ``load_params``, ``average``: parameters by name, from elsewhere and from several |
| ``tools`` | ``inspect``, ``verify``, ``diff``: what to ask of checkpoints |
| ``sealed`` | what the two share: a directory whose manifest vouches for its files |
| ``manifest`` | ``Manifest``: what is known about a checkpoint, as JSON that protects itself |
| ``tensors`` | named tensors as safetensors bytes, and the checks before they are believed |
| ``history`` | ``History``, ``rows``, ``cut``: one JSON object per line |
| ``strict_json`` | JSON that keeps non-finite floats and stays strict |
| ``disk`` | regular files only; written, fsynced, renamed, fsynced |
"""

from trainfn.store.capsule import Capsule, load_capsule, read_notes, save_capsule
from trainfn.store.checkpoint import CheckpointWarning, cursor_of, glance, load, restore, save, steps
from trainfn.store.disk import CheckpointDamagedError, CheckpointWriteError, Place, replace, reporting
from trainfn.store.history import History, cut, rows
from trainfn.store.lock import RunLockedError, writing
from trainfn.store.manifest import Manifest
from trainfn.store.retention import Entry, Retention, clean, keep, prune
from trainfn.store.saver import Saver
from trainfn.store.tools import Difference, diff, inspect, verify
from trainfn.store.weights import average, load_params

__all__ = [
    "Capsule",
    "CheckpointDamagedError",
    "CheckpointWarning",
    "CheckpointWriteError",
    "Difference",
    "Entry",
    "History",
    "Manifest",
    "Place",
    "Retention",
    "RunLockedError",
    "Saver",
    "average",
    "clean",
    "cursor_of",
    "cut",
    "diff",
    "glance",
    "inspect",
    "keep",
    "load",
    "load_capsule",
    "load_params",
    "prune",
    "read_notes",
    "replace",
    "reporting",
    "restore",
    "rows",
    "save",
    "save_capsule",
    "steps",
    "verify",
    "writing",
]
