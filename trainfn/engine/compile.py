"""``compile``: the same step, as one program, and optionally written into the state it was given.

Modes: ``eager`` runs the reference step as it stands; ``graph`` compiles forward, backward, clipping, health check,
optimizer and EMA as one fullgraph program; ``auto`` chooses.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import time
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainfn.batch import Batch, micro_batches
from trainfn.errors import CompileError, ConfigError, DonatedStateError, TrainfnError, suggest
from trainfn.loss import LossSum
from trainfn.metric import Metric, MetricSum
from trainfn.state import Params, TrainState, trainable
from trainfn.step import Step, finished, surroundings
from trainfn.tree import Tree, describe, evolve, named_leaves

Mode = Literal["auto", "eager", "graph"]

_LEAST_STEPS = 5_000  # heuristic: cold, two cores compile for 15 to 70 s; a small model's step is 0.5 to 15 ms shorter
_MOST_PROGRAMS = 64  # batch shapes for which a program is kept
_MOST_SURPRISES = 3  # programs compiled again for no new shape, before that is taken as a habit
_MOST_UNROLLED = 4  # micro-batches are unrolled in the program, which grows, and so does compile time, with each


class CompileWarning(UserWarning):
    """Compilation did something the user may want to know: fell back to eager, or ran a second time."""


def compile(
    step: Step, *, mode: Mode = "auto", donate: bool = False, steps: int | None = None, backend: str = "inductor"
) -> CompiledStep:
    """Return a step of the same signature and the same numbers, made to run fast.

    Nothing is compiled before the first call; that call, and the first one for each new batch shape, takes seconds.

    Args:
        step: from :func:`trainfn.make_step`.
        mode: ``"graph"``, ``"eager"``, or ``"auto"``, which chooses from the device and ``steps``. If
            ``auto`` chose ``graph`` and the model cannot be compiled, it says so and goes on in ``eager``.
        donate: write the new state into the old one's memory. The old state is consumed: any use of it raises.
        steps: how many steps will be run, if known; short runs do not earn their compilation.
        backend: a ``torch.compile`` backend.

    Raises:
        ConfigError: an unknown mode.
        CompileError: (from the call, ``mode="graph"``) the step does not compile as one program.

    >>> import trainfn
    >>> from trainfn.step import make_step
    >>> model, optimizer = torch.nn.Linear(2, 2), trainfn.optim.sgd(lr=0.1)
    >>> step = compile(make_step(model, loss="classification", optimizer=optimizer), mode="eager", donate=True)
    >>> state = trainfn.init(model, optimizer)
    >>> after = step(state, (torch.ones(3, 2), torch.tensor([0, 1, 1])))
    >>> state.params
    Traceback (most recent call last):
        ...
    trainfn.errors.DonatedStateError: This state was consumed by the step over batch 0.
      expected: the state that the step returned: it was written into this one's memory
      try: go on with the returned state, or compile with donate=False
    """
    if mode not in get_args(Mode):
        raise ConfigError(
            "There is no compile mode of this name.", got=repr(mode), hint=suggest(str(mode), get_args(Mode))
        )
    return CompiledStep(step, mode=mode, donate=donate, steps=steps, backend=backend)


class CompiledStep:
    """A step that runs in a chosen mode; called like the step it was made from.

    Attributes:
        step: the step it means.
        mode: ``"eager"``, ``"graph"``, or ``"auto"`` until the first call has shown the device.
        reason: why this mode.
        donate: whether a state given is consumed.
        compiles: how many programs have been compiled.
        compile_seconds: what that has cost, first calls included.
    """

    def __init__(self, step: Step, *, mode: Mode, donate: bool, steps: int | None, backend: str) -> None:
        self.step, self.donate, self.backend = step, donate, backend
        self.mode: Mode = mode
        self.reason = "as asked"
        self.compiles, self.compile_seconds = 0, 0.0
        self._may_fall_back, self._steps = mode == "auto", steps
        self._program: Callable[[TrainState, Batch], Any] | None = None
        self._known: set[Hashable] = set()  # (signature of the batch, number of the state's structure)
        self._structures: dict[Hashable, int] = {}
        self._last_structure = 0
        self._surprises = 0
        self._last: Callable[[], TrainState | None] = lambda: None

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        """Return the state after one step; see :class:`trainfn.step.Step`."""
        self.settle(state)
        result = self._run(state, batch) if self.mode == "graph" else None
        if result is None:
            after = self.step(state, batch)
        elif self.donate:
            after = evolve(state, report=result, cursor=state.cursor + 1)
        else:
            after = finished(state, evolve(result, params=state.params | result.params))
        if self.donate:
            _consume(state)
        self._last = weakref.ref(after)
        return after

    def evaluate(
        self, state: TrainState, batch: Batch, *, metrics: Sequence[Metric] = (), params: Params | None = None
    ) -> dict[str, LossSum | MetricSum]:
        """Return the sums of one batch, as :meth:`trainfn.step.Step.evaluate` does."""
        return self.step.evaluate(state, batch, metrics=metrics, params=params)

    def settle(self, state: TrainState) -> tuple[Mode, str]:
        """Decide what ``auto`` means for this state's device, once; return the mode and the reason."""
        if self.mode == "auto":
            self.mode, self.reason = _choose(state.step.device, self.step.accumulate, self._steps)
        return self.mode, self.reason

    def _run(self, state: TrainState, batch: Batch) -> Any:
        """Run the program on tensors alone: to the compiler, a seed or cursor would be a constant to specialise on."""
        tensors = evolve(state, seed=0, cursor=0, report=None)  # no step reads the last report
        # A state that this step returned has the structure of the one before it: nothing to look at again.
        if state is not self._last():
            self._last = lambda: None  # should this call fail, what is held of the last state no longer fits it
            self._last_structure = self._structures.setdefault(_signature(tensors), len(self._structures))
        key = _signature(batch), self._last_structure
        if key not in self._known:
            return self._first_run(state, tensors, batch, key)
        assert self._program is not None
        try:
            with surroundings(self.step.model, state, training=True):
                return self._program(tensors, batch)
        except Exception as error:
            # Something else that the program was made for has changed, and to compile needs what _first_run sets.
            if not type(error).__module__.startswith("torch._dynamo"):
                raise
        return self._first_run(state, tensors, batch, key)

    def _first_run(self, state: TrainState, tensors: TrainState, batch: Batch, key: Hashable) -> Any:
        """Run the program where it has to be compiled first. None: it cannot be, and ``auto`` goes on in eager."""
        from torch._dynamo import config

        began = time.perf_counter()
        reason = f"for batches of {describe(batch)}. Batches of one shape need one program: padding, buckets, drop_last"
        if key in self._known:
            reason = "though the batch's shape is known: something in Python that the model or loss reads has changed"
            self._surprises += 1
        with surroundings(self.step.model, state, training=True), torch.no_grad():
            # A mistake in the batch or the model shows here as itself, not as a failure of the compiler.
            buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
            self.step.loss(state.params, buffers, micro_batches(batch, self.step.accumulate)[0])
        if self._program is None:
            self._program = _make_program(self.step, donate=self.donate, backend=self.backend)
        failure: Exception | None = None
        try:
            if self._surprises > _MOST_SURPRISES:
                raise RuntimeError("something in Python that the model or the loss reads changes from step to step")
            with (
                surroundings(self.step.model, state, training=True),
                config.patch(trace_autograd_ops=True, recompile_limit=_MOST_PROGRAMS),
            ):
                result = self._program(tensors, batch)
        except (TrainfnError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            failure = error
        if failure is not None:
            self.step(state, batch)  # a mistake in the loss or the settings is raised here as itself, too
            self._refuse(failure)
            return None
        self.compiles += 1
        seconds = time.perf_counter() - began
        self.compile_seconds += seconds
        if self.compiles > 1:
            warnings.warn(f"Another program was compiled, in {seconds:.1f} s, {reason}", CompileWarning, stacklevel=4)
        self._known.add(key)
        return result

    def _refuse(self, error: Exception) -> None:
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not self._may_fall_back:
            raise CompileError(
                "The step does not compile as one program.",
                got=f"{type(error).__name__}: {summary}",
                hint='pass compile="eager" to fit, or mode="eager" to trainfn.compile; the cause is shown above',
            ) from error
        self.mode, self.reason = "eager", f"it does not compile as one program ({summary})"
        warnings.warn(f"Going on in eager mode: {self.reason}", CompileWarning, stacklevel=5)


def _make_program(step: Step, *, donate: bool, backend: str) -> Callable[[TrainState, Batch], Any]:
    def program(state: TrainState, batch: Batch) -> Any:
        after = step.transition(state, batch)
        # Frozen parameters are handed through outside the program; an input is not to be its output.
        changed = evolve(after, params={name: after.params[name] for name in trainable(state.params)})
        if not donate:
            return changed
        with torch.no_grad():
            for (_, old), (_, new) in zip(_written(state), _written(changed), strict=True):
                if old.ndim == 0:  # a copy straight into a [] float64 input is lost (torch 2.11, 2.13); not by a view
                    old, new = old.view(1), new.view(1)
                old.copy_(new)
        return changed.report

    # Programs are cached by code object, up to a limit: each step gets one of its own.
    own = types.FunctionType(program.__code__.replace(), program.__globals__, closure=program.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)


def _written(state: TrainState) -> list[tuple[str, Tensor]]:
    """The tensors that a step changes, in one order for the state before and after."""
    trained = trainable(state.params) or state.params
    tree = (state.step, trained, state.buffers, state.opt, state.ema, state.scale, state.health, state.stats)
    return list(named_leaves(tree))


def _consume(state: TrainState) -> None:
    object.__setattr__(state, "_batch", state.cursor)
    object.__setattr__(state, "__class__", _ConsumedState)


class _ConsumedState(TrainState):
    """What a donated state becomes: reading anything from it raises."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("__class__", "__dict__"):
            return object.__getattribute__(self, name)
        batch = object.__getattribute__(self, "__dict__")["_batch"]
        raise DonatedStateError(
            f"This state was consumed by the step over batch {batch}.",
            expected="the state that the step returned: it was written into this one's memory",
            hint="go on with the returned state, or compile with donate=False",
        )


def _signature(tree: Tree) -> Hashable:
    return tuple(
        (name, leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad) if isinstance(leaf, Tensor) else (name, leaf)
        for name, leaf in named_leaves(tree)
    )


def _choose(device: torch.device, accumulate: int, steps: int | None) -> tuple[Mode, str]:
    if steps is not None and steps < _LEAST_STEPS:
        return "eager", f"{steps} steps would not earn back the compilation (fewer than {_LEAST_STEPS})"
    if accumulate > _MOST_UNROLLED:
        return "eager", f"{accumulate} micro-batches would make too long a program"
    missing = _missing_tool(device)
    if missing:
        return "eager", f"torch.compile needs {missing}, which was not found"
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
