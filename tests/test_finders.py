"""``find_lr`` and ``find_batch_size``: what they find, that they leave everything as it was, and how they end."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import trainfn
from trainfn.engine.memory import is_frozen
from trainfn.errors import ConfigError, MissingPackageError, ModelError, StepMemoryError
from trainfn.finders.batch_size import BatchSizeSearch, Trial, largest
from trainfn.finders.lr import suggested
from trainfn.finders.memory import available, resident
from trainfn.optim import sgd
from trainfn.tree import digest

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(400, 8, generator=GENERATOR)
Y = (X @ torch.randn(8, 3, generator=GENERATOR)).argmax(1)
NORMAL = torch.randn(400, 3, generator=GENERATOR)


def model(*, normalised: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if normalised else nn.ReLU(), nn.Linear(16, 3))


def untouched(look: Callable[[nn.Module, Any], object]) -> None:
    """Hold that model, data and the global generator are the same to the bit after a look."""
    made, data = model(normalised=True), {"input": X.clone(), "labels": Y.clone()}
    torch.manual_seed(3)
    before = digest(made.state_dict()), digest(data), torch.get_rng_state(), made.training
    look(made, data)
    assert (digest(made.state_dict()), digest(data), made.training) == (before[0], before[1], before[3])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(param.grad is None for param in made.parameters())


# --- the learning rate ------------------------------------------------------------------------------------------------


def sweep(data: Any = (X, Y), loss: Any = "classification", made: nn.Module | None = None, **settings: Any) -> Any:
    return trainfn.find_lr(made or model(), data, loss=loss, **{"device": "cpu"} | settings)


def loss_at(lr: float, optimizer: Any) -> float:
    """The loss after 40 steps at a constant rate."""
    result = trainfn.fit(
        model(), (X, Y), loss="classification", optimizer=optimizer(lr), max_steps=40, log_every=10, progress=False,
        device="cpu", compile="eager", on_spike="off", halt_after=40,
    )  # fmt: skip
    return float(result.history[-1]["loss"])


@pytest.mark.parametrize("optimizer", [trainfn.optim.adamw, sgd])
def test_the_suggestion_trains_nearly_as_well_as_the_best_rate(optimizer: Any) -> None:
    found = sweep(optimizer=optimizer, steps=60)
    at = {rate: loss_at(rate, optimizer) for rate in (1e-4, 1e-2, 1e-1, 1.0)}
    assert loss_at(found.suggestion, optimizer) < min(at.values()) + 0.3 * (at[1e-4] - min(at.values()))
    assert at[1e-4] > 1.5 * min(at.values()), "control: not every rate does"


def test_on_a_quadratic_the_suggestion_is_below_where_descent_is_unstable() -> None:
    """A gradient step on h w^2 / 2 shrinks the error for rates below 2 / h, and grows it above."""
    curvature = 5.0

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    def bowl(outputs: Tensor, batch: Any) -> Tensor:
        return curvature / 2 * outputs.square().mean()

    found = sweep(torch.ones(32, 1), bowl, Bowl(), optimizer=sgd, clip_norm=None, start=1e-4, end=100.0)
    assert 0.01 < found.suggestion < 2 / curvature
    assert 2 / curvature < found.rates[-1] < 100.0
    assert "diverged" in found.ended


def test_rates_grow_by_one_factor_and_losses_are_those_of_the_fold() -> None:
    found = sweep(optimizer=sgd, start=1e-5, end=1e-2, steps=16)
    assert (len(found.rates), found.ended) == (16, "it came to the last rate, 0.01")
    assert found.rates[0] == pytest.approx(1e-5)
    assert found.rates[-1] == pytest.approx(1e-2)
    factors = [after / before for before, after in itertools.pairwise(found.rates)]
    assert max(factors) - min(factors) < 1e-4
    state = trainfn.init(model(), sgd(0.1))
    made = trainfn.plan(model(), (X, Y), loss="classification", max_steps=16, device="cpu")
    for number, rate in enumerate(found.rates):
        step = trainfn.make_step(model(), loss="classification", optimizer=sgd(rate), clip_norm=1.0)
        state = step(state, made.loader.batch(number))
        assert float(state.report.loss) == pytest.approx(found.losses[number], rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:.*NaN or infinite:trainfn.health.HealthWarning")
def test_a_loss_that_is_not_finite_ends_the_sweep(bad: float) -> None:
    x = X.clone()
    x[14 * 32 % 400] = bad  # in some batch of the second epoch at the latest
    found = sweep((x, Y), shuffle=False, check_data=False, steps=60)
    assert "not finite" in found.ended
    assert len(found.rates) == 14 * 32 % 400 // 32
    assert all(map(math.isfinite, found.losses))


def test_a_loss_that_never_falls_has_no_suggestion() -> None:
    assert sweep((X, Y), lambda outputs, batch: (outputs * 0).sum(), steps=20).suggestion is None
    assert sweep((X, NORMAL), "mse", start=1e-12, end=1e-9, steps=30).suggestion is None
    assert sweep((X, Y), start=1e-6, end=1.0, steps=30).suggestion is not None, "control"
    assert suggested([], [], [], 100) is None


def test_a_sweep_leaves_everything_as_it_was() -> None:
    untouched(lambda made, data: sweep(data, made=made, steps=20))
    one, two = sweep(steps=10, seed=1), sweep(steps=10, seed=1)
    assert one == two
    assert sweep(steps=10, seed=2) != one
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        one.suggestion = 1.0


def test_a_sweep_takes_what_fit_takes() -> None:
    config = trainfn.TrainConfig(max_epochs=3, lr=7.0, batch_size=100, warmup_steps=5, ema=0.9, out_dir="never_made")
    assert len(sweep(config=config, steps=12).rates) == 12
    assert not Path("never_made").exists()
    by_task = trainfn.find_lr(model(), (X, Y), task="tabular", device="cpu", steps=12, batch_size=100)
    assert by_task.losses == sweep(config=config, steps=12).losses
    assert sweep(steps=12, accumulate=3).losses != sweep(steps=12).losses


def test_what_settings_say_of_a_whole_run_is_left_aside() -> None:
    rest: dict[str, Any] = {"max_steps": 9, "batch_size": 100, "ema": 0.9}
    whole = trainfn.TrainConfig(
        **rest, eval_every=5, monitor="val_accuracy", early_stopping_patience=2, min_delta=0.1, out_dir="never_made",
        on_divergence="rollback", rollback_lr_factor=0.5, max_rollbacks=2,
    )  # fmt: skip
    assert sweep(config=whole, steps=12).losses == sweep(config=trainfn.TrainConfig(**rest), steps=12).losses
    found = trainfn.find_batch_size(model(), (X, Y), loss="classification", config=whole, most=2, device="cpu")
    assert found.batch_size == 2
    with pytest.raises(ConfigError, match="nothing to evaluate on"):  # control: by hand, it is answered
        sweep(steps=12, eval_every=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.1, "max_steps": 3}, r"lr \(the sweep decides it\); max_steps"),
        ({"start": 0.0}, "0 < start < end"),
        ({"start": 1.0, "end": 0.1, "steps": 3}, r"0 < start < end\); steps=3"),
        ({"start": math.nan}, "0 < start < end"),
        ({"learning_rate": 0.1}, "here it is called 'lr'"),
        ({"optimizer": sgd(lr=0.1)}, "optimizer=Transform .expected what makes one of a rate"),
        ({"observers": []}, "observers .it is an argument of fit"),
    ],
)
def test_sweeps_that_are_none(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(**settings)


def test_drawing_a_sweep_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        sweep(steps=10).plot(tmp_path / "sweep.png")


@pytest.mark.slow
def test_a_sweep_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = sweep(steps=20)
    attrs.evolve(found, suggestion=None).plot(tmp_path / "none.png")
    assert found.plot(tmp_path / "sweep.svg").read_text().count("<path") > 10


# --- the batch size ---------------------------------------------------------------------------------------------------


class Bounded(nn.Module):
    """Raises as CUDA does where a micro-batch has more examples than ``most``, and notes the sizes that it sees."""

    def __init__(self, most: int, error: Callable[[], Exception] = lambda: torch.OutOfMemoryError("no memory")) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.most, self.error = most, error
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise self.error()
        out: Tensor = self.layer(x)
        return out


def search(made: nn.Module, data: Any = (X, Y), **settings: Any) -> trainfn.BatchSizeSearch:
    return trainfn.find_batch_size(made, data, loss="classification", **{"device": "cpu"} | settings)


@given(st.integers(1, 500), st.integers(0, 600))
def test_the_largest_that_fits_is_found_in_few_questions(most: int, bound: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= bound

    assert largest(fits, most) == min(most, bound)
    assert len(set(asked)) == len(asked) <= 2 * most.bit_length() + 1
    assert all(1 <= size <= most for size in asked)


@pytest.mark.parametrize(
    ("error", "accumulate"),
    [
        (lambda: torch.OutOfMemoryError("CUDA out of memory"), 1),
        (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3),
    ],
)
def test_the_largest_micro_batch_without_an_error_is_found(error: Any, accumulate: int) -> None:
    made = Bounded(5, error)
    found = search(made, accumulate=accumulate)
    assert found.batch_size == 5
    assert [trial.batch_size for trial in found.trials] == [2, 4, 8, 6, 5]
    assert [trial.batch_size for trial in found.trials if not trial.fits and trial.bytes is None] == [8, 6]
    assert set(made.seen) == {2, 4, 8, 6, 5}, "micro-batches, and not whole steps"


def test_the_data_and_the_caller_bound_it() -> None:
    few = (X[:7], Y[:7])
    assert [trial.batch_size for trial in search(Bounded(10**6), few).trials] == [2, 4, 7]
    assert search(Bounded(10**6), few, accumulate=3).batch_size == 2
    assert search(Bounded(10**6), most=1).batch_size == 1


def test_the_size_that_is_found_is_one_that_fit_takes() -> None:
    made = Bounded(5)
    size = search(made).batch_size
    options = {"loss": "classification", "device": "cpu", "progress": False, "max_steps": 2}
    assert trainfn.fit(made, (X, Y), batch_size=size, **options).state.cursor == 2
    with pytest.raises(StepMemoryError):
        trainfn.fit(made, (X, Y), batch_size=size + 1, **options)


def test_a_search_reads_what_comes_as_a_loader_or_a_stream() -> None:
    def pairs() -> Any:
        yield from zip(X, Y, strict=True)

    options: dict[str, Any] = {"loss": "classification", "device": "cpu"}
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, collate_fn=default_collate)
    for data in (loader, pairs):
        assert trainfn.find_batch_size(model(), data, most=8, **options).batch_size == 8
    assert trainfn.find_batch_size(model(), loader, **options).most == len(X)
    with pytest.raises(ConfigError, match=r"does not say how many[^$]*most="):
        trainfn.find_batch_size(model(), pairs, **options)
    for made in (lambda index: (X, Y), trainfn.data.Batched([(X, Y)])):
        with pytest.raises(ConfigError, match="made already"):
            trainfn.find_batch_size(model(), made, **options)


def test_where_not_even_one_example_fits() -> None:
    with pytest.raises(StepMemoryError, match="one example"):
        search(Bounded(0))
    with pytest.raises(StepMemoryError, match=r"at most 1 bytes\n.*[0-9],[0-9]{3} bytes"):
        search(Hungry(), max_memory=1, headroom=0.0)
    assert search(Bounded(1), most=2).batch_size == 1


def test_an_error_that_is_not_about_memory_is_not_swallowed() -> None:
    with pytest.raises(ModelError, match="first batch") as caught:
        search(Bounded(5, lambda: RuntimeError("something else")))
    assert "something else" in str(caught.value)
    with pytest.raises(ConfigError, match="here it is called 'accumulate'"):
        search(Bounded(5), accumulate_grad_batches=2)


class Hungry(nn.Module):
    """Takes four times a megabyte for each example, and what the heap cannot use again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = (x @ self.layer.weight.T).repeat(1, 90_000).sigmoid()  # (B, 270 000) float32
        out: Tensor = self.layer(x) + wide.mean(1, keepdim=True)
        return out


def search_of(megabytes: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> tuple[BatchSizeSearch, int]:
    """Search with 100 MB to take, of which a step takes that many for its examples; return it, and the most tried."""
    seen = [0]

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    memory = sys.modules[resident.__module__]
    monkeypatch.setattr(memory, "resident", lambda: 1 << 30)
    monkeypatch.setattr(memory, "highest", lambda: (1 << 30) + (megabytes(seen[-1]) << 20))
    return search(Counted(8, 3), max_memory=100 << 20, headroom=0.0), max(seen)


def test_what_is_foreseen_not_to_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four megabytes an example, and 100 to take: a line a tenth steeper ends at 24."""
    found, tried = search_of(lambda examples: 4 * examples, monkeypatch)
    assert [(trial.batch_size, trial.tried) for trial in found.trials] == [
        (2, True), (4, True), (8, True), (16, True), (32, False), (24, True), (28, False), (26, False), (25, False),
    ]  # fmt: skip
    assert found.batch_size == tried == 24


def test_a_step_for_which_the_heap_had_room_does_not_promise_that_the_next_is_as_cheap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As glibc had it once: from 8 to 16 next to nothing, and 165 MB for 32."""
    found, _ = search_of(lambda examples: {8: 41, 16: 50, 32: 165}.get(examples, 5 * examples), monkeypatch)
    assert next(trial.tried for trial in found.trials if trial.batch_size == 32) is False


def test_on_a_host_memory_is_measured() -> None:
    """In a process of its own: the heap has a history, of other tests too."""
    call = "import tests.conftest, tests.test_finders as finders; finders.check_measured_on_a_host()"
    done = subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_measured_on_a_host() -> None:
    search(Hungry(), most=2)  # what a first step loads stays
    before, limit = resident(), 100 << 20
    found = search(Hungry(), max_memory=limit, headroom=0.0)
    assert found.limit == limit < available()
    assert 8 <= found.batch_size <= 33, f"at 3 to 9 MB an example, as the heap may have it: {found}"
    assert not all(trial.fits for trial in found.trials)
    for trial in found.trials:
        assert trial.bytes is not None
        assert (trial.bytes <= limit) == trial.fits
        assert trial.bytes <= 1.5 * limit or not trial.tried
    assert search(Bounded(5), max_memory=limit, headroom=0.75, most=2).limit == limit // 4
    assert resident() - before < limit / 2, "what the tries took is given back"
    assert not is_frozen()


def test_a_search_leaves_everything_as_it_was() -> None:
    untouched(lambda made, data: search(made, data, most=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3, "max_steps": 3}, r"batch_size \(the search decides it\); max_steps"),
        ({"most": 0, "headroom": 1.0, "max_memory": True}, r"most=0 .*max_memory=True .*headroom=1.0"),
    ],
)
def test_searches_that_are_none(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(model(), **settings)


def test_a_host_whose_memory_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[resident.__module__], "_STATUS", Path("/proc/none"))
    with pytest.raises(ConfigError, match="cannot be measured"):
        search(model())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_largest_that_fits_is_found() -> None:
    found = search(Hungry(), device="cuda", max_memory=400 << 20)
    assert 50 <= found.batch_size <= 400
    assert all(isinstance(trial, Trial) and trial.tried for trial in found.trials)
