"""The run directory: whether it can be written to, what of it a run continues from, and what is kept in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from trainfn.errors import ConfigError, suggest, warn
from trainfn.health import forgiven
from trainfn.state import TrainState
from trainfn.store import CheckpointWarning, CheckpointWriteError, Manifest, Retention, restore, steps
from trainfn.task import ConfigDiff, TrainConfig
from trainfn.task.config import differences
from trainfn.task.files import CONFIG_FILE
from trainfn.tree import evolve

POSITION = "position"
"""Under this name, where a stream was is among the settings in a manifest."""

_POSITION = (
    "seed", "batch_size", "accumulate", "shuffle", "drop_last", "limit_train_batches", "overfit_batches",
    "group_by_length",
)  # fmt: skip
_BETTER: dict[Literal["max", "min"], tuple[str, ...]] = {
    "max": ("accuracy", "f1", "r2"),
    "min": ("loss", "perplexity", "error", "ece", "grad_norm"),
}


def check_writable(out_dir: str | os.PathLike[str] | None) -> None:
    """Make the run directory if it is absent, and hold that files can be made in it.

    Raises:
        ConfigError: they cannot.

    >>> check_writable("/dev/null/run")
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: The run directory cannot be written to.
      where: /dev/null/run
      got: Not a directory
      try: pass another out_dir
    """
    if out_dir is None:
        return
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        raise ConfigError(
            "The run directory cannot be written to.",
            where=os.fspath(out_dir),
            got=error.strerror or str(error),
            hint="pass another out_dir",
        ) from error


def make_retention(config: TrainConfig, metrics: Iterable[str], sets: Sequence[str]) -> Retention:
    """Return which checkpoints the settings keep.

    Args:
        config: the settings.
        metrics: names of what is measured besides the loss.
        sets: what the columns of each set that is evaluated on begin with: ``["val"]`` of a single one.

    Raises:
        ConfigError: nothing of the monitored name is measured, or ``mode="auto"`` does not know it.

    >>> config = TrainConfig(max_steps=1, monitor="val_accuracy", keep_best=3)
    >>> make_retention(config, ["accuracy"], ["val"])
    Retention(last=2, best=3, monitor='val_accuracy', mode='max', every=None)
    """
    monitor = config.monitor or (f"{sets[0]}_loss" if sets else "loss")
    names = ["loss", *metrics]
    measured = [f"{prefix}_{name}" for prefix in sets for name in names]
    noise = ["noise_scale"] if config.noise_scale_every is not None else []
    known = ["loss", "grad_norm", "weight", "lr", "examples_per_second", "counted_per_second", *noise, *measured]
    # One metric may have several results, val_f1_cat and val_f1_dog; which, only measuring tells.
    if not any(monitor == name or (name in measured and monitor.startswith(f"{name}_")) for name in known):
        raise ConfigError("Nothing of this name is measured.", got=f"monitor={monitor!r}", hint=suggest(monitor, known))
    fitting = [mode for mode, words in _BETTER.items() if any(word in monitor for word in words)]
    mode = config.mode if config.mode != "auto" else fitting[0] if fitting else None
    if mode is None:
        raise ConfigError(
            "It is not known whether a smaller or a greater number is better.",
            where=f"monitor={monitor!r}",
            hint='pass mode="min" or mode="max"',
        )
    return Retention(last=config.keep_last, best=config.keep_best, monitor=monitor, mode=mode, every=config.keep_every)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the last bits of a run depend on besides the versions, as fields of its record.

    >>> sorted(machine(torch.device("cpu")))
    ['hardware', 'threads']
    """
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"threads": torch.get_num_threads(), "hardware": hardware}


def changes(manifest: Manifest, record: Mapping[str, Any]) -> ConfigDiff:
    """Return in what this run differs from the one that wrote a checkpoint: settings, loss, task and optimizer."""
    old, new = ({**each, "optimizer": by} for each, by in (
        (manifest.config, manifest.optimizer), (record["config"], record["optimizer"])
    ))  # fmt: skip
    old["compile"] = old.get("compile_mode", "auto")
    if new["compile"] == "auto":  # a run keeps the mode that it was begun in
        new["compile"] = old["compile"]
    return differences(old, new)


def write_config(config: TrainConfig) -> None:
    """Write the settings of a run into its directory, unless they are there.

    Raises:
        CheckpointWriteError: the disk refused, with ``on_save_error="stop"``; else that is warned of.

    >>> with tempfile.TemporaryDirectory() as home:
    ...     write_config(TrainConfig(max_steps=10, out_dir=home))
    ...     TrainConfig.load(home).max_steps
    10
    """
    path = Path(config.out_dir or "", CONFIG_FILE)
    try:
        if not (path.is_file() and path.read_text(encoding="utf-8") == config.to_toml()):
            config.save(path)
    except (CheckpointWriteError, OSError, ValueError) as error:
        if config.on_save_error == "stop":
            raise
        warn(f"The settings were not written, and the run goes on: {error}", CheckpointWarning)


def resume(
    config: TrainConfig, state: TrainState, record: Mapping[str, Any]
) -> tuple[TrainState, Path | None, Manifest | None]:
    """Return the state to start from, and the checkpoint that it comes from, if it does.

    Raises:
        ConfigError: the run directory holds checkpoints, and there is no saying what to do about them.
        CheckpointError: the checkpoint does not fit the model, the optimizer, the data or the settings: all that
            differs is reported together.
    """
    found = steps(config.out_dir) if config.out_dir is not None else []
    if config.resume is None:
        if found:
            raise ConfigError(
                "The run directory already holds a run.",
                where=os.fspath(config.out_dir or ""),
                got=f"{len(found)} checkpoints, the last one {found[-1].name}",
                hint='pass resume="auto" to continue it, or another out_dir to start afresh',
            )
        return state, None, None
    if config.resume == "auto" and not found:
        return state, None, None
    source = config.out_dir if config.resume == "auto" else config.resume
    fresh = state
    state, manifest = restore(
        source or "",
        like=lambda manifest: with_factor_of(manifest, fresh),
        also=lambda manifest: _obstacles(manifest, record),
    )
    if fresh.lr_factor is not None and state.lr_factor is None:
        state = evolve(state, lr_factor=fresh.lr_factor)
    if bool(state.health.halted):  # it was halted, and someone has decided to go on
        state = evolve(state, health=forgiven(state.health))
    newer = [path.name for path in found if config.resume != "auto" and path.name > f"step_{state.cursor:08d}"]
    if newer:
        raise ConfigError(
            "The run directory holds later steps than the one to resume from.",
            where=os.fspath(config.out_dir or ""),
            got=", ".join(newer),
            hint="pass another out_dir",
        )
    _warn_of_other_bits(manifest, record)
    path = Path(source or "")
    return state, path if path.name.startswith("step_") else path / f"step_{state.cursor:08d}", manifest


def with_factor_of(manifest: Manifest, state: TrainState) -> TrainState:
    """Return a state of this structure that has a factor for its learning rate where the saved one has."""
    if "lr_factor" not in manifest.tensors:
        return evolve(state, lr_factor=None)
    return evolve(state, lr_factor=torch.ones_like(state.report.lr))


def _obstacles(manifest: Manifest, record: Mapping[str, Any]) -> list[str]:
    """Return what keeps a run from going on from a checkpoint, besides the leaves of its state.

    The cursor counts batches: it means the same examples only for the same data, cut the same way. Moments of one
    optimizer may have the names and shapes of another's; its settings may change.
    """
    changed = changes(manifest, record).changed
    old, new = ({name: changed[name][of] for name in _POSITION if name in changed} for of in (0, 1))
    old["data"], new["data"] = manifest.data, record["data"]
    old["optimizer"], new["optimizer"] = (text.partition("(")[0] for text in (manifest.optimizer, record["optimizer"]))
    names = manifest.tied.keys() | record["tied"].keys()
    for name in names:
        old[f"tied to {name}"] = ", ".join(manifest.tied.get(name, ())) or "nothing"
        new[f"tied to {name}"] = ", ".join(record["tied"].get(name, ())) or "nothing"
    return [f"{name}: {old[name]} then, {new[name]} now" for name in old if old[name] != new[name]]


def _warn_of_other_bits(manifest: Manifest, record: Mapping[str, Any]) -> None:
    then = {"torch": manifest.torch} | {name: manifest.config.get(name) for name in ("threads", "hardware")}
    now = {"torch": str(torch.__version__)} | {name: record["config"][name] for name in ("threads", "hardware")}
    if "cpu" not in (then["hardware"], now["hardware"]):
        then["threads"] = now["threads"]
    differ = [f"{name} {then[name]} then, {now[name]} now" for name in then if then[name] not in (None, now[name])]
    if differ:
        text = f"The run goes on, but not bit for bit as it would have: {'; '.join(differ)}."
        warn(text, CheckpointWarning)
