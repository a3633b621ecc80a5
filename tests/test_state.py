"""The first state: a copy of the model, whole, and its refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trainfn
from tests.strategies import LmRecipe, MlpRecipe, Recipe, language_models, mlps
from trainfn.errors import ConfigError, ModelError, TrainfnError
from trainfn.optim import adamw, sgd
from trainfn.state import Report, trainable
from trainfn.tree import digest, evolve, named_leaves


@settings(max_examples=40)
@given(mlps() | language_models(), st.booleans(), st.integers(0, 2**63 - 1))
def test_the_first_state_is_a_copy_of_the_model(net: Recipe, ema: bool, seed: int) -> None:
    model = net.model()
    before = digest(dict(model.named_parameters()) | dict(model.named_buffers()))
    state = trainfn.init(model, adamw(), seed=seed, ema=ema)
    assert digest(state.params) == digest(dict(model.named_parameters()))
    assert digest(state.buffers) == digest(dict(model.named_buffers()))
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert list(trainable(state.params)) == list(state.opt.mu) == list(state.opt.nu) == trained
    assert (state.ema is None) != ema
    if ema:
        assert digest(state.ema) == digest(trainable(state.params))
    assert (int(state.step), state.cursor, state.seed) == (0, 0, seed)
    assert (int(state.health.streak), int(state.stats.outcomes.sum()), int(state.report.verdict)) == (0, 0, 0)
    with torch.no_grad():  # nothing is shared: neither with the model nor between leaves
        pointers = [leaf.data_ptr() for _, leaf in named_leaves(state) if isinstance(leaf, torch.Tensor)]
        assert len(set(pointers)) == len(pointers)
        for _, leaf in named_leaves(state):
            if isinstance(leaf, torch.Tensor):
                leaf.fill_(1)
    assert digest(dict(model.named_parameters()) | dict(model.named_buffers())) == before


def test_tied_weights_are_one_leaf() -> None:
    state = trainfn.init(LmRecipe(tied=True).model(), adamw())
    assert [name for name in state.params if "weight" in name] == ["embedding.weight", "norm.weight"]


def test_buffers_that_are_not_saved_by_torch_are_part_of_the_state() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("temporary", torch.ones(2), persistent=False)
    assert list(trainfn.init(model, sgd(0.1)).buffers) == ["temporary"]


def test_parameters_may_share_a_tensor_that_is_not_contiguous() -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.arange(6.0).reshape(3, 2).t())
    state = trainfn.init(model, sgd(0.1))
    assert torch.equal(state.params["weight"], model.weight)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "0", None, True])
def test_a_seed_out_of_range_is_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed"):
        trainfn.init(nn.Linear(1, 1), sgd(0.1), seed=seed)  # type: ignore[arg-type]


def all_frozen() -> nn.Module:
    return nn.Linear(1, 1).requires_grad_(False)


def some_lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("make", "what", "told"),
    [
        (all_frozen, "nothing to train", "2 parameters, all frozen"),
        (nn.Identity, "nothing to train", "0 parameters"),
        (some_lazy, "lazy parameters", "1.weight, 1.bias"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(make: Callable[[], nn.Module], what: str, told: str) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        trainfn.init(make(), sgd(0.1))
    assert told in str(caught.value)


def test_a_lazy_model_that_has_seen_a_batch_is_fine() -> None:
    model = some_lazy()
    model(torch.ones(1, 1))
    assert trainfn.init(model, sgd(0.1)).params["1.weight"].shape == (2, 1)


def test_the_state_cannot_be_written_to() -> None:
    state = trainfn.init(MlpRecipe().model(), sgd(0.1))
    with pytest.raises(AttributeError):
        state.cursor = 3  # type: ignore[misc]
    assert not issubclass(AttributeError, TrainfnError)


def test_device_moves_the_state_and_not_the_model() -> None:
    model = nn.Linear(1, 1)
    state = trainfn.init(model, adamw(), device="meta")
    assert {leaf.device.type for _, leaf in named_leaves(state) if isinstance(leaf, torch.Tensor)} == {"meta"}
    assert model.weight.device.type == "cpu"


def test_a_report_goes_through_one_row_bit_by_bit() -> None:
    report = evolve(trainfn.init(nn.Linear(2, 2), sgd(0.1)).report, verdict=torch.tensor(5))
    same = Report.of(report.row)
    assert digest(same) == digest(report)
    assert same.verdict.dtype == torch.int64
