"""``Diagnosis``: what a replay of a step shows, in names, in words and as JSON."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any, Literal

import attrs

Cause = Literal["parameter", "buffer", "batch", "cast", "module", "loss", "gradient", "sum", "none"]


@attrs.frozen
class Part:
    """A module of the model: its dotted name, ``""`` for the model itself, and its class."""

    name: str
    type: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.type})"


@attrs.frozen
class Spoilt:
    """A tensor that was not finite before the step, in the state or in the batch.

    Attributes:
        name: ``params.head.weight``, ``buffers.norm.running_var``, ``batch.x``; or ``batch``, if that is one tensor.
        count: how many rows of it are not finite (elements, in the state).
        rows: the first ten of these rows, as indices within the batch; none in the state.
        to_blame: whether loss and gradients would have been finite, or more of them, without it.
    """

    name: str
    count: int
    rows: tuple[int, ...] = ()
    to_blame: bool = False


@attrs.frozen(kw_only=True)
class Diagnosis:
    """What a replay of one step shows.

    Attributes:
        cursor: the step's place in the run, batches consumed before it.
        cause: what is to blame; ``"none"`` if everything is finite in the replay.
        loss: mean loss up to and including the micro-batch that is told of.
        micro_batch: the first one in which it happened, from 1; None if it did not.
        micro_batches: how many there are.
        spoilt: what was not finite before the step, whether it did harm or not.
        module: the first module whose output went non-finite and did harm.
        before: the module's own code made it, before it called this child, which was given it.
        parameter: the first parameter whose gradient went non-finite, in the order of the backward.
        more_parameters: how many others did.
        backward: the module in whose backward a gradient went non-finite, though the loss is finite.
        operation: the operation there, by autograd's name for it.
        largest: the largest three norms of the mean gradient by parameter, if all of it is finite.
    """

    cursor: int
    cause: Cause
    loss: float
    micro_batch: int | None = None
    micro_batches: int
    spoilt: tuple[Spoilt, ...] = ()
    module: Part | None = None
    before: str | None = None
    parameter: str | None = None
    more_parameters: int = 0
    backward: Part | None = None
    operation: str | None = None
    largest: tuple[tuple[str, float], ...] = ()

    @property
    def sentence(self) -> str:
        """What happened and what is to blame, for people.

        >>> Diagnosis(cursor=7, cause="loss", loss=float('nan'), micro_batch=1, micro_batches=1).sentence
        'In the step over batch 7 the loss became nan: the loss function made it, out of outputs that did no harm.'
        """
        where = f"the step over batch {self.cursor}"
        if self.cause == "none" and not isfinite(self.loss):
            return f"In a replay of {where} nothing in the batch counted (weight 0)."
        if self.cause == "none":
            return (
                f"A replay of {where} shows nothing that is not finite (mean loss {self.loss:.4g}): "
                "compiled kernels round differently and may draw other random numbers."
            )
        part = f"micro-batch {self.micro_batch} of {self.micro_batches} of " if self.micro_batches > 1 else ""
        what = "a gradient became non-finite" if isfinite(self.loss) else f"the loss became {self.loss}"
        return f"In {part}{where} {what}: {self._blame()}."

    @property
    def lines(self) -> tuple[str, ...]:
        """The sentence, then a line for each thing known.

        >>> print(*Diagnosis(cursor=0, cause="none", loss=2.0, micro_batches=1, largest=(("w", 9.0),)).lines[1:])
        largest gradients: w 9
        """
        found = [self.sentence]
        found += [
            f"not finite before the step: {_told(one)}{'' if one.to_blame else ' (did no harm)'}" for one in self.spoilt
        ]
        if self.module is not None:
            before = f", before it called {self.before}" if self.before is not None else ""
            found.append(f"first module with a bad output: {self.module}{before}")
        if self.parameter is not None:
            more = f", and {self.more_parameters} more" if self.more_parameters else ""
            found.append(f"first parameter with a bad gradient: {self.parameter}{more}")
        if self.backward is not None:
            found.append(f"bad in the backward of: {self.backward}, {self.operation}")
        if self.largest:
            found.append("largest gradients: " + ", ".join(f"{name} {norm:.4g}" for name, norm in self.largest))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and the sentence, as JSON data.

        >>> Diagnosis(cursor=0, cause="none", loss=2.0, micro_batches=1).to_json()["cause"]
        'none'
        """
        made: dict[str, Any] = json.loads(json.dumps(attrs.asdict(self) | {"sentence": self.sentence}))
        return made

    def _blame(self) -> str:
        if self.cause in ("parameter", "buffer", "batch"):
            return " and ".join(_told(one) for one in self.spoilt if one.to_blame) + " not finite before the step"
        if self.cause == "module":
            made = f"the code of {self.module} made it before it called {self.before}"
            return made if self.before is not None else f"the output of {self.module} is not finite"
        if self.cause == "gradient":
            place = f"{self.operation} in the backward of {self.backward}"
            return f"{place if self.backward else 'adding up the gradients of ' + str(self.parameter)} made it"
        return {
            "cast": "the batch is finite, but not when cast to the precision of the forward",
            "loss": "the loss function made it, out of outputs that did no harm",
            "sum": f"the sum of the micro-batches overflowed in {self.parameter or 'the loss'}",
        }[self.cause]


def _told(one: Spoilt) -> str:
    rows = ", ".join(str(row) for row in one.rows)
    more = f" and {one.count - len(one.rows)} more" if one.count > len(one.rows) else ""
    return f"{one.name} (row{'s' * (one.count != 1)} {rows}{more})" if one.rows else one.name
