"""Programs: a step over packs, compiled, that writes the state it is given.

    program(tensors, views, batch) -> Report

``tensors`` are those of a :class:`trainfn.engine.layout.Packed`, in a row, and ``views`` the state that they are. What
a step changes is written in place, which costs nothing: the compiler stores results where the inputs were.

| mode | programs |
|---|---|
| ``eager`` | none is compiled: autograd, and PyTorch's fused kernels for the update |
| ``graph`` | one: forward, backward, merging, update |
| ``accum`` | two: gradients added to sums in place, called for each micro-batch; and the update |
| ``split`` | two: the forward, with the backward that PyTorch's partitioner makes of it; and the update |
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from trainfn.batch import Batch, micro_batches
from trainfn.engine.cache import kept_programs
from trainfn.engine.layout import Layout, Packed
from trainfn.grad import Gradients, fold, make_gradients_of, make_loss, merge
from trainfn.recompute import recomputing
from trainfn.state import Buffers, Params, Report, TrainState
from trainfn.step import Step
from trainfn.tree import evolve, leaf_norms, map_leaves, named_leaves, select, widened
from trainfn.update import Update

Program = Callable[[list[Tensor], TrainState, Batch], Report]
ProgramMode = Literal["eager", "graph", "split", "accum"]

_SMALL = 200_000  # heuristic, trained parameters: below, a step is about as short as the calls it consists of
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
def compiling() -> Iterator[None]:
    """Set what the compiler needs to differentiate inside a program, and where programs are kept.

    Only calls that compile need it.
    """
    from torch._dynamo import config

    with kept_programs(), config.patch(trace_autograd_ops=True, recompile_limit=MOST_PROGRAMS):
        yield


class _Tensors:
    """The tensors of the packed states of one form, in a row."""

    def __init__(self, layout: Layout, form: Packed) -> None:
        places = iter(range(sum(1 for _ in named_leaves(form))))
        self.layout, self._places = layout, map_leaves(lambda leaf: next(places), form)
        leaves = [leaf for _, leaf in named_leaves(form)]
        size = sum(leaf.numel() for leaf in form.params.values())
        self.is_wide = any(param.dtype == torch.float64 for param in form.params.values())
        # On a CPU a wrapper in C++ takes 100 us off a call and adds seconds to a compilation: for short steps.
        self.is_small = size <= _SMALL and all(leaf.device.type == "cpu" for leaf in leaves)

    def update(self, step: Step) -> Update:
        return attrs.evolve(step.update, optimizer=self.layout.optimizer)

    def packed(self, tensors: list[Tensor]) -> Packed:
        return map_leaves(lambda place: tensors[place], self._places)

    def apply(self, update: Update, tensors: list[Tensor], found: Gradients, norms: Tensor) -> Report:
        """Write the state after an update with gradients in packs, and return its report."""
        after = update(self.layout.packs(self.packed(tensors)), found, norms)
        written = evolve(self._places, frozen={})
        for (_, place), (_, new) in zip(named_leaves(written), named_leaves(self.layout.written(after)), strict=True):
            if new is not tensors[place]:
                _copy(tensors[place], new)
        return after.report


def _eager(step: Step, form: _Tensors, backend: Any) -> Program:
    layout, update = form.layout, form.update(step)
    fused = None if form.is_wide else update.optimizer.fused

    def program(tensors: list[Tensor], views: TrainState, batch: Batch) -> Report:
        parts = micro_batches(batch, step.accumulate)
        named = fold(step.gradients, views.params, views.buffers, parts, scale=views.scale)
        with torch.no_grad():
            norms, found = leaf_norms(named.grads), layout.joined(named)
            if fused is None:
                return form.apply(update, tensors, found, norms)
            state = layout.packs(form.packed(tensors))
            decision = update.decide(state, found, norms)
            applied, factor = decision.applied, decision.factor
            fused(state.params, _scaled(layout, found.grads, factor, state.params), state.opt, state.step, applied)
            if state.ema is not None:
                share = torch.where(applied, update.average_share(state.step), 0.0)
                for name, mean in state.ema.items():
                    mean.lerp_(state.params[name].detach().to(mean.dtype), share.to(mean.dtype))
            after = update.conclude(state, found, decision)
            for name, buffer in select(applied, found.buffers, state.buffers).items():
                state.buffers[name].copy_(buffer)
            old, new = (list(layout.counters(each).values()) for each in (state, after))
            torch._foreach_copy_(old, new)
            return after.report

    return program


def _graph(step: Step, form: _Tensors, backend: Any) -> Program:
    layout, update = form.layout, form.update(step)

    def whole(tensors: list[Tensor], batch: Batch) -> Report:
        params, buffers, scale = layout.inputs(form.packed(tensors))
        found = fold(step.gradients, params, buffers, micro_batches(batch, step.accumulate), scale=scale)
        return form.apply(update, tensors, layout.joined(found), leaf_norms(found.grads))

    compiled = _compiled(whole, form, backend)

    def program(tensors: list[Tensor], views: TrainState, batch: Batch) -> Report:
        report: Report = compiled(tensors, batch)
        return report

    return program


def _accum(step: Step, form: _Tensors, backend: Any) -> Program:
    layout, update = form.layout, form.update(step)

    def begin(tensors: list[Tensor], sums: Gradients, batch: Batch) -> None:
        params, buffers, scale = layout.inputs(form.packed(tensors))
        _write(sums, layout.joined(step.gradients(params, buffers, batch, scale=scale)))

    def add(tensors: list[Tensor], sums: Gradients, batch: Batch) -> None:
        params, _, scale = layout.inputs(form.packed(tensors))
        found = step.gradients(params, layout.split_buffers(sums.buffers), batch, scale=scale)
        _write(sums, merge(sums, layout.joined(found)))

    def finish(tensors: list[Tensor], sums: Gradients) -> Report:
        own = evolve(sums, weight=sums.weight.clone())  # the report says the weight, and sums are written again
        return form.apply(update, tensors, own, leaf_norms(layout.split(sums.grads)))

    beginning, adding, finishing = (_compiled(fn, form, backend) for fn in (begin, add, finish))
    # Kept from step to step: memory that is new each time costs more, page by page, than the sums in it.
    kept: list[Gradients] = []

    def program(tensors: list[Tensor], views: TrainState, batch: Batch) -> Report:
        if not kept:
            kept.append(_room(form.packed(tensors)))
        first, *rest = micro_batches(batch, step.accumulate)
        beginning(tensors, kept[0], first)
        for part in rest:
            adding(tensors, kept[0], part)
        report: Report = finishing(tensors, kept[0])
        return report

    return program


def _split(step: Step, form: _Tensors, backend: Any) -> Program:
    layout, update = form.layout, form.update(step)
    loss = make_loss(step.model, step.strategy, step.precision, step.checkpoint)

    def forward(params: Params, buffers: Buffers, batch: Batch) -> Any:
        return loss(params, buffers, batch)

    def finish(tensors: list[Tensor], found: Gradients) -> Report:
        return form.apply(update, tensors, layout.joined(found), leaf_norms(found.grads))

    gradients = make_gradients_of(_compiled(forward, form, backend))
    finishing = _compiled(finish, form, backend)

    def program(tensors: list[Tensor], views: TrainState, batch: Batch) -> Report:
        parts = micro_batches(batch, step.accumulate)
        with recomputing(step.model, step.checkpoint):
            found = fold(gradients, views.params, views.buffers, parts, scale=views.scale)
        report: Report = finishing(tensors, found)
        return report

    return program


def _scaled(layout: Layout, found: Params, factor: Tensor, params: Params) -> Params:
    """Return gradients times ``factor`` in the parameters' dtypes.

    Those that were joined are in memory of our own and are multiplied there. The others may be anyone's: a backward may
    return the batch itself.
    """
    scaled = {}
    for name, grad in found.items():
        share = factor.to(grad.dtype)
        scaled[name] = (grad.mul_(share) if layout.is_joined(name) else grad * share).to(params[name].dtype)
    return scaled


def _room(packed: Packed) -> Gradients:
    """Return room for sums of gradients, in packs; 16-bit ones are added up in float32."""
    home = next(iter(packed.rest.values())).device
    wide = torch.float32 if home.type == "mps" else torch.float64
    with torch.no_grad():
        return Gradients(
            grads={
                name: torch.zeros_like(widened(param), requires_grad=False) for name, param in packed.params.items()
            },
            total=torch.zeros((), dtype=wide, device=home),
            weight=torch.zeros((), dtype=wide, device=home),
            micro_batches=torch.zeros((), dtype=torch.int64, device=home),
            buffers={name: buffer.clone() for name, buffer in packed.buffers.items()},
        )


def _write(old: Gradients, new: Gradients) -> None:
    for (_, left), (_, right) in zip(named_leaves(old), named_leaves(new), strict=True):
        _copy(left, right)


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
        options |= {"size_asserts": False, "cpp_wrapper": form.is_small}
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)
    return compiled


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Keep the guards on the batch, and on Python values that a model, a loss or an optimizer reads.

    The hundreds of others would take longer than a small step. A state's tensors are of one form, which the caller has
    seen to. What goes unnoticed are hooks, submodules and functions that are exchanged after compiling.
    """
    return [
        entry.name.startswith("batch")
        or (entry.guard_type in _VALUES and not any(part in entry.name for part in _INTERNAL))
        for entry in entries
    ]


_VALUES = {"CONSTANT_MATCH", "EQUALS_MATCH", "SEQUENCE_LENGTH"}
_INTERNAL = ("__import_torch", "__import_trainfn", "__import_attr", "__import_contextlib", "type(", "form.", "layout.")
