"""Law 5, the other way round: a healthy run of any net, with gradients of any size, is never called anything but ok."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from tests.strategies import Batch, Recipe, adamws, language_models, mlps, torch_warns_of_itself
from trainfn.health import Verdict
from trainfn.loss import LossSum, as_loss_sum, resolve
from trainfn.optim import Transform, sgd

pytestmark = torch_warns_of_itself

STEPS = 80  # nothing is called a spike in the first 50


class Sloped(nn.Module):
    """Its output is ``weight * x``, so that the gradient is as large as ``x``, and the loss begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@attrs.frozen
class Run:
    """A run: ``size`` scales a net's loss, or is the gradient of a :class:`Sloped`."""

    net: Recipe | None
    optimizer: Transform = attrs.field(repr=lambda transform: transform.name)
    size: float
    seed: int

    def verdicts(self, **options: Any) -> list[Verdict]:
        model = Sloped() if self.net is None else self.net.model()
        step = trainfn.make_step(
            model, loss=self.loss, optimizer=self.optimizer, clip_norm=1.0, on_spike="skip", **options
        )
        state, found = trainfn.init(model, self.optimizer, seed=self.seed), []
        for number in range(STEPS):
            state = step(state, self.batch(number))
            found.append(state.report.verdict)
        return [Verdict(code) for code in torch.stack(found).tolist()]

    def batch(self, number: int) -> Batch:
        if self.net is not None:
            return self.net.batch(16, self.seed + number)
        own = torch.Generator().manual_seed(100 * self.seed + number)
        return {"x": self.size * (0.5 + 0.5 * torch.rand(1, 4, generator=own))}

    def loss(self, outputs: Tensor, batch: Batch) -> LossSum:
        if self.net is None:
            return LossSum(total=outputs.sum(), weight=torch.ones(()))
        found = as_loss_sum(resolve(self.net.loss)(outputs, batch), batch)
        return LossSum(total=found.total * self.size, weight=found.weight)


nets = st.builds(
    Run,
    net=mlps() | language_models(),
    optimizer=adamws,
    size=st.sampled_from([1e-30, 1e-12, 1.0, 1.0, 1.0, 1e12, 1e30]),
    seed=st.integers(0, 10_000),
)
slopes = st.builds(
    Run,
    net=st.none(),
    optimizer=st.just(sgd(1e-4)),
    size=st.sampled_from([1e-38, 1e-30, 1.0, 1e30, 3e38]),
    seed=st.integers(0, 10_000),
)
runs = nets | slopes


def check(run: Run) -> None:
    verdicts = run.verdicts()
    wrong = {number: verdict.name for number, verdict in enumerate(verdicts) if verdict is not Verdict.OK}
    assert not wrong, wrong


@settings(max_examples=30)
@given(runs)
def test_a_healthy_run_raises_no_alarm(run: Run) -> None:
    check(run)


@pytest.mark.slow
@settings(max_examples=2000)
@given(runs)
def test_two_thousand_healthy_runs_raise_no_alarm(run: Run) -> None:
    check(run)


def test_control_norms_in_float32_call_a_large_gradient_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_float32(tree: dict[str, Tensor]) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(leaf) for leaf in tree.values()])

    run = Run(net=None, optimizer=sgd(1e-4), size=3e38, seed=0)
    check(run)
    monkeypatch.setattr("trainfn.update.leaf_norms", in_float32)
    with pytest.raises(AssertionError, match="NON_FINITE_GRADIENT"):
        check(run)


def test_control_a_run_with_a_spike_in_it_raises_one() -> None:
    @attrs.frozen
    class Spiked(Run):
        def batch(self, number: int) -> Batch:
            return {name: value * (20.0 if number == 70 else 1.0) for name, value in Run.batch(self, number).items()}

    with pytest.raises(AssertionError, match="70"):
        check(Spiked(net=None, optimizer=sgd(1e-4), size=1.0, seed=0))
