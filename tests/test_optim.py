"""AdamW and SGD against torch's, schedules against values written by hand, clipping against torch's."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trainfn
from tests.strategies import MlpRecipe, Recipe, float32_or_64, language_models, mlps, relative_error
from trainfn.errors import ConfigError
from trainfn.norms import norm
from trainfn.optim import Transform, adamw, chain, clip_by_global_norm, constant, sgd, warmup_cosine
from trainfn.state import Params
from trainfn.tree import digest

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
STEPS = 50


@attrs.frozen
class Pair:
    """An optimizer of ours and how torch's is made. Rates change over the run, as a scheduler would change them."""

    rates: tuple[float, ...]
    settings: dict[str, Any]
    adam: bool

    def ours(self) -> Transform:
        table = torch.tensor(self.rates, dtype=torch.float64)
        return (adamw if self.adam else sgd)(lambda step: table[step % len(self.rates)], **self.settings)

    def theirs(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return (torch.optim.AdamW if self.adam else torch.optim.SGD)(params, lr=1.0, **self.settings)


rates = st.lists(st.sampled_from([1e-4, 3e-3, 0.05]), min_size=1, max_size=3).map(tuple)
decays = st.sampled_from([0.0, 0.01, 0.3])
adamw_pairs = st.builds(
    lambda rates, betas, eps, decay: Pair(rates, {"betas": betas, "eps": eps, "weight_decay": decay}, adam=True),
    rates,
    st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([0.0, 0.9, 0.999])),
    st.sampled_from([1e-8, 1e-3]),
    decays,
)
sgd_pairs = st.builds(
    lambda rates, momentum, nesterov, decay: Pair(
        rates, {"momentum": momentum, "nesterov": nesterov and momentum > 0, "weight_decay": decay}, adam=False
    ),
    rates,
    st.sampled_from([0.0, 0.5, 0.9]),
    st.booleans(),
    decays,
)
# A vector is always there: the rounding of a lone number on its way through 0 is large relative to it.
shapes = st.lists(st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 1, 4)]), max_size=4).map(
    lambda some: [*some, (32,)]
)


def numbers(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    own = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=own, dtype=torch.float64).to(dtype) for shape in shapes]


def check_parity(pair: Pair, ours: Transform, shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    """The same gradients, of sizes from 1e-3 to 1e3, to both; params and torch's agree after every step.

    torch's run in float64: in float32 its decay factor 1 - lr * weight_decay is rounded the same way at every step.
    """
    params = {str(index): tensor for index, tensor in enumerate(numbers(shapes, dtype, seed))}
    twins = [tensor.double().clone().requires_grad_() for tensor in params.values()]
    state, torchs = ours.init(params), pair.theirs(twins)
    for step in range(STEPS):
        scale = 10.0 ** (step % 7 - 3)
        grads = [scale * grad for grad in numbers(shapes, dtype, 1000 * seed + step)]
        named = dict(zip(params, grads, strict=True))
        updates, state = ours.update(named, state, params, torch.tensor(step))
        params = {name: param + updates[name] for name, param in params.items()}
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad.double().clone()
        torchs.param_groups[0]["lr"] = pair.rates[step % len(pair.rates)]
        torchs.step()
        assert all(tensor.dtype == dtype for tensor in params.values())
        error = relative_error(list(params.values()), twins)
        assert error <= TOLERANCE[dtype], f"step {step}: off by {error:.1e}"


@settings(max_examples=40)
@given(adamw_pairs | sgd_pairs, shapes, float32_or_64, st.integers(0, 99))
def test_the_updates_are_those_of_torch(
    pair: Pair, shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int
) -> None:
    check_parity(pair, pair.ours(), shapes, dtype, seed)


@pytest.mark.parametrize(
    ("wrong", "pair"),
    [
        (adamw(0.05, weight_decay=0.011), Pair((0.05,), {"weight_decay": 0.01}, adam=True)),
        (adamw(0.05, betas=(0.9, 0.9989)), Pair((0.05,), {}, adam=True)),
        (adamw(0.05, eps=1e-6), Pair((0.05,), {}, adam=True)),
        (sgd(0.05, momentum=0.9), Pair((0.05,), {"momentum": 0.9, "nesterov": True}, adam=False)),
    ],
)
def test_control_a_setting_slightly_off_is_noticed(wrong: Transform, pair: Pair) -> None:
    with pytest.raises(AssertionError, match="off by"):
        check_parity(pair, wrong, [(2, 3), ()], torch.float32, 0)


def calm(pair: Pair) -> Pair:
    """An Adam that remembers squares: one that does not multiplies a rounding error by 1e7 in 12 steps of training."""
    first, second = pair.settings["betas"]
    return attrs.evolve(pair, settings=pair.settings | {"betas": (first, max(second, 0.9)), "eps": 1e-3})


@settings(max_examples=12)
@given(
    mlps(dropout=False, dtype=st.just(torch.float64)) | language_models(dropout=False, dtype=st.just(torch.float64)),
    adamw_pairs.map(calm) | sgd_pairs,
    st.sampled_from([None, 0.5]),
)
def test_a_net_is_trained_as_by_a_loop_written_with_torch(net: Recipe, pair: Pair, clip_norm: float | None) -> None:
    model, twin, ours = net.model(), net.model(), pair.ours()
    step = trainfn.make_step(model, loss=net.loss, optimizer=ours, clip_norm=clip_norm)
    state = trainfn.init(model, ours)
    trained = [param for param in twin.parameters() if param.requires_grad]
    torchs = pair.theirs(trained)
    for index in range(12):
        batch = net.batch(6, index)
        state = step(state, batch)
        torchs.param_groups[0]["lr"] = pair.rates[index % len(pair.rates)]
        torchs.zero_grad()
        if isinstance(net, MlpRecipe):
            loss = torch.nn.functional.cross_entropy(twin(batch["x"]), batch["y"])
        else:
            logits, nexts = twin(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), nexts.flatten())
        loss.backward()
        if clip_norm is not None:
            # clip_grad_norm_ adds 1e-6 to the norm, which an Adam that remembers nothing makes 1e-4 of.
            length = float(torch.cat([param.grad.flatten() for param in trained]).norm())
            for param in trained:
                param.grad *= min(1.0, clip_norm / length)
        torchs.step()
        assert float(state.report.loss) == pytest.approx(float(loss.detach()), rel=1e-9)
    assert relative_error(state.params, dict(twin.named_parameters())) < 1e-9
    assert relative_error(state.buffers, dict(twin.named_buffers())) < 1e-9


@settings(max_examples=20)
@given(adamw_pairs | sgd_pairs, shapes)
def test_an_update_writes_to_nothing_it_was_given(pair: Pair, shapes: list[tuple[int, ...]]) -> None:
    optimizer = pair.ours()
    params = {str(index): tensor for index, tensor in enumerate(numbers(shapes, torch.float32, 1))}
    grads = {str(index): tensor for index, tensor in enumerate(numbers(shapes, torch.float32, 2))}
    state, step = optimizer.init(params), torch.tensor(3)
    before = digest([params, grads, state, step])
    updates, new = optimizer.update(grads, state, params, step)
    assert digest([params, grads, state, step]) == before
    assert digest(optimizer.update(grads, state, params, step)) == digest((updates, new))


# --- schedules --------------------------------------------------------------------------------------------------------

SQRT3_4 = math.sqrt(3) / 4


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (constant(0.25), {0: 0.25, 7: 0.25, 10**12: 0.25}),
        (constant(0), {0: 0.0}),
        (warmup_cosine(1.0, warmup=0, total=2), {0: 1.0, 1: 0.5, 2: 0.0, 3: 0.0}),
        (warmup_cosine(1.0, warmup=3, total=9), {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 0.5 + SQRT3_4, 6: 0.5, 9: 0.0}),
        (warmup_cosine(1.0, warmup=3, total=9), {5: 0.75, 7: 0.25, 8: 0.5 - SQRT3_4, 10: 0.0, 10**12: 0.0}),
        (warmup_cosine(3.0, warmup=1, total=3, final=1.0), {0: 1.5, 1: 3.0, 2: 2.0, 3: 1.0, 50: 1.0}),
        (warmup_cosine(1.0, warmup=1, total=3, final=2.0), {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0}),
    ],
)
def test_schedules_have_the_values_on_paper(schedule: Any, values: dict[int, float]) -> None:
    for step, value in values.items():
        found = schedule(torch.tensor(step))
        assert (found.dtype, found.shape) == (torch.float64, torch.Size([]))
        assert float(found) == pytest.approx(value, abs=1e-12)


def test_the_report_has_the_rate_of_the_step_taken() -> None:
    optimizer = sgd(warmup_cosine(1.0, warmup=3, total=9))
    net = MlpRecipe()
    model = net.model()
    step, state = trainfn.make_step(model, loss=net.loss, optimizer=optimizer), trainfn.init(model, optimizer)
    assert math.isnan(float(state.report.lr))
    rates = []
    for _ in range(5):
        state = step(state, net.batch())
        rates.append(float(state.report.lr))
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.5 + SQRT3_4])


# --- clipping and chains ----------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(shapes, float32_or_64, st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from([0.01, 1.0, 50.0]))
def test_clipping_is_that_of_torch(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int, scale: float, max_norm: float
) -> None:
    grads = {str(index): scale * grad for index, grad in enumerate(numbers([*shapes, (3,)], dtype, seed))}
    params = {name: torch.zeros_like(grad, requires_grad=True) for name, grad in grads.items()}
    for name, param in params.items():
        param.grad = grads[name].clone()
    total = torch.nn.utils.clip_grad_norm_(list(params.values()), max_norm)
    clip = clip_by_global_norm(max_norm)
    found, _ = clip.update(grads, clip.init(params), params, torch.tensor(0))
    assert float(norm(grads)) == pytest.approx(float(total), rel=1e-6)
    # torch divides by the norm plus 1e-6, and so clips a little more.
    right = {name: param.grad for name, param in params.items()}
    assert relative_error(found, right) <= 2e-6 * max(1.0, 1.0 / float(total))
    if float(total) <= max_norm * (1 - 1e-5):
        assert digest(found) == digest(grads)


def test_clipping_nothing_gives_nothing() -> None:
    clip, zeros = clip_by_global_norm(1.0), {"w": torch.zeros(3)}
    assert digest(clip.update(zeros, (), zeros, torch.tensor(0))[0]) == digest(zeros)


@settings(max_examples=15)
@given(mlps(), st.sampled_from([0.05, 5.0]))
def test_clipping_in_a_chain_and_in_the_step_is_one_thing(net: Recipe, max_norm: float) -> None:
    found = []
    for optimizer, clip_norm in ((sgd(0.1), max_norm), (chain(clip_by_global_norm(max_norm), sgd(0.1)), None)):
        model = net.model()
        step = trainfn.make_step(model, loss=net.loss, optimizer=optimizer, clip_norm=clip_norm)
        found.append(step(trainfn.init(model, optimizer), net.batch()))
    tolerance = 1e-6 if net.dtype == torch.float32 else 1e-12
    assert relative_error(found[1].params, found[0].params) < tolerance
    assert float(found[1].report.lr) == float(found[0].report.lr) == pytest.approx(0.1)
    # The norm reported is the one before clipping, whoever clips.
    assert float(found[1].report.grad_norm) == float(found[0].report.grad_norm)


def test_a_chain_runs_in_order_and_keeps_a_state_for_each() -> None:
    params = {"w": torch.zeros(2)}
    optimizer = chain(sgd(-1.0 * -2.0), clip_by_global_norm(1.0), sgd(0.5, momentum=0.5))
    state = optimizer.init(params)
    grads = {"w": torch.tensor([3.0, 4.0])}
    updates, state = optimizer.update(grads, state, params, torch.tensor(0))
    assert updates["w"].tolist() == pytest.approx([0.3, 0.4])  # -2 g, cut to length 1, times -0.5
    updates, state = optimizer.update(grads, state, params, torch.tensor(1))
    assert updates["w"].tolist() == pytest.approx([0.45, 0.6])
    assert len(state) == 3
    assert float(optimizer.lr(torch.tensor(0))) == 0.5
    assert clip_by_global_norm(1.0).lr is None


def identity(grads: Params, state: Any, params: Params, step: Tensor) -> tuple[Params, Any]:
    return grads, state


def test_an_optimizer_without_a_rate_reports_none() -> None:
    net, optimizer = MlpRecipe(), Transform(lambda params: (), identity, "identity")
    model = net.model()
    state = trainfn.make_step(model, loss=net.loss, optimizer=optimizer)(trainfn.init(model, optimizer), net.batch())
    assert math.isnan(float(state.report.lr))


# --- names and refusals -----------------------------------------------------------------------------------------------


def test_the_name_says_every_setting_so_that_two_runs_can_be_told_apart() -> None:
    names = {
        optimizer.name
        for optimizer in (
            adamw(0.1),
            adamw(0.2),
            adamw(0.1, betas=(0.9, 0.99)),
            adamw(0.1, eps=1e-6),
            adamw(0.1, weight_decay=0.1),
            adamw(warmup_cosine(0.1, warmup=1, total=5)),
            adamw(warmup_cosine(0.1, warmup=2, total=5)),
            adamw(warmup_cosine(0.1, warmup=2, total=5, final=0.01)),
            sgd(0.1),
            sgd(0.1, momentum=0.9),
            sgd(0.1, momentum=0.9, nesterov=True),
            sgd(0.1, weight_decay=0.1),
            chain(clip_by_global_norm(1.0), sgd(0.1)),
            chain(clip_by_global_norm(2.0), sgd(0.1)),
        )
    }
    assert len(names) == 14
    assert adamw(0.1).name == adamw(0.1).name


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: adamw(betas=(1.0, 0.9)), "betas"),
        (lambda: adamw(betas=(0.9, -0.1)), "betas"),
        (lambda: adamw(eps=-1e-8), "eps"),
        (lambda: adamw(weight_decay=-1.0), "weight_decay"),
        (lambda: adamw(weight_decay=math.nan), "weight_decay"),
        (lambda: adamw(eps=math.inf, weight_decay=-1.0), "eps=inf, weight_decay=-1.0"),
        (lambda: adamw(lr=-1.0), "-1.0"),
        (lambda: adamw(lr=math.nan), "nan"),
        (lambda: adamw(lr="0.1"), "0.1"),
        (lambda: sgd(0.1, momentum=1.0), "momentum"),
        (lambda: sgd(0.1, nesterov=True), "nesterov"),
        (lambda: sgd(0.1, weight_decay=-0.1), "weight_decay"),
        (lambda: clip_by_global_norm(0.0), "0.0"),
        (lambda: clip_by_global_norm(-1.0), "-1.0"),
        (lambda: clip_by_global_norm(math.inf), "inf"),
        (lambda: warmup_cosine(0.1, warmup=5, total=5), "warmup=5, total=5"),
        (lambda: warmup_cosine(0.1, warmup=-1, total=5), "warmup=-1"),
        (lambda: warmup_cosine(0.1, warmup=0, total=0), "total=0"),
        (lambda: warmup_cosine(-0.1, warmup=0, total=5), "-0.1"),
        (lambda: warmup_cosine(0.1, warmup=0, total=5, final=math.inf), "inf"),
    ],
)
def test_settings_out_of_range_are_refused_and_shown(make: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert told in str(caught.value)
