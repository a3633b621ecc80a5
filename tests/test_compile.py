"""Modes: which one is chosen and why, falling back, mistakes under the compiler, draws, and consumed states."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from torch._subclasses.fake_tensor import FakeTensorMode

import trainfn
from tests.strategies import Batch, LmRecipe, MlpRecipe, Setup, relative_error, torch_warns_of_itself
from trainfn.engine.choice import Mode
from trainfn.engine.compile import CompiledStep, CompileWarning
from trainfn.errors import CompileError, ConfigError, DataError, DonatedStateError, ModelError
from trainfn.optim import adamw, sgd
from trainfn.state import TrainState
from trainfn.tree import digest, map_leaves, map_named, named_leaves

pytestmark = [
    torch_warns_of_itself,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

engine = sys.modules["trainfn.engine.compile"]  # the room's front door has a function of this name

small = Setup(MlpRecipe(blocks=()), sgd(0.1))


def compiled(setup: Setup = small, **options: Any) -> tuple[CompiledStep, TrainState]:
    model = setup.net.model()
    return trainfn.compile(setup.step(model), **{"backend": "eager"} | options), setup.state(model)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Pretend that a machine has exactly these tools."""

    def pretend(compilers: set[str], headers: bool = True, cxx: str | None = None) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in compilers else None)
        monkeypatch.delenv("CXX", raising=False)
        if cxx is not None:
            monkeypatch.setenv("CXX", cxx)
        if headers:
            (tmp_path / "Python.h").touch()
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})

    return pretend


# --- auto -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compilers", [{"g++"}, {"clang++"}, {"cl"}])
@pytest.mark.parametrize("steps", [None, 10**6])
def test_auto_compiles_where_it_can_and_where_it_pays(
    tools: Callable[..., None], compilers: set[str], steps: int | None
) -> None:
    tools(compilers)
    step, state = compiled(mode="auto", steps=steps)
    assert step.mode == "auto"
    assert step.settle(state) == ("graph", "one program for the whole step")
    assert step.settle(state) == (step.mode, step.reason)


def test_auto_stays_eager_for_few_steps(tools: Callable[..., None]) -> None:
    tools({"g++"})
    step, state = compiled(mode="auto", steps=3)
    mode, reason = step.settle(state)
    assert mode == "eager"
    assert "3 steps would not earn back" in reason


def test_auto_compiles_one_micro_batch_where_there_are_many(tools: Callable[..., None]) -> None:
    tools({"g++"})
    modes = {}
    for accumulate in (1, 2, 64):
        step, state = compiled(attrs.evolve(small, accumulate=accumulate), mode="auto")
        modes[accumulate], reason = step.settle(state)
    assert modes == {1: "graph", 2: "graph", 64: "accum"}
    assert "64 micro-batches" in reason


@pytest.mark.parametrize(
    ("compilers", "headers", "cxx", "missing"),
    [
        (set(), True, None, "a C++ compiler"),
        (set(), True, "/opt/none", "a C++ compiler"),
        ({"icpx"}, True, None, "a C++ compiler"),
        ({"icpx"}, True, "icpx", None),
        ({"g++"}, False, None, "Python's C headers"),
    ],
)
def test_auto_stays_eager_where_a_tool_is_missing(
    tools: Callable[..., None], compilers: set[str], headers: bool, cxx: str | None, missing: str | None
) -> None:
    tools(compilers, headers, cxx)
    step, state = compiled(mode="auto")
    mode, reason = step.settle(state)
    assert mode == ("graph" if missing is None else "eager")
    assert missing is None or missing in reason


def test_auto_in_eager_is_the_step_itself(tools: Callable[..., None]) -> None:
    tools(set())
    step, state = compiled(mode="auto")
    after = step(state, small.batch())
    right = step.step(state, small.batch())
    torch.testing.assert_close(dict(after.params), dict(right.params))
    assert (after.cursor, int(after.step)) == (right.cursor, int(right.step))
    assert (step.mode, step.compiles, step.compile_seconds) == ("eager", 0, 0.0)


def test_a_mode_asked_for_is_taken_whatever_there_is(tools: Callable[..., None]) -> None:
    tools(set())
    for mode in ("eager", "graph"):
        step, state = compiled(mode=mode, steps=1)
        assert step.settle(state) == (mode, "as asked")
        step(state, small.batch())
        assert step.compiles == (mode == "graph")
        assert (step.compile_seconds > 0) == (mode == "graph")


@pytest.mark.parametrize("mode", ["grahp", "", None, "spilt"])
def test_a_mode_that_does_not_exist_is_refused(mode: Any) -> None:
    with pytest.raises(ConfigError, match="no compile mode of this name"):
        compiled(mode=mode)


# --- what cannot be compiled ------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Looks at a number in the batch from Python: no single program does both."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum().item() > 0 else -self.linear(x)


def branching(mode: Mode, *, donate: bool = False) -> tuple[CompiledStep, TrainState]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Branching()
    optimizer = adamw(0.1)
    plain = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    return trainfn.compile(plain, mode=mode, donate=donate, backend="eager"), trainfn.init(model, optimizer)


@pytest.mark.parametrize("donate", [False, True])
def test_auto_goes_on_in_eager_and_says_so_once(tools: Callable[..., None], donate: bool) -> None:
    tools({"g++"})
    step, state = branching("auto", donate=donate)
    reference = branching("eager")[1]
    with pytest.warns(CompileWarning, match="Going on in eager mode") as told:
        state = step(state, small.batch())
    assert len(told) == 1
    assert told[0].filename == __file__
    assert step.mode == "eager"
    assert "does not compile as one program" in step.reason
    assert step.compiles == 0
    for index in (1, 2):
        state = step(state, small.batch(index))
    for index in (0, 1, 2):
        reference = step.step(reference, small.batch(index))
    torch.testing.assert_close(dict(state.params), dict(reference.params))


def test_graph_refuses_and_shows_the_cause() -> None:
    step, state = branching("graph")
    with pytest.raises(CompileError, match="does not compile as one program") as caught:
        step(state, small.batch())
    assert caught.value.__cause__ is not None
    assert caught.value.hint is not None
    assert int(state.step) == 0  # and is still usable
    assert int(step.step(state, small.batch()).step) == 1


# --- a user's mistake is told as itself -------------------------------------------------------------------------------


class Mistaken(nn.Module):
    def __init__(self, mistake: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.mistake = nn.Linear(3, 3), mistake

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.mistake(x))


def raise_own(x: Tensor) -> Tensor:
    raise KeyError("mine")


MISTAKES = [
    (raise_own, KeyError, "mine"),
    (lambda x: x[:, :2], RuntimeError, "mat1 and mat2"),
    (lambda x: x.lineer, AttributeError, "lineer"),
    (lambda x: [][0], IndexError, "list index"),
]


@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES)
@pytest.mark.parametrize("mode", ["eager", "graph", "auto"])
@pytest.mark.parametrize("donate", [False, True])
def test_a_mistake_in_forward_is_told_as_itself(
    tools: Callable[..., None], mistake: Any, error: type[Exception], message: str, mode: Mode, donate: bool
) -> None:
    tools({"g++"})
    model, optimizer = Mistaken(mistake), sgd(0.1)
    plain = trainfn.make_step(model, loss="classification", optimizer=optimizer)
    step = trainfn.compile(plain, mode=mode, donate=donate, backend="eager")
    state = trainfn.init(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message) as caught:
            step(state, small.batch())
    assert type(caught.value) is error
    assert int(state.step) == 0  # a donating step that raised has consumed nothing


@pytest.mark.parametrize("mode", ["eager", "graph", "auto"])
def test_a_batch_that_does_not_fit_is_told_as_itself(tools: Callable[..., None], mode: Mode) -> None:
    tools({"g++"})
    step, state = compiled(mode=mode)
    good = small.batch()
    with pytest.raises(DataError, match="labels have the wrong dtype"):
        step(state, good | {"y": good["y"].double()})
    with pytest.raises(ModelError, match="does not take what the batch holds"):
        step(state, {"a": good["x"], "b": good["x"], "y": good["y"]})
    assert int(step(state, good).step) == 1
    with pytest.raises(DataError, match="labels have the wrong dtype"):  # with a program at hand, too
        step(state, good | {"y": good["y"].double()})


def no_gradient(outputs: Tensor, batch: Batch) -> Tensor:
    return outputs.detach().mean()


@pytest.mark.parametrize("mode", ["graph", "auto"])
def test_a_mistake_after_the_forward_is_told_as_itself(tools: Callable[..., None], mode: Mode) -> None:
    """The compiler meets it first, and cannot say it so well."""
    tools({"g++"})
    model, optimizer = small.net.model(), sgd(0.1)
    plain = trainfn.make_step(model, loss=no_gradient, optimizer=optimizer)
    step = trainfn.compile(plain, mode=mode, backend="eager")
    with pytest.raises(ModelError, match="does not depend on any trained parameter"):
        step(trainfn.init(model, optimizer), small.batch())
    assert step.mode == "graph"


# --- draws ------------------------------------------------------------------------------------------------------------

dropping = Setup(MlpRecipe(blocks=("plain",), width=6, dropout=0.5), sgd(0.1))


def check_draws(backend: str, dropping: Setup = dropping) -> None:
    batch = dropping.batch()
    cold, state = compiled(dropping, mode="graph", backend=backend)
    warm, _ = compiled(dropping, mode="graph", backend=backend)
    here = attrs.evolve(state, cursor=5)
    warm(state, batch)
    assert cold.compiles == 0
    first = cold(here, batch)  # compiles
    torch.rand(3)
    assert digest(cold(here, batch)) == digest(first)
    assert digest(warm(here, batch)) == digest(first)
    for other in (attrs.evolve(here, cursor=6), attrs.evolve(here, seed=6)):
        assert float(warm(other, batch).report.loss) != float(first.report.loss)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_call_that_compiles_draws_what_later_ones_draw(backend: str) -> None:
    check_draws(backend)


def test_the_call_that_compiles_draws_what_later_ones_draw_under_inductor() -> None:
    check_draws("inductor", Setup(LmRecipe(tied=True, dropout=0.5), sgd(0.1)))


def test_where_the_compiler_may_draw_as_eager_does_it_draws_the_same() -> None:
    step, state = compiled(dropping, mode="graph", backend="aot_eager")
    found, right = step(state, dropping.batch()), step.step(state, dropping.batch())
    assert float(found.report.loss) == float(right.report.loss)
    assert relative_error(found.params, right.params) < 1e-6
    other = step.step(attrs.evolve(state, seed=state.seed + 1), dropping.batch())
    assert float(other.report.loss) != float(right.report.loss)


# --- the surroundings of a call ---------------------------------------------------------------------------------------


def test_a_step_under_no_grad_is_the_same_program() -> None:
    step, state = compiled(mode="graph")
    with torch.no_grad():
        inside = step(state, small.batch())
    assert digest(step(state, small.batch())) == digest(inside)
    assert step.compiles == 1


@pytest.mark.parametrize("mode", ["graph", "accum", "split"])
def test_programs_are_traced_once(mode: Mode) -> None:
    """Numbers that a trace finds in 0-d tensors make it begin anew, with a schedule of the learning rate for example.

    Where PyTorch finds a reason to, which the control looks for, it says so.
    """
    setup = attrs.evolve(small, optimizer=adamw(trainfn.optim.warmup_cosine(0.01, warmup=2, total=9)))
    step, state = compiled(setup, mode=mode, backend="aot_eager")
    clear_compilation_metrics()
    step(state, setup.batch())
    assert not any(metrics.restart_reasons for metrics in get_compilation_metrics())


def test_restarted_traces_are_seen() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)

    def scaled(x: Tensor) -> Tensor:
        return x * rate.item()

    clear_compilation_metrics()
    torch.compile(scaled, backend="aot_eager")(torch.ones(2))
    assert any(metrics.restart_reasons for metrics in get_compilation_metrics())


def worked_out(layers: int, mode: Mode) -> int:
    """Return for how many operators the compiler worked out what they return, and did not know it of an equal one."""
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(layers)])
    optimizer = trainfn.optim.sgd(0.1)
    plain = trainfn.make_step(deep, loss="regression", optimizer=optimizer)
    step = trainfn.compile(plain, mode=mode, backend="aot_eager")
    FakeTensorMode.cache_clear()
    step(trainfn.init(deep, optimizer), (torch.ones(3, 8), torch.ones(3, 8)))
    return FakeTensorMode.cache_info().misses


@pytest.mark.parametrize("mode", ["accum", "split"])
def test_equal_layers_are_worked_out_once(mode: Mode) -> None:
    assert worked_out(9, mode) == worked_out(5, mode)


def test_control_layers_that_begin_elsewhere_in_a_pack_are_worked_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainfn.engine.held._alike", lambda param: param)
    assert worked_out(9, "accum") - worked_out(5, "accum") > 4 * 3


def test_compiling_leaves_the_compilers_settings_alone() -> None:
    from torch._dynamo import config

    before = (config.trace_autograd_ops, config.recompile_limit)
    step, state = compiled(mode="graph")
    step(state, small.batch())
    assert (config.trace_autograd_ops, config.recompile_limit) == before


def test_evaluation_is_that_of_the_step() -> None:
    step, state = compiled(mode="graph")
    assert digest(step.evaluate(state, small.batch())) == digest(step.step.evaluate(state, small.batch()))


# --- consumed states --------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[CompiledStep, TrainState, Batch], Any]] = {
    **{name: lambda step, state, batch, name=name: getattr(state, name) for name in TrainState.__record_fields__},
    "named_leaves": lambda step, state, batch: list(named_leaves(state)),
    "map_leaves": lambda step, state, batch: map_leaves(lambda leaf: leaf, state),
    "map_named": lambda step, state, batch: map_named(lambda name, leaf: leaf, state),
    "digest": lambda step, state, batch: digest(state),
    "digest of a tree around it": lambda step, state, batch: digest({"run": [state]}),
    "attrs.evolve": lambda step, state, batch: attrs.evolve(state, cursor=3),
    "repr": lambda step, state, batch: repr(state),
    "pickle": lambda step, state, batch: pickle.dumps(state),
    "copy": lambda step, state, batch: copy.copy(state),
    "the step again": lambda step, state, batch: step(state, batch),
    "the plain step": lambda step, state, batch: step.step(state, batch),
    "evaluate": lambda step, state, batch: step.evaluate(state, batch),
}


@pytest.mark.parametrize("use", USES)
def test_any_use_of_a_consumed_state_raises_and_names_the_call(use: str) -> None:
    step, state = compiled(mode="eager", donate=True)
    state = step(state, small.batch())
    after = step(state, small.batch(1))
    with pytest.raises(DonatedStateError, match="batch 1"):
        USES[use](step, state, small.batch())
    USES[use](step, after, small.batch())  # control: the returned one may be used


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_consumed_state_is_still_known_as_one_and_cannot_be_saved(mode: Mode, tmp_path: Path) -> None:
    step, state = compiled(mode=mode, donate=True)
    after = step(state, small.batch())
    assert isinstance(state, TrainState)
    with pytest.raises(DonatedStateError):
        trainfn.save(state, tmp_path / "consumed")
    assert int(after.step) == 1


def test_a_step_that_does_not_donate_consumes_nothing() -> None:
    for mode in ("eager", "graph"):
        step, state = compiled(mode=mode)
        first = digest(step(state, small.batch()))
        assert digest(step(state, small.batch())) == first


def test_a_donated_state_is_written_in_place_in_graph_mode() -> None:
    setup = Setup(LmRecipe(tied=True), adamw(0.1), ema=0.9)
    step, state = compiled(setup, mode="graph", donate=True)

    def addresses(state: TrainState) -> dict[str, int]:
        written = {"params": state.params, "opt": state.opt, "ema": state.ema, "step": state.step}
        return {name: leaf.data_ptr() for name, leaf in named_leaves(written)}

    state = step(state, setup.batch())  # from elsewhere: it is packed first
    before, bits = addresses(state), digest(state.params)
    for index in range(3):
        state = step(state, setup.batch(index))
        assert addresses(state) == before
    assert digest(state.params) != bits


@pytest.mark.parametrize("mode", ["eager", "graph", "accum", "split"])
def test_a_report_stays_what_it_was(mode: Mode) -> None:
    """Those of several steps are read together, when a row of the history is due."""
    setup = Setup(LmRecipe(), adamw(0.1), accumulate=2)
    step, state = compiled(setup, mode=mode, donate=True, backend="aot_eager")
    reports, bits = [], []
    for index in range(4):
        state = step(state, setup.batch(index))
        reports.append(state.report)
        bits.append(digest(state.report))
    assert [digest(report) for report in reports] == bits
    assert len({float(report.weight) for report in reports}) > 1  # control: the weights do differ


# --- memory -----------------------------------------------------------------------------------------------------------

FAULTS = """
import resource, sys, torch, trainfn
torch.set_num_threads(1)
model, optimizer = torch.nn.Linear(3_072, 3_072, bias=False), trainfn.optim.adamw()
step = trainfn.make_step(model, loss="mse", optimizer=optimizer)
step = trainfn.compile(step, mode="eager", donate=True)
state, batch = trainfn.init(model, optimizer), (torch.ones(2, 3_072), torch.zeros(2, 3_072))
found = []
for index in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    state = step(state, batch)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(found[2:]))  # a system may take pages away from a process that waits
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_step_gets_no_new_pages_from_the_system() -> None:
    """Its 38 MB of gradients are 9,216 pages; the control is told to leave the allocator alone."""

    def faults(**environment: str) -> int:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
        done = subprocess.run(
            [sys.executable, "-c", FAULTS], env=kept | environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout.splitlines()[-1])

    kept, control = faults(), faults(MALLOC_ARENA_MAX="8")
    assert kept < 500 < 9_000 < control
