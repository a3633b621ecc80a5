"""Texts continued: as a roll-out by hand has it, in every form of prompt, and drawn from what the logits say."""

from __future__ import annotations

import math
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from trainfn.errors import ConfigError, DataError, ModelError
from trainfn.generate import draw_tokens
from trainfn.tree import digest

V, CONTEXT = 11, 6


class Gru(nn.Module):
    """Its logits depend on all tokens before; there are places for CONTEXT of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(V, 8), nn.Parameter(torch.randn(CONTEXT, 8))
        self.cell, self.drop, self.head = nn.GRU(8, 8, batch_first=True), nn.Dropout(0.5), nn.Linear(8, V)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) * 3 + self.places[: input_ids.shape[1]]
        return self.head(self.drop(self.cell(x)[0])) * 4


def fit(model: nn.Module | None = None, **settings: Any) -> trainfn.FitResult:
    torch.manual_seed(3)
    ids = torch.randint(0, V, (32, CONTEXT), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"loss": "language_modeling", "max_steps": 3, "device": "cpu", "progress": False}
    return trainfn.fit(model or Gru(), ids, **(options | settings))


@pytest.fixture(scope="module")
def result() -> trainfn.FitResult:
    return fit()


def rolled(result: trainfn.FitResult, ids: list[int], new: int, context: int = CONTEXT) -> list[int]:
    model = result.model()
    with torch.no_grad():
        for _ in range(new):
            ids = [*ids, int(model(torch.tensor([ids[-context:]]))[0, -1].argmax())]
    return ids


def test_greedy_is_the_argmax_rolled_out(result: trainfn.FitResult) -> None:
    for prompt in ([1], [4, 2, 9], [3, 1, 4, 1, 5, 9, 2, 6]):
        found = result.generate(prompt, max_new_tokens=12, temperature=0, context=CONTEXT)
        assert found.tolist() == rolled(result, prompt, 12)
    assert rolled(result, [1], 12) != rolled(result, [1], 12, context=2)  # control: the context matters


def test_one_of_the_likeliest_is_greedy(result: trainfn.FitResult) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "context": CONTEXT}
    greedy = result.generate([1, 2], temperature=0, **options)
    assert torch.equal(result.generate([1, 2], top_k=1, temperature=5.0, seed=7, **options), greedy)
    assert torch.equal(result.generate([1, 2], top_p=1e-9, seed=7, **options), greedy)
    assert torch.equal(result.generate([1, 2], temperature=1e-300, seed=7, **options), greedy)
    assert not torch.equal(result.generate([1, 2], temperature=5.0, seed=7, **options), greedy)


def test_a_seed_gives_the_same_and_another_one_another(result: trainfn.FitResult) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "context": CONTEXT}
    one = result.generate([1], seed=5, **options)
    assert torch.equal(result.generate([1], seed=5, **options), one)
    assert not torch.equal(result.generate([1], seed=6, **options), one)


def test_nothing_is_changed_by_it() -> None:
    model = Gru()
    result = fit(model, ema=0.5)
    model.train()
    before, drawn = digest([result.state, dict(model.state_dict())]), torch.get_rng_state()
    result.generate([1], max_new_tokens=3, context=CONTEXT)
    assert digest([result.state, dict(model.state_dict())]) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())


class Words:
    """A tokenizer of digits."""

    def encode(self, text: str) -> list[int]:
        return [int(letter) for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join("0123456789x"[each] for each in ids)


def test_prompts_of_every_form(result: trainfn.FitResult) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0, "context": CONTEXT}
    right = {text: Words().decode(rolled(result, Words().encode(text), 4)) for text in ("12", "3", "45")}
    assert result.generate("12", tokenizer=Words(), **options) == right["12"]
    assert result.generate(["12", "3", "45"], tokenizer=Words(), **options) == list(right.values())
    ids = {text: Words().encode(text) for text in right}
    expected = {text: torch.tensor(Words().encode(right[text].replace("x", "0"))) for text in right}
    assert "x" not in "".join(right.values())
    for one in (ids["12"], tuple(ids["12"]), torch.tensor(ids["12"]), np.array(ids["12"]), torch.tensor([1, 2]).int()):
        assert torch.equal(result.generate(one, **options), expected["12"])
    several = result.generate([[1, 2], torch.tensor([3]), np.array([4, 5])], **options)
    assert all(torch.equal(a, b) for a, b in zip(several, expected.values(), strict=True))
    table = result.generate(torch.tensor([[1, 2], [4, 5]]), **options)
    assert torch.equal(table, torch.stack([expected["12"], expected["45"]]))


def test_a_prompt_does_not_depend_on_the_others(result: trainfn.FitResult) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "seed": 3, "context": CONTEXT}
    one = result.generate([[1, 2], [3], [4, 5]], **options)
    other = result.generate([[1, 2], [7, 7, 7], [9, 9]], **options)
    assert torch.equal(one[0], other[0])
    twice = result.generate([[1, 2], [1, 2]], **options)
    assert not torch.equal(*twice)


def test_a_text_ends_at_its_last_token() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, idx: Tensor) -> Tensor:
            return nn.functional.one_hot((idx + 1) % V, V).float() * 50 + self.weight

    result = fit(Counting())
    assert result.generate([2], stop=5).tolist() == [2, 3, 4, 5]
    assert result.generate([2], stop=[9, 4]).tolist() == [2, 3, 4]
    assert [row.tolist() for row in result.generate([[2], [4], [7, 5]], stop=5, max_new_tokens=3)] == [
        [2, 3, 4, 5], [4, 5], [7, 5, 6, 7, 8],
    ]  # fmt: skip
    assert result.generate(torch.tensor([[2], [4]]), stop=5).tolist() == [[2, 3, 4, 5], [4, 5, 5, 5]]
    assert result.generate([2], max_new_tokens=0).tolist() == [2]


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(0.2, 3.0), st.floats(0.05, 1.0), st.integers(1, 12))
def test_what_is_drawn_is_of_the_fewest_likeliest(seed: int, temperature: float, top_p: float, top_k: int) -> None:
    own = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 12, generator=own, dtype=torch.float64) * 2
    draws = torch.linspace(0, 1 - 1e-12, 400, dtype=torch.float64)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    drawn = set(draw_tokens(logits.expand(400, -1), draws, **options).tolist())
    likely = (logits[0] / temperature).exp().tolist()
    nucleus: list[int] = []
    ranked = sorted(range(12), key=lambda token: -likely[token])[:top_k]
    total = sum(likely[token] for token in ranked)
    for token in ranked:  # the definition: until their mass is reached
        if sum(likely[each] for each in nucleus) / total < top_p - 1e-12:
            nucleus.append(token)
    assert drawn <= set(nucleus)
    assert {token for token in nucleus if likely[token] / total > 0.01} <= drawn


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}])
def test_tokens_are_drawn_as_often_as_their_logits_say(options: dict[str, Any]) -> None:
    logits, count = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5, 1.5]), 20_000
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.bincount(draw_tokens(logits.expand(count, -1), draws, **options), minlength=6).tolist()
    shares = [math.exp(value / options.get("temperature", 1.0)) for value in logits.tolist()]
    kept = sorted(range(6), key=lambda token: -shares[token])[: options.get("top_k", 6)]
    if "top_p" in options:
        kept = kept[:3]  # 0.42, 0.26 and 0.15 of it: two have 0.68
    wanted = {token: count * shares[token] / sum(shares[each] for each in kept) for token in kept}
    assert sum(seen[token] for token in kept) == count
    chi2 = sum((seen[token] - expected) ** 2 / expected for token, expected in wanted.items())
    assert chi2 < 20.5  # 0.1 % of draws are above, with five degrees of freedom
    uniform = sum((seen[token] - count / len(kept)) ** 2 / (count / len(kept)) for token in kept)
    assert uniform > 200  # control: not what anything would be


class Configured(Gru):
    class config:
        block_size = CONTEXT


class OnlyLast(Gru):
    """As nanoGPT's, which makes the last position's logits alone unless it is given targets."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        out = super().forward(idx)
        return (out[:, [-1]], None) if targets is None else (out, nn.functional.cross_entropy(out.mT, targets))


def test_the_context_is_read_from_the_model() -> None:
    result = fit(Configured())
    assert result.generate([1], max_new_tokens=12, temperature=0).tolist() == rolled(result, [1], 12)


def test_the_logits_of_the_last_position_are_enough() -> None:
    torch.manual_seed(0)
    ids = torch.arange(12).repeat(8, 1) % 3
    model = OnlyLast()
    data = (ids[:, :CONTEXT], ids[:, 1 : CONTEXT + 1])
    result = trainfn.fit(model, data, loss="own", lr=0.05, max_steps=60, device="cpu", progress=False)
    found = result.generate([0, 1], max_new_tokens=7, temperature=0, context=CONTEXT)
    assert found.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_what_cannot_be_continued_is_said(result: trainfn.FitResult) -> None:
    with pytest.raises(ConfigError) as caught:
        result.generate([1], temperature=-1, top_k=0, top_p=1.5, max_new_tokens=2.5, seed=-1, context=0)
    for name in ("temperature=-1", "top_k=0", "top_p=1.5", "max_new_tokens=2.5", "seed=-1", "context=0"):
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match=r"needs a tokenizer[^$]*ByteTokenizer"):
        result.generate("to be")
    for prompt in ([], [[]], [1.5], [[1], [True]], {"a": 1}, torch.ones(1, 2, 3), None):
        with pytest.raises(DataError, match="prompt"):
            result.generate(prompt)
    with pytest.raises(ModelError, match=r"does not go through[^$]*context="):
        result.generate([1], max_new_tokens=12)
    with pytest.raises(ModelError, match=r"does not go through"):
        result.generate([V], max_new_tokens=1)
    flat = fit(nn.Sequential(nn.Embedding(V, 2), nn.Flatten(), nn.Linear(2 * CONTEXT, 3)), loss=lambda o, b: o.mean())
    with pytest.raises(ModelError, match="not those of a causal language model"):
        flat.generate(list(range(CONTEXT)))
    for stop in (".", ["."], True, 1.5):
        with pytest.raises(ConfigError, match=r"ended by ids[^$]*stop="):
            result.generate([1], stop=stop)
    with pytest.raises(DataError, match="no prompts"):
        result.generate(torch.zeros(0, 3, dtype=torch.long))


@pytest.mark.parametrize("biases", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_logits_that_no_token_can_be_drawn_from_are_said(biases: list[float]) -> None:
    def made(head: list[float]) -> trainfn.FitResult:
        model = nn.Sequential(nn.Embedding(V, 2), nn.Linear(2, 2))
        result = fit(model, loss=lambda outputs, batch: outputs.mean(), max_steps=1, check_data=False)
        params = result.state.params | {"1.bias": torch.tensor(head)}
        return attrs.evolve(result, state=trainfn.tree.evolve(result.state, params=params))

    with pytest.raises(ModelError, match="logits are not finite"):
        made(biases).generate([1], max_new_tokens=1)
    assert made([0.0, -math.inf]).generate([1], max_new_tokens=2).tolist() == [1, 0, 0]  # control: a forbidden token


def test_ids_of_other_kinds_of_integers_are_ids(result: trainfn.FitResult) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0, "context": CONTEXT}
    plain = result.generate([1, 2], **options).tolist()
    assert result.generate([np.int64(1), np.int64(2)], **options).tolist() == plain
    for stop in (np.int64(plain[2]), torch.tensor(plain[2]), np.array([plain[2]])):
        assert result.generate([1, 2], stop=stop, **options).tolist() == plain[:3]
