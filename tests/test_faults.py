"""Faults in use: what is said, how soon, and that the last good state is on the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import trainfn
from trainfn.errors import CheckpointError, DataError, StepMemoryError
from trainfn.store import CheckpointWarning, CheckpointWriteError, steps, verify
from trainfn.tree import digest

workers_may_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
MAIN = os.getpid()


class Numbers(Dataset[tuple[Tensor, int]]):
    """Forty examples; when example 26 is fetched by a worker, ``fate`` is called."""

    def __init__(self, fate: Callable[[], object] = int, where: str = "worker") -> None:
        self.fate, self.where = fate, where

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 26 and (os.getpid() != MAIN) == (self.where == "worker"):
            self.fate()
        return torch.arange(4.0) + index, index % 3


def train(data: Any = None, model: nn.Module | None = None, **settings: Any) -> trainfn.FitResult:
    """Batches of four in order: example 26 is in batch 6."""
    torch.manual_seed(0)
    options = {
        "loss": "classification", "batch_size": 4, "shuffle": False, "max_steps": 20, "device": "cpu", "log_every": 5,
        "progress": False, "optimizer": trainfn.optim.adamw(lr=0.01), "compile": "eager", "resume": "auto",
    } | settings  # fmt: skip
    options["resume"] = options["resume"] if "out_dir" in options else None
    return trainfn.fit(model or nn.Linear(4, 3), Numbers() if data is None else data, **options)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer: a test that hangs would say nothing."""

    def late(*_: object) -> None:
        raise TimeoutError(f"{seconds} s are over")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def goes_on(run: Path) -> None:
    """Hold that what is in the directory goes on to the end of a run without the fault, bit for bit."""
    assert digest(train(out_dir=run, max_steps=20).state) == digest(train().state)


# --- data workers -----------------------------------------------------------------------------------------------------


def fails() -> None:
    raise KeyError("no such file")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exits() -> None:
    os._exit(3)


def hangs() -> None:
    time.sleep(1000)


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@workers_may_fork
@pytest.mark.parametrize(
    ("fate", "words", "settings"),
    [
        (
            fails,
            "example 26 failed.*batch 6, examples .24, 25, 26, 27., in data worker 0.*KeyError: 'no such file'",
            {},
        ),
        (dies, r"data worker has died.*batch [3-6] was waited for.*worker 0 \(process \d+\) was ended by SIGKILL", {}),
        (exits, "data worker has died.*exit status 3.*workers=0", {}),
        (hangs, "data workers hang.*batch 6 .*within 1 s.*worker_timeout", {"worker_timeout": 1.0}),
        (stops, "data workers hang", {"worker_timeout": 0.5}),
    ],
    ids=["fails", "dies", "exits", "hangs", "stops"],
)
def test_a_fault_in_a_data_worker_ends_the_run_with_the_last_state_saved(
    tmp_path: Path, fate: Callable[[], None], words: str, settings: dict[str, Any]
) -> None:
    with within(20.0), pytest.raises(DataError, match="(?s)" + words) as raised:
        train(Numbers(fate), workers=2, out_dir=tmp_path, **settings)
    (note,) = raised.value.__notes__
    (step,) = steps(tmp_path)
    cursor = verify(step).cursor
    assert note == f"The state after step {cursor} is saved in {step}."
    assert 3 <= cursor <= 6
    goes_on(tmp_path)


@workers_may_fork
def test_a_worker_that_is_killed_during_a_step_does_not_tear_the_step(tmp_path: Path) -> None:
    """PyTorch's own handler would raise in the observer, or in whatever is at work at that moment."""
    pids = []

    class Telling(Numbers):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((4,), float(os.getpid())), index % 3

    class Knowing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            pids[:] = [int(x[0, 0])]
            return super().forward(x * 0)

    reached: list[int] = []

    def kills(state: trainfn.TrainState) -> None:
        if state.cursor == 5:
            os.kill(pids[0], signal.SIGKILL)
            time.sleep(0.5)
        reached.append(state.cursor)

    with within(20.0), pytest.raises(DataError, match="has died"):
        train(Telling(), Knowing(4, 3), workers=1, observers=[kills], out_dir=tmp_path)
    assert reached[-1] >= 5
    assert verify(steps(tmp_path)[-1]).cursor == reached[-1]


def test_a_slow_worker_is_waited_for_as_long_as_it_takes() -> None:
    result = train(Numbers(lambda: time.sleep(1.5)), workers=2, worker_timeout=60.0, max_steps=8)
    assert digest(result.state) == digest(train(max_steps=8).state)


# --- errors between steps, and in them --------------------------------------------------------------------------------


def test_an_observer_is_named_and_the_state_before_it_saved(tmp_path: Path) -> None:
    def plots(state: trainfn.TrainState) -> None:
        if state.cursor == 7:
            raise ZeroDivisionError("no axis")

    with pytest.raises(ZeroDivisionError, match="no axis") as raised:
        train(out_dir=tmp_path, observers=[plots])
    named, saved = raised.value.__notes__
    assert named.startswith("It was raised by the observer test_an_observer_is_named")
    assert named.endswith("plots in on_step, after step 7.")
    assert saved == f"The state after step 7 is saved in {tmp_path / 'step_00000007'}."
    goes_on(tmp_path)


def test_an_example_that_fails_in_this_process_costs_no_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="example 26 failed"):
        train(Numbers(fails, where="here"), out_dir=tmp_path, check_data=False)
    assert verify(steps(tmp_path)[-1]).cursor == 6
    goes_on(tmp_path)


class Failing(nn.Linear):
    """Raises ``error`` in its seventh forward: the first is the plan's."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        torch.manual_seed(0)
        super().__init__(4, 3)
        self.error, self.count = error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.count == 7:
            raise self.error()
        return super().forward(x)


def test_an_error_in_a_step_is_raised_as_it_is_and_what_was_saved_before_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on purpose") as raised:
        train(model=Failing(lambda: ValueError("on purpose")), out_dir=tmp_path, save_every=2)
    assert not hasattr(raised.value, "__notes__")
    assert [verify(step).cursor for step in steps(tmp_path)] == [2, 4]
    goes_on(tmp_path)


def test_where_nothing_can_be_saved_the_error_says_that_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise CheckpointError("The disk refused: No space left on device.")

    monkeypatch.setattr(sys.modules["trainfn.loop"], "save", full)
    with pytest.raises(DataError) as raised:
        train(Numbers(fails, where="here"), out_dir=tmp_path, check_data=False)
    assert raised.value.__notes__ == [
        "The state after step 6 could not be saved: The disk refused: No space left on device."
    ]


# --- memory -----------------------------------------------------------------------------------------------------------


def host() -> Exception:
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("2**60 bytes of memory")


@pytest.mark.parametrize(
    "error", [host, lambda: torch.OutOfMemoryError("CUDA out of memory."), MemoryError], ids=["host", "GPU", "Python"]
)
def test_memory_that_is_not_there_is_told_with_step_shapes_and_what_to_lower(
    tmp_path: Path, error: Callable[[], Exception]
) -> None:
    with pytest.raises(StepMemoryError) as raised:
        train(model=Failing(error), out_dir=tmp_path, save_every=2)
    said = str(raised.value)
    for word in (
        "step 6, a batch of 0: float32[4, 4], 1: int64[4]",
        "batch_size=2, accumulate=2",
        "checkpoint=",
        "bf16",
    ):
        assert word in said, said
    assert isinstance(raised.value.__cause__, type(error()))
    assert [verify(step).cursor for step in steps(tmp_path)] == [2, 4]
    goes_on(tmp_path)


def test_it_is_told_before_the_first_step_where_it_shows_there() -> None:
    class Huge(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(StepMemoryError, match=r"the plan, a batch of .*float32\[4, 4\]"):
        train(model=Huge(4, 3))


def test_control_other_runtime_errors_are_not_about_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        train(model=Failing(lambda: RuntimeError("shapes")))


# --- the run directory ------------------------------------------------------------------------------------------------


def gone(run: Path) -> None:
    shutil.rmtree(run)


def another(run: Path) -> None:
    shutil.rmtree(run)
    run.with_name("keeps the inode").mkdir()
    run.mkdir()


def moved(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def a_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("")


@pytest.mark.parametrize("fate", [gone, another, moved, a_file], ids=lambda fate: fate.__name__)
def test_a_run_directory_that_goes_is_noticed_and_not_made_anew(tmp_path: Path, fate: Callable[[Path], None]) -> None:
    run = tmp_path / "run"

    def takes(state: trainfn.TrainState) -> None:
        if state.cursor == 7:
            (run / "inode").touch()
            fate(run)

    with pytest.raises(CheckpointWriteError, match="taken away"):
        train(out_dir=run, observers=[takes])
    assert not (run / "history.jsonl").exists()
    if fate is moved:
        assert (run.with_name("elsewhere") / "history.jsonl").read_text().count("\n") == 1


def test_the_user_may_choose_to_go_on_without_it(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def takes(state: trainfn.TrainState) -> None:
        if state.cursor == 7:
            shutil.rmtree(run)

    with pytest.warns(CheckpointWarning) as told:
        result = train(out_dir=run, observers=[takes], on_save_error="warn")
    assert (result.state.cursor, len(result.history)) == (20, 4)
    said = [str(one.message) for one in told]
    assert sum("row of the history was not written" in text for text in said) == 5  # three of steps, two of epochs
    assert sum("A checkpoint was not saved" in text for text in said) == 1
    assert not run.exists()
