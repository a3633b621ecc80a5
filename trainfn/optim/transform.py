"""``Transform``: an optimizer, or a part of one, as a pair of pure functions.

    init   : params -> opt_state
    update : (grads, opt_state, params, step) -> (updates, opt_state)

``params + updates`` are the new parameters. All trees are ``dict[str, Tensor]`` over the trained parameters; ``step``
is the [] int64 number of updates applied before this one. An elementwise Transform does not care whether a tensor is
one parameter or many parameters laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainfn.state import Params
from trainfn.tree import Tree

Schedule = Callable[[Tensor], Tensor]
"""From updates applied, [] int64, to a hyper-parameter, [] float64. A pure function."""


class Transform(NamedTuple):
    """A pair of pure functions, what learning rate they use, and what they are called.

    Attributes:
        init: ``params -> opt_state``.
        update: ``(grads, opt_state, params, step) -> (updates, opt_state)``.
        name: the call that made it, with its settings: its identity in run headers and checkpoints.
        lr: ``step -> []`` the learning rate, for reports; None where there is no such thing.
    """

    init: Callable[[Params], Tree]
    update: Callable[[Params, Tree, Params, Tensor], tuple[Params, Tree]]
    name: str
    lr: Schedule | None = None


def chain(*transforms: Transform) -> Transform:
    """Apply Transforms one after another: the updates of each are the gradients of the next.

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
    name = f"chain({', '.join(transform.name for transform in transforms)})"
    return Transform(init, update, name, rates[-1] if rates else None)


def wide(step: Tensor) -> Tensor:
    """Return the step as a [] float64 (float32 where the device has none), the precision of schedules."""
    return step.to(torch.float32 if step.device.type == "mps" else torch.float64)
