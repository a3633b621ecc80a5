"""The work that is timed: models and one batch each, the same for every peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Workload(NamedTuple):
    """What is trained.

    Attributes:
        name: its short name.
        model: makes the model, always with the same weights.
        batch: inputs and target.
        loss: name of the loss in trainfn.
        mean: the same loss as a function ``(outputs, target) -> mean``.
        steps: steps in a round.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: tuple[Tensor, Tensor]
    loss: str
    mean: Callable[[Tensor, Tensor], Tensor]
    steps: int


class Block(nn.Module):
    """A transformer's block, as in nanoGPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).split(d, dim=2)
        q, k, v = (each.view(b, t, self.heads, d // self.heads).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, *, layers: int, width: int, heads: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return model


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _tokens(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def mlp(layers: int = 12, width: int = 8, batch: int = 16, name: str = "C1") -> Workload:
    """Bound by dispatch: 24 tensors of 8 x 8 and 8."""
    parts = lambda: [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]  # noqa: E731
    data = (_numbers(batch, width), _numbers(batch, width).flip(0))
    return Workload(name, _seeded(lambda: nn.Sequential(*parts())), data, "mse", F.mse_loss, 200)


def wide(name: str = "C3") -> Workload:
    """Bound by the update: 16.8 million parameters, one example."""
    data = (_numbers(1, 4096), _numbers(1, 4096).flip(1))
    return Workload(name, _seeded(lambda: nn.Linear(4096, 4096, bias=False)), data, "mse", F.mse_loss, 5)


def gpt(name: str, *, layers: int, width: int, context: int, batch: int, steps: int, vocabulary: int = 65) -> Workload:
    sizes: dict[str, Any] = {"layers": layers, "width": width, "heads": 4, "context": context, "vocabulary": vocabulary}
    data = (_tokens(vocabulary, batch, context), _tokens(vocabulary, batch, context).flip(1))
    mean = lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten())  # noqa: E731
    return Workload(name, _seeded(lambda: GPT(**sizes)), data, "masked_language_modeling", mean, steps)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "C1": mlp,
    "C3": wide,
    "C4": lambda: gpt("C4", layers=4, width=128, context=64, batch=12, steps=5),
    "C4b": lambda: gpt("C4b", layers=12, width=64, context=32, batch=2, steps=20),
}
