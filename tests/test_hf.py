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


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("gpt2", "eager"),
        ("bert", "eager"),
        *(pytest.param(name, "graph", marks=pytest.mark.slow) for name in ("gpt2", "bert")),
    ],
)
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


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_makes_its_decoder_inputs_of_the_labels(kind: str) -> None:
    """The loss is the model's own: a decoder that read ``input_ids`` instead would be trained on something else."""
    torch.manual_seed(0)
    small = {"vocab_size": 32, "d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 0}
    if kind == "bart":
        heads = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("attention_heads", "layers")}
        sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16, "dropout": 0.0}
        config = transformers.BartConfig(**small, **heads, **sizes)
        model = transformers.BartForConditionalGeneration(config)
    else:
        config = transformers.T5Config(**small, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
        model = transformers.T5ForConditionalGeneration(config)
    batch = {"input_ids": torch.randint(3, 32, (4, 6)), "labels": torch.randint(3, 32, (4, 5))}
    batch["labels"][1, 3:] = -100
    optimizer = trainfn.optim.sgd(0.1)
    step = trainfn.make_step(model, loss="seq2seq", optimizer=optimizer)
    found = step.evaluate(trainfn.init(model, optimizer), batch)["loss"]
    right = model.eval()(**batch).loss
    assert float(found.total / found.weight) == pytest.approx(float(right.detach()), rel=1e-5)


def make_vit():
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize(
    ("make", "task", "data"),
    [
        (make_bert, "text_classification", [([2 + i % 2] * (3 + i % 4), i % 2) for i in range(24)]),
        (make_gpt2, "language_modeling", [list(range(1, 5 + i % 5)) for i in range(24)]),
        (
            lambda: transformers.BertForMaskedLM(make_bert().config),
            trainfn.TaskSpec(
                kind="masked_language_modeling",
                special_tokens={"pad": 0, "mask": 1},
                collate_options={"vocab_size": 64, "probability": 0.5},
            ),
            [list(range(5, 15 + i % 5)) for i in range(24)],
        ),
        (
            make_vit,
            trainfn.TaskSpec(kind="vision_classification", inputs={"image": "pixel_values"}, target="digit"),
            {"image": torch.arange(24)[:, None, None, None].expand(24, 1, 8, 8) / 24, "digit": torch.arange(24) // 8},
        ),
    ],
    ids=["bert", "gpt2", "bert_mlm", "vit"],
)
def test_a_task_is_all_that_a_model_needs(make, task, data):
    """Padding, masks and names of fields come from the task; warnings, such as of a field not passed, are errors."""
    torch.manual_seed(0)
    result = trainfn.fit(
        make(), data, task=task, lr=1e-2, batch_size=8, max_steps=30, log_every=1, device="cpu", progress=False,
        compile="eager",
    )  # fmt: skip
    first, last = (sum(row["loss"] for row in rows) for rows in (result.history[:5], result.history[-5:]))
    assert last < 0.8 * first


def test_padding_on_either_side_counts_the_tokens_of_the_texts_alone():
    torch.manual_seed(0)
    model = make_gpt2().eval()
    step = trainfn.make_step(model, loss="language_modeling", optimizer=trainfn.optim.sgd(0.1))
    state = trainfn.init(model, step.optimizer)
    texts = [list(range(3, 9)), [5, 6, 7]]
    found = {
        side: trainfn.evaluate(step, state, texts, batch_size=2, collate=trainfn.data.collator("text", side=side))
        for side in ("left", "right")
    }
    alone = trainfn.evaluate(step, state, texts, batch_size=1, collate="text")
    assert found["right"]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["left"]["weight"] == alone["weight"] == 7
