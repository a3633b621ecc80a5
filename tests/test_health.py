"""Verdicts: every combination of three numbers, and the counters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from trainfn.health import Health, Verdict, judge, track

NUMBERS = [0.0, 1.0, -1.0, 3e38, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(("total", "weight", "grad_norm"), list(itertools.product(NUMBERS, repeat=3)))
def test_the_verdict_on_every_combination(total: float, weight: float, grad_norm: float) -> None:
    if not (math.isfinite(total) and math.isfinite(weight)):
        right = Verdict.NON_FINITE_LOSS
    elif not math.isfinite(grad_norm):
        right = Verdict.NON_FINITE_GRADIENT
    elif weight <= 0:
        right = Verdict.EMPTY
    else:
        right = Verdict.OK
    found = judge(torch.tensor(total), torch.tensor(weight), torch.tensor(grad_norm, dtype=torch.float64))
    assert (found.dtype, found.shape, int(found)) == (torch.int64, torch.Size([]), right)


def test_every_verdict_has_a_sentence() -> None:
    sentences = [verdict.sentence for verdict in Verdict]
    assert len(set(sentences)) == len(Verdict)
    assert all("skipped" in verdict.sentence for verdict in Verdict if verdict is not Verdict.OK)
    assert Verdict.OK == 0


def test_the_counters_follow_a_run() -> None:
    health = Health(streak=torch.tensor(0), skipped=torch.tensor(0))
    seen = []
    for verdict in (1, 2, 3, 1, 0, 3, 2):
        health = track(health, torch.tensor(verdict))
        seen.append((int(health.streak), int(health.skipped)))
    assert seen == [(1, 1), (2, 2), (2, 2), (3, 3), (0, 3), (0, 3), (1, 4)]
    assert (health.streak.dtype, health.skipped.dtype) == (torch.int64, torch.int64)
