"""Law 6: a run that was cut, any number of times, is bit for bit the run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trainfn
import trainfn.directory
from tests.laws.resume_program import summary, train

PROGRAM = Path(__file__).with_name("resume_program.py")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: sums depend on the number of threads
    yield
    torch.set_num_threads(before)


def test_two_and_two_are_four_in_one_process_and_across_two(tmp_path):
    # Step 2 of 4 in the epoch, accumulation 3, dropout, EMA, BatchNorm.
    whole = summary(train(4, tmp_path / "whole"))
    train(2, tmp_path / "here")
    assert summary(train(4, tmp_path / "here")) == whole

    for steps in ("2", "4"):
        other = subprocess.run(
            [sys.executable, PROGRAM, steps, tmp_path / "there"],
            capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[2])},
        )  # fmt: skip
    assert json.loads(other.stdout) == json.loads(json.dumps(whole))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(1, 8), max_size=3).map(sorted),
    accumulate=st.sampled_from([1, 3]),
    shuffle=st.booleans(),
    momentum=st.sampled_from([None, 0.9]),
)
def test_any_cuts_any_number_of_times(tmp_path_factory, cuts, accumulate, shuffle, momentum):
    options = {"accumulate": accumulate, "shuffle": shuffle}
    if momentum is not None:
        options["optimizer"] = trainfn.optim.sgd(lr=0.1, momentum=momentum)
    folder = tmp_path_factory.mktemp("cuts")
    whole = summary(train(9, folder / "whole", **options))
    for cut in cuts:
        train(cut, folder / "cut", **options)
    assert summary(train(9, folder / "cut", **options)) == whole


def test_a_run_killed_in_the_middle_goes_on_exactly(tmp_path):
    whole = summary(train(9, tmp_path / "whole", save_every=2, save_async=False))
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2]); import torch; torch.set_num_threads(1)\n"
        "from tests.laws.resume_program import train\n"
        "def kill(state):\n"
        "    if state.cursor == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(9, sys.argv[1], save_every=2, save_async=False, observers=[kill])"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "cut", PROGRAM.parents[2]], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in sorted((tmp_path / "cut").glob("step_*"))][-1] == "step_00000006"
    assert summary(train(9, tmp_path / "cut", save_every=2)) == whole


def test_compiled_runs_resume_exactly_in_the_mode_they_began_in(tmp_path):
    options = {"compile": "graph", "drop_last": True}
    whole = summary(train(4, tmp_path / "whole", **options))
    train(2, tmp_path / "cut", **options)
    assert summary(train(4, tmp_path / "cut", **options)) == whole


@pytest.mark.parametrize("forgotten", ["opt", "buffers", "ema", "cursor"])
def test_control_a_resume_that_forgets_a_part_is_noticed(tmp_path, monkeypatch, forgotten):
    whole = summary(train(5, tmp_path / "whole"))
    train(3, tmp_path / "cut")
    honest = trainfn.directory.restore

    def forgetful(path, like, also):
        state, manifest = honest(path, like=like, also=also)
        return attrs.evolve(state, **{forgotten: getattr(like(manifest), forgotten)}), manifest

    monkeypatch.setattr(trainfn.directory, "restore", forgetful)
    assert summary(train(5, tmp_path / "cut"))["digest"] != whole["digest"]


def test_same_seed_same_run_and_other_draws_do_not_matter(tmp_path):
    def draw(state):
        torch.rand(3)

    plain = summary(train(6, None))
    assert summary(train(6, None)) == plain
    assert summary(train(6, None, observers=[draw])) == plain
    assert summary(train(6, None, seed=1))["digest"] != plain["digest"]
