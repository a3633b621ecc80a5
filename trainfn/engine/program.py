"""Programs: a step over packs, compiled, that writes the state it is given.

    program(tensors, batch) -> Report

``tensors`` are those of a :class:`trainfn.engine.layout.Packed`, in a row; those that a step changes are written in
place, which costs nothing: the compiler stores results where the inputs were.

| mode | programs |
|---|---|
| ``graph`` | one: forward, backward, merging, update |
| ``accum`` | two: gradients added to sums in place, called for each micro-batch; and the update |
| ``split`` | two: the forward, with the backward that PyTorch's partitioner makes of it; and the update |
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from trainfn.batch import Batch, micro_batches
from trainfn.engine.layout import Layout, Packed
from trainfn.grad import Gradients, fold, make_gradients_of, merge
from trainfn.state import Buffers, Params, Report
from trainfn.step import Step
from trainfn.tree import evolve, leaf_norms, map_leaves, named_leaves, widened

Program = Callable[[list[Tensor], Batch], Report]
ProgramMode = Literal["graph", "split", "accum"]

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
    make = {"graph": _graph, "accum": _accum, "split": _split}[mode]
    return make(step, _Tensors(layout, form), backend)


@contextmanager
def compiling() -> Iterator[None]:
    """Set what the compiler needs to differentiate inside a program; only calls that compile need it."""
    from torch._dynamo import config

    with config.patch(trace_autograd_ops=True, recompile_limit=MOST_PROGRAMS):
        yield


class _Tensors:
    """The tensors of the packed states of one form, in a row."""

    def __init__(self, layout: Layout, form: Packed) -> None:
        places = iter(range(sum(1 for _ in named_leaves(form))))
        self.layout, self._places = layout, map_leaves(lambda leaf: next(places), form)
        leaves = [leaf for _, leaf in named_leaves(form)]
        size = sum(leaf.numel() for leaf in form.params.values())
        # On a CPU a wrapper in C++ takes 100 us off a call and adds seconds to a compilation: for short steps.
        self.is_small = size <= _SMALL and all(leaf.device.type == "cpu" for leaf in leaves)

    def packed(self, tensors: list[Tensor]) -> Packed:
        return map_leaves(lambda place: tensors[place], self._places)

    def write(self, tensors: list[Tensor], after: Packed) -> None:
        written = evolve(self._places, frozen={})
        for (_, place), (_, new) in zip(named_leaves(written), named_leaves(after), strict=True):
            _copy(tensors[place], new)


def _graph(step: Step, form: _Tensors, backend: Any) -> Program:
    layout, update = form.layout, step.update_with(form.layout.optimizer)

    def program(tensors: list[Tensor], batch: Batch) -> Report:
        packed = form.packed(tensors)
        params, buffers, scale = layout.inputs(packed)
        found = fold(step.gradients, params, buffers, micro_batches(batch, step.accumulate), scale=scale)
        after = update(layout.packs(packed), layout.joined(found), norms=leaf_norms(found.grads))
        form.write(tensors, layout.written(after))
        return after.report

    return _compiled(program, form, backend)


def _accum(step: Step, form: _Tensors, backend: Any) -> Program:
    layout, update = form.layout, step.update_with(form.layout.optimizer)

    def gather(tensors: list[Tensor], sums: Gradients, batch: Batch) -> None:
        params, _, scale = layout.inputs(form.packed(tensors))
        found = step.gradients(params, layout.split_buffers(sums.buffers), batch, scale=scale)
        added = merge(sums, layout.joined(found))
        for (_, old), (_, new) in zip(named_leaves(sums), named_leaves(added), strict=True):
            _copy(old, new)

    def finish(tensors: list[Tensor], sums: Gradients) -> Report:
        packed = form.packed(tensors)
        after = update(layout.packs(packed), sums, norms=leaf_norms(layout.split(sums.grads)))
        form.write(tensors, layout.written(after))
        return after.report

    gathering, finishing = _compiled(gather, form, backend), _compiled(finish, form, backend)

    def program(tensors: list[Tensor], batch: Batch) -> Report:
        sums = _zeros(form.packed(tensors))
        for part in micro_batches(batch, step.accumulate):
            gathering(tensors, sums, part)
        report: Report = finishing(tensors, sums)
        return report

    return program


def _split(step: Step, form: _Tensors, backend: Any) -> Program:
    layout, update = form.layout, step.update_with(form.layout.optimizer)

    def forward(params: Params, buffers: Buffers, batch: Batch) -> Any:
        return step.loss(params, buffers, batch)

    def finish(tensors: list[Tensor], found: Gradients) -> Report:
        packed = form.packed(tensors)
        after = update(layout.packs(packed), layout.joined(found), norms=leaf_norms(found.grads))
        form.write(tensors, layout.written(after))
        return after.report

    gradients = make_gradients_of(_compiled(forward, form, backend))
    finishing = _compiled(finish, form, backend)

    def program(tensors: list[Tensor], batch: Batch) -> Report:
        params, buffers, scale = layout.inputs(form.packed(tensors))
        found = fold(gradients, params, buffers, micro_batches(batch, step.accumulate), scale=scale)
        report: Report = finishing(tensors, found)
        return report

    return program


def _zeros(packed: Packed) -> Gradients:
    """Return the sum of no gradients, in packs, with the buffers that the first micro-batch sees."""
    with torch.no_grad():
        home = next(iter(packed.rest.values())).device
        wide = torch.float32 if home.type == "mps" else torch.float64
        return Gradients(
            grads={
                name: torch.zeros_like(widened(param), requires_grad=False) for name, param in packed.params.items()
            },
            total=torch.zeros((), dtype=wide, device=home),
            weight=torch.zeros((), dtype=wide, device=home),
            micro_batches=torch.zeros((), dtype=torch.int64, device=home),
            buffers={name: buffer.clone() for name, buffer in packed.buffers.items()},
        )


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
