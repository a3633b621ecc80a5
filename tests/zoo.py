"""Models as people bring them, small: how each is made, what data it is given, and what it is trained for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, T, N = 32, 12, 32  # words, positions, examples


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int, dropout: float) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.n_embd, self.dropout = heads, width, dropout
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (each.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, block_size, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """In the form of A. Karpathy's nanoGPT (``model.py``): tied weights, a loss of its own, and without targets the
    logits of the last position alone."""

    def __init__(self) -> None:
        super().__init__()
        self.block_size, width = T, 16
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, width),
                "wpe": nn.Embedding(T, width),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList([Block(width, 2, T, 0.1) for _ in range(2)]),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, V, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, param in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(param, mean=0.0, std=0.02 / math.sqrt(4))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        device = idx.device
        _, t = idx.size()
        assert t <= self.block_size, f"Cannot forward sequence of length {t}, block size is only {self.block_size}"
        pos = torch.arange(0, t, dtype=torch.long, device=device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class Lstm(nn.Module):
    """The last output of two layers, with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 8)
        self.lstm, self.head = nn.LSTM(8, 16, num_layers=2, dropout=0.1, batch_first=True), nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.lstm(self.embed(tokens))
        return self.head(out[:, -1])


class Encoder(nn.Module):
    """PyTorch's own encoder, over padded texts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, dropout=0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return {"hidden": hidden, "logits": self.head(hidden[:, 0])}


class Tabular(nn.Module):
    """Numbers, categories and a text's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.colours, self.words = nn.Embedding(5, 4), nn.EmbeddingBag(V, 4)
        self.net = nn.Sequential(nn.BatchNorm1d(11), nn.Linear(11, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def forward(self, numbers: Tensor, colour: Tensor, words: Tensor | None = None) -> Tensor:
        parts = [numbers, self.colours(colour)] + ([] if words is None else [self.words(words)])
        return self.net(torch.cat(parts, 1)).squeeze(1)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}


def from_config(kind: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        model: nn.Module = getattr(transformers, kind + head)(getattr(transformers, kind + "Config")(**options))
        return model

    return make


def decoder() -> nn.Module:
    x_transformers = pytest.importorskip("x_transformers")
    layers = x_transformers.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True, attn_flash=True)
    return x_transformers.TransformerWrapper(num_tokens=V, max_seq_len=T, attn_layers=layers)  # type: ignore[no-any-return]


IDS = (torch.arange(T + 1) + 3 * torch.arange(N)[:, None]) % (V - 2) + 1  # sequences that count upwards
CLASSES = torch.arange(N) % 4
MASK = (torch.arange(T) < 4 + CLASSES[:, None]).long()
TEXTS = {"input_ids": IDS[:, :T] * MASK, "attention_mask": MASK, "labels": CLASSES}
OWN = torch.Generator().manual_seed(0)
IMAGES = torch.randn(N, 1, 8, 8, generator=OWN) + CLASSES[:, None, None, None]


@attrs.frozen
class Member:
    """A model of the zoo: how it is made, and what it is trained on, for what."""

    make: Callable[[], nn.Module]
    data: Any
    loss: str
    lr: float = 1e-2


ZOO = {
    "nanoGPT": Member(NanoGPT, (IDS[:, :T], IDS[:, 1:]), "own"),
    "CNN": Member(convolutions, (IMAGES, CLASSES), "classification"),
    "LSTM": Member(
        Lstm, {"tokens": 5 * CLASSES[:, None] + torch.arange(T) % 5, "labels": CLASSES}, "classification", lr=5e-2
    ),
    "TransformerEncoder": Member(Encoder, TEXTS, "classification"),
    "tabular": Member(
        Tabular,
        {"numbers": torch.randn(N, 3, generator=OWN), "colour": CLASSES, "words": IDS[:, :T], "y": CLASSES.float()},
        "mse",
    ),
    "x-transformers": Member(decoder, IDS[:, :T], "language_modeling"),
    "GPT-2": Member(
        from_config("GPT2", "LMHeadModel", vocab_size=V, n_positions=T, n_embd=16, n_layer=2, n_head=2, **NO_SPECIAL),
        IDS[:, :T],
        "language_modeling",
    ),
    "Llama": Member(
        from_config("Llama", "ForCausalLM", vocab_size=V, num_key_value_heads=1, **SIZES, **NO_SPECIAL),
        {"input_ids": TEXTS["input_ids"], "attention_mask": MASK},
        "language_modeling",
    ),
    "BERT": Member(
        from_config("Bert", "ForSequenceClassification", vocab_size=V, num_labels=4, **SIZES),
        TEXTS,
        "classification",
        lr=3e-3,
    ),
    "ViT": Member(
        from_config("ViT", "ForImageClassification", image_size=8, patch_size=4, num_channels=1, num_labels=4, **SIZES),
        {"pixel_values": IMAGES, "labels": CLASSES},
        "classification",
        lr=3e-3,
    ),
}
