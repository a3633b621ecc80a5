"""Precision: what really runs in 16 bits, what keeps its digits, the loss scale, and what is said about it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import trainfn
from tests.strategies import (
    LmRecipe,
    MlpRecipe,
    few,
    language_models,
    mlps,
    of_bad_numbers,
    relative_error,
    torch_warns_of_itself,
)
from trainfn.errors import ConfigError, ModelError
from trainfn.health import Verdict
from trainfn.loss import LossSum
from trainfn.optim import adamw, sgd
from trainfn.precision import POLICIES, LossScale, PrecisionWarning, cast, first_scale, lowered, next_scale
from trainfn.state import TrainState
from trainfn.step import Step, make_step
from trainfn.tree import digest

pytestmark = torch_warns_of_itself

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16-true": torch.bfloat16}
MATMULS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.linear}


def nets(**options: Any) -> st.SearchStrategy[Any]:
    float32 = st.just(torch.float32)
    return mlps(dtype=float32, **options) | language_models(dtype=float32, **options)


class Matmuls(TorchDispatchMode):
    """Notes the dtype of every matrix product's operands."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in MATMULS:
            self.dtypes.append(args[1].dtype)
        return func(*args, **(kwargs or {}))


def made(net: Any, precision: str, **options: Any) -> tuple[Step, TrainState]:
    model, optimizer = net.model(), options.pop("optimizer", adamw(0.01))
    step = make_step(model, loss=net.loss, optimizer=optimizer, precision=precision, **options)
    return step, fitting(trainfn.init(model, optimizer, precision=precision, ema=options.get("ema") is not None))


def fitting(state: TrainState) -> TrainState:
    """The state with a loss scale that these nets' gradients do not overflow with; a run finds it in some steps."""
    if state.scale is None:
        return state
    return attrs.evolve(state, scale=attrs.evolve(state.scale, factor=torch.tensor(256.0)))


@pytest.mark.parametrize("net", [MlpRecipe(blocks=("layer_norm",)), LmRecipe(tied=True)], ids=["mlp", "lm"])
@pytest.mark.parametrize("precision", list(POLICIES))
def test_every_matrix_product_runs_in_the_dtype_of_the_policy(net: Any, precision: str) -> None:
    step, state = made(net, precision)
    with Matmuls() as seen:
        after = step(state, net.batch())
    assert len(seen.dtypes) >= 3  # forward and backward
    assert set(seen.dtypes) == {HALF.get(precision, torch.float32)}
    stored = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {param.dtype for param in after.params.values()} == {stored}
    assert {moment.dtype for moment in after.opt.mu.values()} == {stored}
    assert int(after.report.verdict) == Verdict.OK
    assert state.report.loss.dtype == after.report.loss.dtype == torch.float64


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_a_compiled_step_runs_in_that_dtype_too(precision: str) -> None:
    net, dtypes = LmRecipe(), set()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function" and "linear" in str(node.target):
                dtypes.add(node.args[1].meta["example_value"].dtype)
        return graph

    step, state = made(net, precision)
    compiled = trainfn.compile(step, mode="graph", backend=backend)
    eager, graph = step(state, net.batch()), compiled(state, net.batch())
    assert dtypes == {HALF[precision]}
    assert relative_error(graph.params, eager.params) < 1e-6


@settings(few, max_examples=4)
@given(nets(), st.sampled_from(["bf16-mixed", "16-mixed", "bf16-true"]), st.integers(1, 3))
def test_graph_and_eager_agree_in_every_precision(net: Any, precision: str, accumulate: int) -> None:
    step, state = made(net, precision, accumulate=accumulate, optimizer=sgd(0.01), ema=0.9)
    twin = trainfn.compile(step, mode="graph", backend="aot_eager", donate=True)
    given_away = fitting(trainfn.init(step.model, step.optimizer, precision=precision, ema=True))
    for seed in range(3):
        state, given_away = step(state, net.batch(seed=seed)), twin(given_away, net.batch(seed=seed))
    if not net.dropout:  # draws differ between the two
        assert relative_error(given_away.params, state.params) < (1e-2 if precision == "bf16-true" else 1e-3)
    assert digest(given_away.scale) == digest(state.scale)


@settings(max_examples=20)
@given(nets(dropout=False), st.sampled_from(["bf16-mixed", "16-mixed"]))
def test_a_mixed_gradient_is_the_full_one_to_16_bits(net: Any, precision: str) -> None:
    full, state = made(net, "32-true")
    mixed, twin = made(net, precision)
    right = full.gradients(state.params, state.buffers, net.batch())
    found = mixed.gradients(twin.params, twin.buffers, net.batch(), scale=twin.scale)
    digits = 2.0**-8 if precision == "bf16-mixed" else 2.0**-11
    assert float(found.weight) == float(right.weight)
    assert abs(float(found.total - right.total)) <= 40 * digits * abs(float(right.total)) + 1e-3
    if net.loss == "language_modeling":  # a tanh behind a norm over few examples may have no gradient to speak of
        assert relative_error(found.grads, right.grads) < 60 * digits
    assert {grad.dtype for grad in found.grads.values()} == {torch.float32}


def test_small_updates_are_kept_in_a_master_copy() -> None:
    """1 + 1e-4 is 1 in bfloat16: a hundred such updates are 1e-2 in float32 and nothing in bfloat16."""
    found = {}
    for precision in ("bf16-mixed", "bf16-true"):
        model, optimizer = nn.Linear(1, 1, bias=False), sgd(1e-4)
        nn.init.ones_(model.weight)
        step = make_step(model, loss=lambda outputs, batch: -outputs.sum(), optimizer=optimizer, precision=precision)
        state = trainfn.init(model, optimizer, precision=precision)
        for _ in range(100):
            state = step(state, torch.ones(1, 1))
        found[precision] = float(state.params["weight"].detach())
    assert found["bf16-mixed"] == pytest.approx(1.01, abs=1e-5)
    assert found["bf16-true"] == 1.0


# --- what is cast and what is not -------------------------------------------------------------------------------------


class Tables(nn.Module):
    """A persistent table that is added to activations, and one that is not saved and is used in float32."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.dense, self.writes = nn.Linear(4, 4), writes
        self.register_buffer("positions", torch.linspace(0, 1, 4))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("frequencies", torch.linspace(0, 1, 4), persistent=False)
        self.dtypes: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.dtypes = {name: buffer.dtype for name, buffer in self.named_buffers()} | {"x": x.dtype}
        if self.writes:
            self.seen += 1.0
        return self.dense(x + self.positions)


def mean(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.float().square().mean()


def test_persistent_buffers_and_inputs_are_cast_and_keep_their_digits() -> None:
    model, optimizer = Tables(), sgd(0.1)
    step = make_step(model, loss=mean, optimizer=optimizer, precision="bf16-mixed")
    state = trainfn.init(model, optimizer)
    after = step(state, torch.ones(2, 4))
    low, full = torch.bfloat16, torch.float32
    assert model.dtypes == {"positions": low, "seen": low, "frequencies": full, "x": low}
    assert digest(after.buffers) == digest(state.buffers)  # a cast there and back would have cost 16 bits


def test_batch_norm_keeps_its_statistics_in_full() -> None:
    net = MlpRecipe(blocks=("batch_norm",))
    step, state = made(net, "bf16-mixed")
    assert not any("norm" in name for name in lowered(step.model))
    after = step(state, net.batch())
    full, twin = made(net, "32-true")
    right = full(twin, net.batch())
    assert relative_error(after.buffers, right.buffers) < 2e-2
    assert {str(buffer.dtype) for buffer in after.buffers.values()} == {"torch.float32", "torch.int64"}


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_a_forward_that_counts_in_a_cast_buffer_is_reported(precision: str) -> None:
    with pytest.warns(PrecisionWarning, match=r"writes to buffers .* in 16 bits: seen"):
        trainfn.plan(Tables(writes=True), torch.ones(4, 4), loss=mean, max_steps=1, device="cpu", precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainfn.plan(Tables(), torch.ones(4, 4), loss=mean, max_steps=1, device="cpu", precision=precision)
        trainfn.plan(Tables(writes=True), torch.ones(4, 4), loss=mean, max_steps=1, device="cpu")


def test_targets_are_not_cast_and_a_loss_of_the_users_own_sees_float32() -> None:
    seen = {}

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        seen.update(outputs=outputs.dtype, x=batch[0].dtype, y=batch[1].dtype)
        return (outputs - batch[1]).square().mean()

    model, optimizer = nn.Linear(2, 1), sgd(0.1)
    step = make_step(model, loss=loss, optimizer=optimizer, precision="16-mixed")
    step(trainfn.init(model, optimizer, precision="16-mixed"), (torch.ones(3, 2), torch.ones(3, 1)))
    assert seen == dict.fromkeys(("outputs", "x", "y"), torch.float32)


def test_a_model_that_makes_tensors_of_its_own_dtype_is_answered() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.dense(x + torch.zeros(2))

    data = (torch.ones(4, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ModelError, match=r"dtype=x.dtype"):
        trainfn.fit(Mixed(), data, loss="classification", max_steps=1, precision="bf16-mixed", progress=False)


# --- models that are in 16 bits already -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "precision", "reported"),
    [
        (torch.bfloat16, "bf16-mixed", True),
        (torch.bfloat16, "32-true", True),
        (torch.float16, "16-mixed", True),
        (torch.float16, "bf16-true", True),
        (torch.bfloat16, "bf16-true", False),
        (torch.float32, "bf16-mixed", False),
        (torch.float32, "bf16-true", False),
    ],
)
def test_a_model_without_a_float32_master_is_reported(dtype: torch.dtype, precision: Any, reported: bool) -> None:
    model = nn.Linear(2, 2, dtype=dtype)
    data = (torch.ones(4, 2, dtype=dtype), torch.zeros(4, dtype=torch.long))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainfn.plan(model, data, loss="classification", max_steps=1, device="cpu", precision=precision)
    assert [warning.category for warning in seen] == [PrecisionWarning] * reported


def test_an_unknown_precision_is_answered() -> None:
    for wrong in ("bf16", "16", "fp32", None):
        with pytest.raises(ConfigError, match="32-true"):
            trainfn.TrainConfig(max_steps=1, precision=wrong)
    with pytest.raises(ConfigError, match="bf16-mixed"):
        make_step(nn.Linear(1, 1), loss="mse", optimizer=sgd(0.1), precision="bf16-mixd")


# --- the loss scale ---------------------------------------------------------------------------------------------------


def check_scales(overflows: list[bool], change: Any) -> list[float]:
    """Return the scales before each step and after the last; they must be GradScaler's."""
    theirs = torch.amp.GradScaler("cpu")
    theirs.scale(torch.ones(()))  # it makes its scale at the first use
    param = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=0.0)
    ours, scales = first_scale(torch.device("cpu")), []
    for overflow in overflows:
        scales.append(float(ours.factor))
        assert scales[-1] == theirs.get_scale()
        param.grad = torch.full((1,), math.inf if overflow else 1.0)
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours = change(ours, overflow=torch.tensor(overflow), counted=torch.tensor(True))
        assert ours.factor.dtype == torch.float32
    assert float(ours.factor) == theirs.get_scale()
    return [*scales, float(ours.factor)]


@settings(max_examples=5)
@given(st.lists(st.tuples(st.integers(0, 2100), st.integers(1, 3)), max_size=2))
def test_the_scale_goes_the_way_of_grad_scaler(stretches: list[tuple[int, int]]) -> None:
    check_scales([flag for good, bad in stretches for flag in [False] * good + [True] * bad], next_scale)


def test_the_scale_as_published() -> None:
    scales = check_scales([False] * 2000 + [True] + [False] * 1999 + [True] + [False] * 2000, next_scale)
    assert [scales[0], scales[2000], scales[2001], scales[4001], scales[-1]] == [65536, 131072, 65536, 32768, 65536]
    assert check_scales([True] * 20, next_scale)[-1] == 65536 / 2**20


def test_control_a_count_that_an_overflow_does_not_reset_is_noticed() -> None:
    def forgetful(scale: LossScale, *, overflow: Tensor, counted: Tensor) -> LossScale:
        new = next_scale(scale, overflow=overflow, counted=counted)
        return new if not overflow else LossScale(factor=new.factor, good=scale.good)

    with pytest.raises(AssertionError):
        check_scales([False] * 1000 + [True] + [False] * 1500, forgetful)


def test_an_empty_batch_says_nothing_about_the_scale() -> None:
    scale, no = first_scale(torch.device("cpu")), torch.tensor(False)
    assert digest(next_scale(scale, overflow=no, counted=no)) == digest(scale)


class Steep(nn.Module):
    """Its gradient is ``slope``, as large as one likes, through a product in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, slope: Tensor) -> Tensor:
        return self.weight * slope


def summed(outputs: Tensor, batch: Any) -> LossSum:
    return LossSum(total=outputs.sum(), weight=torch.ones(()))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_an_overflow_is_skipped_counted_and_advances_nothing_but_the_scale(mode: Any) -> None:
    model, optimizer = Steep(), sgd(trainfn.optim.linear(1.0, 0.0, total=10))
    plain = make_step(model, loss=summed, optimizer=optimizer, precision="16-mixed", ema=0.9)
    step = trainfn.compile(plain, mode=mode, backend="aot_eager")
    state = trainfn.init(model, optimizer, precision="16-mixed", ema=True)
    verdicts, factors, rates = [], [], []
    for slope in (
        100.0,
        100.0,
        100.0,
        100.0,
        100.0,
        100.0,
        100.0,
        0.5,
        100.0,
    ):  # 100 x 65,536 is too much, x 512 is not
        before, state = state, step(state, torch.full((1, 2), slope))
        verdict = Verdict(int(state.report.verdict))
        verdicts.append(verdict.name)
        factors.append(float(state.scale.factor))
        rates.append(float(state.report.lr))
        if verdict is Verdict.OVERFLOW:
            for field in ("step", "params", "buffers", "opt", "ema"):
                assert digest(getattr(state, field)) == digest(getattr(before, field))
        else:
            assert float(state.report.grad_norm) == pytest.approx(slope * math.sqrt(2), rel=1e-3)
    overflows = verdicts.index("OK")
    assert verdicts == ["OVERFLOW"] * overflows + ["OK"] * (9 - overflows)
    assert factors == [65536 / 2 ** min(index + 1, overflows) for index in range(9)]
    assert 65504 / 200 < factors[-1] <= 65504 / 100
    assert rates[: overflows + 2] == pytest.approx([1.0] * (overflows + 1) + [0.9])
    assert (int(state.step), int(state.stats.outcomes[Verdict.OVERFLOW])) == (9 - overflows, overflows)
    assert int(state.health.streak) == 0


@of_bad_numbers
def test_what_a_smaller_scale_cannot_cure_halts_the_run() -> None:
    def infinite(outputs: Tensor, batch: Any) -> Tensor:
        return torch.where(outputs > 0, outputs, outputs.detach()).sum() + (outputs * 0).sqrt().sum()

    with pytest.raises(trainfn.errors.DivergenceError, match="3 steps in a row"):
        trainfn.fit(
            Steep(), torch.ones(8, 2), loss=infinite, optimizer=sgd(0.1), max_steps=50, precision="16-mixed",
            progress=False, device="cpu", batch_size=2,
        )  # fmt: skip


def test_small_gradients_survive_by_the_scale() -> None:
    """1e-7 times 1e-3 is nothing in float16; times 65,536 it is something. The control: without a scale."""
    net, optimizer = Steep(), sgd(0.1)
    step = make_step(net, loss=lambda outputs, batch: outputs.sum() * 1e-3, optimizer=optimizer, precision="16-mixed")
    state, batch = trainfn.init(net, optimizer, precision="16-mixed"), torch.full((1, 2), 1e-4)
    scaled = step.gradients(state.params, state.buffers, batch, scale=state.scale)
    plain = step.gradients(state.params, state.buffers, batch)
    torch.testing.assert_close(scaled.grads["weight"], torch.full((2,), 1e-7), rtol=1e-2, atol=0)
    assert relative_error(plain.grads, scaled.grads) > 0.05


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_scale_leaves_no_trace_in_the_gradients(accumulate: int) -> None:
    net = LmRecipe()
    step, state = made(net, "16-mixed", accumulate=accumulate)
    found = []
    for factor in (2.0, 1024.0):
        scale = LossScale(factor=torch.tensor(factor), good=torch.tensor(0))
        found.append(step.gradients(state.params, state.buffers, net.batch(), scale=scale))
    assert relative_error(found[0].grads, found[1].grads) < 2e-3
    assert digest(found[0].total) == digest(found[1].total)


def test_cast_leaves_alone_what_is_no_floating_tensor() -> None:
    tree = {"ids": torch.ones(2, dtype=torch.long), "mask": torch.tensor([True]), "n": 3, "x": (torch.ones(1), None)}
    found = cast(tree, torch.float16)
    assert found["ids"] is tree["ids"]
    assert found["mask"] is tree["mask"]
    assert (found["n"], found["x"][0].dtype, found["x"][1]) == (3, torch.float16, None)
    assert cast(tree, None) is tree


# --- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", list(POLICIES))
def test_fit_in_every_precision_learns_and_resumes_bit_for_bit(precision: Any, tmp_path: Any) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = (x, (x[:, 0] > 0).long())

    def run(steps: int, out_dir: Any, resume: Any) -> trainfn.FitResult:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        return trainfn.fit(
            model, data, val_data=data, loss="classification", optimizer=adamw(0.05), batch_size=16, max_steps=steps,
            precision=precision, out_dir=out_dir, resume=resume, ema=0.9, progress=False, device="cpu",
        )  # fmt: skip

    whole = run(40, tmp_path / "whole", None)
    assert whole.best["val_loss"] < 0.3
    assert ("scale" in whole.history[-1]) == (precision == "16-mixed")
    run(17, tmp_path / "cut", None)
    assert digest(run(40, tmp_path / "cut", "auto").state) == digest(whole.state)


# --- what sixteen bits would lose -------------------------------------------------------------------------------------


def test_a_run_in_float64_resumes(tmp_path: Any) -> None:
    data = (torch.randn(16, 2, dtype=torch.float64), torch.zeros(16, dtype=torch.long))
    settings = {"loss": "classification", "out_dir": tmp_path, "resume": "auto", "progress": False, "device": "cpu"}
    trainfn.fit(nn.Linear(2, 2).double(), data, max_steps=2, **settings)
    assert trainfn.fit(nn.Linear(2, 2).double(), data, max_steps=4, **settings).state.cursor == 4


def test_a_nan_in_the_data_says_nothing_about_the_scale() -> None:
    model, optimizer = Steep(), sgd(1e-3)
    step = make_step(model, loss=summed, optimizer=optimizer, precision="16-mixed")
    state = trainfn.init(model, optimizer, precision="16-mixed")
    for _ in range(40):
        state = step(state, torch.full((1, 2), math.nan))
    assert (float(state.scale.factor), int(state.scale.good)) == (65536.0, 0)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_an_average_of_16_bit_parameters_moves(mode: Any) -> None:
    model, optimizer = Steep(), sgd(0.5)
    plain = make_step(model, loss=summed, optimizer=optimizer, precision="bf16-true", ema=0.99)
    step = trainfn.compile(plain, mode=mode, backend="aot_eager")
    state = trainfn.init(model, optimizer, precision="bf16-true", ema=True)
    seen = []
    for _ in range(300):
        state = step(state, torch.ones(1, 2))
        seen.append(state.params["weight"].detach().double().mean())
    weights = 0.99 ** torch.arange(299, -1, -1, dtype=torch.float64)
    right = (torch.stack(seen) * weights).sum() / weights.sum()
    assert float(state.ema["weight"].mean()) == pytest.approx(float(right), rel=1e-5)
    assert step.evaluate(state, torch.ones(1, 2), params=state.ema)["loss"].total.isfinite()


@pytest.mark.parametrize("accumulate", [1, 512])
def test_a_long_accumulation_in_bfloat16_loses_nothing(accumulate: int) -> None:
    model, optimizer = Steep(), sgd(0.1)
    step = make_step(
        model, loss=lambda o, b: o.sum(1).mean(), optimizer=optimizer, precision="bf16-true", accumulate=accumulate
    )
    after = step(trainfn.init(model, optimizer, precision="bf16-true"), torch.ones(1024, 2))
    assert float(after.report.grad_norm) == pytest.approx(math.sqrt(2), rel=1e-2)


@pytest.mark.parametrize(("made", "used"), [("32-true", "16-mixed"), ("16-mixed", "32-true")])
def test_a_state_of_another_precision_is_refused(made: str, used: str) -> None:
    model, optimizer = Steep(), sgd(0.1)
    step = make_step(model, loss=summed, optimizer=optimizer, precision=used)
    with pytest.raises(ConfigError, match="disagree about the precision"):
        step(trainfn.init(model, optimizer, precision=made), torch.ones(1, 2))
