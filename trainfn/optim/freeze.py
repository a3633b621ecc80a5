"""``freeze``: parameters that stay as they are.

update = 0    where predicate(name, param);    the gradient elsewhere
"""

from __future__ import annotations

from torch import Tensor

from trainfn.optim.settings import Rule, call, check
from trainfn.optim.transform import Frozen, Transform, keep_frozen
from trainfn.state import Params
from trainfn.tree import Tree


def freeze(predicate: Frozen) -> Transform:
    """Return the Transform that freezes some parameters and hands on the gradients of the others.

    In a ``chain`` or as a part of ``partition`` it keeps the frozen ones from every other part: they have no state,
    their gradients are in no norm, weight decay does not reach them, and ``param + update`` is ``param``, bit for bit.

    Args:
        predicate: ``(name, param) -> bool``, which parameters are frozen; the same for one name at every step.

    Returns:
        A Transform whose ``frozen`` is the predicate.

    Raises:
        ConfigError: the predicate is no function. From ``init``: it freezes everything.

    >>> import torch
    >>> from trainfn.optim import adamw, chain
    >>> optimizer = chain(freeze(lambda name, param: name.startswith("backbone.")), adamw(lr=0.1))
    >>> params = {"backbone.weight": torch.ones(1), "head.weight": torch.ones(1)}
    >>> state = optimizer.init(params)
    >>> list(state[1].mu)
    ['head.weight']
    >>> updates, state = optimizer.update(params, state, params, torch.tensor(0))
    >>> [float(params[name] + updates[name]) == 1.0 for name in params]
    [True, False]
    """
    check("freeze", {"predicate": (predicate, Rule("a function of (name, parameter)", callable))})

    def update(grads: Params, state: Tree, params: Params, step: Tensor) -> tuple[Params, Tree]:
        return grads, state

    plain = Transform(lambda params: (), update, call("freeze", predicate))
    return keep_frozen(plain._replace(frozen=predicate, bind=lambda _: plain))
