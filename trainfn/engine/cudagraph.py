"""CUDA graphs: a whole step (micro-batches, backward, update) launched at once.

    a call:    a kernel launch from the host, 5 us each, a thousand times a step
    a replay:  copy the batch into its slots, launch the recording, copy the report out

A recording holds addresses. Those of a donated state stay what they are: its packs are written in place and handed from
step to step; a recording belongs to the packs that it was made over and ends with them. Batches are copied into slots
of their own, one set for each kind of batch; the report is copied out, because the next replay overwrites it.

To record runs nothing, and the calls that a recording has to be preceded by (a few to be timed, one on the stream that
records) are steps that were to be taken anyway. So no state is copied, and no step is taken twice.

Draws: the step's generators are seeded before every step, captured or not. While recording, a kernel is given not the
seed but the address of one, and ``CUDAGraph.replay`` writes the generator's seed and offset there before each launch
(``CUDAGeneratorImpl.h``, "CUDA Graph-safe RNG states"; the same in torch 2.11 and 2.13). A replay after ``manual_seed``
therefore draws what the calls would. The host's generator has no such address: a step that draws from it is refused.

What a recording cannot see is the host. A number that the model, the loss or the optimizer reads from an attribute is
the one that it was while recording, and so is every decision taken from it; a compiled program would have noticed. What
a forward copies from the host with ``non_blocking=True`` is copied from the same address ever after. Hence ``"auto"``
leaves eager steps alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.engine.recording import Cuda, Mark, Recording
from trainfn.errors import CompileError, listed
from trainfn.state import Report
from trainfn.tree import Tree, leaves, map_leaves, named_leaves

Asked = Literal["auto"] | bool

_TIMED = 8  # steps timed before and after recording
_GAIN = 0.98  # a replay has to take less than this share of the calls' time: it costs memory of its own
_MOST_CAPTURES = 16  # by one compiled step; each takes a second, and memory for its slots


@attrs.define(eq=False)
class Case:
    """What has become of the calls over one set of packs with one kind of batch.

    Attributes:
        calls: how many there were.
        slots: the batch at addresses that stay.
        replay: launches the recording; None while there is none.
        result: where the recording leaves its report.
        is_over: there will be none.
        called, replayed: marks before and after the steps that are timed.
    """

    calls: int = 0
    slots: Batch = None
    replay: Callable[[], object] | None = None
    result: Tensor | None = None
    is_over: bool = False
    called: list[tuple[Mark, Mark]] = attrs.field(factory=list)
    replayed: list[tuple[Mark, Mark]] = attrs.field(factory=list)

    def give_up(self) -> None:
        """Go on without a recording, and free what it took."""
        self.replay, self.result, self.slots, self.is_over = None, None, None, True


Cases = dict[Hashable, Case]


def make_capturing(asked: Asked, device: torch.device, *, donate: bool, mode: str) -> tuple[Capturing | None, str]:
    """Return what captures a step's calls, or None, and why not. On a CPU, nobody asks why.

    Raises:
        CompileError: it was asked for, and cannot be.

    >>> make_capturing("auto", torch.device("cpu"), donate=True, mode="graph")
    (None, '')
    """
    if asked is False or (asked == "auto" and device.type != "cuda"):
        return None, ""
    if device.type != "cuda":
        raise refused(f"the state is on {device.type}", 'pass device="cuda", or cuda_graph="auto"')
    if asked is True:
        check_donated(asked, donate)
    elif not donate:
        return None, "no CUDA graph, because states are not donated"
    elif mode == "eager":
        return None, "no CUDA graph in eager mode unless asked for: Python in the forward may decide anew at each step"
    return Capturing(asked, Cuda(device)), ""


def check_donated(asked: Asked, donate: bool) -> None:
    """Raise if a CUDA graph is asked for, of states that are not written in place."""
    if asked is True and not donate:
        hint = "pass donate=True: a captured step writes to fixed addresses"
        raise refused("the state is not donated: each step would have other addresses", hint)


def refused(why: str, hint: str) -> CompileError:
    """Return the error for what was asked for and cannot be captured."""
    return CompileError("The step cannot be captured as a CUDA graph.", got=why, hint=hint)


class Capturing:
    """Runs a step's calls, and from some step on their recording.

    Args:
        asked: True to record as soon as possible; ``"auto"`` to time steps first, and to keep what is faster.
        recording: the device.

    Attributes:
        reason: what was decided, and why.
        captures: how many recordings were made.
    """

    def __init__(self, asked: Asked, recording: Recording) -> None:
        self.captures = 0
        self._must, self._recording = asked is True, recording
        self._pays: bool | None = True if asked is True else None
        self.reason = "captured as a CUDA graph" if self._must else "a CUDA graph will be timed against it"

    def run(self, cases: Cases, key: Hashable, packed: Tree, batch: Batch, call: Callable[[Batch], Report]) -> Report:
        """Return the report of one step: of ``call(batch)``, or of a replay of it.

        Args:
            cases: those of the packs that ``call`` writes to.
            key: tells kinds of batches apart.
            packed: these packs.
            batch: the batch.
            call: the step; it has to be possible to take it without waiting for the device.

        Raises:
            CompileError: a capture was asked for, and fails. No number has changed.
        """
        case = cases.get(key)
        if case is None:
            case = cases[key] = self._begin(packed, batch)
        if self._pays is False:
            case.give_up()
        if case.replay is not None:
            return self._replay(case, batch)
        if case.is_over:
            return call(batch)
        case.calls += 1
        if case.calls <= (_TIMED if self._pays is None else 1):  # lazy things happen at the first call
            with self._timed(case.called):
                return call(batch)
        if case.slots is None:
            case.slots = _slots(batch)
            with self._recording.aside():
                return call(case.slots)
        with torch.no_grad():
            _fill(case.slots, batch)
        if not self._record(case, call):
            return call(batch)
        return self._replay(case, batch)

    def _begin(self, packed: Tree, batch: Batch) -> Case:
        elsewhere = [
            name
            for name, leaf in named_leaves({"state": packed, "batch": batch})
            if isinstance(leaf, Tensor) and leaf.device != self._recording.device
        ]
        if elsewhere:
            self._refuse(f"not on {self._recording.device}: {listed(elsewhere, 8)}", "move them there")
        elif self.captures >= _MOST_CAPTURES:
            self._refuse(
                f"{self.captures} captures were made", "give batches few shapes, and go on from the last state"
            )
        return Case(is_over=bool(elsewhere) or self.captures >= _MOST_CAPTURES)

    def _refuse(self, why: str, hint: str, cause: Exception | None = None) -> None:
        if self._must:
            raise refused(why, hint) from cause
        self.reason = f"no CUDA graph: {why}"

    def _record(self, case: Case, call: Callable[[Batch], Report]) -> bool:
        used = self._recording.generators()
        before = [generator.get_state() for generator in used]
        failure: Exception | None = None
        drawn = False
        try:
            case.replay, case.result = self._recording.record(lambda: call(case.slots).row)
            drawn = not torch.equal(used[0].get_state(), before[0])
        except Exception as error:
            failure = error
        for generator, state in zip(used, before, strict=True):  # the step itself is still to be taken
            generator.set_state(state)
        self.captures += 1
        if failure is None and not drawn:
            return True
        case.give_up()
        self._pays = self._pays if self._must else False
        hint = 'pass cuda_graph="auto" or False; look for numbers that Python reads from the device'
        if failure is None:
            self._refuse("the step draws random numbers on the host, which a replay would repeat", "draw on the device")
        else:
            first = next(iter(str(failure).strip().splitlines()), "")
            self._refuse(f"{type(failure).__name__}: {first}", hint, failure)
        return False

    def _replay(self, case: Case, batch: Batch) -> Report:
        assert case.replay is not None
        assert case.result is not None
        if self._pays is None:
            return self._timed_replay(case, batch)
        with torch.no_grad():
            _fill(case.slots, batch)
        case.replay()
        return Report.of(case.result.clone())

    def _timed_replay(self, case: Case, batch: Batch) -> Report:
        assert case.replay is not None
        assert case.result is not None
        with self._timed(case.replayed), torch.no_grad():
            _fill(case.slots, batch)
            case.replay()
            report = Report.of(case.result.clone())
        if len(case.replayed) >= _TIMED and case.replayed[_TIMED - 1][1].query():  # nobody waits for the device
            called, replayed = (_median(marks) for marks in (case.called, case.replayed))
            self._pays = replayed < _GAIN * called
            times = f"{replayed * 1e3:,.0f} us replayed, {called * 1e3:,.0f} us called"
            self.reason = f"captured as a CUDA graph ({times})" if self._pays else f"no CUDA graph ({times})"
            case.called, case.replayed = [], []
            if not self._pays:
                case.give_up()
        return report

    @contextmanager
    def _timed(self, marks: list[tuple[Mark, Mark]]) -> Iterator[None]:
        if self._pays is not None:
            yield
            return
        start = self._recording.mark()
        yield
        marks.append((start, self._recording.mark()))


def _slots(batch: Batch) -> Batch:
    def own(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    return map_leaves(own, batch)


def _fill(slots: Batch, batch: Batch) -> None:
    for slot, leaf in zip(leaves(slots), leaves(batch), strict=True):
        if isinstance(slot, Tensor):
            slot.copy_(leaf, non_blocking=True)


def _median(marks: list[tuple[Mark, Mark]]) -> float:
    return statistics.median(start.elapsed_time(end) for start, end in marks)
