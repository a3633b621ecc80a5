"""``partition``: another Transform for each group of parameters.

state   = {label: transforms[label].init(the parameters of that label)}
updates = the union over labels of transforms[label].update(...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from trainfn.errors import ConfigError
from trainfn.optim.settings import describe
from trainfn.optim.transform import Choose, Predicate, Transform, bound, keep_frozen
from trainfn.state import Params
from trainfn.tree import Tree

Labels = Callable[[str, Tensor], str]
"""From a parameter's name and the parameter to its label. Reads shape and dtype, not data."""


_INPUTS = {
    "emb",
    "embed",
    "embedding",
    "embeddings",
    "pos",
    "position",
    "positions",
    "tok",
    "token",
    "tokens",
    "wpe",
    "wte",
}
_OUTPUTS = {"bias", "classifier", "head", "score", "shared", "unembed"}
_LAST = {"fc.weight", "logits.weight", "output.weight"}  # of the model itself; inside a block they are hidden layers


def matrices_and_others(name: str, param: Tensor) -> str:
    """Label the matrices of hidden layers ``"matrices"``, which is what Muon is for, and all else ``"others"``.

    Embeddings and heads are told by the words in their names ("embed", "wte", "head", "classifier", ...), which is a
    heuristic: where a model calls them otherwise, write a function of your own.

    >>> import torch
    >>> names = ("wte.weight", "blocks.0.multihead_attn.in_proj_weight", "lm_head.weight")
    >>> [matrices_and_others(name, torch.ones(2, 2)) for name in names]
    ['others', 'matrices', 'others']
    >>> matrices_and_others("blocks.0.norm.weight", torch.ones(2))
    'others'
    """
    words = {word for part in name.split(".") for word in part.lower().split("_")}
    is_hidden = not words & (_INPUTS | _OUTPUTS) and name not in _LAST
    return "matrices" if param.ndim == 2 and is_hidden else "others"


def partition(labels: Labels, transforms: Mapping[str, Transform]) -> Transform:
    """Apply to each parameter the Transform of its label. The learning rate reported is that of the first that has one.

    A Transform freezes among the parameters of its own label, ``freeze`` in place of an optimizer included.

    Args:
        labels: ``(name, param) -> label``; the same for one name at every step.
        transforms: by label. Those whose label no parameter has do nothing and have no state.

    Raises:
        ConfigError: there are no transforms. From ``init``: a label has none; every such parameter is listed.

    >>> import torch
    >>> from trainfn.optim import adamw, muon
    >>> optimizer = partition(matrices_and_others, {"matrices": muon(lr=0.02), "others": adamw(lr=3e-4)})
    >>> params = {"embed.weight": torch.ones(5, 2), "hidden.weight": torch.ones(2, 2), "hidden.bias": torch.ones(2)}
    >>> state = optimizer.init(params)
    >>> [sorted(state["matrices"].momentum), sorted(state["others"].mu)]
    [['hidden.weight'], ['embed.weight', 'hidden.bias']]
    >>> updates, state = optimizer.update(params, state, params, torch.tensor(0))
    >>> updates["hidden.bias"]
    tensor([-0.0003, -0.0003])
    """
    if not transforms:
        raise ConfigError("partition has no Transform to choose from.", expected="one or more", got=repr(transforms))
    transforms = dict(transforms)

    def init(params: Params) -> Tree:
        _check_labels(labels, transforms, params)
        return {label: transforms[label].init(group) for label, group in _groups(labels, transforms, params).items()}

    def update(grads: Params, state: Tree, params: Params, step: Tensor) -> tuple[Params, Tree]:
        updates, new = {}, {}
        for label, group in _groups(labels, transforms, params).items():
            own = {name: grads[name] for name in group}
            changed, new[label] = transforms[label].update(own, state[label], group, step)
            updates.update(changed)
        return {name: updates[name] for name in grads}, new

    def frozen(name: str, param: Tensor) -> bool:
        own = transforms.get(labels(name, param))  # a label without a Transform is for init to report
        return own is not None and own.frozen is not None and own.frozen(name, param)

    def bind(choose: Choose) -> Transform:
        def within(label: str) -> Choose:
            def choose_there(predicate: Predicate) -> Callable[[str, Tensor], Any]:
                return choose(lambda name, param: predicate(name, param) if labels(name, param) == label else None)

            return choose_there

        by_name = choose(labels)
        return partition(by_name, {label: bound(transform, within(label)) for label, transform in transforms.items()})

    some = any(transform.frozen is not None for transform in transforms.values())
    parts = ", ".join(f"{label!r}: {transform.name}" for label, transform in transforms.items())
    name = f"partition({describe(labels)}, {{{parts}}})"
    lr = next((transform.lr for transform in transforms.values() if transform.lr is not None), None)
    return keep_frozen(Transform(init, update, name, lr, frozen if some else None, bind))


def _groups(labels: Labels, transforms: Mapping[str, Transform], params: Params) -> dict[str, Params]:
    """The parameters by label, in the order of the transforms; labels that no parameter has are left out."""
    given = {name: labels(name, param) for name, param in params.items()}
    groups = {label: {name: params[name] for name in params if given[name] == label} for label in transforms}
    return {label: group for label, group in groups.items() if group}


def _check_labels(labels: Labels, transforms: Mapping[str, Transform], params: Params) -> None:
    given = {name: labels(name, param) for name, param in params.items()}
    unknown = {name: label for name, label in given.items() if label not in transforms}
    if unknown:
        raise ConfigError(
            "A parameter's label has no Transform.",
            where=", ".join(unknown),
            expected=f"one of {', '.join(map(repr, transforms))}",
            got=", ".join(f"{name}: {label!r}" for name, label in unknown.items()),
        )
