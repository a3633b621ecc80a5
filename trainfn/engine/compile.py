"""``compile``: the same step, as one program or two, and optionally written into the state it was given.

Modes: ``eager`` compiles nothing, and updates by PyTorch's fused kernels; ``graph`` compiles forward, backward,
clipping, health check, optimizer and EMA as one program; ``accum`` and ``split`` compile two
(:mod:`trainfn.engine.program`); ``auto`` chooses.

A state that a compiled step returns is a view of a few packs (:mod:`trainfn.engine.layout`) and carries them along, so
that the next call has nothing to look at but the batch. A state from elsewhere is packed first.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, get_args

import attrs
import torch
from torch import Tensor

from trainfn.attention import attending
from trainfn.batch import Batch, micro_batches
from trainfn.engine.choice import Mode, choose
from trainfn.engine.cudagraph import Asked, Capturing, Cases, check_donated, make_capturing
from trainfn.engine.held import Held
from trainfn.engine.layout import Layout, Packed
from trainfn.engine.memory import collecting_young, keep_pages
from trainfn.engine.program import Program, ProgramMode, compiling, make_program
from trainfn.errors import CompileError, ConfigError, DonatedStateError, TrainfnError, suggest
from trainfn.loss import LossSum
from trainfn.metric import Metric, MetricSum
from trainfn.state import Params, Report, TrainState
from trainfn.step import Step, generators, surroundings
from trainfn.tree import Tree, describe, evolve, named_leaves

_MOST_COPIED = 2**16  # elements: uncompiled, gradients of larger tensors cost more to join than a call of a kernel does
_MOST_SHAPES = 4  # of a batch, that programs are compiled for, up to a minute each: more is no habit that ends
_MOST_SURPRISES = 3  # programs compiled again for no new shape, before that is taken as a habit


class CompileWarning(UserWarning):
    """Compilation did something the user may want to know: fell back to eager, or ran a second time."""


def compile(
    step: Step,
    *,
    mode: Mode = "auto",
    donate: bool = False,
    cuda_graph: Asked = False,
    steps: int | None = None,
    backend: str = "inductor",
) -> CompiledStep:
    """Return a step of the same signature and the same numbers, made to run fast.

    A compiled program notices when a Python value that it was made of changes, and is made anew. It does not notice
    exchanged submodules, hooks and functions, and attributes of classes: make another step then.

    Nothing is compiled before the first call; that call, and the first one for each new batch shape, takes seconds.
    Four shapes get a program. Batches of any further one are run in eager, to the same numbers, and a warning lists the
    shapes and says what helps: a run is not to be spent compiling, nor to be ended for it.

    Args:
        step: from :func:`trainfn.make_step`.
        mode: ``"graph"``, ``"accum"``, ``"split"``, ``"eager"``, or ``"auto"``, which chooses from the device, the
            size of the model, what it accumulates and recomputes, and ``steps``. If the model cannot be compiled,
            ``auto`` says so and goes on in ``eager``.
        donate: write the new state into the old one's memory. The old state is consumed: any use of it raises. Tensors
            that were taken out of it, and shallow copies, see the new numbers.
        cuda_graph: replay the step as one CUDA graph (:mod:`trainfn.engine.cudagraph`): ``"auto"`` where a few steps
            timed both ways show that it is faster, True always, False never. It needs donated states on a GPU. Not the
            default, because it has not been run on one yet.
        steps: how many steps will be run, if known; short runs do not earn their compilation.
        backend: a ``torch.compile`` backend.

    Raises:
        ConfigError: an unknown mode; or one that cannot recompute, of a step with ``checkpoint=``.
        CompileError: (from the call, ``mode="graph"``) the step does not compile as one program; ``cuda_graph=True``,
            and the step cannot be captured.

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
    if cuda_graph != "auto" and not isinstance(cuda_graph, bool):
        raise ConfigError("This is no answer.", got=f"cuda_graph={cuda_graph!r}", expected='"auto", True or False')
    check_donated(cuda_graph, donate)
    if step.checkpoint and mode in ("graph", "accum"):
        raise ConfigError(
            "This mode does not recompute activations.",
            where=", ".join(step.checkpoint),
            expected='mode "split", "eager" or "auto"',
            got=f"{mode!r}: where forward and backward are one program, the compiler sees the same work twice, does it "
            "once, and keeps the result",
            hint='pass compile="split" to fit, or mode="split" to trainfn.compile; or leave out checkpoint=',
        )
    return CompiledStep(step, mode=mode, donate=donate, steps=steps, backend=backend, cuda_graph=cuda_graph)


class CompiledStep:
    """A step that runs in a chosen mode; called like the step it was made from.

    Attributes:
        step: the step it means.
        mode: one of the modes, or ``"auto"`` until the first call has shown the device.
        reason: why this mode, and why a CUDA graph or none.
        donate: whether a state given is consumed.
        cuda_graph: whether one was asked for.
        compiles: how often a call had to compile.
        compile_seconds: what that has cost, first calls included.
    """

    def __init__(
        self, step: Step, *, mode: Mode, donate: bool, steps: int | None, backend: str, cuda_graph: Asked = False
    ) -> None:
        self.step, self.donate, self.backend, self.cuda_graph = step, donate, backend, cuda_graph
        self.mode: Mode = mode
        self._why, self._why_called = "as asked", ""
        self._capturing: Capturing | None = None  # on a GPU, once the first call has shown it
        self._settled = False
        self.compiles, self.compile_seconds = 0, 0.0
        self._may_fall_back, self._steps = mode == "auto", steps
        self._forms: dict[Hashable, _Form] = {}  # by signature of the state
        self._surprises = 0

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        """Return the state after one step; see :class:`trainfn.step.Step`."""
        cursor = state.cursor  # of a consumed state, this raises
        if not self._settled:
            self.settle(state)
        with attending(self.step.attention):
            after = self._run(state, batch, cursor) or self._run(state, batch, cursor)  # the second one in eager
        assert after is not None
        if self.donate:
            _consume(state)
        return after

    def evaluate(
        self, state: TrainState, batch: Batch, *, metrics: Sequence[Metric] = (), params: Params | None = None
    ) -> dict[str, LossSum | MetricSum]:
        """Return the sums of one batch, as :meth:`trainfn.step.Step.evaluate` does."""
        return self.step.evaluate(state, batch, metrics=metrics, params=params)

    def settle(self, state: TrainState) -> tuple[Mode, str]:
        """Decide what ``auto`` means for this state's device, once; return the mode and the reason."""
        if not self._settled:
            device = state.step.device
            if self.mode == "auto":
                self.mode, self._why = choose(device, self.step, self._steps)
            made = make_capturing(self.cuda_graph, device, donate=self.donate, mode=self.mode)
            (self._capturing, self._why_called), self._settled = made, True
        return self.mode, self.reason

    @property
    def reason(self) -> str:
        why = self._why_called if self._capturing is None else self._capturing.reason
        return f"{self._why}; {why}" if why else self._why

    def _run(self, state: TrainState, batch: Batch, cursor: int) -> TrainState | None:
        """Run the program. None: it cannot be compiled, and ``auto`` goes on in eager."""
        held = self._hold(state)
        if not self.donate:
            held = _Held(held.form, held.form.layout.copy(held.packed))
        report = self._report(state, held, batch)
        if report is None:
            return None
        return held.state(report, state.seed, cursor + 1)

    def _report(self, state: TrainState, held: _Held, batch: Batch) -> Report | None:
        form = held.form
        if self.mode == "eager":
            return self._eager_run(state, held, batch)
        key = _signature(batch)
        if key not in form.draws and len(form.draws) >= _MOST_SHAPES:
            is_news, found = form.eager is None, self._eager_run(state, held, batch)
            if is_news:
                shapes = "; ".join([*form.shapes, describe(batch)])
                text = (
                    f"Batches of {len(form.draws)} shapes have a compiled program; those of any other shape are now "
                    f"run in eager, which is slower. Seen: {shapes}. Batches of few shapes help: drop_last=True for a "
                    "short last one, padding to one length, or to a few (buckets)"
                )
                warnings.warn(text, CompileWarning, stacklevel=4)
            return found
        report = self._known_run(state, held, batch, key) if key in form.draws else None
        return self._first_run(state, held, batch, key) if report is None else report

    def _eager_run(self, state: TrainState, held: _Held, batch: Batch) -> Report:
        form = held.form
        if form.eager is None:
            form.eager = make_program("eager", self.step, form.layout, held.packed, self.backend)
        with surroundings(self.step.model, state, training=True):
            if self.mode == "eager" and self._capturing is not None:
                return self._captured(self._capturing, form.eager, held, batch, _signature(batch))
            return form.eager(held, batch)

    def _hold(self, state: TrainState) -> _Held:
        """Return the packs that a state is a view of; for a state from elsewhere, new ones."""
        held = state.__dict__.get("_held")
        if isinstance(held, _Held) and held.form.owner is self:
            return held
        key = _signature(evolve(state, seed=0, cursor=0, report=None))  # no step reads the last report
        if key not in self._forms:
            if state.step.device.type == "cpu":
                keep_pages()
            most = _MOST_COPIED if self.mode == "eager" else None
            self._forms[key] = _Form(self, Layout(state, self.step.optimizer, most=most))
        return _Held(self._forms[key], self._forms[key].layout.pack(state))

    def _known_run(self, state: TrainState, held: _Held, batch: Batch, key: Hashable) -> Report | None:
        """Run a program that has been compiled for such a batch. None: it has to be compiled again."""
        form = held.form
        assert form.program is not None
        try:
            draws = form.draws[key]
            if draws is not None:
                with surroundings(self.step.model, state, training=True, draws=draws), self._unchanged():
                    if self._capturing is not None:
                        return self._captured(self._capturing, form.program, held, batch, key)
                    return form.program(held, batch)
            # Whether it draws at all is looked at once: to seed the generators costs 20 us.
            with surroundings(self.step.model, state, training=True):
                before = [generator.get_state() for generator in generators(state)]
                report = form.program(held, batch)
                after = [generator.get_state() for generator in generators(state)]
                form.draws[key] = not all(map(torch.equal, before, after))
                return report
        except Exception as error:
            # Something else that the program was made for has changed, and to compile needs what _first_run sets.
            if not type(error).__module__.startswith("torch._dynamo") and "fail_on_recompile" not in str(error):
                raise
        return None

    def _unchanged(self) -> AbstractContextManager[Any]:
        """Make it an error to compile. Programs that differentiate cannot, but a forward alone would, and unseeded.

        Where activations are recomputed it is left alone: there, PyTorch itself has frames looked at in the backward.
        """
        watched = self.mode == "split" and not self.step.checkpoint
        return torch.compiler.set_stance("fail_on_recompile") if watched else nullcontext()

    @staticmethod
    def _captured(capturing: Capturing, program: Program, held: _Held, batch: Batch, key: Hashable) -> Report:
        return capturing.run(held.cases, key, held.packed, batch, lambda given: program(held, given))

    def _first_run(self, state: TrainState, held: _Held, batch: Batch, key: Hashable) -> Report | None:
        """Run the program where it has to be compiled first. None: it cannot be, and ``auto`` goes on in eager."""
        began, form = time.perf_counter(), held.form
        reason = f"for batches of {describe(batch)}. Batches of one shape need one program: padding, buckets, drop_last"
        if key in form.draws:
            reason = "though the batch's shape is known: something in Python that the model or loss reads has changed"
            self._surprises += 1
        with surroundings(self.step.model, state, training=True), torch.no_grad():
            # A mistake in the batch or the model shows here as itself, not as a failure of the compiler.
            buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
            self.step.loss(state.params, buffers, micro_batches(batch, self.step.accumulate)[0])
        if form.program is None:
            with collecting_young():  # PyTorch imports its compiler
                mode = cast(ProgramMode, self.mode)
                form.program = make_program(mode, self.step, form.layout, held.packed, self.backend)
        failure: Exception | None = None
        try:
            if self._surprises > _MOST_SURPRISES:
                raise RuntimeError("something in Python that the model or the loss reads changes from step to step")
            with surroundings(self.step.model, state, training=True), compiling(self.step.attention, self.backend):
                report = form.program(held, batch)
        except (TrainfnError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            failure = error
        if failure is not None:
            self.step(state, batch)  # a mistake in the loss or the settings is raised here as itself, too
            self._refuse(failure)
            self.settle(state)
            for other in self._forms.values():  # states are packed anew, for eager
                other.owner = None
            self._forms.clear()
            return None
        self.compiles += 1
        seconds = time.perf_counter() - began
        self.compile_seconds += seconds
        if self.compiles > 1:
            warnings.warn(f"Another program was compiled, in {seconds:.1f} s, {reason}", CompileWarning, stacklevel=5)
        if key not in form.draws:
            form.shapes.append(describe(batch))
        form.draws = dict.fromkeys([*form.draws, key])  # what draws nothing may do so in another program
        return report

    def _refuse(self, error: Exception) -> None:
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not self._may_fall_back:
            raise CompileError(
                "The step does not compile as one program.",
                got=f"{type(error).__name__}: {summary}",
                hint='pass compile="eager" to fit, or mode="eager" to trainfn.compile; the cause is shown above',
            ) from error
        self.mode, self._why, self._settled = "eager", f"it does not compile as one program ({summary})", False
        warnings.warn(f"Going on in eager mode: {self._why}", CompileWarning, stacklevel=6)


@attrs.define(eq=False)
class _Form:
    """States of one structure: how they are packed, and the program for them.

    Attributes:
        owner: the compiled step.
        layout: how they are packed.
        program: once there is one.
        draws: for each kind of batch that it was compiled for, whether it draws random numbers; None if not yet known.
        shapes: those kinds of batch, for people.
        eager: what runs in eager mode, and batches of more shapes than are compiled for.
    """

    owner: CompiledStep | None
    layout: Layout
    program: Program | None = None
    draws: dict[Hashable, bool | None] = attrs.field(factory=dict)
    shapes: list[str] = attrs.field(factory=list)
    eager: Program | None = None


class _Held(Held):
    """A state of some form, and the recordings over its packs."""

    def __init__(self, form: _Form, packed: Packed) -> None:
        super().__init__(form.layout, packed)
        self.form = form
        self.cases: Cases = {}


def _consume(state: TrainState) -> None:
    cursor, fields = state.cursor, state.__dict__
    fields.clear()  # what nobody else holds is free now
    fields["_batch"] = cursor
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
        (name, leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
        if isinstance(leaf, Tensor)
        else (name, leaf)
        for name, leaf in named_leaves(tree)
    )
