"""Trees of tensors: the ``@record`` decorator, names of leaves, and the few maps everything else is written with.

A *tree* is a tensor, ``None``, a ``dict``, ``list`` or ``tuple`` of trees, or a record (a class made by
:func:`record`). The trees that matter most are ``dict[str, Tensor]`` keyed by ``named_parameters()`` names. A leaf's
*name* is the dotted path to it, and the same name stands in checkpoints and error messages.

This is the one module that touches ``torch.utils._pytree``, whose name is private to PyTorch. It is what ``vmap`` and
``torch.compile`` consult, so records are registered there.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast, dataclass_transform

import attrs
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

from trainfn.errors import DataError

Tree = Any
"""A tensor, None, or a dict, list, tuple or record of trees."""

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False, field_specifiers=(attrs.field,))
def record(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only value that ``torch.compile`` can build and that PyTorch sees as a pytree.

    attrs' own frozen ``__init__`` cannot be traced by ``torch.compile(fullgraph=True)``; a plain one that calls
    ``object.__setattr__`` can, so that is what gets written here. ``evolve`` works inside and outside compiled
    code, and assigning to a field raises ``attrs.exceptions.FrozenInstanceError``. There is no ``==``: a comparison
    of tensors is not a truth value.

    Raises:
        TypeError: a field's default is a tensor or a mutable container. It would be shared by every instance and
            changed by the first program that runs in place.

    >>> @record
    ... class Pair:
    ...     left: Tensor
    ...     right: int = 0
    >>> evolve(Pair(left=torch.ones(2)), right=3)
    Pair(left=tensor([1., 1.]), right=3)
    """
    made: Any = attrs.define(cls, frozen=True, init=False, eq=False, kw_only=True, slots=False)
    fields = attrs.fields(made)
    for field in fields:
        if isinstance(field.default, (Tensor, dict, list, set, attrs.Factory)):  # type: ignore[arg-type]
            raise TypeError(f"{cls.__name__}.{field.name}: a record field cannot have a {type(field.default)} default")
    made.__init__ = _make_init(made)
    names = made.__record_fields__ = tuple(field.name for field in fields)
    torch_pytree.register_pytree_node(
        made,
        lambda value: ([getattr(value, name) for name in names], None),
        lambda children, _context: made(**dict(zip(names, children, strict=True))),
        flatten_with_keys_fn=lambda value: (
            [(torch_pytree.GetAttrKey(name), getattr(value, name)) for name in names],
            None,
        ),
        serialized_type_name=f"{made.__module__}.{made.__qualname__}",
    )
    return cast(type[T], made)


def evolve(value: T, **changes: Any) -> T:
    """Return a copy of a record with some fields replaced.

    >>> @record
    ... class Pair:
    ...     left: int
    ...     right: int
    >>> evolve(Pair(left=1, right=2), right=3)
    Pair(left=1, right=3)
    """
    made: Any = type(value)
    return cast(T, made(**{name: getattr(value, name) for name in made.__record_fields__} | changes))


def named_leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted name, leaf)`` for every leaf that is not None, in the order in which they were written.

    >>> [name for name, _ in named_leaves({"a": {"w": torch.ones(1)}, "b": (torch.ones(1), None)})]
    ['a.w', 'b.0']
    """
    found: list[tuple[str, Any]] = []
    _note(tree, prefix, found)
    return iter(found)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves that are not None, in the order of :func:`named_leaves`.

    >>> leaves({"a": {"w": 1}, "b": (2, None)})
    [1, 2]
    """
    found: list[Any] = []
    _gather(tree, found)
    return found


def map_named(fn: Callable[[str, Any], Any], tree: T, prefix: str = "") -> T:
    """Return a tree of the same structure whose leaves are ``fn(dotted name, leaf)``; None stays None.

    >>> map_named(lambda name, leaf: name, {"a": {"w": 1}, "b": (2, None)})
    {'a': {'w': 'a.w'}, 'b': ('b.0', None)}
    """
    if not _is_node(tree):
        return cast(T, None if tree is None else fn(prefix, tree))
    return cast(T, _rebuild(tree, [map_named(fn, child, _join(prefix, key)) for key, child in _children(tree)]))


def map_leaves(fn: Callable[..., Any], tree: T, *rest: Tree, is_leaf: Callable[[Any], bool] | None = None) -> T:
    """Return a tree whose leaves are ``fn(leaf, *leaves of rest)``; the trees have one structure, None stays None.

    Traceable by ``torch.compile``; costs Python time per leaf, so on a hot path it belongs inside a compiled program.

    Args:
        fn: takes the leaves of one place.
        tree, *rest: trees of one structure.
        is_leaf: what else to take for a leaf, asked of every node of ``tree``.

    >>> map_leaves(lambda a, b: a + b, {"w": 1, "b": None}, {"w": 2, "b": None})
    {'w': 3, 'b': None}
    >>> map_leaves(len, {"a": [1, 2], "b": {"c": [3]}}, is_leaf=lambda node: isinstance(node, list))
    {'a': 2, 'b': {'c': 1}}
    """
    if not _is_node(tree) or (is_leaf is not None and is_leaf(tree)):
        return cast(T, None if tree is None else fn(tree, *rest))
    others = [dict(_children(other)) for other in rest]
    new = [map_leaves(fn, child, *[other[key] for other in others], is_leaf=is_leaf) for key, child in _children(tree)]
    return cast(T, _rebuild(tree, new))


def map_outputs(fn: Callable[..., Any], outputs: T, *rest: Any) -> T:
    """Return outputs of a model, whatever their form, with ``fn(leaf, *leaves of rest)`` in place of each leaf.

    A tensor, tuple, list, dict or record; a dict of a class of its own, as transformers' ModelOutput; or any object, of
    which a shallow copy has other attributes.

    >>> from types import SimpleNamespace
    >>> map_outputs(lambda leaf: leaf + 1, SimpleNamespace(logits=(1, 2), loss=None))
    namespace(logits=(2, 3), loss=None)
    """
    kind = type(outputs)
    if isinstance(outputs, dict) and kind is not dict:
        others = [dict(other) for other in rest]
        fields = {name: map_outputs(fn, value, *[other[name] for other in others]) for name, value in outputs.items()}
        return kind(**fields)
    if isinstance(outputs, Tensor) or _is_node(outputs) or not hasattr(outputs, "__dict__"):
        return map_leaves(fn, outputs, *rest)
    changed = copy.copy(outputs)
    for name, value in vars(outputs).items():
        object.__setattr__(changed, name, map_leaves(fn, value, *[vars(other)[name] for other in rest]))
    return changed


def split(tree: T, sizes: Sequence[int]) -> Iterator[T]:
    """Yield trees of views of the leaves, which are divided along their first dimension into parts of these sizes.

    >>> [part["x"].tolist() for part in split({"x": torch.arange(3)}, [1, 2])]
    [[0], [1, 2]]
    """
    if tree is None or (_is_node(tree) and not _children(tree)):
        yield from itertools.repeat(tree, len(sizes))
    elif type(tree) is tuple or type(tree) is list:
        yield from map(type(tree), zip(*(split(child, sizes) for child in cast(Any, tree)), strict=True))
    elif _is_node(tree):
        columns = [split(child, sizes) for _, child in _children(tree)]
        yield from (cast(T, _rebuild(tree, list(parts))) for parts in zip(*columns, strict=True))
    else:
        yield from cast(Any, torch.split(cast(Any, tree), list(sizes)))


def select(condition: Tensor, on_true: T, on_false: T) -> T:
    """Return ``on_true`` where the 0-d bool ``condition`` holds, else ``on_false``, leaf by leaf, without a sync.

    Non-finite numbers in the branch not taken do not leak: this is ``torch.where``, not a product.

    >>> select(torch.tensor(False), {"w": torch.tensor(float("nan"))}, {"w": torch.tensor(1.0)})
    {'w': tensor(1.)}
    """
    return map_leaves(
        lambda new, old: new if new is old else torch.where(condition, new, old).to(old.dtype), on_true, on_false
    )


def widened(values: Tensor) -> Tensor:
    """Return ``values`` in the dtype that sums are made in: float64 stays, all else becomes float32.

    >>> widened(torch.ones(2, dtype=torch.bfloat16))
    tensor([1., 1.])
    """
    return values if values.dtype == torch.float64 else values.float()


def wide_float(like: Tensor) -> torch.dtype:
    """Return float64, or float32 where the tensor's device has none.

    >>> wide_float(torch.ones(1))
    torch.float64
    """
    return torch.float32 if like.device.type == "mps" else torch.float64


def batch_length(batch: Tree) -> int:
    """Return the number of examples in a batch: the length that the first dimension of every tensor shares.

    0-d tensors and leaves that are no tensors do not count. Reads shapes only, never data.

    Raises:
        DataError: leaves disagree in length (each is listed), or there is no tensor with a first dimension.

    >>> batch_length({"x": torch.ones(4, 2), "y": torch.ones(4)})
    4
    """
    lengths = {name: leaf.shape[0] for name, leaf in named_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    if not lengths:
        raise DataError(
            "The batch holds no tensor with a batch dimension.",
            expected="a tensor, tuple or dict of tensors whose first dimension counts examples",
            got=describe(batch),
        )
    if len(set(lengths.values())) > 1:
        raise DataError(
            "The batch's leaves disagree in length.",
            where="the first dimension of each tensor in the batch",
            expected="one number of examples",
            got=", ".join(f"{name}: {length}" for name, length in lengths.items()),
            hint="check the data set or the collate function that makes this batch",
        )
    return next(iter(lengths.values()))


def describe(tree: Tree) -> str:
    """Return a one-line description of a tree's fields, with dtypes and shapes, for messages.

    >>> describe({"x": torch.ones(4, 2), "y": 3})
    'x: float32[4, 2], y: int'
    """

    def one(leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        return type(leaf).__name__

    named = [f"{name}: {one(leaf)}" if name else one(leaf) for name, leaf in named_leaves(tree)]
    return ", ".join(named) or f"an empty {type(tree).__name__}"


def digest(tree: Tree) -> str:
    """Return the SHA-256 of every leaf's name, dtype, shape and bits: equal exactly when two trees are bitwise equal.

    Copies each leaf to the host. 16 hex digits are enough to print; all 64 are returned.

    >>> digest({"w": torch.zeros(1)}) == digest({"w": -torch.zeros(1)})     # 0.0 and -0.0 differ in one bit
    False
    """
    sha = hashlib.sha256()
    for name, leaf in named_leaves(tree):
        sha.update(f"{name}:{describe(leaf)}\n".encode())
        if isinstance(leaf, Tensor):
            # contiguous() leaves the stride 0 of an expanded dimension of size 1 as it is, which view() then refuses.
            whole = leaf.detach().cpu().clone(memory_format=torch.contiguous_format)
            raw = whole.reshape(-1).view(torch.uint8)
            sha.update(ctypes.string_at(raw.data_ptr(), raw.numel()) if raw.numel() else b"")
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()


def _make_init(cls: type) -> Callable[..., None]:
    """Write ``__init__(self, *, field, ...)`` out as source, as attrs and dataclasses do, so that it can be traced."""
    fields = attrs.fields(cls)
    arguments = ", ".join(f.name if f.default is attrs.NOTHING else f"{f.name}=_{f.name}" for f in fields)
    body = "".join(f"\n    object.__setattr__(self, {f.name!r}, {f.name})" for f in fields)
    scope: dict[str, Any] = {f"_{f.name}": f.default for f in fields}
    exec(f"def __init__(self, *, {arguments}):{body}", scope)  # noqa: S102
    return cast(Callable[..., None], scope["__init__"])


def _is_node(value: Any) -> bool:
    if value is None or isinstance(value, Tensor):  # torch 2.11 cannot trace hasattr of None's type; a tensor's is slow
        return False
    return isinstance(value, (dict, list, tuple)) or hasattr(type(value), "__record_fields__")


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    return [(name, getattr(node, name)) for name in node.__record_fields__]


def _rebuild(node: Any, children: list[Any]) -> Any:
    if isinstance(node, dict):
        return dict(zip(node, children, strict=True))
    if isinstance(node, (list, tuple)):
        return type(node)(*children) if hasattr(node, "_fields") else type(node)(children)
    return type(node)(**dict(zip(node.__record_fields__, children, strict=True)))


def _gather(tree: Tree, found: list[Any]) -> None:
    if _is_node(tree):
        for _, child in _children(tree):
            _gather(child, found)
    elif tree is not None:
        found.append(tree)


def _note(tree: Tree, name: str, found: list[tuple[str, Any]]) -> None:
    if _is_node(tree):
        for key, child in _children(tree):
            _note(child, _join(name, key), found)
    elif tree is not None:
        found.append((name, tree))


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)
