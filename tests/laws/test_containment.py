"""Law 5: a number that is not finite, wherever it comes from, changes nothing but the counters that tell of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from tests.strategies import (
    IGNORED,
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
from trainfn.health import Verdict, judge
from trainfn.loss import LossSum
from trainfn.norms import norm
from trainfn.optim import adamw, sgd, warmup_cosine
from trainfn.precision import LossScale
from trainfn.state import TrainState
from trainfn.tree import digest

pytestmark = torch_warns_of_itself

StepFn = Callable[[TrainState, Batch], TrainState]

not_finite = st.sampled_from([math.nan, math.inf, -math.inf])
places = st.sampled_from(["batch", "loss", "gradient"])
BAD = (Verdict.NON_FINITE_LOSS, Verdict.NON_FINITE_GRADIENT)


def summed_with_extra(outputs: Tensor, batch: Batch) -> LossSum:
    """Cross-entropy; ``extra`` ([B]) is added to the examples' losses."""
    each = F.cross_entropy(outputs, batch["y"], ignore_index=IGNORED, reduction="none") + batch["extra"]
    return LossSum(total=each.sum(), weight=(batch["y"] != IGNORED).sum().to(each.dtype))


def clean_batch(setup: Setup, seed: int = 0) -> Batch:
    batch = setup.batch(seed)
    return batch | {"extra": torch.zeros_like(batch["x"][:, 0]), "poison": torch.zeros_like(batch["x"][:, 0])}


def poisoned_batch(setup: Setup, place: str, value: float, seed: int = 0) -> Batch:
    """A batch that spoils one number: an input, one example's loss, or one element of one parameter's gradient."""
    batch = clean_batch(setup, seed)
    if place == "batch":
        batch["x"][-1, -1] = value
    elif place == "loss":
        batch["extra"][0] = value
    else:
        batch["poison"][0] = value
    return batch


def trained_part(state: TrainState) -> dict[str, str]:
    """What a skipped step must leave alone, to the bit."""
    parts = {name: digest(getattr(state, name)) for name in ("step", "params", "buffers", "opt", "ema")}
    return parts | {"baseline": digest(state.health.baseline), "seen": digest(state.stats.seen)}


def bad_steps(state: TrainState) -> int:
    return int(state.stats.outcomes[[Verdict.NON_FINITE_LOSS, Verdict.NON_FINITE_GRADIENT]].sum())


def check_contained(step: StepFn, state: TrainState, bad: Batch, verdicts: tuple[Verdict, ...] = BAD) -> TrainState:
    """Return the state after ``bad``, which must not differ from the one before in anything that is trained."""
    before, health = trained_part(state), [int(state.health.streak), bad_steps(state)]
    rate, seed, cursor = digest(state.step), state.seed, state.cursor
    after = step(state, bad)
    changed = [name for name, bits in trained_part(after).items() if bits != before[name]]
    assert not changed, f"the step changed {changed}"
    assert Verdict(int(after.report.verdict)) in verdicts
    counted = verdicts == BAD
    assert [int(after.health.streak), bad_steps(after)] == [number + counted for number in health]
    assert (digest(after.step), after.seed, after.cursor) == (rate, seed, cursor + 1)
    return after


def check_forgotten(step: StepFn, state: TrainState, bad: Batch, good: Batch) -> None:
    """A clean step after a bad one is the clean step without it (at the same cursor, which draws depend on)."""
    after = step(check_contained(step, state, bad), good)
    without = step(attrs.evolve(state, cursor=state.cursor + 1), good)
    assert int(after.report.verdict) == Verdict.OK
    assert trained_part(after) == trained_part(without)
    assert digest(after.report) == digest(without.report)
    assert int(after.step) == int(state.step) + 1
    assert int(after.health.streak) == 0
    assert bad_steps(after) == bad_steps(state) + 1


# The first layer is trained here: what comes in through a frozen one may be squashed to something finite, and is fine.
trainable_mlps = mlps().map(lambda net: attrs.evolve(net, frozen=tuple(set(net.frozen) & {"blocks.0"})))


@settings(max_examples=100)
@given(setups(trainable_mlps), places, not_finite)
def test_one_number_that_is_not_finite_changes_nothing(setup: Setup, place: str, value: float) -> None:
    model = setup.net.model()
    step, state = setup.step(model, summed_with_extra), setup.state(model)
    state = step(state, clean_batch(setup, 1))
    check_forgotten(step, state, poisoned_batch(setup, place, value), clean_batch(setup, 2))


@settings(few, max_examples=6)
@given(setups(trainable_mlps), st.lists(st.tuples(places, not_finite), min_size=3, max_size=3))
def test_in_a_compiled_step_too(setup: Setup, spoilt: list[tuple[str, float]]) -> None:
    model = setup.net.model()
    step = trainfn.compile(setup.step(model, summed_with_extra), mode="graph", backend="aot_eager")
    state = step(setup.state(model), clean_batch(setup, 1))
    for place, value in spoilt:
        check_forgotten(step, state, poisoned_batch(setup, place, value), clean_batch(setup, 2))
    assert step.compiles == 1


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_a_donating_step_too(mode: Mode, dtype: torch.dtype) -> None:
    net = MlpRecipe(blocks=("batch_norm", "layer_norm"), dropout=0.3, dtype=dtype)
    setup = Setup(net, adamw(warmup_cosine(0.1, warmup=2, total=8)), clip_norm=1.0, ema=0.9)
    model = setup.net.model()
    plain = setup.step(model, summed_with_extra)
    step = trainfn.compile(plain, mode=mode, donate=True, backend="aot_eager")
    plain = trainfn.compile(plain, mode="eager")
    state, reference = setup.state(model), setup.state(model)
    for seed, (place, value) in enumerate([("batch", math.nan), ("loss", -math.inf), ("gradient", math.inf)]):
        state = check_contained(step, state, poisoned_batch(setup, place, value))
        state = step(state, clean_batch(setup, seed))
        reference = plain(attrs.evolve(reference, cursor=reference.cursor + 1), clean_batch(setup, seed))
    assert bad_steps(state) == 3
    assert int(state.step) == 3
    if mode == "eager":
        assert trained_part(state) == trained_part(reference)


@settings(max_examples=25)
@given(setups(language_models() | trainable_mlps))
def test_a_batch_in_which_nothing_counts_changes_nothing_and_is_no_fault(setup: Setup) -> None:
    model = setup.net.model()
    step, state = setup.step(model), setup.state(model)
    batch = setup.batch()
    state = step(state, batch)
    empty = dict(batch)
    name = "y" if "y" in batch else "labels"
    empty[name] = torch.full_like(batch[name], IGNORED)
    after = check_contained(step, state, empty, verdicts=(Verdict.EMPTY,))
    assert float(after.report.weight) == 0.0


def test_a_compiled_step_knows_an_empty_batch_too() -> None:
    setup = Setup(LmRecipe(tied=True, dropout=0.3), adamw(0.01), ema=0.9)
    model, batch = setup.net.model(), setup.batch()
    step = trainfn.compile(setup.step(model), mode="graph", donate=True, backend="aot_eager")
    state = step(setup.state(model), batch)
    empty = batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
    check_contained(step, state, empty, verdicts=(Verdict.EMPTY,))


def test_the_streak_counts_bad_steps_in_a_row_and_an_empty_one_neither_adds_nor_ends_it() -> None:
    setup = Setup(MlpRecipe(), sgd(0.1))
    model = setup.net.model()
    step, state = setup.step(model, summed_with_extra), setup.state(model)
    bad, good = poisoned_batch(setup, "loss", math.nan), clean_batch(setup)
    empty = good | {"y": torch.full_like(good["y"], IGNORED)}
    seen = []
    for batch in (bad, bad, empty, bad, good, empty, bad):
        state = step(state, batch)
        seen.append((int(state.health.streak), bad_steps(state), int(state.step)))
    assert seen == [(1, 1, 0), (2, 2, 0), (2, 2, 0), (3, 3, 0), (0, 3, 1), (0, 3, 1), (1, 4, 1)]


def test_a_schedule_stands_still_while_steps_are_skipped() -> None:
    lr = warmup_cosine(1.0, warmup=3, total=10)
    setup = Setup(MlpRecipe(), sgd(lr))
    model = setup.net.model()
    step, state = setup.step(model, summed_with_extra), setup.state(model)
    rates = []
    for place in (None, "loss", "gradient", None, "batch", None):
        state = step(state, clean_batch(setup) if place is None else poisoned_batch(setup, place, math.nan))
        rates.append(round(float(state.report.lr), 4))
    assert rates == [0.25, 0.5, 0.5, 0.5, 0.75, 0.75]


@pytest.mark.parametrize("part", range(3))
def test_one_bad_micro_batch_spoils_its_step_and_no_other(part: int) -> None:
    setup = Setup(MlpRecipe(blocks=("batch_norm",)), adamw(0.1), accumulate=3, ema=0.5)
    model = setup.net.model()
    step, state = setup.step(model, summed_with_extra), setup.state(model)
    bad = clean_batch(setup)
    bad["extra"][2 * part] = math.nan
    check_forgotten(step, state, bad, clean_batch(setup, 1))


# --- sizes that are no faults -----------------------------------------------------------------------------------------


class Four(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, slope: Tensor) -> Tensor:
        return self.weight * slope


def summed(outputs: Tensor, batch: Batch) -> LossSum:
    return LossSum(total=outputs.sum(), weight=torch.ones(()))


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("slope", [3e38, 1e30, 1e-30, 1e-38])
def test_very_large_and_very_small_gradients_are_no_false_alarm(mode: Mode, slope: float) -> None:
    model, optimizer = Four(), sgd(1.0)
    plain = trainfn.make_step(model, loss=summed, optimizer=optimizer, clip_norm=1.0)
    step = trainfn.compile(plain, mode=mode, backend="aot_eager")
    after = step(trainfn.init(model, optimizer), {"slope": torch.full((1, 4), slope)})
    assert int(after.report.verdict) == Verdict.OK
    length = 2.0 * float(torch.tensor(slope))  # of four equal elements
    assert float(after.report.grad_norm) == pytest.approx(length, rel=1e-12)
    moved = after.params["weight"].detach().double()
    torch.testing.assert_close(moved, torch.full((4,), -min(slope, 0.5), dtype=torch.float64), rtol=1e-5, atol=0)


def test_control_the_plain_norm_raises_a_false_alarm_or_sees_nothing() -> None:
    large, small = torch.full((4,), 3e38), torch.full((4,), 1e-30)
    assert torch.linalg.vector_norm(large).isinf()
    assert small.square().sum() == 0.0
    assert norm([large]).isfinite()
    assert norm([small]) > 0.0


# --- controls: the same checkers, guards that are not good enough -----------------------------------------------------


def loss_only(total: Tensor, weight: Tensor, grad_norm: Tensor, scale: LossScale | None) -> Tensor:
    return judge(total, weight, torch.zeros_like(grad_norm), scale)


def test_control_a_guard_that_looks_at_the_loss_only_lets_a_gradient_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainfn.update, "judge", loss_only)
    setup = Setup(MlpRecipe(), adamw(0.1))
    model = setup.net.model()
    step, state = setup.step(model, summed_with_extra), setup.state(model)
    check_contained(step, state, poisoned_batch(setup, "loss", math.nan))
    with pytest.raises(AssertionError, match=r"the step changed \['step', 'params', 'opt', 'seen'\]"):
        check_contained(step, state, poisoned_batch(setup, "gradient", math.nan))


def test_control_no_guard_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainfn.update, "judge", lambda *numbers: torch.tensor(int(Verdict.OK)))
    setup = Setup(MlpRecipe(blocks=("batch_norm",)), adamw(0.1), ema=0.9)
    model = setup.net.model()
    step, state = setup.step(model, summed_with_extra), setup.state(model)
    with pytest.raises(AssertionError, match=r"\['step', 'params', 'buffers', 'opt', 'ema', 'seen'\]"):
        check_contained(step, state, poisoned_batch(setup, "batch", math.nan))


def test_control_zeroed_gradients_still_move_the_moments() -> None:
    """The usual remedy, ``nan_to_num`` on the gradients: Adam's moments decay and its clock goes on."""
    setup = Setup(MlpRecipe(), adamw(0.1))
    model = setup.net.model()
    plain, state = setup.step(model, summed_with_extra), setup.state(model)

    def zeroing(state: TrainState, batch: Batch) -> TrainState:
        found = plain.gradients(state.params, state.buffers, batch)
        zeros = {name: torch.nan_to_num(grad) for name, grad in found.grads.items()}
        after = plain.update(state, attrs.evolve(found, grads=zeros))
        return attrs.evolve(after, cursor=state.cursor + 1)

    with pytest.raises(AssertionError, match="'opt'"):
        check_contained(zeroing, state, poisoned_batch(setup, "gradient", math.nan))


def test_control_clipping_by_torch_spreads_one_nan_over_every_parameter() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    params[0].grad, params[1].grad = torch.tensor([1.0, math.nan]), torch.ones(3)
    nn.utils.clip_grad_norm_(params, 1.0)
    assert all(param.grad.isnan().all() for param in params)
