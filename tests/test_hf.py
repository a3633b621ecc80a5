"""Unmodified Hugging Face models, built from configurations, train through ``fit`` as one compiled program."""

from __future__ import annotations

import pytest
import torch

import trainfn

transformers = pytest.importorskip("transformers")


def make_gpt2():
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


def make_bert():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    return transformers.BertForSequenceClassification(config)


def tokens():
    """48 sequences that count upwards; a quarter of each is padding."""
    ids = (torch.arange(16) + torch.arange(48)[:, None]) % 60 + 1
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_trains_for_20_steps(name, mode):
    torch.manual_seed(0)
    model = make_gpt2() if name == "gpt2" else make_bert()
    data = tokens() if name == "gpt2" else tokens() | {"labels": (torch.arange(48) % 2)}
    loss = "language_modeling" if name == "gpt2" else "classification"
    result = trainfn.fit(
        model, data, loss=loss, lr=5e-3, batch_size=8, max_steps=20, log_every=1, compile=mode, device="cpu",
        progress=False,
    )  # fmt: skip
    assert result.state.cursor == int(result.state.step) == 20
    assert result.history[0]["weight"] == (8 * 11 if name == "gpt2" else 8)
    first = sum(row["loss"] for row in result.history[:5])
    assert sum(row["loss"] for row in result.history[-5:]) < first
    if name == "gpt2":
        assert "lm_head.weight" not in result.state.params  # tied to the embedding, so there once
        trained = result.model()
        assert trained.lm_head.weight is trained.transformer.wte.weight
