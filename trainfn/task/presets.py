"""Presets: named differences from the default settings, ``TrainConfig.preset("production", max_epochs=3)``.

| preset | for | differs from the default by |
|---|---|---|
| ``quick`` | whether it learns at all, within minutes | max_steps 200, compile "eager", log_every 5, save_every None |
| ``baseline`` | a run that others are compared with: the step's reference meaning, and all of it in the history | compile "eager", log_every 1, health_every 10, keep_last None |
| ``production`` | a long run that nobody watches, and that is started again by a machine | resume "auto", save_every_minutes 15, keep_last 3, on_divergence "rollback", on_save_error "warn", worker_timeout 600 |
| ``low_memory`` | a model that hardly fits: the step of the default settings, in less memory and more time | batch_size 4, accumulate 8, precision "bf16-mixed", save_async False |

How long to train is said besides, but for ``quick``; ``production`` needs an ``out_dir``; ``checkpoint=`` with the names
of the model's blocks saves more memory. There is none for several devices, because trainfn trains on one.
"""  # noqa: E501

from __future__ import annotations

from typing import Any

from trainfn.errors import ConfigError, suggest

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"max_steps": 200, "compile": "eager", "log_every": 5, "save_every": None},
    "baseline": {"compile": "eager", "log_every": 1, "health_every": 10, "keep_last": None},
    "production": {
        "resume": "auto",
        "save_every_minutes": 15,
        "keep_last": 3,
        "on_divergence": "rollback",
        "on_save_error": "warn",
        "worker_timeout": 600,
    },
    "low_memory": {
        "batch_size": 4,
        "accumulate": 8,
        "precision": "bf16-mixed",
        "save_async": False,
    },
}


def preset(name: str) -> dict[str, Any]:
    """Return the settings in which a preset differs from the default.

    Raises:
        ConfigError: there is none of this name.

    >>> preset("quick")["max_steps"]
    200
    >>> preset("distributed")
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: There is no such preset.
      got: 'distributed'
      try: trainfn trains on one device; one of baseline, low_memory, production, quick
    """
    if not isinstance(name, str) or name not in PRESETS:
        hint = suggest(str(name), PRESETS)
        hint = f"trainfn trains on one device; {hint}" if name == "distributed" else hint
        raise ConfigError("There is no such preset.", got=repr(name), hint=hint)
    return dict(PRESETS[name])
