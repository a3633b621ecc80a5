"""What ``mode="auto"`` means: a mode, and a sentence that says why."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from trainfn.step import Step

Mode = Literal["auto", "eager", "graph", "split", "accum"]

_LEAST_STEPS = 5_000  # heuristic: cold, two cores compile for 15 to 70 s; a small model's step is 0.5 to 15 ms shorter
_MOST_UNROLLED = 4  # micro-batches are unrolled in one program, which grows, and so does compile time, with each
SMALL = 200_000  # heuristic, trained parameters: below, a step is about as short as the calls it consists of


def choose(device: torch.device, step: Step, steps: int | None) -> tuple[Mode, str]:
    """Return the mode for a step on a device, and why.

    Args:
        device: of its state.
        step: its model and what it accumulates and recomputes are looked at.
        steps: how many will be run, if known.
    """
    if steps is not None and steps < _LEAST_STEPS:
        return "eager", f"{steps} steps would not earn back the compilation (fewer than {_LEAST_STEPS})"
    missing = _missing_tool(device)
    if missing:
        return "eager", f"torch.compile needs {missing}, which was not found"
    if step.checkpoint:
        return "split", "one program for the whole step would keep what a checkpoint means to recompute"
    if step.accumulate > _MOST_UNROLLED:
        return "accum", f"{step.accumulate} micro-batches would make too long a program"
    trained = sum(param.numel() for param in step.model.parameters() if param.requires_grad)
    if trained > SMALL:
        return "accum", f"gradients and update of {trained:,} parameters compile faster apart, and run as fast"
    return "graph", "one program for the whole step"


def _missing_tool(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if find_spec("triton") else "triton"
    if device.type != "cpu":
        return f"a backend for {device.type}"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl") if name):
        return "a C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's C headers"
    return None
