"""Where another mode, or a table that is kept, could go wrong without a sound: each against the plain step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainfn
from tests.strategies import torch_warns_of_itself
from trainfn.data import Loader
from trainfn.optim import adamw, sgd
from trainfn.tree import digest

pytestmark = [
    torch_warns_of_itself,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Another program was compiled"),
]

X, Y = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))


def losses(model: nn.Module, mode: Any, change: Any = None, steps: int = 6, **options: Any) -> list[float]:
    """Train for a few steps, with a change to the model before the fourth; ``mode=None`` is the plain step."""
    optimizer = options.pop("optimizer", sgd(0.1, momentum=0.9))
    step: Any = trainfn.make_step(model, loss="mse", optimizer=optimizer)
    if mode is not None:
        step = trainfn.compile(step, mode=mode, backend="aot_eager")
    state, found = trainfn.init(model, optimizer), []
    dtype = next(model.parameters()).dtype
    for number in range(steps):
        if number == 3 and change is not None:
            change(model)
        state = step(state, (X.to(dtype), Y.to(dtype)))
        found.append(float(state.report.loss))
    return found


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        (torch.bfloat16, sgd(0.1)),
        (torch.bfloat16, sgd(0.1, momentum=0.9)),
        (torch.bfloat16, adamw(0.1)),
        (torch.float16, sgd(0.1, momentum=0.9)),
    ],
    ids=["plain", "momentum", "adamw", "float16"],
)
def test_eager_trains_16_bit_parameters(dtype: torch.dtype, optimizer: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16).to(dtype)  # PyTorch's kernel for SGD on a CPU leaves all but the last few alone
    found, right = (losses(model, mode, optimizer=optimizer, steps=20) for mode in ("eager", None))
    assert found[-1] == pytest.approx(right[-1], rel=2e-2)
    assert right[-1] < 0.95 * right[0]


class Checkpointing(nn.Module):
    """Recomputes by itself, as models of transformers do after ``gradient_checkpointing_enable``."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recomputes = recomputes
        self.block = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False) if self.recomputes else self.block(x))


@pytest.mark.parametrize("mode", [None, "eager", "accum"])
def test_a_model_that_recomputes_by_itself_reads_the_states_weights(mode: Any) -> None:
    model = Checkpointing(True)
    before = digest(dict(model.named_parameters()))
    assert losses(model, mode) == pytest.approx(losses(Checkpointing(False), None), rel=1e-6)
    assert digest(dict(model.named_parameters())) == before


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.transform, self.drop = nn.Linear(16, 16), SimpleNamespace(scale=1.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x)) * self.transform.scale


@pytest.mark.parametrize("mode", ["graph", "accum", "split"])
@pytest.mark.parametrize("what", ["scale", "dropout"])
def test_a_python_value_that_changes_is_noticed_and_draws_are_seeded(mode: Any, what: str) -> None:
    def change(model: Any) -> None:
        if what == "scale":
            model.transform.scale = 0.1
        else:
            model.drop.p = 0.5

    found, right = (losses(Reads(), each, change) for each in (mode, None))
    assert found == pytest.approx(right, rel=1e-5)
    assert right[3] != pytest.approx(losses(Reads(), None)[3], rel=1e-3)  # control: the change matters


def test_a_parameter_that_was_none_is_trained_once_it_is_there() -> None:
    model, optimizer = nn.Linear(16, 16, bias=False), sgd(0.1)
    step = trainfn.make_step(model, loss="mse", optimizer=optimizer)
    step(trainfn.init(model, optimizer), (X, Y))
    model.bias = nn.Parameter(torch.ones(16))
    assert float(step(trainfn.init(model, optimizer), (X, Y)).report.grad_norms[1]) > 0.0


def test_states_of_other_strides_are_packed_for_themselves() -> None:
    model, optimizer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 16)), sgd(0.1)
    plain = trainfn.make_step(model, loss="mse", optimizer=optimizer)
    step, x = trainfn.compile(plain, mode="graph", backend="aot_eager"), X[:, :16].reshape(16, 4, 4, 4)
    for form in (torch.channels_last, torch.contiguous_format):
        state = trainfn.init(model.to(memory_format=form), optimizer)
        found, right = step(state, (x, Y[:16])), plain(state, (x, Y[:16]))
        torch.testing.assert_close(found.params, right.params)
    assert step.compiles == 2


@pytest.mark.filterwarnings("ignore:Batches of 4 shapes")
def test_batches_of_other_strides_count_as_shapes_and_end_no_run() -> None:
    model, optimizer = nn.Linear(3, 2), sgd(0.1)
    step = trainfn.compile(trainfn.make_step(model, loss="mse", optimizer=optimizer), mode="graph", backend="aot_eager")
    state = trainfn.init(model, optimizer)
    for length in (4, 5, 6, 7):
        for x in (torch.randn(length, 3), torch.randn(3, length).t()):
            state = step(state, (x, torch.randn(length, 2)))
    assert int(state.step) == 8


@pytest.mark.parametrize("data", [{"x": X, "m": None}, (X, None), {"x": X, "e": {}}])
def test_batches_with_nothing_in_a_place_are_streamed(data: Any) -> None:
    loader = Loader(data, batch_size=5)
    assert [digest(batch) for batch in loader.batches(0, 30)] == [digest(loader.batch(n)) for n in range(30)]
