"""``Reader``: reads an iterable batch by batch, pass after pass, and says and finds again where it is.

A *position* is what a checkpoint keeps of it, after the batch of its step:

    epoch      passes begun before this one
    batches    read in this pass, and ``examples`` in them
    seconds    it took to get them
    state      what ``state_dict()`` says, as JSON (:mod:`trainfn.data.position`); absent where nothing has one

Nothing is read ahead of the batch that is asked for, so the data's own state is always that of the last batch. Around
each read the global generators are seeded from (seed, number of the batch), as those of a data set's items are: what
the data draw from them in this process is drawn again after a resume. What they draw in workers follows from the seed
at the beginning of the pass; after a resume by ``state_dict()`` that is for the loader to keep.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs

from trainfn.batch import Batch
from trainfn.data.draws import seeded
from trainfn.data.passes import Batched, Passes, Windows, failed
from trainfn.data.position import from_json, owner_of, to_json
from trainfn.data.source import kind_of
from trainfn.errors import DataError, TrainfnError
from trainfn.tree import batch_length

_END: Any = object()
_AGAIN = "pass what can be iterated over again: an object with __iter__, or the generator function itself, not its call"


class StreamWarning(UserWarning):
    """A stream is read again to get to where a run was."""


@attrs.frozen
class Place:
    """A position without the data's own state."""

    epoch: int = 0
    batches: int = 0
    examples: int = 0
    seconds: float = 0.0


class Reader:
    """Reads batches one after another.

    Args:
        passes: how to go through the data once.
        seed: what random draws of the data are derived from.
        workers: how many processes have copies of the data.

    Attributes:
        kind, name: what the data are called in messages, and where the module does not matter.
        place: where the next batch is, as far as that is known: the pass may turn out to have ended.
        is_one_shot: whether the data can be iterated over once only.
        owner: the object whose ``state_dict()`` is part of a position, or None.

    >>> reader = Reader(Passes([1, 2, 3], 2, False, 0, None, None), seed=0, workers=0)
    >>> [reader.read(number)[1].tolist() for number in range(3)], reader.place.epoch, reader.place.batches
    ([[1, 2], [3], [1, 2]], 1, 1)
    """

    def __init__(self, passes: Passes, *, seed: int, workers: int) -> None:
        data = passes.data.data if isinstance(passes.data, Batched) else passes.data
        self.kind, self.name, self.owner = kind_of(data), type(data).__qualname__, owner_of(data, workers)
        self.is_one_shot = hasattr(type(data), "__next__")
        self.place = Place()
        self._passes, self._seed = passes, seed
        self._draws = getattr(data, "draws", True) or getattr(passes.collate, "draws", passes.collate is not None)
        self._number = self._first = 0  # of the batch that is read, and of the first one of its pass
        self._pass: Any = None
        self._is_begun = self._has_moved = False
        self._state: Any = None  # to be given to the owner before the next batch
        self._begun_at: Place | None = None  # where the pass that is under way is, if that is not where to go on

    def read(self, number: int, *, again: bool = True) -> tuple[Place, Batch] | None:
        """Return the next batch, and the place that it was at.

        Args:
            number: the batch's, in the run: for draws and messages.
            again: begin another pass where this one has ended; if False, None is returned then.

        Raises:
            DataError: the data cannot be begun again, are empty, raise something, or yield what makes no batch.
        """
        self._number = number
        elsewhere = self._begun_at is not None or (self._pass is None and self.place.batches > 0)
        returns = elsewhere or self._state is not None
        if returns:
            self._return()
        began = time.perf_counter()
        found = self._asked(self._next) if again or self.place.batches else _END
        if found is _END and not again:
            return None
        if found is _END and (returns or self.place.batches):
            self.drop()
            if self.place.batches:
                self._turn()
            found = self._asked(self._next)
        if found is _END:
            raise self._empty()
        place, count = self.place, batch_length(found)
        seconds = place.seconds + time.perf_counter() - began
        self.place = Place(place.epoch, place.batches + 1, place.examples + count, seconds)
        self._has_moved = True
        if self._pass.has_ended:  # the owner's state may be that of the next pass already
            self._asked(self._next)  # a loader notes its end when it is asked once more
            self._pass = None
            self._number += 1
            self._turn()
        return place, found

    def position(self) -> dict[str, Any]:
        """Return where the next batch is, as JSON data.

        Raises:
            DataError: the owner's state has no such form.
        """
        found = attrs.asdict(self.place) | {"seconds": round(self.place.seconds, 3)}
        if self._has_moved and self.owner is not None:
            return found | {"state": self.said()}
        return found if self._state is None else found | {"state": self._state}

    def said(self) -> Any:
        """Return what the owner says now of where it is, as JSON data."""
        return to_json(self.owner.state_dict(), f"{kind_of(self.owner)}.state_dict()")

    def seek(self, number: int, position: dict[str, Any]) -> None:
        """Go to a position before batch ``number`` is read.

        Raises:
            DataError: the data can be iterated over once only, and that has begun.
        """
        if self.is_one_shot and self._is_begun:
            what = "The run goes on at a place that an iterator cannot be brought to."
            raise DataError(what, where=f"batch {number}", got=self.kind, hint=_AGAIN)
        self._begun_at, self._has_moved = None if self._pass is None else self.place, False
        self.place = Place(**{name: position[name] for name in attrs.fields_dict(Place) if name in position})
        self._first, self._state = number - self.place.batches, position.get("state")

    def drop(self) -> None:
        """Let go of the pass that is under way, and of its workers; the owner is not asked any more."""
        self._pass = self._begun_at = None
        self._has_moved = False

    def park(self) -> None:
        """Let go of the pass, having noted where it was."""
        try:
            state = self.position().get("state")
        except DataError:  # which nobody has to know unless it is to be saved
            state = None
        self.drop()
        self._state = state

    def _next(self) -> Batch:
        return next(self._begun(), _END)

    def _begun(self) -> Iterator[Batch]:
        """Return the pass that is under way, begun if none is."""
        if self._pass is None:
            if self.is_one_shot and self._is_begun:
                raise DataError(
                    "The stream has ended, and cannot be begun again.",
                    where=f"batch {self._number}",
                    got=f"{self.kind}, which can be iterated over once",
                    hint=f"max_steps={self._number} is as far as it goes; or {_AGAIN}",
                )
            self._is_begun = True
            with self._drawing(self._first):  # what a loader draws when it begins, wherever in the pass that is
                self._pass = self._passes.begin(self.place.epoch, self._number)
        return self._pass  # type: ignore[no-any-return]

    def _turn(self) -> None:
        """Be at the beginning of the next pass."""
        self.place, self._first = Place(epoch=self.place.epoch + 1), self._number

    def _return(self) -> None:
        """Begin the pass that the position is in, and get there: by the owner's state, or batch by batch."""
        place, state, last, owner = self.place, self._state, self._number, self.owner
        at, self._state, self._begun_at = self._begun_at or Place(), None, None
        if state is not None and owner is not None:
            self.drop()
            self._asked(lambda: owner.load_state_dict(from_json(state)))
            return
        if place.batches:
            warnings.warn(
                f"The stream is read again: {place.batches} batches of epoch {place.epoch} are fetched and passed "
                f"over, which took {place.seconds:.1f} s before. A data set or loader with state_dict() and "
                "load_state_dict() (torchdata's StatefulDataLoader) goes on at once.",
                StreamWarning,
                stacklevel=2,
            )
        if at.epoch != place.epoch or at.batches > place.batches:
            while owner is not None and self._pass is not None and self._asked(self._skip):
                pass  # data that know where they are go on from there, and begin again only after their end
            at = Place()
            self.drop()
        for number in range(at.batches, place.batches):
            self._number = self._first + number  # draws are those of that batch
            if not self._asked(self._skip):
                raise DataError(
                    "The stream is shorter than it was.",
                    where=f"epoch {place.epoch}",
                    expected=f"at least {place.batches} batches, which were read before",
                    got=number,
                )
        self._number = last

    def _skip(self) -> bool:
        current = self._begun()
        return current.skip() if isinstance(current, Windows) else next(current, _END) is not _END

    def _empty(self) -> DataError:
        again = " again" if self.place.epoch else ""
        return DataError(
            f"The stream ends at once{again}.",
            where=f"batch {self._number}",
            expected="at least one batch in each pass",
            got=f"{self.kind}{', no full batch' if self._passes.drop_last else ''}",
            hint="each iter(data) has to begin at the first example" if again else None,
        )

    def _drawing(self, number: int) -> AbstractContextManager[None]:
        return seeded(self._seed, number) if self._draws else nullcontext()

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """Return what the data answer, with their draws seeded and their errors told."""
        with self._drawing(self._number):
            try:
                return ask()
            except TrainfnError as error:
                if "batch " in str(error.where) or not isinstance(error, DataError):
                    raise
                told, cause = error, error.__cause__
            except Exception as error:
                told, cause = failed(error), error
        where = f"batch {self._number}" + (f", {told.where}" if told.where else "")
        raise DataError(told.what, where=where, expected=told.expected, got=told.got, hint=told.hint) from cause
