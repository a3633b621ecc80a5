"""``diagnose``: which of the tensors that are not finite did harm, and which one first.

The first bad number is not always to blame: a mask may be -inf and a field that no one reads may be NaN, and neither
does harm. So blame is put to the test. With the same random draws the micro-batch is run again with the first bad
tensor *mended* (its bad elements made 0.5), then with the next one that is still bad mended as well, until loss and
gradients are finite. Then each is left as it was again, and is innocent if nothing gets worse. NaN in a module's output
is not given that last chance: nobody means it. Where nothing was in need of mending, the loss function or the backward
made the bad number, and of a bad gradient :mod:`trainfn.diagnose.replay` knows the operation that made it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import attrs
from torch import nn

from trainfn.attention import attending
from trainfn.batch import Batch, micro_batches
from trainfn.diagnose.diagnosis import Cause, Diagnosis, Part, Spoilt
from trainfn.diagnose.replay import Key, Replay, bad_elements, is_finite, replay
from trainfn.grad import merge
from trainfn.norms import leaf_norms
from trainfn.state import TrainState
from trainfn.step import Step, generators, surroundings
from trainfn.tree import named_leaves

_MOST_MENDED = 32  # heuristic: each costs a replay; with more, the first bad tensor is blamed untested
_MOST_ROWS = 10
_CAUSES: dict[str, Cause] = {"params": "parameter", "buffers": "buffer", "batch": "batch"}

_Again = Callable[[Collection[Key]], Replay]


def diagnose(step: Step, state: TrainState, batch: Batch) -> Diagnosis:
    """Return what made a step's numbers non-finite, found by running it once more and watching.

    Nothing given is changed and the global random generators are as before. Costs one step, and a forward and backward
    of one micro-batch for each tensor that is put to the test. The replay is eager: after a compiled step it may come
    out otherwise, and then says so.

    Args:
        step: the step that went wrong (of a :class:`trainfn.CompiledStep`, its ``step``).
        state: the state before it; its seed and cursor give the draws.
        batch: the batch that it was given.

    Returns:
        The names; ``cause`` is ``"none"``, with the largest gradients, if everything is finite.

    Raises:
        DataError, ModelError: the batch does not fit the model or the loss. What the model itself raises, it raises.

    >>> import math, torch, trainfn
    >>> model, optimizer = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), trainfn.optim.sgd(lr=0.1)
    >>> step = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    >>> batch = torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), torch.tensor([0, 1])
    >>> print(*diagnose(step, trainfn.init(model, optimizer), batch).lines, sep="\\n")
    In the step over batch 0 the loss became nan: batch.0 (row 1) not finite before the step.
    not finite before the step: batch.0 (row 1)
    first module with a bad output: 0 (Linear)
    first parameter with a bad gradient: 0.weight, and 1 more
    """
    parts = micro_batches(batch, step.accumulate)
    spoilt = _spoilt(state, batch)
    common: dict[str, Any] = {"cursor": state.cursor, "micro_batches": len(parts)}
    merged, buffers = None, state.buffers
    with attending(step.attention), surroundings(step.model, state, training=True):
        for number, part in enumerate(parts, 1):
            again = functools.partial(
                replay, step, state, buffers, part, [generator.get_state() for generator in generators(state)]
            )
            seen = again(())
            merged = seen.found if merged is None else merge(merged, seen.found)
            buffers = seen.found.buffers
            common["loss"] = float(merged.total / merged.weight)
            if seen.is_bad:
                return _explained(step.model, seen, again, spoilt, common | {"micro_batch": number})
            bad = [name for name, grad in merged.grads.items() if not is_finite(grad)]
            if bad or not is_finite(merged.total):
                sums: dict[str, Any] = {"parameter": bad[0] if bad else None, "more_parameters": max(len(bad) - 1, 0)}
                return Diagnosis(**common, **sums, micro_batch=number, cause="sum", spoilt=spoilt)
    assert merged is not None
    norms = (leaf_norms(merged.grads) / merged.weight).tolist()
    largest = sorted(zip(merged.grads, norms, strict=True), key=lambda pair: -pair[1])[: 3 if merged.weight else 0]
    return Diagnosis(**common, cause="none", spoilt=spoilt, largest=tuple(largest))


def _explained(
    model: nn.Module, seen: Replay, again: _Again, spoilt: tuple[Spoilt, ...], common: dict[str, Any]
) -> Diagnosis:
    """Tell of a micro-batch in which something is not finite."""
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    guilty, last = _guilty(seen, again)
    sources = [key for key in guilty if key[0] != "output"]
    cause: Cause = "gradient" if seen.outcome[0] else "loss"
    module, before = next((name for kind, name in guilty if kind == "output"), None), None
    if sources:
        cause = _CAUSES[sources[0][0]]
        left = again(sources).bad if module is not None else last.bad
        module = next((name for kind, name in seen.bad if kind == "output" and (kind, name) not in left), None)
    elif module is not None:
        cause = "module"
        entry = _entry(module, guilty, again)
        if entry is not None and entry not in seen.callers:
            cause = "cast"
        elif entry is not None:
            module, before = seen.callers[entry], entry
    owner, operation = seen.operation or (None, None)
    told = seen.outcome[0] and operation is not None
    return Diagnosis(
        **common,
        cause=cause,
        spoilt=tuple(_blamed(one, sources) for one in spoilt),
        module=None if module is None else Part(module, types[module]),
        before=before,
        parameter=seen.bad_grads[0] if seen.bad_grads else None,
        more_parameters=max(len(seen.bad_grads) - 1, 0),
        backward=Part(owner, types[owner]) if told and owner is not None else None,
        operation=operation if told else None,
    )


def _guilty(seen: Replay, again: _Again) -> tuple[list[Key], Replay]:
    """Return the places that did harm, in order, and the replay with these mended."""
    mended: list[Key] = []
    has_nan: dict[Key, bool] = {}
    last = seen
    try:
        while last.is_bad and len(mended) < _MOST_MENDED:
            fresh = [key for key in last.bad if key not in has_nan]
            if not fresh:
                break
            has_nan[fresh[0]] = last.bad[fresh[0]]
            mended.append(fresh[0])
            last = again(mended)
        for key, nan in has_nan.items():
            if key[0] != "output" or not nan:
                rest = [other for other in mended if other != key]
                without = again(rest) if rest else seen
                if without.outcome == last.outcome:
                    mended, last = rest, without
    except Exception:  # with other numbers the model may take another way, and find there what it cannot do
        return list(seen.bad)[:1], seen
    return mended, last


def _entry(module: str, guilty: list[Key], again: _Again) -> str | None:
    """Return the outermost module that was given what spoilt ``module``; None if ``module`` spoilt it itself."""
    others = [key for key in guilty if key != ("output", module)]
    seen = again(others)
    if module not in seen.fed or ("output", module) in again([*others, ("input", module)]).bad:
        return None
    entry = module
    while (caller := seen.callers.get(entry)) in seen.fed:
        entry = caller
    return entry


def _spoilt(state: TrainState, batch: Batch) -> tuple[Spoilt, ...]:
    """Return what is not finite before the step."""
    found = []
    for kind, tree in (("params", state.params), ("buffers", state.buffers), ("batch", batch)):
        for name, leaf in named_leaves(tree):
            if is_finite(leaf):
                continue
            bad = bad_elements(leaf)
            rows: list[int] = []
            count = int(bad.sum())
            if kind == "batch" and bad.ndim:
                rows = bad.reshape(len(bad), -1).any(dim=1).nonzero().flatten().tolist()
                count = len(rows)
            found.append(Spoilt(_named(kind, name), count, tuple(rows[:_MOST_ROWS])))
    return tuple(found)


def _blamed(one: Spoilt, sources: list[Key]) -> Spoilt:
    return attrs.evolve(one, to_blame=one.name in [_named(*key) for key in sources])


def _named(kind: str, name: str) -> str:
    return f"{kind}.{name}" if name else kind
