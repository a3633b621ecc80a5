"""Law 4 where memory is shared: what a step reads may lie where it writes, or be moved, and changes no number."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn
from tests.strategies import relative_error, torch_warns_of_itself
from trainfn import optim
from trainfn.engine.choice import Mode
from trainfn.engine.held import Held
from trainfn.loss import LossSum
from trainfn.optim import Transform
from trainfn.state import TrainState
from trainfn.tree import digest

pytestmark = [
    torch_warns_of_itself,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

X = torch.randn(40, generator=torch.Generator().manual_seed(0))


def loss(outputs: Tensor, batch: Any) -> LossSum:
    return LossSum(total=outputs, weight=torch.ones(()))


class Dot(nn.Module):
    """Each parameter is the gradient of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(X.flip(0)), nn.Parameter(X.square() - 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.dot(self.a, self.b)


class Crossed(torch.autograd.Function):
    """A product whose backward hands out what it was given, and not a copy."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.dot(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return b, a


class OwnDot(Dot):
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = Crossed.apply(self.a, self.b)
        return product


class Keeping(Dot):
    """The forward puts a parameter in a buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(40))

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.a.detach()
        return (self.a * self.b * x).sum()


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each parameter a pack of its own in eager, too, and update one after the other, as is done to large ones."""
    monkeypatch.setattr(sys.modules["trainfn.engine.compile"], "_MOST_COPIED", 1)
    monkeypatch.setattr("trainfn.engine.held._MOST_AT_ONCE", len(X))


def taken(model: nn.Module, optimizer: Transform, mode: Mode | None, backend: str = "aot_eager") -> TrainState:
    """Return the state after three steps; of the step itself, without a mode."""
    step: Any = trainfn.make_step(model, loss=loss, optimizer=optimizer)
    if mode is not None:
        step = trainfn.compile(step, mode=mode, donate=True, backend=backend)
    state = trainfn.init(model, optimizer)
    for _ in range(3):
        state = step(state, (X, X))
    return state


def error(found: TrainState, right: TrainState) -> float:
    return max(relative_error(found.params, right.params), relative_error(found.buffers, right.buffers))


@pytest.mark.parametrize("net", [Dot, OwnDot, Keeping])
@pytest.mark.parametrize("optimizer", [optim.adafactor(0.1), optim.adamw(0.1)])
@pytest.mark.parametrize("mode", ["eager", "graph", "accum", "split"])
@pytest.mark.usefixtures("apart")
def test_what_is_read_may_lie_where_the_update_writes(net: type[nn.Module], optimizer: Transform, mode: Mode) -> None:
    assert error(taken(net(), optimizer, mode), taken(net(), optimizer, None)) < 1e-6


def test_inductor_returns_an_input_as_a_gradient_and_it_does_no_harm() -> None:
    found, right = (taken(Dot(), optim.adafactor(0.1), mode, "inductor") for mode in ("accum", None))
    assert error(found, right) < 1e-6


@pytest.mark.parametrize(
    ("net", "optimizer", "mode", "backend"),
    [
        (OwnDot, optim.adamw(0.1), "eager", ""),
        (Keeping, optim.adamw(0.1), "eager", ""),
        (Dot, optim.adafactor(0.1), "accum", "inductor"),
    ],
)
@pytest.mark.usefixtures("apart")
def test_control_a_step_that_does_not_look_is_wrong(
    net: type[nn.Module], optimizer: Transform, mode: Mode, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Held, "apart", lambda held, found: found)
    assert error(taken(net(), optimizer, mode, backend), taken(net(), optimizer, None)) > 1e-3


@pytest.mark.parametrize("mode", ["eager", "graph", "accum", "split"])
@pytest.mark.parametrize("moved", [True, False])
def test_a_state_whose_memory_is_moved_goes_on(mode: Mode, moved: bool) -> None:
    """``share_memory_``, and with it any queue of processes that a tensor is put into, gives it other memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = optim.adamw(0.1)
    plain = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    step = trainfn.compile(plain, mode=mode, donate=True, backend="eager")
    state = trainfn.init(model, optimizer)
    batch = (torch.randn(6, 4), torch.arange(6) % 3)
    for _ in range(2):
        state = step(state, batch)
    if moved:
        before = state.params["0.weight"].data_ptr()
        state.params["0.weight"].share_memory_()
        assert state.params["0.weight"].data_ptr() != before
    for _ in range(2):
        state = step(state, batch)
    right = trainfn.init(model, optimizer)
    for _ in range(4):
        right = plain(right, batch)
    assert relative_error(state.params, right.params) < 1e-5


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("most", [40, 10**6])
def test_an_eager_update_in_pieces_is_that_of_the_whole(
    accumulate: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainfn.engine.held._MOST_AT_ONCE", most)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3))
    optimizer = optim.adamw(0.1)
    plain = trainfn.make_step(
        model, loss="classification", optimizer=optimizer, ema=0.9, clip_norm=0.1, accumulate=accumulate
    )
    step = trainfn.compile(plain, mode="eager", donate=True)
    found, right = (trainfn.init(model, optimizer, ema=True) for _ in range(2))
    batch = (torch.randn(6, 4), torch.arange(6) % 3)
    whole = digest(batch)
    for _ in range(3):
        found, right = step(found, batch), plain(right, batch)
    assert len(found.__dict__["_held"].pieces) == (1 if most > 100 else 5)
    assert relative_error(found.params, right.params) < 1e-5
    assert relative_error(found.ema, right.ema) < 1e-5
    assert digest(batch) == whole
