"""CUDA graphs without a GPU: slots, reports, draws, decisions and refusals, with a stand-in for what records.

The stand-in keeps to what a recording is: to make one changes nothing, a replay does what was recorded at the addresses
of that time. What a GPU makes of it is in ``test_cuda.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import trainfn
from tests.strategies import LmRecipe, MlpRecipe, Setup, torch_warns_of_itself
from trainfn.engine.choice import Mode
from trainfn.engine.compile import CompiledStep
from trainfn.engine.cudagraph import Capturing, make_capturing
from trainfn.errors import CompileError, ConfigError
from trainfn.optim import adamw
from trainfn.state import TrainState
from trainfn.tree import digest, named_leaves

pytestmark = [
    torch_warns_of_itself,
    pytest.mark.filterwarnings("ignore:Another program was compiled:trainfn.engine.compile.CompileWarning"),
]

engine = sys.modules["trainfn.engine.compile"]
captures = sys.modules["trainfn.engine.cudagraph"]


class Moment:
    def __init__(self, device: StandIn) -> None:
        self.device, self.at = device, device.clock

    def query(self) -> bool:
        return self.device.done

    def elapsed_time(self, end: Moment) -> float:
        return end.at - self.at


class StandIn:
    """Records Python instead of kernels. ``protected`` are the tensors that a recording must leave as they are."""

    def __init__(self, *, call: float = 2.0, replay: float = 1.0) -> None:
        self.device = torch.device("cpu")
        self.host = torch.Generator()  # what a step draws from is the device's generator here
        self.protected: list[Tensor] = []
        self.clock, self.done, self.costs = 0.0, True, (call, replay)
        self.asides, self.replays, self.recordings = 0, 0, 0
        self.failure: Exception | None = None

    def generators(self) -> list[torch.Generator]:
        return [self.host, torch.default_generator]

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.asides += 1
        yield

    def record(self, body: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.recordings += 1
        kept = [tensor.detach().clone() for tensor in self.protected]
        result = body().detach().clone()
        with torch.no_grad():
            for tensor, old in zip(self.protected, kept, strict=True):
                tensor.copy_(old)
        if self.failure is not None:
            raise self.failure
        result.fill_(-1)

        def replay() -> None:
            self.replays += 1
            began = self.clock
            result.copy_(body())
            self.clock = began + self.costs[1]

        return replay, result

    def mark(self) -> Moment:
        return Moment(self)


def compiled(
    monkeypatch: pytest.MonkeyPatch, setup: Setup, mode: Mode, device: StandIn | None, asked: Any = True
) -> tuple[CompiledStep, TrainState]:
    made = None if device is None else Capturing(asked, device)
    monkeypatch.setattr(engine, "make_capturing", lambda *_, **__: (made, ""))
    model = setup.net.model()
    step = trainfn.compile(setup.step(model), mode=mode, donate=True, backend="aot_eager")
    return step, setup.state(model, seed=3)


def run(
    monkeypatch: pytest.MonkeyPatch,
    setup: Setup,
    mode: Mode,
    device: StandIn | None,
    *,
    asked: Any = True,
    steps: int = 8,
    batch: Callable[[int], Any] | None = None,
) -> tuple[TrainState, list[dict[str, Any]], CompiledStep]:
    """Return the last state, what every report said while the run went on and at its end, and the step."""
    step, state = compiled(monkeypatch, setup, mode, device, asked)
    reports = []
    for index in range(steps):
        state = step(state, (batch or setup.batch)(index))
        reports.append(state.report)
        if device is not None:
            device.protected = state.__dict__["_held"].tensors
    return state, [{name: leaf.tolist() for name, leaf in named_leaves(report)} for report in reports], step


net = MlpRecipe(blocks=("batch_norm", "plain"), dropout=0.3, frozen=("head.bias",))
SETUPS = {
    "plain": Setup(LmRecipe(tied=True), adamw(0.1), clip_norm=0.5),
    "all": Setup(net, adamw(0.1), clip_norm=0.5, ema=0.9, accumulate=2, length=6),
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
@pytest.mark.parametrize("mode", ["eager", pytest.param("graph", marks=pytest.mark.slow), "accum", "split"])
def test_replayed_steps_are_the_steps_to_the_bit(monkeypatch: pytest.MonkeyPatch, mode: Mode, setup: Setup) -> None:
    device = StandIn()
    found, reports, step = run(monkeypatch, setup, mode, device)
    right, expected, _ = run(monkeypatch, setup, mode, None)
    assert digest(found) == digest(right)
    assert reports == expected  # read at the end: later replays have not written to earlier reports
    assert device.recordings == device.asides == 1
    assert device.replays >= 4
    assert "captured as a CUDA graph" in step.reason


def test_control_a_recording_that_runs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Running(StandIn):
        def record(self, body: Any) -> Any:
            self.protected = []
            return super().record(body)

    right = run(monkeypatch, SETUPS["plain"], "eager", None)[0]
    assert digest(run(monkeypatch, SETUPS["plain"], "eager", Running())[0]) != digest(right)


def test_control_slots_that_are_not_filled_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = run(monkeypatch, SETUPS["plain"], "eager", None)[0]
    monkeypatch.setattr(captures, "_fill", lambda slots, batch: None)
    assert digest(run(monkeypatch, SETUPS["plain"], "eager", StandIn())[0]) != digest(right)


def test_control_reports_that_are_not_copied_out_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uncopied(Tensor):
        def clone(self, **_: Any) -> Any:
            return self

    class Lending(StandIn):
        def record(self, body: Any) -> Any:
            replay, result = super().record(body)
            return replay, result.as_subclass(Uncopied)

    expected = run(monkeypatch, SETUPS["plain"], "eager", None)[1]
    assert run(monkeypatch, SETUPS["plain"], "eager", Lending())[1] != expected


def test_control_draws_that_go_on_from_the_recording_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generators are put back after recording; a device without a generator to put back draws other numbers."""

    class Forgetful(StandIn):
        def generators(self) -> list[torch.Generator]:
            return [self.host]

    right = run(monkeypatch, SETUPS["all"], "eager", None)[0]
    assert digest(run(monkeypatch, SETUPS["all"], "eager", Forgetful())[0]) != digest(right)
    assert digest(run(monkeypatch, SETUPS["all"], "eager", StandIn())[0]) == digest(right)


def test_the_global_generator_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    run(monkeypatch, SETUPS["all"], "graph", StandIn())
    assert torch.equal(torch.get_rng_state(), before)


# --- auto -------------------------------------------------------------------------------------------------------------


def timed(monkeypatch: pytest.MonkeyPatch, device: StandIn, steps: int = 24) -> tuple[TrainState, CompiledStep]:
    """Run a step whose calls take the time that the stand-in says."""
    setup = SETUPS["plain"]
    step, state = compiled(monkeypatch, setup, "eager", device, "auto")
    step.settle(state)
    capturing = step._capturing
    assert capturing is not None
    plain = capturing.run

    def ticking(cases: Any, key: Any, packed: Any, batch: Any, call: Any) -> Any:
        def slow(given: Any) -> Any:
            device.clock += device.costs[0]
            return call(given)

        return plain(cases, key, packed, batch, slow if _is_called(cases, key) else call)

    monkeypatch.setattr(capturing, "run", ticking)
    for index in range(steps):
        state = step(state, setup.batch(index))
        device.protected = state.__dict__["_held"].tensors
    return state, step


def _is_called(cases: Any, key: Any) -> bool:
    """Whether the next step is taken by calls: time goes by then, and not while recording."""
    case = cases.get(key)
    return case is None or case.replay is None


@pytest.mark.parametrize(("call", "replay", "wins"), [(4.0, 1.0, True), (1.0, 1.0, False), (1.0, 3.0, False)])
def test_auto_keeps_what_is_faster_and_says_so(
    monkeypatch: pytest.MonkeyPatch, call: float, replay: float, wins: bool
) -> None:
    device = StandIn(call=call, replay=replay)
    state, step = timed(monkeypatch, device)
    assert ("captured as a CUDA graph" in step.reason) == wins
    assert f"{replay * 1e3:,.0f} us replayed, {call * 1e3:,.0f} us called" in step.reason
    assert device.recordings == 1
    assert device.replays == (15 if wins else 8)  # 8 called, 1 aside, 8 replayed and timed, then what is faster
    assert digest(state) == digest(run(monkeypatch, SETUPS["plain"], "eager", None, steps=24)[0])


def test_auto_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = StandIn(call=1.0, replay=9.0)
    device.done = False  # the marks have not been reached
    _, step = timed(monkeypatch, device)
    assert device.replays == 15
    assert "will be timed" in step.reason


def test_what_was_decided_is_not_timed_again_for_another_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    device, setup = StandIn(call=1.0, replay=9.0), SETUPS["plain"]
    state, step = timed(monkeypatch, device)
    for index in range(4):
        state = step(state, setup.net.batch(3, index))
    assert device.recordings == 1


# --- other batches, other packs ---------------------------------------------------------------------------------------


def test_another_shape_is_another_recording_and_both_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, device = SETUPS["plain"], StandIn()
    batch = lambda index: setup.net.batch(6 if index % 3 else 4, index)  # noqa: E731
    found, reports, _ = run(monkeypatch, setup, "graph", device, steps=16, batch=batch)
    right, expected, _ = run(monkeypatch, setup, "graph", None, steps=16, batch=batch)
    assert digest(found) == digest(right)
    assert reports == expected
    assert device.recordings == 2


@pytest.mark.parametrize("asked", [True, "auto"])
def test_the_number_of_recordings_is_bounded(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    monkeypatch.setattr(captures, "_MOST_CAPTURES", 2)
    monkeypatch.setattr(captures, "_TIMED", 1)
    setup, device = SETUPS["plain"], StandIn()
    batch = lambda index: setup.net.batch(3 + index // 5, index)  # noqa: E731
    if asked is True:
        with pytest.raises(CompileError, match="2 captures were made"):
            run(monkeypatch, setup, "eager", device, steps=20, batch=batch)
        return
    device.done = False
    found, _, step = run(monkeypatch, setup, "eager", device, asked=asked, steps=20, batch=batch)
    assert device.recordings == 2
    assert "2 captures were made" in step.reason
    assert digest(found) == digest(run(monkeypatch, setup, "eager", None, steps=20, batch=batch)[0])


def test_a_state_from_elsewhere_is_recorded_over_its_own_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs in turns, of one step: each replays at its own addresses."""
    setup, device = SETUPS["plain"], StandIn()
    step, first = compiled(monkeypatch, setup, "eager", device)
    second = setup.state(setup.net.model(), seed=4)
    for index in range(6):
        for which in (0, 1):
            state = (first, second)[which]
            held = state.__dict__.get("_held")
            device.protected = held.tensors if held is not None else []
            state = step(state, setup.batch(index + 10 * which))
            first, second = (state, second) if which == 0 else (first, state)
    assert device.recordings == 2
    alone = run(monkeypatch, setup, "eager", None, steps=6)[0]
    assert digest(first) == digest(alone)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, "auto"])
def test_what_is_on_the_host_is_named(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    device = StandIn()
    device.device = torch.device("meta")
    if asked is True:
        with pytest.raises(CompileError, match=r"not on meta: state.params.norm.weight"):
            run(monkeypatch, SETUPS["plain"], "eager", device)
        return
    _, _, step = run(monkeypatch, SETUPS["plain"], "eager", device, asked=asked)
    assert "no CUDA graph: not on meta" in step.reason
    assert device.recordings == 0


@pytest.mark.parametrize("asked", [True, "auto"])
def test_draws_on_the_host_are_refused(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    device = StandIn()
    device.host = torch.default_generator  # which the dropout draws from
    steps = 24
    if asked is True:
        with pytest.raises(CompileError, match="draws random numbers on the host"):
            run(monkeypatch, SETUPS["all"], "eager", device)
        return
    found, _, step = run(monkeypatch, SETUPS["all"], "eager", device, asked=asked, steps=steps)
    assert "draws random numbers on the host" in step.reason
    assert device.replays == 0
    assert digest(found) == digest(run(monkeypatch, SETUPS["all"], "eager", None, steps=steps)[0])


@pytest.mark.parametrize("asked", [True, "auto"])
def test_a_capture_that_fails_costs_no_step(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    device, setup = StandIn(), SETUPS["all"]
    device.failure = RuntimeError("operation not permitted when stream is capturing\nmore")
    right = run(monkeypatch, setup, "eager", None, steps=12)[0]
    if asked is True:
        step, state = compiled(monkeypatch, setup, "eager", device)
        for index in range(2):
            state = step(state, setup.batch(index))
            device.protected = state.__dict__["_held"].tensors
        before = digest(state)
        with pytest.raises(CompileError, match="operation not permitted") as caught:
            step(state, setup.batch(2))
        assert caught.value.__cause__ is device.failure
        assert digest(state) == before
        return
    found, _, step = run(monkeypatch, setup, "eager", device, asked=asked, steps=12)
    assert digest(found) == digest(right)
    assert device.recordings == 1  # not tried again
    assert "RuntimeError: operation not permitted when stream is capturing" in step.reason
    assert "more" not in step.reason


def test_on_a_cpu_asking_is_refused_and_auto_is_not_there() -> None:
    setup = SETUPS["plain"]
    model = setup.net.model()
    state = setup.state(model)
    step = trainfn.compile(setup.step(model), mode="eager", donate=True, cuda_graph=True)
    with pytest.raises(CompileError, match="the state is on cpu"):
        step(state, setup.batch())
    assert int(state.step) == 0
    for asked in ("auto", False):
        step = trainfn.compile(setup.step(model), mode="eager", donate=True, cuda_graph=asked)
        after = step(setup.state(model), setup.batch())
        assert int(after.step) == 1
        assert step._capturing is None
        assert step.reason == "as asked"


def test_an_undonated_step_cannot_be_asked_for_one() -> None:
    plain = SETUPS["plain"].step(SETUPS["plain"].net.model())
    with pytest.raises(CompileError, match="not donated"):
        trainfn.compile(plain, cuda_graph=True)
    with pytest.raises(ConfigError, match="cuda_graph='yes'"):
        trainfn.compile(plain, donate=True, cuda_graph="yes")  # type: ignore[arg-type]


def test_auto_says_why_not_on_a_gpu() -> None:
    gpu = torch.device("cuda", 0)
    assert "not donated" in make_capturing("auto", gpu, donate=False, mode="graph")[1]
    assert "eager mode" in make_capturing("auto", gpu, donate=True, mode="eager")[1]
    assert make_capturing(False, gpu, donate=True, mode="graph") == (None, "")
