"""Law 7: one program for a whole run of constant shape, whatever changes in it; and it is counted honestly."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trainfn
from tests.strategies import (
    Batch,
    LmRecipe,
    MlpRecipe,
    Setup,
    few,
    language_models,
    mlps,
    setups,
    torch_warns_of_itself,
)
from trainfn.engine.choice import Mode
from trainfn.engine.compile import CompiledStep, CompileWarning
from trainfn.errors import CompileError, DataError
from trainfn.fit import carry_out
from trainfn.health import Verdict
from trainfn.optim import Transform, adamw, sgd, warmup_cosine

pytestmark = torch_warns_of_itself


class Counting:
    """A backend that runs graphs as they are and counts how many it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def compiled(setup: Setup, model: nn.Module, counting: Counting, *, donate: bool = False) -> CompiledStep:
    return trainfn.compile(setup.step(model), mode="graph", donate=donate, backend=counting)  # type: ignore[arg-type]


def check_counts(step: CompiledStep, counting: Counting, programs: int) -> None:
    """Our own count, and the compiler's."""
    assert (step.compiles, counting.graphs) == (programs, programs)


def cut(batch: Batch, length: int) -> Batch:
    return {name: value[:length] for name, value in batch.items()}


@pytest.mark.parametrize("donate", [False, True])
def test_fifty_steps_are_one_program(donate: bool) -> None:
    """Learning rate, verdict, streak, cursor and the batch's values all change; the model's mode too, between calls."""
    net = MlpRecipe(blocks=("batch_norm", "layer_norm"), dropout=0.3, frozen=("head.bias",), dtype=torch.float64)
    setup = Setup(net, adamw(warmup_cosine(0.1, warmup=5, total=40)), clip_norm=0.1, ema=0.9, accumulate=2)
    model, counting = net.model(), Counting()
    step, state = compiled(setup, model, counting, donate=donate), setup.state(model)
    verdicts, rates = set(), set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(50):
            batch = setup.batch(index)
            if index % 10 == 3:
                batch["x"][0, 0] = float("nan")
            if index % 10 == 7:
                batch["y"].fill_(-100)
            model.train(index % 3 == 0)
            state = step(state, batch)
            if index % 20 == 0:
                step.evaluate(state, batch)
            verdicts.add(Verdict(int(state.report.verdict)))
            rates.add(float(state.report.lr))
    check_counts(step, counting, 1)
    assert {Verdict.OK, Verdict.NON_FINITE_LOSS, Verdict.EMPTY} <= verdicts
    assert len(rates) > 30
    assert (state.cursor, int(state.step)) == (50, 40)


@settings(few, max_examples=5)
@given(setups(mlps() | language_models()), st.booleans())
def test_any_net_is_one_program(setup: Setup, donate: bool) -> None:
    model, counting = setup.net.model(), Counting()
    step, state = compiled(setup, model, counting, donate=donate), setup.state(model)
    for index in range(4):
        state = step(state, setup.batch(index))
    check_counts(step, counting, 1)


@pytest.mark.parametrize("donate", [False, True])
def test_a_short_last_batch_is_a_second_program_and_is_told_once(donate: bool) -> None:
    setup = Setup(LmRecipe(dropout=0.3), adamw(warmup_cosine(0.1, warmup=2, total=9)))
    model, counting = setup.net.model(), Counting()
    step, state = compiled(setup, model, counting, donate=donate), setup.state(model)
    for index in range(4):
        state = step(state, setup.batch(index))
    check_counts(step, counting, 1)
    with pytest.warns(CompileWarning, match=r"Another program .* input_ids: int64\[4, 9\]") as told:
        state = step(state, cut(setup.batch(4), 4))
    assert len(told) == 1
    assert told[0].filename == __file__
    for index in range(5, 9):  # the next epoch: both programs are there
        state = step(state, setup.batch(index))
    step(state, cut(setup.batch(9), 4))
    check_counts(step, counting, 2)


def test_states_of_other_runs_share_the_program() -> None:
    setup = Setup(MlpRecipe(), adamw(0.01), ema=0.9)
    model, counting = setup.net.model(), Counting()
    step = compiled(setup, model, counting)
    for seed in range(3):
        state = setup.state(model, seed)
        for index in range(2):
            state = step(state, setup.batch(index))
        step(attrs.evolve(state, cursor=10**12), setup.batch())
    check_counts(step, counting, 1)


def test_a_state_of_another_kind_is_a_second_program() -> None:
    """Freezing a parameter, by hand, between steps changes what is computed; it may not be ignored."""
    setup = Setup(MlpRecipe(), sgd(0.1))
    model, counting = setup.net.model(), Counting()
    step = compiled(setup, model, counting)
    state = step(setup.state(model), setup.batch())
    frozen = attrs.evolve(state, params=state.params | {"head.bias": state.params["head.bias"].detach()})
    with pytest.warns(CompileWarning, match="Another program"):
        after = step(frozen, setup.batch())
    check_counts(step, counting, 2)
    assert after.params["head.bias"] is frozen.params["head.bias"]
    assert not torch.equal(after.params["head.weight"], frozen.params["head.weight"])


def test_a_call_that_failed_leaves_no_trace() -> None:
    setup = Setup(MlpRecipe(), sgd(0.1))
    model, counting = setup.net.model(), Counting()
    step = compiled(setup, model, counting)
    state = step(setup.state(model), setup.batch())
    frozen = attrs.evolve(state, params=state.params | {"head.bias": state.params["head.bias"].detach()})
    with pytest.raises(DataError):
        step(frozen, setup.batch() | {"y": torch.zeros(6)})
    step(state, setup.batch())
    check_counts(step, counting, 1)


def test_steps_made_alike_do_not_share_or_exhaust_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps programs by code object, up to a limit; a sweep may make more steps than that."""
    monkeypatch.setattr(sys.modules["trainfn.engine.program"], "MOST_PROGRAMS", 2)
    setup = Setup(MlpRecipe(blocks=()), sgd(0.1))
    for _ in range(4):
        model, counting = setup.net.model(), Counting()
        step, state = compiled(setup, model, counting), setup.state(model)
        step(step(state, setup.batch()), setup.batch(1))
        check_counts(step, counting, 1)


def test_a_state_in_float64_that_was_evolved_is_no_news() -> None:
    """Its report has other dtypes than the first state's: nothing that the program reads."""
    setup = Setup(MlpRecipe(dtype=torch.float64), sgd(0.1))
    model, counting = setup.net.model(), Counting()
    step = compiled(setup, model, counting)
    state = step(setup.state(model), setup.batch())
    step(attrs.evolve(state, cursor=7), setup.batch())
    check_counts(step, counting, 1)


@pytest.mark.parametrize("mode", ["graph", "split", "accum"])
@pytest.mark.parametrize("donate", [False, True])
def test_a_fifth_shape_and_more_are_run_in_eager_and_told_once(mode: Mode, donate: bool) -> None:
    setup = Setup(LmRecipe(), adamw(0.01), ema=0.9)
    model, counting = setup.net.model(), Counting()
    step = trainfn.compile(setup.step(model), mode=mode, donate=donate, backend=counting)  # type: ignore[arg-type]
    state, reference = setup.state(model), setup.state(model)
    lengths = [6, 5, 4, 3, 2, 1, 6, 2, 1, 5]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CompileWarning)
        for index, length in enumerate(lengths):
            batch = cut(setup.batch(index), length)
            state, reference = step(state, batch), setup.step(model)(reference, batch)
    assert step.compiles == 4
    torch.testing.assert_close(dict(state.params), dict(reference.params))
    assert (state.cursor, int(state.step)) == (len(lengths), len(lengths))
    *compiled_again, last = (str(warning.message) for warning in told)
    assert len(compiled_again) == 3
    assert all("Another program" in message for message in compiled_again)
    assert all(f"[{length}, 9]" in last for length in (6, 5, 4, 3, 2))
    assert "drop_last" in last
    assert told[-1].filename == __file__


def fitted(counting: Counting, length: int, steps: int, out_dir: Path) -> CompiledStep:
    """A run with a schedule, evaluation and checkpoints, over ``length`` examples in batches of 8."""
    model = MlpRecipe(blocks=("layer_norm",)).model()
    x = torch.randn(length, 3, generator=torch.Generator().manual_seed(0))
    data = {"x": x, "y": torch.arange(length) % 3}
    planned = trainfn.plan(
        model, data, val_data=data, loss="classification", batch_size=8, max_steps=steps, eval_every=steps // 5,
        save_every=steps // 2, out_dir=out_dir, compile="graph", progress=False, device="cpu",
    )  # fmt: skip
    planned.step.backend = counting  # type: ignore[assignment]
    carry_out(planned)
    return planned.step


@pytest.mark.parametrize("steps", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_a_run_with_a_schedule_evaluation_and_checkpoints_is_one_program(steps: int, tmp_path: Path) -> None:
    counting = Counting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_counts(fitted(counting, 40, steps, tmp_path), counting, 1)


@pytest.mark.parametrize("steps", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_and_two_where_the_last_batch_is_short(steps: int, tmp_path: Path) -> None:
    counting = Counting()
    with pytest.warns(CompileWarning, match=r"Another program .*\[4, 3\].*drop_last") as told:
        check_counts(fitted(counting, 44, steps, tmp_path), counting, 2)
    assert len(told) == 1


# --- control: the same counts, a step that is not one program ---------------------------------------------------------


def drifting(rate: list[float]) -> Transform:
    """An optimizer whose learning rate is a Python number that someone changes."""

    def update(grads: Any, state: Any, params: Any, step: Any) -> Any:
        return {name: -rate[0] * grad for name, grad in grads.items()}, state

    return Transform(lambda params: (), update, "drifting")


def test_control_a_rate_held_as_a_python_number_is_another_program_and_is_told() -> None:
    rate = [0.1]
    setup = Setup(MlpRecipe(blocks=()), drifting(rate))
    model, counting = setup.net.model(), Counting()
    step, state = compiled(setup, model, counting), setup.state(model)
    state = step(state, setup.batch())
    rate[0] = 0.2
    with pytest.warns(CompileWarning, match="though the batch's shape is known"):
        after = step(state, setup.batch(1))
    torch.testing.assert_close(dict(after.params), dict(setup.step(model)(state, setup.batch(1)).params))
    with pytest.raises(AssertionError):
        check_counts(step, counting, 1)
    check_counts(step, counting, 2)


@pytest.mark.parametrize("mode", ["auto", pytest.param("graph", marks=pytest.mark.slow)])
def test_what_changes_at_every_step_is_given_up_on(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sys.modules["trainfn.engine.compile"]  # the room's front door has a function of this name
    monkeypatch.setattr(engine, "choose", lambda *_: ("graph", "for this test"))
    rate = [0.1]
    setup = Setup(MlpRecipe(blocks=()), drifting(rate))
    model, counting = setup.net.model(), Counting()
    step = trainfn.compile(setup.step(model), mode=mode, backend=counting)  # type: ignore[arg-type]
    state, reference = setup.state(model), setup.state(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CompileWarning)
        for index in range(7 if mode == "auto" else 4):
            rate[0] += 0.1
            state = step(state, setup.batch(index))
            reference = setup.step(model)(reference, setup.batch(index))
    check_counts(step, counting, 4)
    torch.testing.assert_close(dict(state.params), dict(reference.params))
    messages = [str(warning.message) for warning in told]
    assert all("Another program was compiled" in message for message in messages[:3])
    if mode == "auto":
        assert step.mode == "eager"
        assert len(messages) == 4
        assert "Going on in eager mode" in messages[3]
    else:
        rate[0] += 0.1
        with pytest.raises(CompileError, match="from step to step"):
            step(state, setup.batch(5))
