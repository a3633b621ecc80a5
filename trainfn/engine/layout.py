"""Packs: leaves of one role and dtype, laid end to end in one flat buffer.

    params = {"a": [2, 3], "b": [3]}   ->   {"a": [32]}: a, padding, b, padding

A program then takes and updates a handful of buffers, however many tensors a model has: its host cost does not grow
with their number, and the update is one loop over memory. What a user sees are views into the packs.

Trained parameters share a pack where the optimizer treats them alike (see ``Transform.bind``); their moments and
averages are packed as they are. A parameter that the optimizer looks at the shape of, or that is not contiguous, is a
pack of its own, in its own shape. Frozen parameters stay where they are. Counters and statistics are packed by dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from operator import itemgetter
from typing import Any

import attrs
import torch
from torch import Tensor

from trainfn.grad import Gradients
from trainfn.norms import leaf_norms, row_norms
from trainfn.optim.transform import Predicate, Transform, bound
from trainfn.precision import LossScale
from trainfn.state import Buffers, Params, TrainState, trainable
from trainfn.tree import Tree, evolve, leaves, map_leaves, map_named, named_leaves, record

_ALIGNMENT = 64  # bytes: a cache line, and what vector and tensor instructions ask for


@record
class Packed:
    """A state in packs: what a program takes.

    Attributes:
        params: packs of trained parameters; they require grad.
        frozen: frozen parameters, by name, as they are.
        buffers: packs of buffers.
        opt: the optimizer's state, packs in place of parameters.
        ema: packs of averages, or None.
        rest: counters, scale and statistics, by dtype.
    """

    params: Params
    frozen: Params
    buffers: Buffers
    opt: Tree
    ema: Params | None
    rest: dict[str, Tensor]


@attrs.frozen
class Slot:
    """Where a leaf is in a pack, in elements: its room is its size and a gap of zeros."""

    name: str
    shape: torch.Size
    start: int
    room: int
    gap: int

    def view(self, flat: Tensor) -> Tensor:
        """Return the leaf in a pack."""
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


@attrs.frozen
class Pack:
    """Leaves that share a buffer, called like the first of them. A pack of one has the shape of its leaf."""

    slots: tuple[Slot, ...]
    _gaps: set[int] = attrs.field(init=False, repr=False, eq=False)  # their sizes, of which few differ
    _pieces: list[str | int] = attrs.field(init=False, repr=False, eq=False)  # leaves by name, gaps by size, in order

    @_gaps.default
    def _found_gaps(self) -> set[int]:
        return {slot.gap for slot in self.slots if slot.gap}

    @_pieces.default
    def _found_pieces(self) -> list[str | int]:
        return [piece for slot in self.slots for piece in (slot.name, slot.gap) if piece != 0]

    @property
    def name(self) -> str:
        return self.slots[0].name

    @property
    def is_joined(self) -> bool:
        """Whether several leaves share it."""
        return len(self.slots) > 1

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the leaves in a pack by name, as views."""
        if not self.is_joined:
            return {self.name: flat}
        return {slot.name: slot.view(flat) for slot in self.slots}

    def rows(self) -> tuple[int, list[int]]:
        """Return the length of rows into which a pack of several can be cut, and how many of them each leaf has."""
        length = math.gcd(*(slot.room for slot in self.slots)) or 1
        return length, [slot.room // length for slot in self.slots]

    def join(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Return the pack of these leaves, in new memory if they are several; zeros fill the room between them."""
        if not self.is_joined:
            return leaves[self.name]
        first = leaves[self.name]
        zeros = {gap: first.new_zeros(gap) for gap in self._gaps}
        flatten: Callable[..., Tensor] = torch._utils._flatten_dense_tensors
        # Looked up, reshaped and joined by two calls from Python, however many there are.
        return flatten(itemgetter(*self._pieces)({**leaves, **zeros}))


def counters(state: TrainState) -> dict[str, Tree]:
    """Return the counters, the loss scale and the statistics of a state."""
    counts = {"step": state.step, "scale": state.scale, "health": state.health, "stats": state.stats}
    return counts | {"lr_factor": state.lr_factor}


class Layout:
    """How the states of one structure are packed.

    Args:
        state: any state of the structure.
        optimizer: says which parameters it treats alike.
        most: elements of the largest parameter that shares a pack; any size if None.

    Attributes:
        optimizer: the Transform that does the same to packs.
        trained: the packs of trained parameters.
        is_lowered: whether updates are multiplied by a factor, which no fused kernel does.

    >>> import trainfn
    >>> optimizer = trainfn.optim.adamw(decay=trainfn.optim.matrices_only)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> state = trainfn.init(model, optimizer)
    >>> packed = Layout(state, optimizer).pack(state)
    >>> {name: tuple(pack.shape) for name, pack in packed.params.items()}
    {'0.weight': (32,), '0.bias': (32,)}
    """

    def __init__(self, state: TrainState, optimizer: Transform, *, most: int | None = None) -> None:
        params = trainable(state.params)
        answers: list[dict[str, Hashable]] = []

        def choose(predicate: Predicate) -> Callable[[str, Tensor], Any]:
            given = {name: predicate(name, param) for name, param in params.items()}
            answers.append(given)
            return lambda name, param: given[name]

        self.optimizer = bound(optimizer, choose)
        self._trained_names = dict.fromkeys(params)
        alone = {name: name for name, param in params.items() if most is not None and param.numel() > most}
        self.trained = _packs(params, lambda name: (alone.get(name), *(given[name] for given in answers)))
        if not all(self._fits(role) for role in self.roles(state.opt)):
            self.trained = _packs(params, lambda name: name)
        self._buffers = _packs(state.buffers, lambda name: None)
        self._rest = _packs(dict(named_leaves(counters(state))), lambda name: None)
        self.is_lowered = state.lr_factor is not None
        self._names, self._buffer_names = tuple(state.params), tuple(state.buffers)
        self._by_name = {pack.name: pack for pack in self.trained}
        self._rows = {pack.name: pack.rows()[0] for pack in self.trained if pack.is_joined}
        self._owners = self._owners_of_rows(params)
        # A form without tensors, which a trace would make inputs of, and look into: it would trace all a second time.
        form = evolve(state, params={}, buffers={}, ema=None, opt=(), report=None)
        self._form = map_named(lambda name, leaf: name if isinstance(leaf, Tensor) else leaf, form)

    def pack(self, state: TrainState) -> Packed:
        """Return the state's numbers in packs, in new memory but for what is frozen."""
        with torch.no_grad():
            packed = Packed(
                params={pack.name: pack.join(trainable(state.params)) for pack in self.trained},
                frozen={name: param for name, param in state.params.items() if not param.requires_grad},
                buffers=_joined(self._buffers, state.buffers),
                opt=self.map_roles(self._joined, state.opt),
                ema=None if state.ema is None else self._joined(state.ema),
                rest=_joined(self._rest, dict(named_leaves(counters(state)))),
            )
            given = set(map(id, leaves(state)))
            return _own(packed, lambda leaf: leaf.detach().clone() if id(leaf) in given else leaf)

    def copy(self, packed: Packed) -> Packed:
        """Return the packs in new memory, but for what is frozen."""
        with torch.no_grad():
            return _own(packed, lambda leaf: leaf.detach().clone())

    def inputs(self, packed: Packed) -> tuple[Params, Buffers, LossScale | None]:
        """Return what the forward and backward read: parameters and buffers by name, as views, and the loss scale."""
        return (
            packed.frozen | self.split(packed.params),
            self.split_buffers(packed.buffers),
            self._numbers(packed)["scale"],
        )

    def views(self, packed: Packed) -> TrainState:
        """Return the state that packs hold, as views into them; its report, seed and cursor are to be filled in."""
        with torch.no_grad():
            params, buffers, _ = self.inputs(packed)
            for name, param in params.items():
                if name not in packed.frozen:
                    params[name] = param.detach().requires_grad_()
            return evolve(
                self._form,
                params={name: params[name] for name in self._names},
                buffers={name: buffers[name] for name in self._buffer_names},
                opt=self.map_roles(self.split, packed.opt),
                ema=None if packed.ema is None else self.split(packed.ema),
                **self._numbers(packed),
            )

    def packs(self, packed: Packed) -> TrainState:
        """Return the state that ``update`` takes: packs in place of leaves, counters as they are."""
        return evolve(
            self._form,
            params=packed.params,
            buffers=packed.buffers,
            opt=packed.opt,
            ema=packed.ema,
            **self._numbers(packed),
        )

    def joined(self, found: Gradients) -> Gradients:
        """Return gradients in packs, their buffers too."""
        return self.joined_buffers(evolve(found, grads=self._joined(found.grads)))

    def joined_buffers(self, found: Gradients) -> Gradients:
        """Return gradients that are in packs with their buffers in packs, too."""
        return evolve(found, buffers=_joined(self._buffers, found.buffers)) if self._buffers else found

    def norms(self, packs: Params) -> Tensor:
        """Return the 2-norm of each gradient in packs, [trained parameters] float64, in the state's order."""
        rows = [
            row_norms(packs[pack.name].view(-1, self._rows[pack.name]))
            if pack.name in self._rows
            else leaf_norms(packs[pack.name])
            for pack in self.trained
        ]
        squares = (rows[0] if len(rows) == 1 else torch.cat(rows)).square()
        return squares.new_zeros(len(self._trained_names)).index_add_(0, self._owners, squares).sqrt_()

    def written(self, after: TrainState) -> Packed:
        """Return what ``update`` returned in the form of a :class:`Packed`, leaf by leaf what a program writes."""
        return Packed(
            params=after.params,
            frozen={},
            buffers=after.buffers,
            opt=after.opt,
            ema=after.ema,
            rest=_joined(self._rest, dict(named_leaves(counters(after)))),
        )

    def split(self, packs: Params) -> Params:
        """Return what is in packs of trained parameters, by name, as views."""
        named: Params = {}
        for name, pack in packs.items():
            named |= self._by_name[name].split(pack)
        return {name: named[name] for name in self._trained_names if name in named}

    def split_buffers(self, packs: Buffers) -> Buffers:
        """Return what is in packs of buffers, by name, as views."""
        return _split(self._buffers, packs)

    def _numbers(self, packed: Packed) -> dict[str, Any]:
        rest = _split(self._rest, packed.rest)
        return map_named(lambda name, leaf: rest[name], counters(self._form))

    def _joined(self, leaves: Params) -> Params:
        return {pack.name: pack.join(leaves) for pack in self.trained if pack.name in leaves}

    def _owners_of_rows(self, params: Params) -> Tensor:
        """Return for each row that is measured which parameter it is of."""
        places = {name: place for place, name in enumerate(params)}
        slots = [slot for pack in self.trained for slot in pack.slots]
        counts = [count for pack in self.trained for count in (pack.rows()[1] if pack.is_joined else [1])]
        owners = torch.tensor([places[slot.name] for slot in slots]).repeat_interleave(torch.tensor(counts))
        return owners.to(next(iter(params.values())).device)

    def _fits(self, role: Params) -> bool:
        """Whether what an optimizer keeps for parameters lies in memory as they do, where these share a pack."""
        for pack in self.trained:
            held = [role.get(slot.name) for slot in pack.slots]
            if len(held) == 1 or all(one is None for one in held):
                continue
            kept = [one for one in held if one is not None and one.is_contiguous()]
            if len(kept) < len(held) or len({one.dtype for one in kept}) > 1:
                return False
            if any(one.shape != slot.shape for one, slot in zip(kept, pack.slots, strict=True)):
                return False
        return True

    def roles(self, tree: Tree) -> list[Params]:
        """Return every dict of tensors by parameters' names in an optimizer's state."""
        found: list[Params] = []

        def note(role: Params) -> Params:
            found.append(role)
            return role

        self.map_roles(note, tree)
        return found

    def map_roles(self, fn: Callable[[Params], Params], tree: Tree) -> Tree:
        """Apply ``fn`` to every dict of tensors by parameters' names, such as the first moments, of an optimizer."""
        return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, dict) else leaf, tree, is_leaf=self._is_role)

    def _is_role(self, node: Any) -> bool:
        return isinstance(node, dict) and all(
            isinstance(leaf, Tensor) and name in self._trained_names for name, leaf in node.items()
        )


def _own(packed: Packed, own: Callable[[Tensor], Tensor]) -> Packed:
    made = map_leaves(own, evolve(packed, frozen={}))
    for param in made.params.values():
        param.requires_grad_()
    return evolve(made, frozen=packed.frozen)


def _packs(leaves: Mapping[str, Tensor], key: Callable[[str], Hashable]) -> tuple[Pack, ...]:
    """Return packs of the leaves that have one key, dtype and device; what is not contiguous is alone."""
    groups: dict[Hashable, list[str]] = {}
    for name, leaf in leaves.items():
        alone = name if not leaf.is_contiguous() else None
        groups.setdefault((key(name), leaf.dtype, leaf.device, alone), []).append(name)
    packs = []
    for names in groups.values():
        slots, start = [], 0
        rooms = {name: _room(leaves[name]) for name in names}
        for name in sorted(names, key=lambda name: rooms[name]):  # of one size side by side: their norms are one loop
            slots.append(Slot(name, leaves[name].shape, start, rooms[name], rooms[name] - leaves[name].numel()))
            start += rooms[name]
        packs.append(Pack(tuple(slots)))
    return tuple(packs)


def _room(leaf: Tensor) -> int:
    each = max(1, _ALIGNMENT // leaf.element_size())
    return -(-leaf.numel() // each) * each


def _joined(packs: Iterable[Pack], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {pack.name: pack.join(leaves) for pack in packs}


def _split(packs: Iterable[Pack], flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for pack in packs:
        named |= pack.split(flats[pack.name])
    return named
