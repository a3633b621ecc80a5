"""Law 6 at length: runs of every optimizer, cut one to three times, are bit for bit those that were not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trainfn.directory
from tests.laws.exact_case import OPTIMIZERS, Case, by_seed, make_case, train
from trainfn.tree import evolve

ROOT = Path(__file__).parents[2]
QUICK = next(seed for seed in range(30) if len(by_seed(seed).cuts) == 1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return make_case(lambda options: draw(st.sampled_from(options)))


def check(case: Case, folder: Path) -> None:
    """Compare the end of the cut run with the run without cuts: state, rows, and the examples of all parts in order."""
    whole = train(case, case.stop, folder / "whole")
    parts = [train(case, stop, folder / "cut") for stop in (*case.cuts, case.stop)]
    last = parts[-1]
    assert last["digest"] == whole["digest"]
    assert numbers(last["rows"], case) == numbers(whole["rows"], case)
    assert repr(last["epochs"]) == repr(whole["epochs"])
    for name in ("order", "losses"):
        assert [entry for part in parts for entry in part[name]] == whole[name]


def numbers(rows: list[dict[str, Any]], case: Case) -> list[tuple[Any, ...]]:
    """What is in the rows that both runs have: a cut closes a row (and evaluates), and so the next one is shorter."""
    means: tuple[str, ...] = ("loss", "weight", "verdict")
    if case.log_every == 1 and not case.evaluated:
        means, shared = (), rows
    else:
        shared = [row for row in rows if row["step"] not in case.cuts]
    return [tuple(sorted((name, repr(value)) for name, value in row.items() if name not in means)) for row in shared]


@settings(max_examples=12)
@given(case=cases())
def test_any_run_with_any_cuts(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(case, tmp_path_factory.mktemp("run"))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_two_thousand_runs(block: int, tmp_path: Path) -> None:
    for seed in range(100 * block, 100 * block + 100):
        check(by_seed(seed), tmp_path / str(seed))


def test_every_optimizer_is_among_them() -> None:
    assert {by_seed(seed).optimizer for seed in range(100)} == set(OPTIMIZERS)


@pytest.mark.parametrize("forgotten", ["opt", "params", "health", "seed", "report", "cursor"])
def test_control_what_a_resume_forgets_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    case = by_seed(next(seed for seed in range(100) if by_seed(seed).dropout and by_seed(seed).log_every == 1))
    honest = trainfn.directory.restore

    def forgetful(path: Any, like: Any, also: Any) -> Any:
        state, manifest = honest(path, like=like, also=also)
        lost = 1 + state.seed if forgotten == "seed" else getattr(like(manifest), forgotten)
        return evolve(state, **{forgotten: lost}), manifest

    monkeypatch.setattr(trainfn.directory, "restore", forgetful)
    if forgotten == "report":  # no step reads it: that one may be forgotten
        check(case, tmp_path)
        return
    with pytest.raises(AssertionError):
        check(case, tmp_path)


def in_a_process(seed: int, stop: int, run: Path, kill: int | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.laws.exact_case", str(seed), str(stop), str(run)]
    done = subprocess.run(
        command + ([] if kill is None else [str(kill)]), cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == (0 if kill is None else -signal.SIGKILL), done.stderr
    return json.loads(done.stdout) if kill is None else {}


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed == QUICK else pytest.mark.slow) for seed in range(100)]
)
def test_a_fresh_process_for_every_part(seed: int, tmp_path: Path) -> None:
    """The first thirty lose a process to SIGKILL in the middle of a part."""
    case, draw = by_seed(seed), random.Random(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train(case, case.stop, tmp_path / "whole", save_every=2)
    finally:
        torch.set_num_threads(threads)
    parts = [in_a_process(seed, stop, tmp_path / "cut") for stop in case.cuts]
    if seed < 30:
        in_a_process(seed, case.stop, tmp_path / "cut", kill=draw.randrange(case.cuts[-1] + 1, case.stop + 1))
    last = in_a_process(seed, case.stop, tmp_path / "cut")
    assert last["digest"] == whole["digest"]
    assert numbers(last["rows"], case) == numbers(whole["rows"], case)
    assert repr(last["epochs"]) == repr(whole["epochs"])
    for name in ("order", "losses"):
        if seed >= 30:
            assert [entry for part in (*parts, last) for entry in part[name]] == whole[name]
        else:  # what was killed had not saved all that it had done
            assert whole[name][len(whole[name]) - len(last[name]) :] == last[name]
