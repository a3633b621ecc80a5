"""On a GPU: replayed steps are the steps, nothing waits for the device between rows, batches arrive whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn
from tests.strategies import LmRecipe, MlpRecipe, Setup, torch_warns_of_itself
from trainfn.data import CopyStream, Loader, prefetched
from trainfn.engine.choice import Mode
from trainfn.engine.compile import CompiledStep
from trainfn.engine.cudagraph import Capturing
from trainfn.errors import CompileError
from trainfn.loss import classification
from trainfn.optim import adamw, matrices_and_others, muon, partition, sgd, warmup_cosine
from trainfn.reports import fetched
from trainfn.state import TrainState
from trainfn.tree import digest, map_leaves, named_leaves

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
    torch_warns_of_itself,
    pytest.mark.filterwarnings("ignore:Another program was compiled:trainfn.engine.compile.CompileWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def on_gpu(batch: Any) -> Any:
    return map_leaves(lambda leaf: leaf.cuda() if isinstance(leaf, Tensor) else leaf, batch)


def made(setup: Setup, mode: Mode, cuda_graph: Any, **options: Any) -> tuple[CompiledStep, TrainState]:
    model = setup.net.model().cuda()
    step = trainfn.compile(setup.step(model), mode=mode, donate=True, cuda_graph=cuda_graph, **options)
    return step, setup.state(model, seed=3)


def run(
    setup: Setup, mode: Mode, cuda_graph: Any, *, steps: int = 10, batch: Callable[[int], Any] | None = None
) -> tuple[TrainState, list[str], CompiledStep]:
    """Return the last state, the digest of every report, read at the end, and the step."""
    step, state = made(setup, mode, cuda_graph)
    reports = []
    for index in range(steps):
        state = step(state, on_gpu((batch or setup.batch)(index)))
        reports.append(state.report)
    return state, [digest(report) for report in reports], step


dropping = MlpRecipe(blocks=("batch_norm", "plain"), dropout=0.3, frozen=("head.bias",))
SETUPS = {
    "language": Setup(LmRecipe(tied=True), adamw(warmup_cosine(0.1, warmup=2, total=20)), clip_norm=0.5),
    "dropout, EMA, accumulation": Setup(dropping, adamw(0.1), clip_norm=0.5, ema=0.9, accumulate=2),
    "float64": Setup(MlpRecipe(dtype=torch.float64), sgd(0.1, momentum=0.9), ema=0.9),
}


def check_captured(step: CompiledStep, captures: int = 1) -> None:
    assert isinstance(step._capturing, Capturing)
    assert step._capturing.captures == captures
    assert "captured as a CUDA graph" in step.reason


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
@pytest.mark.parametrize("mode", ["eager", "graph", "accum", "split"])
def test_replayed_steps_are_the_steps_to_the_bit(mode: Mode, setup: Setup) -> None:
    found, reports, step = run(setup, mode, True)
    right, expected, _ = run(setup, mode, False)
    check_captured(step)
    assert digest(found) == digest(right)
    assert reports == expected


def test_an_optimizer_that_looks_at_shapes_is_captured_too() -> None:
    mixed = partition(matrices_and_others, {"matrices": muon(0.01), "others": adamw(0.01)})
    setup = Setup(MlpRecipe(blocks=("plain",)), mixed)
    found, _, step = run(setup, "graph", True)
    check_captured(step)
    assert digest(found) == digest(run(setup, "graph", False)[0])


def test_control_another_seed_or_batch_is_another_run() -> None:
    setup = SETUPS["dropout, EMA, accumulation"]
    found = run(setup, "graph", True)[0]
    assert digest(run(setup, "graph", True, batch=lambda index: setup.batch(index + (index > 7)))[0]) != digest(found)
    step, state = made(setup, "graph", True)
    for index in range(10):
        other = trainfn.tree.evolve(state, seed=state.seed + 1) if index == 0 else state
        state = step(other, on_gpu(setup.batch(index)))
    assert digest(state.params) != digest(found.params)


def test_the_global_generators_are_as_they_were() -> None:
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    run(SETUPS["dropout, EMA, accumulation"], "graph", True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(), before[1])


def test_a_step_that_is_not_finite_changes_nothing_in_a_replay_either() -> None:
    setup = SETUPS["language"]
    model = nn.Linear(4, 2).cuda()
    step = trainfn.make_step(model, loss="classification", optimizer=setup.optimizer)
    step = trainfn.compile(step, mode="graph", donate=True, cuda_graph=True)
    state = trainfn.init(model, setup.optimizer)
    batch = (X[:8].cuda(), Y[:8].cuda())
    for _ in range(7):
        state = step(state, batch)
    before = digest(state.params)
    state = step(state, (torch.full_like(batch[0], float("nan")), batch[1]))
    assert digest(state.params) == before
    assert int(state.report.verdict) != 0
    state = step(state, batch)
    assert digest(state.params) != before


def test_another_shape_is_another_capture() -> None:
    setup = SETUPS["language"]
    batch = lambda index: setup.net.batch(6 if index % 3 else 4, index)  # noqa: E731
    found, reports, step = run(setup, "graph", True, steps=20, batch=batch)
    right, expected, _ = run(setup, "graph", False, steps=20, batch=batch)
    check_captured(step, 2)
    assert digest(found) == digest(right)
    assert reports == expected


def test_auto_decides_by_what_it_has_timed() -> None:
    setup = SETUPS["language"]
    step, state = made(setup, "graph", "auto")
    for index in range(40):
        state = step(state, on_gpu(setup.batch(index)))
        torch.cuda.synchronize()
    assert "us replayed" in step.reason
    assert digest(state) == digest(run(setup, "graph", False, steps=40)[0])


def test_weights_of_classes_are_read_by_replays_from_memory_that_stays() -> None:
    setup = Setup(MlpRecipe(), sgd(0.1))
    loss = classification(class_weights=[1.0, 0.5, 3.0])
    states = {}
    for cuda_graph in (True, False):
        model = setup.net.model().cuda()
        plain = setup.step(model, loss)
        step = trainfn.compile(plain, mode="eager", donate=True, cuda_graph=cuda_graph)
        states[cuda_graph] = setup.state(model)
        try:
            for index in range(12):
                states[cuda_graph] = step(states[cuda_graph], on_gpu(setup.batch(index)))
                _ = [torch.full((3,), float("nan")) for _ in range(100)]  # take memory on the host that was given back
        except CompileError:
            return  # a driver may refuse to record a copy from such memory
    assert digest(states[True]) == digest(states[False])


# --- refusals ---------------------------------------------------------------------------------------------------------


class Asking(nn.Module):
    """Asks the device for a number in the middle of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1.0 if float(x.detach().sum()) > -1e9 else 0.0)


class DrawingOnTheHost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.rand(())  # a number on the host, handed to a kernel


@pytest.mark.parametrize(("model", "why"), [(Asking, "captur"), (DrawingOnTheHost, "draws random numbers on the host")])
def test_what_cannot_be_captured_is_refused_and_the_state_goes_on(model: type[nn.Module], why: str) -> None:
    optimizer = sgd(0.1)
    net = model().cuda()
    plain = trainfn.make_step(net, loss="classification", optimizer=optimizer)
    step = trainfn.compile(plain, mode="eager", donate=True, cuda_graph=True)
    state, batch = trainfn.init(net, optimizer), (X[:8].cuda(), Y[:8].cuda())
    for _ in range(2):  # one that is timed by nobody, and one on the stream that records
        state = step(state, batch)
    with pytest.raises(CompileError, match=why):
        step(state, batch)
    applied = int(state.step)
    again = trainfn.compile(plain, mode="eager", donate=True, cuda_graph=False)(state, batch)
    assert int(again.step) == applied + 1
    float(torch.rand(3, device="cuda").sum())  # the device's generator is usable
    found, _, other = run(SETUPS["dropout, EMA, accumulation"], "eager", True)  # and so is capturing
    check_captured(other)
    assert found.cursor == 10


def test_a_batch_on_the_host_is_named() -> None:
    setup = Setup(MlpRecipe(), sgd(0.1))
    step, state = made(setup, "eager", True)
    with pytest.raises(CompileError, match=r"batch\.scale"):
        step(state, on_gpu(setup.batch()) | {"scale": torch.ones(())})


# --- nothing waits ----------------------------------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("mode", ["eager", "graph", "accum", "split"])
def test_no_step_waits_for_the_device(mode: Mode, cuda_graph: bool) -> None:
    setup = SETUPS["dropout, EMA, accumulation"]
    step, state = made(setup, mode, cuda_graph)
    batches = [on_gpu(setup.batch(index)) for index in range(12)]
    for batch in batches[:7]:
        state = step(state, batch)
    with no_waiting():
        for batch in batches[7:]:
            state = step(state, batch)


def test_control_a_number_that_is_read_is_a_wait() -> None:
    value = torch.ones((), device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchron"):
        value.item()


def test_a_run_waits_at_rows_only() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    planned = trainfn.plan(
        model, (X, Y), loss="classification", batch_size=8, max_steps=30, device="cuda", progress=False
    )
    states = trainfn.run(planned)
    for _ in range(5):
        next(states)
    with no_waiting():
        for _ in range(10):
            next(states)
    states.close()


# --- copies -----------------------------------------------------------------------------------------------------------


def test_prefetched_batches_are_whole() -> None:
    """Each one is large enough for its copy to be still under way when the next thing is launched."""
    x = torch.arange(64 * 2**18, dtype=torch.float32).view(64, -1)
    loader = Loader((x, Y), batch_size=8, seed=1, pin=True)
    sums = []
    for inputs, _ in prefetched(loader.batches(0, 16), CopyStream(torch.device("cuda", 0))):
        sums.append(inputs.double().sum())
        del inputs
    right = [float(loader.batch(cursor)[0].double().sum()) for cursor in range(16)]
    assert torch.stack(sums).tolist() == pytest.approx(right, rel=1e-12)


def test_a_run_is_the_same_with_and_without_prefetching(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    def train() -> str:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
        return digest(
            trainfn.fit(
                model, (X, Y), loss="classification", batch_size=8, max_steps=20, device="cuda", progress=False
            ).state
        )

    with_it = train()
    monkeypatch.setattr(sys.modules["trainfn.loop"], "prefetched", lambda batches, lane: batches)
    assert train() == with_it


def test_numbers_are_fetched_as_they_are() -> None:
    values = [torch.tensor(3), torch.tensor([0.5, float("nan"), float("inf")]), torch.tensor(0.1, dtype=torch.float64)]
    found = fetched([value.cuda() for value in values])
    assert repr(found) == repr([float(values[0]), values[1].tolist(), values[2].tolist()])


def test_the_history_is_the_one_that_plain_reading_gives() -> None:
    torch.manual_seed(0)
    seen: list[float] = []
    result = trainfn.fit(
        nn.Linear(4, 2),
        (X, Y),
        loss="classification",
        batch_size=8,
        max_steps=12,
        log_every=1,
        device="cuda",
        progress=False,
        observers=[lambda state: seen.append(float(state.report.loss))],
    )
    assert [row["loss"] for row in result.history] == pytest.approx(seen, rel=1e-15)


def test_all_leaves_of_a_captured_state_are_on_the_gpu() -> None:
    state = run(SETUPS["language"], "graph", True)[0]
    assert all(leaf.is_cuda for _, leaf in named_leaves(state) if isinstance(leaf, Tensor))
