"""``Transform``: an optimizer, or a part of one, as a pair of pure functions.

    init   : params -> opt_state
    update : (grads, opt_state, params, step) -> (updates, opt_state)

``params + updates`` are the new parameters. All trees are ``dict[str, Tensor]`` over the trained parameters; ``step``
is the [] int64 number of updates applied before this one. An elementwise Transform does not care whether a tensor is
one parameter or many parameters laid end to end.

A hyper-parameter is a number or a schedule. Each update reads it once with :func:`value_at`: a number stays a Python
number, a constant of the compiled program; a schedule gives a 0-d tensor in the precision of schedules, with which the
scalars of the step are computed, and :func:`narrow` brings to a parameter's dtype what meets its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.state import Params
from trainfn.tree import Tree, wide_float

Schedule = Callable[[Tensor], Tensor]
"""From updates applied, [] int64, to a hyper-parameter, [] float64. A pure function."""

Hyper = float | Schedule
"""A hyper-parameter: a number, or a schedule of it."""

Scalar = float | Tensor
"""A hyper-parameter at one step: the number, or what its schedule gives, [] float64."""

Frozen = Callable[[str, Tensor], bool]
"""From a parameter's name and the parameter to whether it stays as it is. Reads shape and dtype, nothing else."""


Predicate = Callable[[str, Tensor], Hashable]
"""A choice by parameter: of whether it is decayed, of its label. Reads name, shape and dtype, nothing else."""

Choose = Callable[[Predicate], Callable[[str, Tensor], Any]]
"""Takes a predicate, and returns one that gives the same answers by the name alone."""


Fused = Callable[[Tensor, Tensor, Tensor], Callable[[Params, Params, Any], None]]
"""``(step, lr, skipped) -> (params, grads, opt_state) -> None``: an update that is written into ``params`` and
``opt_state``, or nothing where ``skipped``, [] bool, is true; ``lr`` is what the Transform's own gives at ``step``.
What it returns may be called for one part of the elements after another, which lie in memory alike in all that it is
given. For steps that are not compiled, and parameters in float32 or less."""


class Transform(NamedTuple):
    """A pair of pure functions, what learning rate they use, what they are called, and what they leave alone.

    Attributes:
        init: ``params -> opt_state``.
        update: ``(grads, opt_state, params, step) -> (updates, opt_state)``.
        name: the call that made it, with its settings: its identity in run headers and checkpoints.
        lr: ``step -> []`` the learning rate, for reports; None where there is no such thing.
        frozen: ``(name, param) -> bool``, which parameters are not to be trained; None for none. A Transform made of
            others keeps these from all of them, see :func:`chain`.
        bind: ``choose -> Transform``, the same ``update`` with every predicate replaced by ``choose(predicate)``; None
            if it looks at shapes. Parameters for which all choices are alike may then be laid end to end, and updated
            as one tensor under the name of any of them: ``update`` is elementwise, but for norms over all tensors.
        fused: the same update, by a kernel of PyTorch's that writes in place, see :data:`Fused`; None where there is no
            such kernel.
    """

    init: Callable[[Params], Tree]
    update: Callable[[Params, Tree, Params, Tensor], tuple[Params, Tree]]
    name: str
    lr: Schedule | None = None
    frozen: Frozen | None = None
    bind: Callable[[Choose], Transform] | None = None
    fused: Fused | None = None


def chain(*transforms: Transform) -> Transform:
    """Apply Transforms one after another: the updates of each are the gradients of the next.

    What one of them freezes is kept from all of them, earlier ones too: it has no state, its gradient is in no norm,
    and its update is zero.

    >>> from trainfn.optim import clip_by_global_norm, sgd
    >>> optimizer = chain(clip_by_global_norm(1.0), sgd(lr=0.5))
    >>> params = {"w": torch.zeros(2)}
    >>> grads = {"w": torch.tensor([3.0, 4.0])}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params, torch.tensor(0))
    >>> updates["w"]
    tensor([-0.3000, -0.4000])
    """

    def init(params: Params) -> Tree:
        return tuple(transform.init(params) for transform in transforms)

    def update(grads: Params, state: Tree, params: Params, step: Tensor) -> tuple[Params, Tree]:
        new_states = []
        for transform, old in zip(transforms, state, strict=True):
            grads, new = transform.update(grads, old, params, step)
            new_states.append(new)
        return grads, tuple(new_states)

    rates = [transform.lr for transform in transforms if transform.lr is not None]
    choices = [transform.frozen for transform in transforms if transform.frozen is not None]

    def frozen(name: str, param: Tensor) -> bool:
        return any(choice(name, param) for choice in choices)

    def bind(choose: Choose) -> Transform:
        return chain(*[bound(transform, choose) for transform in transforms])

    name = f"chain({', '.join(transform.name for transform in transforms)})"
    whole = Transform(init, update, name, rates[-1] if rates else None, frozen if choices else None, bind)
    return keep_frozen(whole)


def bound(transform: Transform, choose: Choose) -> Transform:
    """Return the Transform with its predicates bound, none of its parameters being frozen; one that looks at shapes as
    it is, and then each parameter is a choice of its own.

    >>> from trainfn.optim import adamw, lamb, matrices_only
    >>> params = {"a": torch.ones(2, 2), "b": torch.ones(3, 3), "c": torch.ones(2)}
    >>> def chosen_by(transform):
    ...     found = []
    ...     def choose(predicate):
    ...         found.append([predicate(name, param) for name, param in params.items()])
    ...         return predicate
    ...     bound(transform, choose)
    ...     return found
    >>> chosen_by(adamw(decay=matrices_only)), chosen_by(adamw()), chosen_by(lamb())
    ([[True, True, False]], [], [['a', 'b', 'c']])
    """
    if transform.bind is not None:
        return transform.bind(choose)
    choose(lambda name, param: name)
    return transform


def keep_frozen(transform: Transform) -> Transform:
    """Return ``transform`` such that it sees no parameter that it calls frozen, and the updates of those are zero.

    Their gradients may be given or left out.

    Raises:
        ConfigError: from ``init``: every parameter is frozen.

    >>> from trainfn.optim import sgd
    >>> optimizer = keep_frozen(sgd(lr=0.5)._replace(frozen=lambda name, param: name == "v"))
    >>> params = {"v": torch.ones(1), "w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init(params), params, torch.tensor(0))[0]
    {'v': tensor([-0.]), 'w': tensor([-0.5000])}
    """
    frozen = transform.frozen
    if frozen is None:
        return transform

    def trained(params: Params) -> Params:
        return {name: param for name, param in params.items() if not frozen(name, param)}

    def init(params: Params) -> Tree:
        active = trained(params)
        if params and not active:
            raise ConfigError(
                "The optimizer freezes every parameter: nothing is left to train.",
                where=", ".join(params),
                expected="a parameter for which the predicate given to freeze is false",
                got=transform.name,
                hint="let the predicate of freeze(lambda name, param: ...) name fewer parameters",
            )
        return transform.init(active)

    def update(grads: Params, state: Tree, params: Params, step: Tensor) -> tuple[Params, Tree]:
        active = trained(params)
        own = {name: grad for name, grad in grads.items() if name in active}
        updates, state = transform.update(own, state, active, step)
        # -0.0 and not 0.0: a parameter of -0.0 plus 0.0 is 0.0, another bit pattern.
        return {name: updates[name] if name in own else torch.full_like(params[name], -0.0) for name in grads}, state

    return transform._replace(init=init, update=update)


def rebind(make: Callable[[Any], Transform], predicate: Predicate | None) -> Callable[[Choose], Transform]:
    """Return the ``bind`` of a Transform that ``make`` makes of its one predicate."""
    return lambda choose: make(None if predicate is None else choose(predicate))


def value_at(setting: Hyper, step: Tensor) -> Scalar:
    """Return a hyper-parameter at ``step``: a number as it is, of a schedule its value, [] float64.

    >>> value_at(0.9, torch.tensor(3)), value_at(lambda step: step / 4.0, torch.tensor(3))
    (0.9, tensor(0.7500))
    """
    return scheduled(setting, step) if callable(setting) else setting


def scheduled(schedule: Callable[[Tensor], Any], step: Tensor) -> Tensor:
    """Return what a schedule gives at ``step``, [] float64; a number is made a tensor.

    Raises:
        ConfigError: it is neither a number nor a tensor of no dimensions.

    >>> scheduled(lambda step: min(1.0, (step + 1) / 2), torch.tensor(9))
    tensor(1., dtype=torch.float64)
    """
    value = schedule(step)
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    if isinstance(value, (int, float)):
        return torch.full_like(step, value, dtype=wide_float(step))
    raise ConfigError(
        "A schedule gives something that is no number.",
        where=getattr(schedule, "__qualname__", None) or repr(schedule),
        expected="a tensor of no dimensions, or a number",
        got=repr(value),
    )


def wide(step: Tensor) -> Tensor:
    """Return the step as a [] float64 (float32 where the device has none), the precision of schedules."""
    return step.float() if step.device.type == "mps" else step.double()  # half a microsecond sooner than by to()


def narrow(value: Scalar, dtype: torch.dtype) -> Scalar:
    """Return a scalar for arithmetic with tensors of ``dtype``: a number as it is, a tensor in that dtype.

    Without it a parameter of no dimensions would take the scalar's dtype.

    >>> narrow(0.9, torch.float32), narrow(wide(torch.tensor(3)), torch.float32).dtype
    (0.9, torch.float32)
    """
    return value.to(dtype) if isinstance(value, Tensor) else value
