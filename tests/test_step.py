"""The step in eager mode: draws, modes, averages, batches of every form, and refusals. The laws are in ``laws/``."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from tests.strategies import Batch, LmRecipe, MlpRecipe, Recipe, Setup, language_models, mlps, setups
from trainfn.errors import ConfigError, ModelError
from trainfn.optim import adamw, sgd
from trainfn.state import TrainState, trainable
from trainfn.step import _mix
from trainfn.tree import digest, named_leaves

dropping = Setup(MlpRecipe(blocks=("plain", "plain"), width=6, dropout=0.5), sgd(0.1))
counters = st.integers(0, 2**62)

# --- draws ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 2**63 - 1), counters, st.integers(0, 2**63 - 1), counters)
def test_draws_are_a_function_of_seed_and_cursor(seed: int, cursor: int, other_seed: int, other_cursor: int) -> None:
    def loss_at(seed: int, cursor: int) -> float:
        return float(step(attrs.evolve(first, seed=seed, cursor=cursor), batch).report.loss)

    model, batch = dropping.net.model(), dropping.batch()
    step, first = dropping.step(model), dropping.state(model)
    found = loss_at(seed, cursor)
    torch.manual_seed(123)
    torch.rand(7)
    np.random.rand(7)
    assert loss_at(seed, cursor) == found
    for pair in ((other_seed, cursor), (seed, other_cursor), (cursor, seed)):
        if pair != (seed, cursor):
            assert loss_at(*pair) != found


def test_control_without_seeding_draws_depend_on_what_was_drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = dropping.net.model(), dropping.batch()
    step, state = dropping.step(model), dropping.state(model)
    monkeypatch.setattr(trainfn.step, "_mix", lambda seed, cursor: torch.seed() % 2**63)
    losses = {float(step(state, batch).report.loss) for _ in range(4)}
    assert len(losses) > 1


def test_neighbouring_seeds_and_cursors_share_no_draws() -> None:
    numbers = [range(20), [2**31, 2**32, 2**62, 2**63 - 1]]
    pairs = [(seed, cursor) for seeds in numbers for seed in seeds for cursors in numbers for cursor in cursors]
    mixed = [_mix(*pair) for pair in pairs]
    assert len(set(mixed)) == len(pairs)
    assert all(0 <= number < 2**64 for number in mixed)
    flipped = [bin(_mix(5, 7) ^ _mix(5, 7 ^ (1 << bit))).count("1") for bit in range(60)]
    assert 24 < sum(flipped) / len(flipped) < 40  # of 64


def test_evaluation_draws_nothing_and_uses_running_statistics() -> None:
    setup = Setup(MlpRecipe(blocks=("batch_norm",), dropout=0.5), sgd(0.1))
    model, batch = setup.net.model(), setup.batch()
    step, state = setup.step(model), setup.state(model)
    state = step(state, batch)
    twin = setup.net.model().eval()
    twin.load_state_dict({name: tensor.detach() for name, tensor in (state.params | state.buffers).items()})
    right = nn.functional.cross_entropy(twin(batch["x"]), batch["y"], reduction="sum")
    found = step.evaluate(state, batch)
    assert digest(found["loss"].total) == digest(right)
    assert digest(step.evaluate(attrs.evolve(state, cursor=99), batch)) == digest(found)


def test_evaluation_of_the_average() -> None:
    setup = Setup(LmRecipe(), sgd(1.0), ema=0.5)
    model, batch = setup.net.model(), setup.batch()
    step = setup.step(model)
    state = step(step(setup.state(model), batch), batch)
    averaged = attrs.evolve(state, params={name: tensor.requires_grad_() for name, tensor in state.ema.items()})
    assert digest(step.evaluate(state, batch, params=state.ema)) == digest(step.evaluate(averaged, batch))
    assert digest(step.evaluate(state, batch)) != digest(step.evaluate(averaged, batch))


# --- modes ------------------------------------------------------------------------------------------------------------


class SaysItsMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, self.inner.training, torch.is_grad_enabled()))
        return self.weight * x


def mean(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.mean()


@pytest.mark.parametrize(
    ("outer", "inner", "training", "evaluating"),
    [
        (True, True, (True, True), (False, False)),
        (False, False, (True, True), (False, False)),  # a model in evaluation mode is trained in training mode
        (True, False, (True, False), (False, False)),  # a part put in evaluation mode on purpose stays so
        (False, True, (True, True), (False, True)),
    ],
)
def test_the_mode_of_every_module_in_a_step_and_afterwards(
    outer: bool, inner: bool, training: tuple[bool, bool], evaluating: tuple[bool, bool]
) -> None:
    model, optimizer = SaysItsMode(), sgd(0.1)
    model.train(outer)
    model.inner.train(inner)
    step, state = trainfn.make_step(model, loss=mean, optimizer=optimizer), trainfn.init(model, optimizer)
    step(state, torch.ones(2, 1))
    step.evaluate(state, torch.ones(2, 1))
    assert model.seen == [(*training, True), (*evaluating, False)]
    assert (model.training, model.inner.training) == (outer, inner)


def test_frozen_batch_norm_inside_a_training_model_keeps_its_statistics() -> None:
    setup = Setup(MlpRecipe(blocks=("batch_norm", "batch_norm")), sgd(0.1))
    model = setup.net.model()
    model.blocks[0].norm.eval()
    state = setup.state(model)
    after = setup.step(model)(state, setup.batch())
    changed = {name for name, buffer in after.buffers.items() if digest(buffer) != digest(state.buffers[name])}
    assert changed == {f"blocks.1.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


# --- the average of the parameters ------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(mlps() | language_models(), st.sampled_from([0.0, 0.5, 0.99]))
def test_the_average_is_that_of_all_the_parameters_so_far(net: Recipe, decay: float) -> None:
    setup = Setup(net, adamw(0.1), ema=decay)
    model = net.model()
    step, state = setup.step(model), setup.state(model)
    trail = []
    for index in range(4):
        state = step(state, setup.batch(index))
        trail.append({name: state.params[name].detach().double() for name in state.ema})
    weights = [decay ** (3 - index) for index in range(4)]  # 0.0 ** 0 is 1: the last alone
    weights = [weight / sum(weights) for weight in weights]  # the first parameters, drawn at random, are not in it
    for name, found in state.ema.items():
        right = sum(weight * past[name] for weight, past in zip(weights, trail, strict=True))
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
        assert found.dtype == net.dtype
        assert not found.requires_grad
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert not frozen & set(state.ema)


@pytest.mark.parametrize(("kept", "decay"), [(True, None), (False, 0.9)])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_state_and_a_step_that_disagree_about_the_average(kept: bool, decay: float | None, mode: Any) -> None:
    net, optimizer = MlpRecipe(), sgd(0.1)
    model = net.model()
    plain = trainfn.make_step(model, loss=net.loss, optimizer=optimizer, ema=decay)
    step = trainfn.compile(plain, mode=mode, backend="eager")
    with pytest.raises(ConfigError, match="disagree about the moving average"):
        step(trainfn.init(model, optimizer, ema=kept), net.batch())


# --- what a step returns ----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(setups(mlps() | language_models()))
def test_a_step_returns_what_the_next_one_reads(setup: Setup) -> None:
    model, batch = setup.net.model(), setup.batch()
    step, state = setup.step(model), setup.state(model, seed=11)
    after = step(state, batch)
    assert isinstance(after, TrainState)
    assert (int(after.step), after.cursor, after.seed) == (1, 1, 11)
    assert {name: param.requires_grad for name, param in after.params.items()} == {
        name: param.requires_grad for name, param in model.named_parameters()
    }
    assert all(param.is_leaf and param.grad is None for param in after.params.values())
    for name, param in after.params.items():
        assert (param is state.params[name]) == (not param.requires_grad)  # a frozen one is handed through
    for name, field in named_leaves((after.step, after.report, after.health, after.stats)):
        shapes = {"grad_norms": len(trainable(after.params)), "outcomes": 16}
        shapes |= dict.fromkeys(("mean", "spread", "last", "count"), 3)
        length = shapes.get(name.rsplit(".")[-1])
        assert field.shape == (() if length is None else (length,)), name
        assert not field.requires_grad
    assert torch.isfinite(after.report.loss)
    assert float(after.report.grad_norm) > 0


def test_the_report_is_about_the_mean_loss_and_the_norm_before_clipping() -> None:
    net = LmRecipe(dtype=torch.float64)
    found = []
    for clip_norm in (None, 1e-3):
        setup = Setup(net, sgd(1.0), clip_norm=clip_norm)
        model, batch = net.model(), setup.batch()
        state = setup.state(model)
        after = setup.step(model)(state, batch)
        logits, nexts = model(batch["input_ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        mean_loss = nn.functional.cross_entropy(logits, nexts)
        mean_loss.backward()
        grads = torch.cat([param.grad.flatten() for param in model.parameters()])
        assert float(after.report.loss) == pytest.approx(float(mean_loss.detach()), rel=1e-12)
        assert float(after.report.weight) == int((nexts != -100).sum())
        assert float(after.report.grad_norm) == pytest.approx(float(grads.norm()), rel=1e-12)
        moved = [after.params[name].detach() - state.params[name].detach() for name in state.params]
        found.append(float(torch.cat([move.flatten() for move in moved]).norm()))
    assert found == pytest.approx([float(grads.norm()), 1e-3], rel=1e-9)


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "other names"])
def test_a_batch_may_have_any_form(form: str) -> None:
    net = MlpRecipe()
    model, optimizer, fields = net.model(), sgd(0.1), net.batch()
    x, y = fields["x"], fields["y"]
    batches: dict[str, Any] = {
        "tuple": (x, y),
        "list": [x, y],
        "dict": fields,
        "other names": {"pixels": x, "label": y},
    }
    step = trainfn.make_step(model, loss=net.loss, optimizer=optimizer, accumulate=2)
    found = step(trainfn.init(model, optimizer), batches[form])
    assert digest(found) == digest(step(trainfn.init(model, optimizer), fields))


class TwoHeads(nn.Module):
    """Returns what Hugging Face models return, and would compute its own loss if it were given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 5)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        assert labels is None
        return {"loss": None, "logits": self.embedding(input_ids), "hidden": ()}


def test_a_model_that_could_compute_its_own_loss_is_not_asked_to() -> None:
    model, optimizer = TwoHeads(), sgd(0.1)
    step = trainfn.make_step(model, loss="language_modeling", optimizer=optimizer)
    tokens = torch.tensor([[1, 2, 3]])
    assert int(step(trainfn.init(model, optimizer), {"input_ids": tokens, "labels": tokens}).step) == 1


def test_training_learns() -> None:
    setup = Setup(MlpRecipe(width=6), adamw(0.05), clip_norm=1.0)
    model, batch = setup.net.model(), setup.batch()
    step, state = setup.step(model), setup.state(model)
    losses = []
    for _ in range(60):
        state = step(state, batch)
        losses.append(float(state.report.loss))
    assert losses[-1] < 0.1 * losses[0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": True}, "accumulate"),
        ({"accumulate": 2.0}, "accumulate"),
        ({"clip_norm": 0.0}, "clip norm"),
        ({"clip_norm": float("nan")}, "clip norm"),
        ({"ema": 1.0}, "EMA"),
        ({"ema": -0.1}, "EMA"),
        ({"loss": "clasification"}, "classification"),
        ({"loss": 3}, "neither a name nor a function"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        trainfn.make_step(nn.Linear(1, 1), **{"loss": "classification", "optimizer": sgd(0.1)} | options)


@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        (lambda outputs, batch: outputs, {"x": torch.ones(2, 3)}),
        (lambda outputs, batch: 1.0, {"x": torch.ones(2, 3)}),
        (mean, {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}),
    ],
)
def test_a_loss_or_a_batch_that_does_not_fit_is_refused(loss: Any, batch: Batch) -> None:
    model, optimizer = MlpRecipe().model(), sgd(0.1)
    model.forward = lambda x: x @ model.first.weight.t()
    step = trainfn.make_step(model, loss=loss, optimizer=optimizer)
    with pytest.raises(ModelError):
        step(trainfn.init(model, optimizer), batch)
