"""Signals: the step is finished and saved, the exit status says why, and what was saved goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainfn
from trainfn.signals import listening
from trainfn.store import steps, verify
from trainfn.tree import digest

ROOT = Path(__file__).parents[1]
X, Y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def train(**settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3))
    options = {"loss": "classification", "batch_size": 8, "device": "cpu", "progress": False, "resume": "auto"}
    return trainfn.fit(model, (X, Y), optimizer=trainfn.optim.adamw(lr=0.01), **(options | settings))


def send(number: signal.Signals, at: int, times: int = 1) -> Any:
    def observer(state: trainfn.TrainState) -> None:
        if state.cursor == at:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return observer


@pytest.fixture(autouse=True)
def _handlers_are_as_they_were() -> Any:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD)
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to it
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGINT, own)
    assert after == before


@pytest.mark.parametrize("background", [True, False])
def test_ctrl_c_ends_a_run_between_steps_with_everything_saved(tmp_path: Path, background: bool) -> None:
    with pytest.raises(KeyboardInterrupt, match="SIGINT after step 7") as raised:
        train(max_steps=20, out_dir=tmp_path, save_async=background, observers=[send(signal.SIGINT, 7)])
    assert raised.value.result.checkpoint == tmp_path / "step_00000007"
    assert raised.value.result.state.cursor == 7
    assert digest(train(max_steps=20, out_dir=tmp_path).state) == digest(train(max_steps=20, resume=None).state)


def test_sigterm_is_an_exit_of_143_and_works_without_a_directory() -> None:
    with pytest.raises(SystemExit) as raised:
        train(max_steps=20, resume=None, observers=[send(signal.SIGTERM, 3)])
    assert (raised.value.code, raised.value.result.state.cursor) == (143, 3)


def test_a_signal_at_the_last_step_still_ends_the_program(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(max_steps=5, out_dir=tmp_path, observers=[send(signal.SIGTERM, 5)])
    assert train(max_steps=5, out_dir=tmp_path).checkpoint == tmp_path / "step_00000005"


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as raised:
        train(max_steps=20, out_dir=tmp_path, observers=[send(signal.SIGINT, 4, times=2)])
    assert not hasattr(raised.value, "result")
    assert steps(tmp_path) == []


def test_usr1_is_for_the_caller_to_answer(tmp_path: Path) -> None:
    heard: list[Any] = []

    def goes_on(number: signal.Signals, checkpoint: Path | None) -> bool:
        verify(checkpoint)
        heard.append((number, checkpoint.name))
        return True

    result = train(max_steps=9, out_dir=tmp_path, on_signal=goes_on, observers=[send(signal.SIGUSR1, 4)])
    assert heard == [(signal.SIGUSR1, "step_00000004")]
    assert result.state.cursor == 9
    with pytest.raises(SystemExit) as raised:
        train(max_steps=12, out_dir=tmp_path, on_signal=lambda *_: None, observers=[send(signal.SIGUSR1, 10)])
    assert raised.value.code == 128 + signal.SIGUSR1
    with pytest.raises(SystemExit):  # True is of no use there
        train(max_steps=12, out_dir=tmp_path, on_signal=goes_on, observers=[send(signal.SIGTERM, 11)])


def test_handlers_come_back_after_an_error_too() -> None:
    def own(number: int, frame: object) -> None:
        raise AssertionError("not to be called")

    before = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(ZeroDivisionError):
            train(max_steps=3, resume=None, observers=[lambda state: 1 // 0])
        assert signal.getsignal(signal.SIGTERM) is own
        with pytest.raises(SystemExit):
            train(max_steps=3, resume=None, observers=[send(signal.SIGTERM, 2)])
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening() as listener:
            signal.raise_signal(signal.SIGINT)
            assert listener.heard is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_off_the_main_thread_it_trains_and_listens_to_nothing(tmp_path: Path) -> None:
    found: list[Any] = []

    def work() -> None:
        found.append(signal.getsignal(signal.SIGTERM))
        result = train(
            max_steps=4, out_dir=tmp_path, observers=[lambda s: found.append(signal.getsignal(signal.SIGTERM))]
        )
        found.append(result)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[-1].state.cursor == 4
    assert set(found[:-1]) == {signal.getsignal(signal.SIGTERM)}


PROGRAM = """
import json, os, sys, torch
from torch import nn
import trainfn
from trainfn.tree import digest
class Items(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, index): return torch.arange(4.0) + index, index % 3
def tell(state):
    if state.cursor == 3: print("go", flush=True)
def train(stop, out_dir, workers, tell=()):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3))
    return trainfn.fit(model, Items(), loss="classification", optimizer=trainfn.optim.adamw(lr=0.01), batch_size=4,
                       max_steps=stop, workers=workers, device="cpu", progress=False, out_dir=out_dir, observers=tell,
                       resume="auto" if out_dir else None, save_every=50, log_every=50, compile="eager")
if __name__ == "__main__":
    result = train(int(sys.argv[2]), sys.argv[1], int(sys.argv[3]), [tell])
    print(digest(result.state))
"""


def signalled(run: Path, number: signal.Signals, workers: int, group: bool) -> int:
    """Start a run of 10**6 steps in a process group of its own, signal it once it is under way; return its status."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, run, "1000000", str(workers)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "go\n"
        (os.killpg if group else os.kill)(process.pid, number)
        print(process.communicate(timeout=60)[1])  # for pytest to show
    finally:
        process.kill()
        process.communicate()
    return process.returncode


@pytest.mark.parametrize(
    ("number", "workers", "group"),
    [
        *[(number, 0, False) for number in (signal.SIGTERM, signal.SIGINT)] * 3,
        *[(number, 2, True) for number in (signal.SIGTERM, signal.SIGINT)] * 2,
        *[
            pytest.param(number, workers, workers > 0, marks=pytest.mark.slow)
            for number, often in ((signal.SIGTERM, 100), (signal.SIGINT, 50))
            for workers in (0, 2)
            for _ in range(often)
        ],
    ],
)
def test_a_signalled_process_has_saved_and_says_why_it_ended(
    tmp_path: Path, number: signal.Signals, workers: int, group: bool
) -> None:
    status = signalled(tmp_path, number, workers, group)
    assert status == (143 if number == signal.SIGTERM else -signal.SIGINT)  # a shell shows the second as 130
    newest = verify(steps(tmp_path)[-1])
    assert newest.cursor >= 3
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == newest.cursor  # saved after the step in which it was told, not at some earlier one


def test_a_signalled_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    signalled(tmp_path / "cut", signal.SIGTERM, 0, False)
    stop = verify(steps(tmp_path / "cut")[-1]).cursor + 5
    scope: dict[str, Any] = {"__name__": "program"}
    exec(compile(PROGRAM, "program", "exec"), scope)  # noqa: S102
    whole, cut = scope["train"](stop, None, 0), scope["train"](stop, tmp_path / "cut", 0)
    assert digest(whole.state) == digest(cut.state)
