"""One micro-batch run again, eagerly: which tensors are not finite, and which operations made gradients so.

Hooks on the modules look at what goes into and comes out of each; hooks on the nodes of the autograd graph look at what
goes through it backwards. A node belongs to the innermost module at whose end it was first in the graph. All hooks are
removed when the replay ends, however it ends.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from trainfn.batch import Batch
from trainfn.grad import Gradients
from trainfn.precision import backward_unit
from trainfn.state import Buffers, Params, TrainState, trainable
from trainfn.step import Step, generators
from trainfn.tree import map_named, named_leaves

Key = tuple[str, str]
"""A place where tensors are: ("params" | "buffers" | "batch", leaf's name) or ("input" | "output", module's name)."""

_MEND = 0.5  # a number at which logarithms, roots and quotients are finite, and so are their derivatives
_DEPTH = 4  # how deep to look for tensors inside objects


@attrs.frozen(kw_only=True)
class Replay:
    """What was seen.

    Attributes:
        found: what the micro-batch contributes.
        bad: the places that were not finite, in order, as they were before any mending; and whether there was NaN.
        fed: modules that were given something not finite.
        callers: module -> the module that called it first.
        bad_grads: parameters whose gradient is not finite, nearest to where that began first.
        operation: (module, operation) that made a gradient non-finite; None if it cannot be told.
    """

    found: Gradients
    bad: dict[Key, bool]
    fed: frozenset[str]
    callers: dict[str, str]
    bad_grads: tuple[str, ...]
    operation: tuple[str | None, str] | None

    @property
    def outcome(self) -> tuple[bool, frozenset[str]]:
        """Whether the loss is finite, and which gradients are not."""
        return is_finite(self.found.total) and is_finite(self.found.weight), frozenset(self.bad_grads)

    @property
    def is_bad(self) -> bool:
        """Whether the step would refuse it."""
        return self.outcome != (True, frozenset())


def replay(
    step: Step,
    state: TrainState,
    buffers: Buffers,
    batch: Batch,
    draws: list[Tensor],
    mended: Collection[Key] = (),
) -> Replay:
    """Run forward and backward of one micro-batch, inside the step's surroundings, and watch.

    Args:
        step: gives the forward and the criterion.
        state: gives parameters and loss scale.
        buffers: those that the micro-batch before left. Not written to.
        batch: the micro-batch.
        draws: the generators' states before the micro-batch was first run.
        mended: places whose bad elements are made 0.5.
    """
    for generator, draw in zip(generators(state), draws, strict=True):
        generator.set_state(draw)
    watch = _Watch(step.model, mended)
    params = {name: param.view_as(param) if param.requires_grad else param for name, param in state.params.items()}
    fresh = {name: buffer.clone() for name, buffer in buffers.items()}
    views = trainable(params)
    params, fresh, batch = watch.given("params", params), watch.given("buffers", fresh), watch.given("batch", batch)
    with ExitStack() as hooks:
        watch.attach(hooks, views)
        result = step.criterion(step.forward(params, fresh, batch), batch)
        watch.closed = True
        unit = torch.ones_like(result.total)
        if state.scale is not None:
            unit = backward_unit(state.scale, result.weight.detach()).to(result.total.dtype)
        grads, flows = watch.backward(hooks, result.total, views, unit)
    grads = {name: grad / unit.to(grad.dtype) for name, grad in grads.items()}
    bad_grads, operation = watch.trace([name for name, grad in grads.items() if not is_finite(grad)], flows)
    found = Gradients(
        grads=grads,
        total=result.total.detach(),
        weight=result.weight.detach(),
        micro_batches=torch.ones((), dtype=torch.int64, device=result.total.device),
        buffers={name: buffer.detach() for name, buffer in fresh.items()},
    )
    return Replay(
        found=found,
        bad=watch.bad,
        fed=frozenset(watch.fed),
        callers=watch.callers,
        bad_grads=bad_grads,
        operation=operation,
    )


def is_finite(value: object) -> bool:
    """Return whether a tensor has neither NaN nor infinities; what is no tensor of floats has none.

    >>> is_finite(torch.tensor([1.0, float("inf")])), is_finite(torch.tensor(1)), is_finite("x")
    (False, True, True)
    """
    return not isinstance(value, Tensor) or not bool(bad_elements(value).any())


def bad_elements(tensor: Tensor) -> Tensor:
    """Return where a tensor is not finite, bool, of its shape; [] False for a quantized, sparse or meta one."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return torch.zeros((), dtype=torch.bool)
    has_few_kernels = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return ~torch.isfinite(tensor.detach().float() if has_few_kernels else tensor.detach())


class _Watch:
    """What the hooks of one replay share."""

    def __init__(self, model: nn.Module, mended: Collection[Key]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.mended = mended
        self.bad: dict[Key, bool] = {}
        self.fed: set[str] = set()
        self.callers: dict[str, str] = {}
        self.stack: list[str] = []
        self.closed = False  # activation checkpointing calls modules again in the backward
        self.nodes: dict[Node, str | None] = {}  # -> the module whose forward recorded it; None: the loss
        self.owners: dict[Node, str | None] = {}  # -> the parameter that it hands all of its gradient to

    def given(self, kind: str, tree: Any) -> Any:
        """Look at what the forward is given; return it, mended where it is to be."""
        if any(where == kind for where, _ in self.mended):
            return map_named(lambda name, leaf: self.see((kind, name), leaf), tree)
        for name, leaf in named_leaves(tree):
            self.see((kind, name), leaf)
        return tree

    def attach(self, hooks: ExitStack, views: Params) -> None:
        """Begin to watch the modules, and know the parameters' views in the graph."""
        for name, view in views.items():
            assert view.grad_fn is not None
            self.nodes[view.grad_fn], self.owners[view.grad_fn] = None, name
        for module in self.names:
            hooks.callback(module.register_forward_pre_hook(self.before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(self.after).remove)

    def backward(
        self, hooks: ExitStack, total: Tensor, views: Params, unit: Tensor
    ) -> tuple[Params, list[tuple[Node, list[bool]]]]:
        """Return the gradients, and for each operation in turn which of the gradients that it made are bad."""
        grads = {name: torch.zeros_like(view) for name, view in views.items()}
        flows: list[tuple[Node, list[bool]]] = []
        if total.grad_fn is None:
            return grads, flows

        def record(node: Node, made: Any, _given: Any) -> None:
            flows.append((node, [not is_finite(grad) for grad in made]))

        self.claim(total, None)
        for node in self.nodes.keys() - self.owners.keys():
            hooks.callback(node.register_hook(functools.partial(record, node)).remove)
        found = torch.autograd.grad(total, list(views.values()), grad_outputs=unit, allow_unused=True)
        made = {name: grad.detach() for name, grad in zip(views, found, strict=True) if grad is not None}
        return grads | made, flows

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self.names[module]
        if not self.closed:
            if self.stack:
                self.callers.setdefault(name, self.stack[-1])
            self.stack.append(name)
            if not all(is_finite(tensor) for tensor in _tensors((args, kwargs))):
                self.fed.add(name)
        return _map_tensors(_mended, (args, kwargs)) if ("input", name) in self.mended else None

    def after(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        name = self.names[module]
        outputs = self.see(("output", name), outputs)
        if not self.closed:
            self.stack.pop()
            for tensor in _tensors(outputs):
                self.claim(tensor, name)
        return outputs

    def see(self, key: Key, value: Any) -> Any:
        """Note whether there is anything bad at this place; return the value, mended if it is to be."""
        bad = [tensor for tensor in _tensors(value) if not is_finite(tensor)]
        if bad and not self.closed:
            self.bad[key] = self.bad.get(key, False) or any(bool(tensor.isnan().any()) for tensor in bad)
        return _map_tensors(_mended, value) if bad and key in self.mended else value

    def claim(self, tensor: Tensor, module: str | None) -> None:
        """Give ``module`` the nodes of the tensor's graph that no module inside it has."""
        waiting = [tensor.grad_fn]
        while waiting:
            if (node := waiting.pop()) is not None and node not in self.nodes:
                self.nodes[node] = module
                waiting.extend(following for following, _ in node.next_functions)

    def owner(self, node: Node | None) -> str | None:
        """Return the parameter that all of a node's gradient goes to, through a cast or a transpose perhaps."""
        chain: list[Node] = []
        while node is not None and node not in self.owners:
            chain.append(node)
            following = [other for other, _ in node.next_functions if other is not None]
            node = following[0] if len(following) == 1 else None
        found = None if node is None else self.owners[node]
        self.owners |= dict.fromkeys(chain, found)
        return found

    def trace(
        self, bad: list[str], flows: list[tuple[Node, list[bool]]]
    ) -> tuple[tuple[str, ...], tuple[str | None, str] | None]:
        """Return the parameters with bad gradients, the first to get one first, and the operation where it began."""
        harmful = {node for node, name in self.owners.items() if name in bad}
        first: dict[str, None] = {}
        way: list[tuple[Node, list[Node]]] = []
        for node, flags in reversed(flows):
            pairs = zip(flags, node.next_functions, strict=False)
            reached = [following for is_bad, (following, _) in pairs if is_bad and following in harmful]
            if reached:
                harmful.add(node)
                way.append((node, reached))
        for node, reached in reversed(way):
            # What leads to one parameter through another module is that module's activations, no cast or transpose.
            owners = {self.owner(other) for other in reached if self.nodes[other] in (None, self.nodes[node])}
            first |= dict.fromkeys(name for name in bad if name in owners)
        operation = (self.nodes[way[-1][0]], way[-1][0].name().rsplit("::", 1)[-1]) if way else None
        return tuple(first | dict.fromkeys(bad)), operation


def _mended(tensor: Tensor) -> Tensor:
    return tensor if is_finite(tensor) else torch.where(bad_elements(tensor), _MEND, tensor).to(tensor.dtype)


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """Yield the tensors in a module's arguments or output, inside containers and objects."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        for child in _children(value).values():
            yield from _tensors(child, depth - 1)


def _map_tensors(fn: Callable[[Tensor], Tensor], value: Any, depth: int = _DEPTH) -> Any:
    """Return a copy of the value in which each tensor that :func:`_tensors` yields is ``fn`` of it."""
    if isinstance(value, Tensor):
        return fn(value)
    children = {key: _map_tensors(fn, child, depth - 1) for key, child in _children(value).items()} if depth else {}
    if not children:
        return value
    if isinstance(value, (tuple, list)):
        made = list(children.values())
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    whole = copy.copy(value)
    if isinstance(value, dict):
        for key, child in children.items():
            whole[key] = child  # an ordered dict with attributes, as in transformers, sets those too
    else:
        vars(whole).update(children)
    return whole


def _children(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    return {} if isinstance(value, (nn.Module, type)) else getattr(value, "__dict__", {})
