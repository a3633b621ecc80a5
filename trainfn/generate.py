"""``generate``: a language model continues what it is given, token by token.

Of the logits of the last position, ``softmax(logits / temperature)`` is cut to the ``top_k`` likeliest tokens, then to
the fewest that have ``top_p`` of what probability is left, and the next token is drawn from those. There is no cache of
keys and values: each token costs one forward over what comes before it, by any model whose outputs hold logits.

Letters: B sequences, T tokens, V words in the vocabulary.

References:
    A. Holtzman et al., "The Curious Case of Neural Text Degeneration" (top_p), https://arxiv.org/abs/1904.09751, 2020.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainfn.engine import CompiledStep
from trainfn.errors import ConfigError, DataError, ModelError
from trainfn.loss import logits_of
from trainfn.predict import predicting
from trainfn.state import TrainState
from trainfn.step import Step
from trainfn.tree import describe

_CONTEXTS = ("n_positions", "max_position_embeddings", "block_size", "max_seq_len", "n_ctx")

Logits = Callable[[Tensor], Tensor]
"""``ids [B, T] -> logits [B, V]`` of the last position, float64, on the host."""


def generate(
    step: Step | CompiledStep,
    state: TrainState,
    prompt: Any,
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | Sequence[int] | None = None,
    context: int | None = None,
    tokenizer: Any = None,
    ema: bool | None = None,
) -> Any:
    """Return a prompt, or each of several, with what the model continues it with.

    In evaluation mode, in the step's precision and on the state's device; the module's modes and the global random
    generators are as before. The same call gives the same tokens. What a prompt is continued with depends on its place
    among several and on ``seed``, not on the others.

    Args:
        step: what the state is trained with; its model is used, which takes ids [B, T] int64 alone and whose outputs
            hold logits [B, T, V], or [B, 1, V] of the last position.
        state: read, not changed.
        prompt: a text, or the ids of one: a list of ints, an array or a tensor [T]; several of either, which need not
            be of one length; or ids [B, T].
        max_new_tokens: how many tokens at most.
        temperature: what the logits are divided by; 0 takes the likeliest token each time.
        top_k: draw from this many tokens at most.
        top_p: draw from the likeliest tokens that together have this probability, in (0, 1].
        seed: what is drawn is a function of it.
        stop: id of a token, or of several, that ends a text and is its last one.
        context: how many tokens the model is given at most, the last ones; if None, what the model's configuration says
            it takes, or all.
        tokenizer: for texts: has ``encode(text)`` and ``decode(ids)``.
        ema: as for :func:`trainfn.predict.predict`.

    Returns:
        What was given, longer: a text, ids [T + new] int64, or a list of either. Of ids [B, T] a tensor again, [B, T +
        new], in which what has ended early is filled up with its last token.

    Raises:
        ConfigError: an option is out of range, or texts without a tokenizer.
        DataError: a prompt that is empty, or that holds no ids.
        ModelError: the model does not go through, or its outputs are not those of a causal language model.

    >>> import trainfn
    >>> model, optimizer = nn.Embedding(4, 4), trainfn.optim.sgd(lr=0.1)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.eye(4).roll(1, 1))  # after 0 comes 1, ...
    >>> step = trainfn.make_step(model, loss="language_modeling", optimizer=optimizer)
    >>> generate(step, trainfn.init(model, optimizer), [2, 3], max_new_tokens=3, temperature=0)
    tensor([2, 3, 0, 1, 2])
    """
    _check(max_new_tokens, temperature, top_k, top_p, seed, context)
    plain = step.step if isinstance(step, CompiledStep) else step
    stops = _stops(stop)
    prompts, rebuild = _read(prompt, tokenizer)
    longest = context or _context_of(plain.model)
    draws = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    groups: dict[int, list[int]] = {}
    for at, ids in enumerate(prompts):  # those of one length go through together: padding would not be exact
        groups.setdefault(len(ids), []).append(at)
    done: list[Tensor] = list(prompts)
    with predicting(step, state, ema=ema) as outputs_of:

        def last_logits(ids: Tensor) -> Tensor:
            given = ids if longest is None else ids[:, -longest:]
            return _last(plain.model, outputs_of, given.to(state.step.device), longest)

        for places in groups.values():
            ids = torch.stack([prompts[at] for at in places])
            rows = _continued(last_logits, ids, draws[places], temperature, top_k, top_p, stops)
            for at, row in zip(places, rows, strict=True):
                done[at] = row
    return rebuild(done)


def _continued(
    last_logits: Logits,
    ids: Tensor,
    draws: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stops: Sequence[int],
) -> list[Tensor]:
    """Continue ids [B, T] by ``draws`` [B, new], numbers in [0, 1); return each row up to its end."""
    start, ends = ids.shape[1], torch.tensor(list(stops), dtype=torch.int64)
    lengths = torch.full((len(ids),), start + draws.shape[1])
    open_rows = torch.arange(len(ids))
    whole = torch.cat([ids, ids.new_zeros(draws.shape)], 1)
    for at in range(draws.shape[1]):
        width = start + at
        logits = last_logits(whole[open_rows, :width])
        following = draw_tokens(logits, draws[open_rows, at], temperature=temperature, top_k=top_k, top_p=top_p)
        whole[open_rows, width] = following
        ended = torch.isin(following, ends)
        lengths[open_rows[ended]] = width + 1
        open_rows = open_rows[~ended]
        if not len(open_rows):
            break
    return [row[: int(length)] for row, length in zip(whole, lengths, strict=True)]


def draw_tokens(
    logits: Tensor, draws: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the next token of each row, [B] int64: the one at which the cumulated probability passes the draw.

    Args:
        logits: [B, V].
        draws: [B], numbers in [0, 1), uniform.
        temperature, top_k, top_p: as for :func:`generate`.

    >>> draw_tokens(torch.tensor([[0.0, 2.0, 1.0]]).log_softmax(1), torch.tensor([0.99]), top_p=0.6)
    tensor([1])
    """
    ranked, tokens = logits.double().sort(dim=1, descending=True, stable=True)  # (B, V), the likeliest first
    if temperature == 0:
        return tokens[:, 0]
    # Minus the largest first: at a temperature of 1e-300 the others are minus infinity, and none is NaN.
    shares = ((ranked - ranked[:, :1]) / temperature).softmax(1)
    if top_k is not None:
        shares[:, top_k:] = 0.0
        shares = shares / shares.sum(1, keepdim=True)
    if top_p is not None:
        before = shares.cumsum(1) - shares
        shares = torch.where(before < top_p, shares, 0.0)
    reached = shares.cumsum(1)  # (B, V)
    chosen = torch.searchsorted(reached, (draws.double() * reached[:, -1])[:, None], right=True)
    most = (shares > 0).sum(1, keepdim=True) - 1  # a draw next to 1 may be rounded past the last one
    return tokens.gather(1, torch.minimum(chosen, most))[:, 0]


def _last(model: nn.Module, outputs_of: Callable[[Any], Any], ids: Tensor, longest: int | None) -> Tensor:
    batch = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        batch["attention_mask"] = torch.ones_like(ids)
    try:
        logits = logits_of(outputs_of(batch))
    except ModelError as error:
        if longest is not None or error.__cause__ is None:
            raise
        hint = f"if {ids.shape[1]} tokens are more than it takes: context=, the most that it does"
        raise ModelError(error.what, where=error.where, got=error.got, hint=hint) from error.__cause__
    if logits.ndim != 3 or logits.shape[0] != ids.shape[0] or logits.shape[1] not in (1, ids.shape[1]):
        raise ModelError(
            "The outputs are not those of a causal language model.",
            expected="logits [batch, positions, vocabulary]",
            got=f"{describe(logits)} for ids {list(ids.shape)}",
        )
    found = logits[:, -1].double().cpu()  # (B, V)
    if not bool(found.amax(1).isfinite().all()):  # minus infinity forbids a token; one has to be left
        raise ModelError(
            "The logits are not finite.",
            where=f"after {ids.shape[1]} tokens",
            expected="numbers, or minus infinity for some tokens",
            got="NaN, infinity, or minus infinity for all",
            hint="look at the run's history",
        )
    return found


def _context_of(model: nn.Module) -> int | None:
    """Return how many tokens a model says that it takes, by the names that its configuration may have for it."""
    for holder in (getattr(model, "config", None), model):
        for name in _CONTEXTS:
            found = getattr(holder, name, None)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return None


def _stops(stop: Any) -> list[int]:
    """Return the ids that end a text; whatever counts as an index is one."""
    try:
        several = [] if stop is None else list(stop) if isinstance(stop, Iterable) and _is_row(stop) else [stop]
        if not any(isinstance(each, (bool, float)) for each in several):
            return [operator.index(each) for each in several]
    except TypeError:
        pass
    raise ConfigError(
        "A text is ended by ids.",
        expected="stop: the id of a token, or several",
        got=f"stop={stop!r}",
        hint="the tokenizer knows the id of a token: tokenizer.encode(text)",
    )


def _is_row(value: Any) -> bool:
    return getattr(value, "ndim", 1) > 0


def _read(prompt: Any, tokenizer: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """Return prompts as ids [T], and what makes of the continued ones what was given."""
    if isinstance(prompt, np.ndarray):
        prompt = torch.from_numpy(prompt)
    if isinstance(prompt, Tensor) and prompt.ndim == 2:

        def stacked(rows: list[Tensor]) -> Tensor:
            width = max(map(len, rows))
            return torch.stack([torch.cat([row, row[-1:].expand(width - len(row))]) for row in rows])

        if not len(prompt):
            raise DataError("There are no prompts.", expected="ids [B, T] of at least one", got=describe(prompt))
        return [_ids(row) for row in prompt], stacked
    several = isinstance(prompt, (list, tuple)) and not all(isinstance(each, Integral) for each in prompt)
    each_of = list(prompt) if several else [prompt]
    if any(isinstance(each, str) for each in each_of):
        if tokenizer is None:
            raise ConfigError(
                "A text needs a tokenizer.", hint="tokenizer=trainfn.data.ByteTokenizer(), or the one trained with"
            )
        encoded = [tokenizer.encode(each) for each in each_of]
        texts = [_ids(getattr(found, "ids", found)) for found in encoded]
        return texts, lambda rows: _one_or_all([tokenizer.decode(row.tolist()) for row in rows], several)
    return [_ids(each) for each in each_of], lambda rows: _one_or_all(rows, several)


def _one_or_all(values: list[Any], several: bool) -> Any:
    return values if several else values[0]


def _ids(prompt: Any) -> Tensor:
    try:
        ids = torch.as_tensor(prompt).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError("A prompt is neither a text nor ids.", got=type(prompt).__name__) from error
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(
            "A prompt holds no ids.",
            expected="a text, or at least one id: a list of ints, or an integer tensor [T]",
            got=describe(ids),
            hint="begin with the token that texts begin with",
        )
    return ids.long()


def _check(
    new: int, temperature: float, top_k: int | None, top_p: float | None, seed: int, context: int | None
) -> None:
    def is_int(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    wrong = {
        f"max_new_tokens={new!r} (expected an int >= 0)": not is_int(new, 0),
        f"temperature={temperature!r} (expected a number >= 0)": not (is_number(temperature) and temperature >= 0),
        f"top_k={top_k!r} (expected an int >= 1, or None)": top_k is not None and not is_int(top_k, 1),
        f"top_p={top_p!r} (expected a number in (0, 1], or None)": top_p is not None
        and not (is_number(top_p) and 0 < top_p <= 1),
        f"seed={seed!r} (expected an int in [0, 2**63))": not is_int(seed, 0),
        f"context={context!r} (expected an int >= 1, or None)": context is not None and not is_int(context, 1),
    }
    if any(wrong.values()):
        raise ConfigError(
            "Text cannot be generated so.", got="\n    ".join(["", *(text for text, is_so in wrong.items() if is_so)])
        )
