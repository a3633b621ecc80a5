"""Random small nets, batches, optimizers and steps: what the laws are held against.

A drawn value is a *recipe*: frozen, printable, built anew wherever it is used, so that a failing example can be read
and no test changes what another one sees. The nets are odd on purpose: norms with buffers, dropout, tied weights,
frozen parameters, a 0-d parameter, a backward that is wrong, labels that do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from trainfn.optim import Transform, adamw, sgd, warmup_cosine
from trainfn.state import TrainState
from trainfn.step import Step, make_step
from trainfn.tree import Tree, named_leaves

IGNORED = -100
Batch = dict[str, Tensor]

few = settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
"""For laws about compiled steps: each example costs seconds, and shrinking one costs minutes."""

# torch's own tracer instantiates the class of a custom backward, and warns about it.
torch_warns_of_itself = pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")

# A run warns of steps that it skips.
of_bad_numbers = pytest.mark.filterwarnings("ignore:.*NaN or infinite:trainfn.health.HealthWarning")


class Tripled(torch.autograd.Function):
    """The identity, with a backward that is wrong on purpose: three times the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3.0


class Poisoned(torch.autograd.Function):
    """The identity on a parameter; ``poison`` ([B]) is added to one element of its gradient and shows nowhere else."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, poison: Tensor) -> Tensor:
        ctx.save_for_backward(poison)
        return param.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (poison,) = ctx.saved_tensors
        first = torch.arange(grad.numel()).reshape(grad.shape) == 0
        return torch.where(first, grad + poison.sum(), grad), None


class Block(nn.Module):
    def __init__(self, width: int, kind: str, dropout: float) -> None:
        super().__init__()
        # No bias in front of BatchNorm: its true gradient is 0, and Adam makes a full step out of the rounding error.
        self.dense = nn.Linear(width, width, bias=kind != "batch_norm")
        self.norm = {"layer_norm": nn.LayerNorm, "batch_norm": nn.BatchNorm1d}.get(kind, nn.Identity)(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.norm(self.dense(x))))


class Mlp(nn.Module):
    def __init__(self, recipe: MlpRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.first = nn.Linear(recipe.features, recipe.width)
        self.blocks = nn.ModuleList(Block(recipe.width, kind, recipe.dropout) for kind in recipe.blocks)
        self.head = nn.Linear(recipe.width, recipe.classes)
        self.temperature = nn.Parameter(torch.tensor(1.25))

    def forward(self, x: Tensor, poison: Tensor | None = None) -> Tensor:
        poisoned = self.recipe.poisoned if poison is not None else None
        weight = Poisoned.apply(self.first.weight, poison) if poisoned == "first.weight" else self.first.weight
        hidden = torch.tanh(F.linear(x, weight, self.first.bias))
        for block in self.blocks:
            hidden = block(hidden)
        if self.recipe.wrong_backward:
            hidden = Tripled.apply(hidden)
        bias = Poisoned.apply(self.head.bias, poison) if poisoned == "head.bias" else self.head.bias
        heat = Poisoned.apply(self.temperature, poison) if poisoned == "temperature" else self.temperature
        return F.linear(hidden, self.head.weight, bias) * heat


@attrs.frozen
class MlpRecipe:
    """A classifier ``{"x": [B, features], "y": [B]} -> [B, classes]``."""

    features: int = 3
    width: int = 4
    classes: int = 3
    blocks: tuple[str, ...] = ("plain",)
    dropout: float = 0.0
    tied: bool = False
    frozen: tuple[str, ...] = ()
    wrong_backward: bool = False
    poisoned: str = "first.weight"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    loss: str = "classification"

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = Mlp(self)
        if self.tied:
            for block in net.blocks:
                block.dense.weight = net.blocks[0].dense.weight
        for name, param in net.named_parameters():
            param.requires_grad_(not name.startswith(self.frozen) if self.frozen else True)
        return net.to(self.dtype)

    def batch(self, length: int = 6, seed: int = 0) -> Batch:
        """Return a batch in which about a quarter of the labels, never the first, does not count."""
        own = torch.Generator().manual_seed(1000 * self.seed + seed)
        labels = torch.randint(0, self.classes, (length,), generator=own)
        dropped = torch.rand(length, generator=own) < 0.25
        dropped[0] = False
        x = torch.randn(length, self.features, generator=own, dtype=torch.float64).to(self.dtype)
        return {"x": x, "y": labels.masked_fill(dropped, IGNORED)}


class LanguageModel(nn.Module):
    """Looks at one token to guess the next: what stands beside it, padding included, cannot matter."""

    def __init__(self, recipe: LmRecipe) -> None:
        super().__init__()
        self.embedding = nn.Embedding(recipe.vocabulary, recipe.width)
        self.norm = nn.LayerNorm(recipe.width)
        self.dropout = nn.Dropout(recipe.dropout)
        self.head = nn.Linear(recipe.width, recipe.vocabulary, bias=False)
        if recipe.tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.embedding(input_ids))))


@attrs.frozen
class LmRecipe:
    """A language model ``{"input_ids": [B, T], "labels": [B, T]} -> [B, T, vocabulary]``."""

    vocabulary: int = 7
    width: int = 4
    dropout: float = 0.0
    tied: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    loss: str = "language_modeling"

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return LanguageModel(self).to(self.dtype)

    def batch(self, length: int = 6, seed: int = 0) -> Batch:
        """Return a batch of up to 9 tokens a row of which a different share counts in every row; in some, none."""
        own = torch.Generator().manual_seed(1000 * self.seed + seed)
        tokens = torch.randint(0, self.vocabulary, (length, 9), generator=own)
        share = torch.rand(length, 1, generator=own).mul(1.6).sub(0.3)
        share[0] = 1.0
        counted = torch.rand(length, 9, generator=own) < share
        return {"input_ids": tokens, "labels": tokens.masked_fill(~counted, IGNORED)}


Recipe = MlpRecipe | LmRecipe


@attrs.frozen
class Setup:
    """A net, and a step that trains it."""

    net: Recipe
    optimizer: Transform = attrs.field(repr=lambda transform: transform.name)
    clip_norm: float | None = None
    ema: float | None = None
    accumulate: int = 1
    length: int = 6

    def step(self, model: nn.Module, loss: Callable[..., Any] | str | None = None) -> Step:
        return make_step(
            model,
            loss=loss or self.net.loss,
            optimizer=self.optimizer,
            accumulate=self.accumulate,
            clip_norm=self.clip_norm,
            ema=self.ema,
        )

    def state(self, model: nn.Module, seed: int = 0) -> TrainState:
        return trainfn.init(model, self.optimizer, seed=seed, ema=self.ema is not None)

    def batch(self, seed: int = 0) -> Batch:
        return self.net.batch(self.length, seed)


float32_or_64 = st.sampled_from([torch.float32, torch.float64])
rates = st.sampled_from([0.1, 0.01, 0.003])
schedules = st.builds(
    lambda peak, warmup, more, final: warmup_cosine(peak, warmup=warmup, total=warmup + more, final=final),
    rates,
    st.integers(0, 3),
    st.integers(1, 6),
    st.sampled_from([0.0, 1e-4]),
)
adamws = st.builds(
    adamw,
    lr=rates | schedules,
    betas=st.tuples(st.sampled_from([0.0, 0.8, 0.9]), st.sampled_from([0.95, 0.999])),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
sgds = st.builds(
    lambda lr, momentum, nesterov, weight_decay: sgd(
        lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay
    ),
    rates | schedules,
    st.sampled_from([0.0, 0.9]),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
)
optimizers = adamws | sgds


@st.composite
def mlps(
    draw: st.DrawFn,
    *,
    batch_norm: bool = True,
    dropout: bool = True,
    dtype: st.SearchStrategy[torch.dtype] | None = None,
) -> MlpRecipe:
    kinds = ["plain", "layer_norm", *(["batch_norm"] if batch_norm else [])]
    blocks = tuple(draw(st.lists(st.sampled_from(kinds), max_size=3)))
    return MlpRecipe(
        features=draw(st.integers(1, 4)),
        width=draw(st.integers(4, 6)),
        classes=draw(st.integers(2, 4)),
        blocks=blocks,
        dropout=draw(st.sampled_from([0.0, 0.3])) if dropout else 0.0,
        tied=len(set(blocks)) == 1 and draw(st.booleans()),
        frozen=draw(st.sampled_from([(), ("blocks.0",), ("first.bias", "head.weight")])),
        wrong_backward=draw(st.booleans()),
        poisoned=draw(st.sampled_from(["first.weight", "head.bias", "temperature"])),
        dtype=draw(float32_or_64 if dtype is None else dtype),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def language_models(
    draw: st.DrawFn, *, dropout: bool = True, dtype: st.SearchStrategy[torch.dtype] | None = None
) -> LmRecipe:
    return LmRecipe(
        vocabulary=draw(st.integers(2, 7)),
        width=draw(st.integers(3, 6)),
        dropout=draw(st.sampled_from([0.0, 0.3])) if dropout else 0.0,
        tied=draw(st.booleans()),
        dtype=draw(float32_or_64 if dtype is None else dtype),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def setups(draw: st.DrawFn, nets: st.SearchStrategy[Recipe]) -> Setup:
    accumulate = draw(st.sampled_from([1, 1, 2, 3]))
    share = draw(st.integers(2, 3))  # BatchNorm needs two examples in each micro-batch, the last one too
    return Setup(
        net=draw(nets),
        optimizer=draw(optimizers),
        clip_norm=draw(st.sampled_from([None, 0.05, 1e6])),
        ema=draw(st.sampled_from([None, 0.0, 0.9])),
        accumulate=accumulate,
        length=accumulate * share - (share == 3 and draw(st.booleans())),
    )


def leaves(tree: Tree) -> dict[str, Any]:
    """Return the tree's leaves by name: what ``torch.testing.assert_close`` can compare."""
    return dict(named_leaves(tree))


def relative_error(found: Tree, right: Tree) -> float:
    """Return |found - right| / |right|, each norm taken over all leaves together, in float64."""
    left, reference = ({name: leaf.detach() for name, leaf in leaves(tree).items()} for tree in (found, right))
    assert left.keys() == reference.keys()
    difference = sum(float((left[name].double() - reference[name].double()).square().sum()) for name in reference)
    size = sum(float(leaf.double().square().sum()) for leaf in reference.values())
    return (difference / size) ** 0.5 if size else float(difference > 0)


class Loud(nn.Module):
    """A linear model; the last column of its input multiplies the output, and so the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x[:, :1]) * x[:, 1:]
