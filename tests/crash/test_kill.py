"""A process that saves is killed: what it had acknowledged is still there, whole, and nothing else is in sight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def outcome(run: Path, how: str, *numbers: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.crash.saver", str(run), how, *map(str, numbers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


def test_killed_at_random(tmp_path: Path) -> None:
    result = outcome(tmp_path / "run", "at-random", 25, 0)
    assert result["torn"] > 0, "no kill fell into a save: this has tested nothing"


@pytest.mark.slow
def test_killed_at_random_many_times(tmp_path: Path) -> None:
    result = outcome(tmp_path / "run", "at-random", 2000, 1)
    assert result["torn"] > 200


def test_killed_before_every_system_call(tmp_path: Path) -> None:
    result = outcome(tmp_path / "run", "at-every-call")
    assert result == {"kills": 12, "saved": 1}


@pytest.mark.parametrize("positions", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_killed_at_byte_positions(tmp_path: Path, positions: int) -> None:
    assert outcome(tmp_path / "run", "at-byte-positions", positions) == {"kills": positions - 2, "whole": 2}


def test_killed_before_every_call_of_a_later_save_and_its_pruning(tmp_path: Path) -> None:
    result = outcome(tmp_path / "run", "pruning")
    assert result == {"kills": 31, "half": 0}


def test_control_deletion_in_place_leaves_half_a_step(tmp_path: Path) -> None:
    assert outcome(tmp_path / "run", "pruning-by-deletion")["half"] > 0


def test_killed_before_every_call_of_the_cleaning_at_the_start(tmp_path: Path) -> None:
    assert outcome(tmp_path / "run", "cleaning") == {"kills": 6}


def test_control_a_file_that_is_overwritten_is_lost(tmp_path: Path) -> None:
    assert outcome(tmp_path / "run", "overwriting") == {"acknowledged": 0, "lost": 1}
