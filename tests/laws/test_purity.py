"""Law 1: a step writes to nothing it was given, and to no global, whether it returns or raises."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from tests.strategies import (
    Batch,
    LmRecipe,
    MlpRecipe,
    Setup,
    few,
    language_models,
    mlps,
    optimizers,
    setups,
    torch_warns_of_itself,
)
from trainfn.optim import Transform, adamw, sgd
from trainfn.state import Params, TrainState
from trainfn.tree import Tree, digest

pytestmark = torch_warns_of_itself

any_setup = setups(mlps() | language_models())


class Boom(Exception):
    """What the broken losses and models here raise."""


class BreaksAfterwards(nn.Module):
    """Runs its net, changes a buffer, draws a number, and then fails."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        self.net(*args, **kwargs)
        self.calls += torch.rand(1)
        raise Boom


def breaking_loss(outputs: Tensor, batch: Batch) -> Tensor:
    outputs.sum()
    raise Boom


def everything(model: nn.Module, state: TrainState, batch: Batch) -> dict[str, Any]:
    """All that a step could reach and must leave alone, to the bit."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "state": digest(state),
        "what the state trains": [param.requires_grad for param in state.params.values()],
        "gradients on the state": [param.grad is None for param in state.params.values()],
        "batch": digest(batch),
        "model": digest(tensors),
        "gradients on the model": [param.grad is None for param in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "torch's generator": digest(torch.get_rng_state()),
        "python's generator": random.getstate(),
        "numpy's generator": repr(np.random.get_state()),
        "gradient mode": torch.is_grad_enabled(),
    }


@contextmanager
def untouched(model: nn.Module, state: TrainState, batch: Batch) -> Iterator[None]:
    before = everything(model, state, batch)
    yield
    after = everything(model, state, batch)
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"the step changed {changed}"


def set_modes(model: nn.Module, mode: str) -> None:
    model.train(mode != "eval")
    if mode == "mixed":
        for module in list(model.modules())[1:2]:
            module.eval()


modes = st.sampled_from(["train", "eval", "mixed"])


@settings(max_examples=50)
@given(any_setup, modes, st.integers(0, 2**63 - 1), st.booleans())
def test_an_eager_step_writes_to_nothing(setup: Setup, mode: str, seed: int, no_grad: bool) -> None:
    model, batch = setup.net.model(), setup.batch()
    set_modes(model, mode)
    step, state = setup.step(model), setup.state(model, seed)
    for _ in range(2):
        with untouched(model, state, batch), torch.no_grad() if no_grad else nullcontext():
            after = step(state, batch)
        assert float(after.report.lr) == 0.0 or digest(after.params) != digest(state.params)
        state = after


@settings(max_examples=30)
@given(any_setup, modes, st.sampled_from(["loss", "forward"]))
def test_an_eager_step_that_raises_writes_to_nothing(setup: Setup, mode: str, where: str) -> None:
    model, batch = setup.net.model(), setup.batch()
    model = BreaksAfterwards(model) if where == "forward" else model
    set_modes(model, mode)
    step, state = setup.step(model, breaking_loss if where == "loss" else None), setup.state(model)
    with untouched(model, state, batch), pytest.raises(Boom):
        step(state, batch)


@settings(max_examples=20)
@given(any_setup, modes)
def test_evaluation_writes_to_nothing(setup: Setup, mode: str) -> None:
    model, batch = setup.net.model(), setup.batch()
    set_modes(model, mode)
    step, state = setup.step(model), setup.state(model)
    with untouched(model, state, batch):
        found = step.evaluate(state, batch, params=state.ema)
    assert not found["loss"].total.requires_grad


@settings(few, max_examples=5)
@given(any_setup, modes)
def test_a_compiled_step_writes_to_nothing(setup: Setup, mode: str) -> None:
    model, batch = setup.net.model(), setup.batch()
    set_modes(model, mode)
    step = trainfn.compile(setup.step(model), mode="graph", backend="aot_eager")
    state = setup.state(model)
    for _ in range(3):  # the first call compiles
        with untouched(model, state, batch):
            after = step(state, batch)
        state = after
    assert step.compiles == 1


@few
@given(any_setup, st.sampled_from(["loss", "forward"]), st.booleans())
def test_a_compiled_step_that_raises_writes_to_nothing(setup: Setup, where: str, donate: bool) -> None:
    model, batch = setup.net.model(), setup.batch()
    model = BreaksAfterwards(model) if where == "forward" else model
    plain = setup.step(model, breaking_loss if where == "loss" else None)
    step = trainfn.compile(plain, mode="graph", donate=donate, backend="aot_eager")
    state = setup.state(model)
    with untouched(model, state, batch), pytest.raises(Boom):
        step(state, batch)


@settings(few, max_examples=3)
@given(optimizers, st.booleans())
def test_a_donating_step_writes_to_its_state_and_to_nothing_else(optimizer: Transform, warm: bool) -> None:
    setup = Setup(MlpRecipe(blocks=("batch_norm",), dropout=0.3, frozen=("head.bias",)), optimizer, ema=0.9)
    model, batch = setup.net.model(), setup.batch()
    step = trainfn.compile(setup.step(model), mode="graph", donate=True, backend="aot_eager")
    state, bystander = setup.state(model), setup.state(model)
    if warm:
        state = step(state, batch)
    with untouched(model, bystander, batch):
        step(state, batch)


# --- controls: the same checker, things that are wrong on purpose -----------------------------------------------------


def impure_sgd(lr: float) -> Transform:
    """Torch's manner: written into the parameters it was given."""

    def update(grads: Params, state: Tree, params: Params, step: Tensor) -> tuple[Params, Tree]:
        for name, grad in grads.items():
            params[name].sub_(lr * grad)
        return {name: torch.zeros_like(grad) for name, grad in grads.items()}, state

    return Transform(lambda params: (), update, "impure_sgd")


def moments_in_place(inner: Transform) -> Transform:
    """Returns the right updates, but keeps its moments where they were."""

    def update(grads: Params, state: Any, params: Params, step: Tensor) -> tuple[Params, Tree]:
        updates, new = inner.update(grads, state, params, step)
        for name in grads:
            state.mu[name].copy_(new.mu[name])
        return updates, attrs.evolve(new, mu=state.mu)

    return inner._replace(update=update)


@pytest.mark.parametrize("optimizer", [impure_sgd(0.1), moments_in_place(adamw())], ids=["params", "moments"])
def test_control_an_optimizer_in_place_is_noticed(optimizer: Transform) -> None:
    setup = Setup(LmRecipe(), optimizer)
    model, batch = setup.net.model(), setup.batch()
    step, state = setup.step(model), setup.state(model)
    with pytest.raises(AssertionError, match=r"the step changed \['state'\]"), untouched(model, state, batch):
        step(state, batch)


def test_control_a_donating_step_is_noticed() -> None:
    setup = Setup(LmRecipe(), sgd(0.1))
    model, batch = setup.net.model(), setup.batch()
    step = trainfn.compile(setup.step(model), mode="graph", donate=True, backend="aot_eager")
    state = step(setup.state(model), batch)  # the first one, from elsewhere, is copied into packs
    twin = attrs.evolve(state)  # shares every tensor, and is not marked as consumed
    with pytest.raises(AssertionError, match="'state'"), untouched(model, twin, batch):
        step(state, batch)


def test_control_draws_from_the_global_generator_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainfn.step, "_seeded", lambda state: nullcontext())
    setup = Setup(MlpRecipe(dropout=0.3), sgd(0.1))
    model, batch = setup.net.model(), setup.batch()
    with pytest.raises(AssertionError, match="torch's generator"), untouched(model, state := setup.state(model), batch):
        setup.step(model)(state, batch)


def test_control_a_model_left_in_training_mode_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainfn.step, "_mode", lambda model, training: nullcontext(model.train(training)))
    setup = Setup(MlpRecipe(dropout=0.3), sgd(0.1))
    model, batch = setup.net.model().eval(), setup.batch()
    with pytest.raises(AssertionError, match="modes"), untouched(model, state := setup.state(model), batch):
        setup.step(model)(state, batch)


def test_control_a_loss_that_writes_to_the_batch_is_noticed() -> None:
    def careless(outputs: Tensor, batch: Batch) -> Tensor:
        batch["x"].zero_()
        return outputs.square().mean()

    setup = Setup(MlpRecipe(frozen=("first.weight",)), sgd(0.1))
    model, batch = setup.net.model(), setup.batch()
    with pytest.raises(AssertionError, match="batch"), untouched(model, state := setup.state(model), batch):
        setup.step(model, careless)(state, batch)


class Handed(torch.autograd.Function):
    """``weight * x`` of one element each; its backward hands out the input itself as the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return weight * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class HandsOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(70_000))  # too large to share a pack in eager mode

    def forward(self, x: Tensor) -> Tensor:
        return Handed.apply(self.weight, x)


@pytest.mark.parametrize("donate", [False, True])
def test_a_gradient_that_is_the_batch_is_not_written_to(donate: bool) -> None:
    model, optimizer = HandsOut(), adamw(0.1)
    plain = trainfn.make_step(model, loss=lambda outputs, batch: outputs.sum(), optimizer=optimizer, clip_norm=0.5)
    step, batch = trainfn.compile(plain, mode="eager", donate=donate), torch.full((70_000,), 3.0)
    before = batch.clone()
    step(trainfn.init(model, optimizer), batch)
    assert torch.equal(batch, before)
