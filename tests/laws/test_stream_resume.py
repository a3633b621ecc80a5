"""Law 6 for streams: a run over what can only be iterated over, cut anywhere, is bit for bit the run that was not."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trainfn
from tests.laws.stream_program import EXAMPLES, KINDS, WITH_A_STATE, Remembering, train
from trainfn.data import Stream, StreamWarning, prefetched
from trainfn.tree import digest

PROGRAM = Path(__file__).with_name("stream_program.py")
workers_may_fork = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cut_and_whole(kind: str, folder: Path, cuts: tuple[int, ...], **settings: Any) -> tuple[Any, Any, list[Any]]:
    """Two runs to step 11, of four or five steps a pass, and the parts of the second one."""
    data, given = KINDS[kind]()
    whole = train(data, 11, folder / "whole", **given, **settings)
    parts = []
    for stop in (*cuts, 11):
        data, given = KINDS[kind]()
        parts.append(train(data, stop, folder / "cut", **given, **settings))
    return whole, parts[-1], parts


@workers_may_fork
@pytest.mark.parametrize("kind", KINDS)
def test_two_and_two_are_four_over_every_kind_of_stream(kind: str, tmp_path: Path) -> None:
    """Cut inside a pass, at its end, and in a later one."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        whole, last, parts = cut_and_whole(kind, tmp_path, (2, 4, 7))
    assert (last["digest"], last["rows"]) == (whole["digest"], whole["rows"])
    assert [row["epoch"] for row in whole["rows"]][-1] >= 2
    assert [number for part in parts for number in part["order"]] == whole["order"]
    assert sorted(whole["order"][:EXAMPLES]) == list(range(EXAMPLES)), "a pass is all examples"
    read_again = [note for note in told if issubclass(note.category, StreamWarning)]
    assert (read_again == []) == (kind in WITH_A_STATE)


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    data, given = KINDS["a data set with a state"]()
    whole = train(data, 7, tmp_path / "whole", **given)
    train(KINDS["a data set with a state"]()[0], 3, tmp_path / "cut", **given)
    done = subprocess.run(
        [sys.executable, PROGRAM, "a data set with a state", "7", tmp_path / "cut"],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[2])},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert (found["digest"], found["rows"]) == (whole["digest"], json.loads(json.dumps(whole["rows"])))


@pytest.mark.parametrize("kind", ["examples", "a data set with a state", "a loader with a state"])
def test_control_a_resume_that_does_not_go_back_to_the_position_is_noticed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Stream.seek
    monkeypatch.setattr(Stream, "seek", lambda self, cursor, position: honest(self, cursor, {}))
    whole, last, _ = cut_and_whole(kind, tmp_path, (2,))
    assert last["digest"] != whole["digest"]


def test_control_a_state_that_is_left_out_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the data set says, its own generator is not where it was."""
    monkeypatch.setattr(Remembering, "load_state_dict", lambda self, state: setattr(self, "at", state["at"]))
    whole, last, _ = cut_and_whole("a data set with a state", tmp_path, (2,))
    assert last["digest"] != whole["digest"]


class Lane:
    """A way to the device that is none."""

    def send(self, batch: Any) -> tuple[Any, None]:
        return batch, None

    def receive(self, batch: Any, arrival: None) -> Any:
        return batch


def test_prefetching_does_not_let_the_position_run_ahead() -> None:
    """What is asked for while batch n is in use begins at batch n + 1, from a loader that fetches two ahead itself."""
    for kind in ("a loader with a state", "examples", "a DataLoader of one"):
        data, given = KINDS[kind]()
        stream = Stream(data, **given)
        whole = [digest(batch) for batch in Stream(KINDS[kind]()[0], **given).batches(0, 9)]
        for number, batch in enumerate(prefetched(stream.batches(0, 8), Lane())):
            other = Stream(KINDS[kind]()[0], **given)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", StreamWarning)
                other.seek(number + 1, stream.position(number + 1))
                follows = digest(next(other.batches(number + 1)))
            assert (digest(batch), follows) == (whole[number], whole[number + 1]), (kind, number)


@pytest.mark.parametrize("kind", ["examples", "a data set with a state"])
def test_a_run_that_goes_back_is_the_run_without_the_window(kind: str, tmp_path: Path) -> None:
    """Batch 4 is spoilt: on from step 3, without batches 3 and 4; and cut after that, it goes on bit for bit."""

    def run(folder: str, *stops: int) -> Any:
        for number, stop in enumerate(stops):
            calls = itertools.count(1)
            data, given = KINDS[kind]()

            def spoilt(items: list[Any], calls: Iterator[int] = calls, first: bool = number == 0) -> Any:
                bad = next(calls) == 5 and first
                return torch.stack([x * math.nan if bad else x for x, _ in items]), torch.tensor([y for _, y in items])

            options = {"on_divergence": "rollback", "halt_after": 1, "save_every": 3, "check_data": False}
            found = train(data, stop, tmp_path / folder, collate=spoilt, **options, **given)
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = run("whole", 9)
        assert trainfn.inspect(tmp_path / "whole").config["rollbacks"] == [[3, 5]]
        cut = run("cut", 7, 9)
    assert (cut["digest"], repr(cut["rows"])) == (whole["digest"], repr(whole["rows"]))
    assert trainfn.inspect(tmp_path / "cut").config["rollbacks"] == [[3, 5]]
