"""Verdicts on every combination of numbers, counters, and spikes in synthetic series whose answers are known."""

from __future__ import annotations

import itertools
import math
from functools import partial

import attrs
import pytest
import torch
from torch import Tensor

from trainfn.health import (
    SPIKES,
    Health,
    Verdict,
    add_up,
    ailing,
    is_applied,
    judge,
    judge_spike,
    track,
)
from trainfn.precision import LossScale
from trainfn.state import AccumulationStats, Baseline

NUMBERS = [0.0, 1.0, -1.0, 3e38, math.nan, math.inf, -math.inf]
NORMS = NUMBERS[:-1]


def baseline(series: int = 1) -> Baseline:
    zeros = torch.zeros(series, 3, dtype=torch.float64)
    return Baseline(mean=zeros, spread=zeros, last=zeros, count=zeros.long(), lasting=torch.zeros(series).long())


@pytest.mark.parametrize("factor", [None, 2.0, 1.0])
@pytest.mark.parametrize(("total", "weight", "grad_norm"), list(itertools.product(NUMBERS, NUMBERS, NORMS)))
def test_the_verdict_on_every_combination(total: float, weight: float, grad_norm: float, factor: float | None) -> None:
    if not (math.isfinite(total) and math.isfinite(weight)):
        right = Verdict.NON_FINITE_LOSS
    elif not math.isfinite(grad_norm):
        right = Verdict.OVERFLOW if factor == 2.0 else Verdict.NON_FINITE_GRADIENT
    elif weight <= 0:
        right = Verdict.EMPTY
    else:
        right = Verdict.OK
    scale = None if factor is None else LossScale(factor=torch.tensor(factor), good=torch.tensor(0))
    found = judge(torch.tensor(total), torch.tensor(weight), torch.tensor(grad_norm, dtype=torch.float64), scale)
    assert (found.dtype, found.shape, int(found)) == (torch.int64, torch.Size([]), right)


def test_every_verdict_has_a_sentence_that_says_whether_the_step_was_applied() -> None:
    assert len({verdict.sentence for verdict in Verdict}) == len(Verdict)
    for verdict in Verdict:
        assert ("applied" in verdict.sentence, "skipped" in verdict.sentence) == (verdict.applied, not verdict.applied)
        assert bool(is_applied(torch.tensor(int(verdict)))) == verdict.applied
    assert [verdict.name for verdict in Verdict if verdict.applied] == ["OK", "LOSS_SPIKE", "GRADIENT_SPIKE"]


def test_the_counters_follow_a_run() -> None:
    none = torch.tensor(0)
    health = Health(streak=none, halted=torch.tensor(False), baseline=baseline())
    stats = AccumulationStats(micro_batches=none, seen=none.double(), outcomes=torch.zeros(16, dtype=torch.int64))
    run = [
        (Verdict.NON_FINITE_LOSS, 1),
        (Verdict.NON_FINITE_GRADIENT, 2),
        (Verdict.EMPTY, 2),
        (Verdict.OVERFLOW, 2),
        (Verdict.LOSS_SPIKE_SKIPPED, 2),
        (Verdict.NON_FINITE_LOSS, 3),
        (Verdict.LOSS_SPIKE, 0),
        (Verdict.NON_FINITE_GRADIENT, 1),
        (Verdict.OK, 0),
    ]
    for verdict, streak in run:
        code = torch.tensor(int(verdict))
        health = track(health, code, ~is_applied(code), health.baseline)
        stats = add_up(stats, code, ~is_applied(code), torch.tensor(8.0), torch.tensor(3))
        assert int(health.streak) == streak
    assert int(stats.micro_batches) == 3 * len(run)
    assert float(stats.seen) == 16.0
    assert [int(stats.outcomes[verdict]) for verdict in Verdict] == [1, 1, 0, 2, 2, 1, 1, 0, 1, 0]
    assert (health.streak.dtype, stats.seen.dtype, stats.outcomes.dtype) == (torch.int64, torch.float64, torch.int64)


def test_what_ails_a_tensor() -> None:
    norms = {"a": 0.0, "b": 1e-30, "c": 9.9e-8, "d": 1e-7, "e": 10.0, "f": 10.1, "g": math.inf, "h": math.nan}
    assert ailing(norms) == {"vanishing": ["b", "c"], "exploding": ["f", "g"], "dead": ["a"]}
    assert ailing({"a": 1.0}) == {}


# --- spikes -----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Curves:
    """Losses and gradient norms of many runs, [runs, steps]: warm-up, power laws, a drop of the learning rate, noise.

    The noise is log-normal, of 1 to 20 % in the loss and 5 to 25 % in the gradient norm. At the drop the loss falls by
    up to 40 % within some 40 steps, and the gradient norm rises by up to a factor of 2.
    """

    loss: Tensor
    grad_norm: Tensor


def curves(runs: int, steps: int, seed: int) -> Curves:
    own = torch.Generator().manual_seed(seed)

    def uniform(least: float, most: float) -> Tensor:
        return least + (most - least) * torch.rand(runs, 1, generator=own, dtype=torch.float64)

    def noise(size: Tensor) -> Tensor:
        return torch.exp(size * torch.randn(runs, steps, generator=own, dtype=torch.float64))

    t = torch.arange(steps, dtype=torch.float64)
    warm_up, first = uniform(10, 100), uniform(2, 10)
    last = first * uniform(0.05, 0.55)
    dropped = torch.sigmoid((t - steps * uniform(0.4, 0.7)) / 10)
    fall = (1 + torch.clamp(t - warm_up / 4, min=0) / warm_up) ** -uniform(0.3, 1.0)
    loss = (last + (first - last) * fall) * (1 - dropped * uniform(0.0, 0.4))
    rise = 1 + 2 * torch.exp(-(((t - warm_up) / 30) ** 2))
    grad_norm = 10 ** uniform(-2, 2) * rise * (1 + t / warm_up) ** -uniform(0.0, 0.3) * (1 + dropped * uniform(0, 1))
    return Curves(loss * noise(uniform(0.01, 0.2)), grad_norm * noise(uniform(0.05, 0.25)))


def found_spikes(series: Curves, judge_one: object = judge_spike) -> Tensor:
    """Return where a spike was seen, [runs, steps] bool. All runs are judged beside each other."""
    runs, steps = series.loss.shape
    state, ok, found = baseline(runs), torch.zeros(runs, dtype=torch.int64), []
    together = torch.vmap(partial(judge_one, skip=True))
    for step in range(steps):
        verdict, state = together(state, ok, series.loss[:, step], series.grad_norm[:, step])
        found.append(verdict)
    return torch.isin(torch.stack(found, 1), torch.tensor([int(code) for code in SPIKES]))


def with_spikes(series: Curves, field: str, size: float, seed: int) -> tuple[Curves, Tensor]:
    """Return the series with one spike in about 200 steps, and where they are; none in the first 60 steps."""
    own = torch.Generator().manual_seed(seed)
    where = torch.rand(series.loss.shape, generator=own) < 1 / 200
    where[:, :60] = False
    values = getattr(series, field)
    return attrs.evolve(series, **{field: torch.where(where, values * size, values)}), where


RUNS = [100, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("runs", RUNS)
def test_healthy_runs_raise_at_most_one_alarm_in_ten_thousand_steps(runs: int) -> None:
    found = found_spikes(curves(runs, 1000, seed=1))
    assert int(found.sum()) <= found.numel() / 10_000
    early = found[:, :200]  # warm-up included
    assert int(early.sum()) <= max(1, early.numel() / 10_000)


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("field", ["loss", "grad_norm"])
@pytest.mark.parametrize(("size", "least"), [(10.0, 0.99), (5.0, 0.95)])
def test_spikes_are_found(size: float, least: float, field: str, runs: int) -> None:
    series, where = with_spikes(curves(runs, 1000, seed=2), field, size, seed=3)
    found = found_spikes(series)
    recall = float((found & where).sum() / where.sum())
    assert recall >= least
    assert int((found & ~where).sum()) <= max(1, found.numel() / 10_000)


def test_a_spike_in_a_loss_that_may_be_negative() -> None:
    own = torch.Generator().manual_seed(0)
    loss = torch.linspace(3.0, -3.0, 600, dtype=torch.float64) + 0.1 * torch.randn(600, generator=own).double()
    series = Curves(loss[None].clone(), torch.ones(1, 600, dtype=torch.float64))
    assert not found_spikes(series).any()  # not on its way through 0 either
    series.loss[0, 500] += 10.0
    assert found_spikes(series).nonzero().tolist() == [[0, 500]]


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38])
def test_what_does_not_change_is_no_spike_and_a_change_after_it_is_forgiven(value: float) -> None:
    steady = torch.full((1, 300), value, dtype=torch.float64)
    assert not found_spikes(Curves(steady, steady)).any()
    rest = torch.cat([steady, torch.linspace(1.0, 1.3, 100, dtype=torch.float64)[None] * value], 1)
    assert not found_spikes(Curves(rest, rest)).any()


def test_gradients_of_zero_now_and_then_are_no_spikes() -> None:
    own = torch.Generator().manual_seed(0)
    norms = torch.exp(0.1 * torch.randn(1, 1000, generator=own, dtype=torch.float64))
    norms[0, ::7] = 0.0
    assert not found_spikes(Curves(norms, norms)).any()


def test_a_level_that_lasts_is_learned_anew() -> None:
    level = torch.ones(1, 400, dtype=torch.float64)
    level[0, 200:] = 50.0
    level[0, 350] = 5000.0
    found = found_spikes(Curves(level, torch.ones_like(level)))[0].nonzero().flatten().tolist()
    assert found == [*range(200, 210), 350]


def test_spikes_do_not_move_their_own_baseline() -> None:
    own = torch.Generator().manual_seed(0)
    loss = torch.exp(0.1 * torch.randn(1, 1000, generator=own, dtype=torch.float64))
    loss[0, 100::10] *= 10.0
    assert found_spikes(Curves(loss, torch.ones_like(loss)))[0].nonzero().flatten().tolist() == list(
        range(100, 1000, 10)
    )


@pytest.mark.parametrize(
    "code", [Verdict.NON_FINITE_LOSS, Verdict.NON_FINITE_GRADIENT, Verdict.EMPTY, Verdict.OVERFLOW]
)
def test_a_step_that_is_not_ok_is_neither_a_spike_nor_learned_from(code: Verdict) -> None:
    known = attrs.evolve(baseline(), count=torch.full((1, 3), 100))
    old = attrs.evolve(known, **{name: getattr(known, name)[0] for name in ("mean", "spread", "last", "count")})
    old = attrs.evolve(old, lasting=torch.tensor(3))
    nan = torch.tensor(math.nan)
    verdict, new = judge_spike(old, torch.tensor(int(code)), nan, nan, skip=True)
    assert int(verdict) == code
    for name in ("mean", "spread", "last", "count", "lasting"):
        torch.testing.assert_close(getattr(new, name), getattr(old, name), rtol=0, atol=0)


# --- controls: the same curves, rules that are not good enough --------------------------------------------------------


def plain_rule(
    state: Baseline, verdict: Tensor, loss: Tensor, grad_norm: Tensor, *, skip: bool
) -> tuple[Tensor, Baseline]:
    """The usual z-score: mean and standard deviation of everything so far, spikes included."""
    x = torch.stack([loss, loss, grad_norm])
    count = state.count + 1
    delta = x - state.mean
    deviation = (state.spread / count).sqrt()
    spikes = ((count > 50) & (delta > 3 * deviation)).any()
    new = attrs.evolve(
        state,
        mean=state.mean + delta / count,
        spread=state.spread + delta * (x - state.mean - delta / count),
        count=count,
    )
    return torch.where(spikes, int(Verdict.LOSS_SPIKE_SKIPPED), verdict), new


def test_control_a_plain_z_score_misses_spikes_and_raises_false_alarms() -> None:
    healthy = curves(100, 1000, seed=1)
    assert int(found_spikes(healthy, plain_rule).sum()) > 10 * healthy.loss.numel() / 10_000
    series, where = with_spikes(curves(100, 1000, seed=2), "grad_norm", 5.0, seed=3)
    found = found_spikes(series, plain_rule)
    assert float((found & where).sum() / where.sum()) < 0.95
