"""A state as the packs that it lies in, and the forms of it that programs take.

Each form is made once: the memory of a donated state stays where it is from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from trainfn.engine.layout import Layout, Packed, counters
from trainfn.grad import Gradients
from trainfn.state import Params, Report, TrainState, trainable
from trainfn.tree import Tree, evolve, leaves, map_leaves

_MOST_AT_ONCE = 2**20  # numbers: with moments, average and gradient 20 MB, about what a CPU's cache holds


class Held:
    """A packed state.

    Attributes:
        layout: how it is packed.
        packed: its packs.
        tensors: the same, in a row.
        views: the state that a user sees; its report, seed and cursor are to be filled in.
        inputs: the same, for a compiled forward to read: parameters of equal layers are alike in all but numbers.
        packs: the state that an update takes, packs in place of leaves.
        counters: its counters, loss scale and statistics, in a row.
        pieces: what is trained, in parts.
    """

    def __init__(self, layout: Layout, packed: Packed) -> None:
        self.layout, self.packed = layout, packed
        self.tensors: list[Tensor] = leaves(packed)
        self._inputs: TrainState | None = None
        self._places: list[int] = []  # of packs
        self._begin: set[int] = set()  # where trained parameters do

    @cached_property
    def views(self) -> TrainState:
        return self.layout.views(self.packed)

    @property
    def inputs(self) -> TrainState:
        self._look()
        if self._inputs is None:
            params = {name: _alike(param) for name, param in self.views.params.items()}
            self._inputs = evolve(self.views, params=params)
        return self._inputs

    def apart(self, found: Gradients) -> Gradients:
        """Return gradients of which nothing lies where trained parameters do, which an update writes while it reads.

        Programs and autograd functions may return what they are given: of a dot product, each factor is the gradient
        of the other. And a forward may put a parameter in a buffer's place. That is copied, and nothing else.
        """
        self._look()
        if not any(map(self._is_ours, leaves(found))):  # as almost always: to rebuild them costs 7 us
            return found
        return map_leaves(lambda leaf: leaf.detach().clone() if self._is_ours(leaf) else leaf, found)

    def _is_ours(self, leaf: Tensor) -> bool:
        return leaf.untyped_storage().data_ptr() in self._begin

    def _look(self) -> None:
        """Forget where packs were if they are elsewhere: ``share_memory_()``, or a queue of processes, moves them."""
        places = [pack.data_ptr() for pack in self.packed.params.values()]
        if places != self._places:
            self._places, self._inputs = places, None
            self._begin = {param.data_ptr() for param in trainable(self.views.params).values() if param.numel()}

    def state(self, report: Report, seed: int, cursor: int) -> TrainState:
        """Return the state that a user sees, which carries this along; at every step, so without ``evolve``'s 3 us."""
        state = object.__new__(TrainState)
        state.__dict__.update(self.views.__dict__, report=report, seed=seed, cursor=cursor, _held=self)
        return state

    @cached_property
    def packs(self) -> TrainState:
        return self.layout.packs(self.packed)

    @cached_property
    def counters(self) -> list[Tensor]:
        return leaves(counters(self.packs))

    @cached_property
    def pieces(self) -> list[Piece]:
        return [Piece(self, places) for places in _places(self.packed.params)]


def _alike(param: Tensor) -> Tensor:
    """Return a view of a pack as a tensor of its own, which begins where its memory does.

    PyTorch's tracing remembers what an operator makes of tensors that are alike in all but numbers, and where in a
    pack they begin is a part of that: equal layers would be worked out one by one, a quarter of a trace of twelve.
    """
    if not param.requires_grad or param.device.type not in ("cpu", "cuda"):
        return param
    # Tensor.__dlpack__ would refuse one on a GPU that is not the current one.
    return from_dlpack(to_dlpack(param.detach())).requires_grad_()


_Place = tuple[int, int] | None  # first row and number of rows; None for all of a pack


class Piece:
    """A part of what is trained, which goes through all of an update before the next part does.

    On a CPU it then stays in the cache meanwhile: for 16.8 million parameters 21 ms instead of 26.

    Attributes:
        params, opt, ema: as in a state, by name of pack.
    """

    def __init__(self, held: Held, places: dict[str, _Place]) -> None:
        self._places = places
        self.params = self.part({name: param.detach() for name, param in held.packed.params.items()})
        self.opt: Tree = held.layout.map_roles(self.part, held.packed.opt)
        self.ema = None if held.packed.ema is None else self.part(held.packed.ema)

    def part(self, packs: Params) -> Params:
        """Return what this piece is of packs, by name, as views."""
        return {
            name: packs[name] if place is None else packs[name].narrow(0, *place)
            for name, place in self._places.items()
            if name in packs
        }


def _places(params: Params) -> Iterator[dict[str, _Place]]:
    """Yield what each piece consists of: large packs are cut along their first dimension, small ones stay together."""
    together: dict[str, _Place] = {}
    room = _MOST_AT_ONCE
    for name, param in params.items():
        size, rows = param.numel(), len(param) if param.ndim and param.is_contiguous() else 1
        if param.device.type == "cpu" and size > _MOST_AT_ONCE and rows > 1:
            most = max(1, _MOST_AT_ONCE * rows // size)
            for first in range(0, rows, most):
                yield {name: (first, min(most, rows - first))}
            continue
        if param.device.type == "cpu" and size > room and together:
            yield together
            together, room = {}, _MOST_AT_ONCE
        together[name], room = None, room - size
    if together:
        yield together
