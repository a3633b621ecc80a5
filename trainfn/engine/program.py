"""Programs: a step over packs, compiled, that writes the state it is given.

    program(held, batch) -> Report

What a step changes of a :class:`trainfn.engine.held.Held` state is written in place, which costs nothing: the compiler
stores results where the inputs were.

| mode | programs |
|---|---|
| ``eager`` | none is compiled: autograd, and PyTorch's fused kernels for the update |
| ``graph`` | one: forward, backward, merging, update |
| ``accum`` | two: the gradients of a micro-batch, called for each; and the update |
| ``split`` | two: the forward, with the backward that PyTorch's partitioner makes of it; and the update |

Between two programs, gradients are joined and added up by :mod:`trainfn.engine.sums`.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from trainfn.batch import Batch, micro_batches
from trainfn.engine.cache import kept_programs
from trainfn.engine.choice import SMALL
from trainfn.engine.held import Held
from trainfn.engine.layout import Layout, Packed
from trainfn.engine.memory import collecting_young
from trainfn.engine.passes import passes
from trainfn.engine.sums import summed
from trainfn.grad import Gradients, GradientsFn, fold, make_gradients_of, make_loss
from trainfn.precision import LossScale
from trainfn.recompute import recomputing
from trainfn.state import Buffers, Params, Report
from trainfn.step import Step
from trainfn.tree import evolve, leaves, map_leaves, select
from trainfn.update import Update

Program = Callable[[Held, Batch], Report]
ProgramMode = Literal["eager", "graph", "split", "accum"]

MOST_PROGRAMS = 64  # batch shapes for which a program is kept


def make_program(mode: ProgramMode, step: Step, layout: Layout, form: Packed, backend: Any) -> Program:
    """Return the program of a mode. Nothing is compiled before its first call, which belongs inside :func:`compiling`.

    Args:
        mode: which.
        step: what it means.
        layout: how its states are packed.
        form: any packed state, for its structure.
        backend: of ``torch.compile``.
    """
    make = {"eager": _eager, "graph": _graph, "accum": _accum, "split": _split}[mode]
    return make(step, _Tensors(layout, form), backend)


@contextmanager
def compiling(attention: str, backend: Any) -> Iterator[None]:
    """Set what the compiler needs to differentiate inside a program, and where those of Inductor are kept.

    Only calls that compile need it. Programs with another kernel of attention are kept apart: PyTorch's key to what it
    keeps does not hold the choice (2.13), and the first one compiled would be all that ever ran.
    """
    from torch._dynamo import config
    from torch.compiler import config as kept

    tag = kept.cache_key_tag if attention == "auto" else f"{kept.cache_key_tag} attention={attention}"
    differentiating = config.patch(trace_autograd_ops=True, recompile_limit=MOST_PROGRAMS)
    keeping = kept_programs() if backend == "inductor" else nullcontext()
    with collecting_young(), keeping, differentiating, kept.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        yield


class _Tensors:
    """The tensors of the packed states of one form, in a row."""

    def __init__(self, layout: Layout, form: Packed) -> None:
        places = iter(range(len(leaves(form))))
        self.layout, self._places = layout, map_leaves(lambda leaf: next(places), form)
        self._written = leaves(evolve(self._places, frozen={}))
        tensors = leaves(form)
        size = sum(leaf.numel() for leaf in form.params.values())
        # PyTorch's kernels that write in place read scalars in float32; on a CPU that of SGD leaves most of a 16-bit
        # parameter unwritten (2.13). They take what belongs together to lie in memory alike.
        alike = [role[name].stride() == form.params[name].stride() for role in layout.roles(form.opt) for name in role]
        self.has_kernels = all(alike) and all(
            param.dtype == torch.float32 or (param.is_cuda and param.dtype != torch.float64)
            for param in form.params.values()
        )
        # On a CPU a wrapper in C++ takes 100 us off a call and adds seconds to a compilation: for short steps.
        self.is_small = size <= SMALL and all(leaf.device.type == "cpu" for leaf in tensors)

    def update(self, step: Step) -> Update:
        return attrs.evolve(step.update, optimizer=self.layout.optimizer)

    def packed(self, tensors: list[Tensor]) -> Packed:
        return map_leaves(lambda place: tensors[place], self._places)

    def apply(self, update: Update, tensors: list[Tensor], found: Gradients, norms: Tensor) -> Report:
        """Write the state after an update with gradients in packs, and return its report."""
        after = update(self.layout.packs(self.packed(tensors)), found, norms)
        for place, new in zip(self._written, leaves(self.layout.written(after)), strict=True):
            if new is not tensors[place]:
                _copy(tensors[place], new)
        return after.report


def _eager(step: Step, form: _Tensors, backend: Any) -> Program:
    layout, update = form.layout, form.update(step)
    fused = update.optimizer.fused if form.has_kernels and not layout.is_lowered else None
    joined = {pack.name for pack in layout.trained if pack.is_joined}

    def scaled(name: str, grad: Tensor, factor: Tensor, param: Tensor) -> Tensor:
        """Return a gradient times a factor, laid out as its parameter is: kernels take it for granted.

        What was joined is ours, and written over. What a backward returns may lie otherwise, or be anyone's: the batch.
        """
        if name in joined and grad.dtype == param.dtype:
            return grad.mul_(factor)
        return torch.mul(grad, factor, out=torch.empty_like(param))

    def program(held: Held, batch: Batch) -> Report:
        found = summed(layout, step.gradients, held.views, micro_batches(batch, step.accumulate))
        if found.buffers or len(joined) < len(layout.trained):  # what is joined is apart
            found = held.apart(found)
        with torch.no_grad():
            found, norms = layout.joined_buffers(found), layout.norms(found.grads)
            if fused is None:
                return form.apply(update, held.tensors, found, norms)
            before = held.packs
            decision = update.decide(before, found, norms)
            write = fused(before.step, decision.report.lr, decision.skipped)
            share = update.average_share(before.step, decision.skipped) if before.ema is not None else None
            for piece in held.pieces:
                grads = piece.part(found.grads)
                grads = {name: scaled(name, grad, decision.factor, piece.params[name]) for name, grad in grads.items()}
                write(piece.params, grads, piece.opt)
                if share is not None and piece.ema is not None:
                    _average(piece.ema, piece.params, share)
            for name, buffer in select(decision.applied, found.buffers, before.buffers).items():
                before.buffers[name].copy_(buffer)
            torch._foreach_copy_(held.counters, leaves(update.counted(before, found, decision)))
            return decision.report

    return program


def _graph(step: Step, form: _Tensors, backend: Any) -> Program:
    layout, update = form.layout, form.update(step)

    def whole(tensors: list[Tensor], batch: Batch) -> Tensor:
        params, buffers, scale = layout.inputs(form.packed(tensors))
        found = layout.joined(fold(step.gradients, params, buffers, micro_batches(batch, step.accumulate), scale=scale))
        return form.apply(update, tensors, found, layout.norms(found.grads)).row

    compiled = _compiled(whole, form, backend)

    def program(held: Held, batch: Batch) -> Report:
        return Report.of(compiled(held.tensors, batch))

    return program


def _accum(step: Step, form: _Tensors, backend: Any) -> Program:
    def one(params: Params, buffers: Buffers, batch: Batch, scale: LossScale | None) -> Gradients:
        return step.gradients(params, buffers, batch, scale=scale)

    compiled = _compiled(one, form, backend)

    def gradients(params: Params, buffers: Buffers, batch: Batch, /, scale: LossScale | None = None) -> Gradients:
        found: Gradients = compiled(params, buffers, batch, scale)
        return found

    return _in_two(step, form, backend, gradients)


def _split(step: Step, form: _Tensors, backend: Any) -> Program:
    loss = make_loss(step.model, step.strategy, step.precision, step.checkpoint)

    def forward(params: Params, buffers: Buffers, batch: Batch) -> Any:
        return loss(params, buffers, batch)

    program = _in_two(step, form, backend, make_gradients_of(_compiled(forward, form, backend)))

    def recomputed(held: Held, batch: Batch) -> Report:
        with recomputing(step.model, step.checkpoint):
            return program(held, batch)

    return recomputed if step.checkpoint else program


def _in_two(step: Step, form: _Tensors, backend: Any, gradients: GradientsFn) -> Program:
    """Return the program that takes gradients by one of its own, joins them, and compiles the update."""
    layout, update = form.layout, form.update(step)

    def finish(tensors: list[Tensor], found: Gradients) -> Tensor:
        return form.apply(update, tensors, layout.joined_buffers(found), layout.norms(found.grads)).row

    finishing = _compiled(finish, form, backend)

    def program(held: Held, batch: Batch) -> Report:
        found = held.apart(summed(layout, gradients, held.inputs, micro_batches(batch, step.accumulate)))
        return Report.of(finishing(held.tensors, found))

    return program


def _average(means: Params, params: Params, share: Tensor) -> None:
    for name, mean in means.items():
        mean.lerp_(params[name].to(mean.dtype), share.to(mean.dtype))


def _copy(old: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        if old.ndim == 0:  # a copy straight into a [] float64 input is lost (torch 2.11, 2.13); not by a view
            old, new = old.view(1), new.view(1)
        old.copy_(new)


def _compiled(fn: Callable[..., Any], form: _Tensors, backend: Any) -> Callable[..., Any]:
    # Programs are cached by code object, up to a limit: each step gets one of its own.
    assert isinstance(fn, types.FunctionType)
    own = types.FunctionType(fn.__code__.replace(), fn.__globals__, closure=fn.__closure__)
    options: dict[str, Any] = {"guard_filter_fn": _guards}
    if backend == "inductor":
        options |= {"size_asserts": False, "cpp_wrapper": form.is_small, "post_grad_custom_post_pass": passes()}
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)
    return compiled


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Keep the guards on the batch, and on Python values that a model, a loss or an optimizer reads.

    The hundreds of others would take longer than a small step. A state's tensors are of one form, which the caller has
    seen to. What goes unnoticed after compiling are hooks, submodules and functions that are exchanged, attributes of
    classes that change, and attributes that are set for the first time.
    """
    return [
        entry.name.startswith("batch") or (entry.guard_type in _VALUES and not _INTERNAL.search(entry.name))
        for entry in entries
    ]


_VALUES = {"CONSTANT_MATCH", "EQUALS_MATCH", "SEQUENCE_LENGTH"}
_INTERNAL = re.compile(r"__import_(torch|trainfn|attr|contextlib)|type\(|^(form|layout)\.|\._rooms\b")
