"""Any hyper-parameter may be a schedule.

Against the plain number, against torch.optim with its settings changed between steps, and against oracles in plain
Python that know every gradient and every setting of the run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from trainfn import optim
from trainfn.errors import ConfigError
from trainfn.optim import Transform
from trainfn.state import Params
from trainfn.tree import digest, named_leaves

STEPS = 30
EXACT = 1e-12

Settings = dict[str, Any]

# Numbers at which each setting matters: limits that bind, an eps of the size of what it is added to.
ADAM: Settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1}
CASES: dict[str, tuple[Callable[..., Transform], Settings]] = {
    "sgd": (optim.sgd, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd_nesterov": (optim.sgd, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "adam": (optim.adam, ADAM),
    "adamw": (optim.adamw, ADAM),
    "nadam": (optim.nadam, ADAM | {"momentum_decay": 0.1}),
    "nadam_decoupled": (optim.nadam, ADAM | {"momentum_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (optim.radam, ADAM),
    "radam_decoupled": (optim.radam, ADAM | {"decoupled_weight_decay": True}),
    "lamb": (optim.lamb, ADAM),
    "lion": (optim.lion, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    "rmsprop": (optim.rmsprop, {"lr": 0.01, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.8}),
    "rmsprop_centered": (
        optim.rmsprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.8, "centered": True},
    ),
    "adagrad": (optim.adagrad, {"lr": 0.1, "lr_decay": 0.1, "eps": 0.1, "weight_decay": 0.1}),
    "adafactor": (
        optim.adafactor,
        {"lr": 0.01, "beta2_decay": -0.3, "eps": (0.9, 0.9), "d": 2.0, "weight_decay": 0.1},
    ),
    "muon": (optim.muon, {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "eps": 30.0}),
    "clip_by_global_norm": (optim.clip_by_global_norm, {"max_norm": 0.5}),
    "clip_by_value": (optim.clip_by_value, {"max_value": 0.5}),
    "adaptive_clip": (optim.adaptive_clip, {"max_ratio": 0.1, "eps": 2.0}),
}
SHARES = ("betas[0]", "betas[1]", "momentum", "alpha")
PLAIN_NUMBERS = {"ns_coefficients", "initial_accumulator_value"}  # of one iteration, and of the state before any step


class Moving:
    """A schedule around a number: from half of it to 2.5 times; for a share, of what is left to 1."""

    def __init__(self, number: float, phase: int, *, share: bool) -> None:
        self.number, self.phase, self.share = number, phase, share

    def _around(self, wave: Any) -> Any:
        return 1.0 - (1.0 - self.number) * wave if self.share else self.number * wave

    def __call__(self, step: Tensor) -> Tensor:
        return self._around(1.5 + torch.sin(0.7 * step.double() + self.phase))

    def at(self, step: int) -> float:
        return self._around(1.5 + math.sin(0.7 * step + self.phase))

    def __repr__(self) -> str:
        return f"Moving({self.number}, {self.phase}, share={self.share})"


class Fixed:
    """A schedule that is always one number, of any sign."""

    def __init__(self, number: float) -> None:
        self.number = number

    def __call__(self, step: Tensor) -> Tensor:
        return torch.full_like(step, self.number, dtype=torch.float64)


def hypers(settings: Settings) -> Iterator[str]:
    """Names of the settings that may be schedules, as messages write them."""
    for name, value in settings.items():
        if isinstance(value, tuple):
            yield from (f"{name}[{index}]" for index in range(len(value)))
        elif isinstance(value, float):
            yield name


def replaced(settings: Settings, change: Callable[[str, float], Any]) -> Settings:
    """The settings with ``change(name, number)`` for each of :func:`hypers`."""
    new = dict(settings)
    for name, value in settings.items():
        if isinstance(value, tuple):
            new[name] = tuple(change(f"{name}[{index}]", number) for index, number in enumerate(value))
        elif isinstance(value, float):
            new[name] = change(name, value)
    return new


def moving(settings: Settings, *, shares: bool = True) -> Settings:
    """The settings as moving schedules, each of its own phase; shares as plain numbers if not ``shares``."""
    phases = {name: index for index, name in enumerate(hypers(settings))}

    def change(name: str, number: float) -> Any:
        if name in SHARES and not shares:
            return number
        return Moving(number, phases[name], share=name in SHARES)

    return replaced(settings, change)


def at(settings: Settings, step: int) -> Settings:
    """Plain settings: what moving ones are at one step."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(one, value))
        return value.at(step) if isinstance(value, Moving) else value

    return {name: one(value) for name, value in settings.items()}


SHAPES: dict[str, tuple[int, ...]] = {"w": (4, 3), "b": (7,), "s": ()}


def numbers(seed: int, case: str, dtype: torch.dtype = torch.float64) -> Params:
    own = torch.Generator().manual_seed(seed)
    shapes = {"w": (4, 3), "u": (2, 5)} if case == "muon" else SHAPES
    return {name: torch.randn(shape, generator=own, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def gradients(step: int, case: str, dtype: torch.dtype = torch.float64) -> Params:
    return {name: 3.0 ** (step % 3 - 1) * grad for name, grad in numbers(100 + step, case, dtype).items()}


def walk(optimizer: Transform, case: str, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Params, Params, Any]]:
    """Yield parameters, updates and state after each step."""
    params = numbers(0, case, dtype)
    state = optimizer.init(params)
    for step in range(STEPS):
        updates, state = optimizer.update(gradients(step, case, dtype), state, params, torch.tensor(step))
        params = {name: param + updates[name] for name, param in params.items()}
        yield params, updates, state


def furthest(one: Transform, other: Transform, case: str) -> float:
    """The largest difference of any element after any step."""
    return max(
        float((mine[name] - theirs[name]).abs().max())
        for (mine, *_), (theirs, *_) in zip(walk(one, case), walk(other, case), strict=True)
        for name in mine
    )


# --- which settings, and schedules that stand still -------------------------------------------------------------------


def test_every_number_of_every_builder_is_tried_here() -> None:
    tried: dict[Any, set[str]] = {}
    for builder, settings in CASES.values():
        tried.setdefault(builder, set()).update(name.partition("[")[0] for name in hypers(settings))
    for name in optim.__all__:
        signature = inspect.signature(getattr(optim, name)) if inspect.isfunction(getattr(optim, name)) else None
        if signature is None or signature.return_annotation != "Transform":
            continue
        annotations = {key: parameter.annotation for key, parameter in signature.parameters.items()}
        may_move = {key for key, annotation in annotations.items() if "Hyper" in annotation}
        assert may_move == tried.get(getattr(optim, name), set()), name
        assert {key for key, annotation in annotations.items() if "float" in annotation} <= PLAIN_NUMBERS, name


def cases_and_hypers() -> list[tuple[str, str]]:
    return [(case, name) for case, (_, settings) in CASES.items() for name in hypers(settings)]


@pytest.mark.parametrize("case", CASES)
def test_schedules_that_stand_still_are_the_plain_numbers(case: str) -> None:
    builder, settings = CASES[case]
    plain = builder(**settings)
    assert furthest(builder(**replaced(settings, lambda _, number: Fixed(number))), plain, case) <= EXACT
    for name in hypers(settings):
        one = replaced(settings, lambda other, number, name=name: Fixed(number) if other == name else number)
        assert furthest(builder(**one), plain, case) <= EXACT, name


@pytest.mark.parametrize(("case", "name"), cases_and_hypers())
def test_control_every_schedule_is_read(case: str, name: str) -> None:
    builder, settings = CASES[case]
    other = replaced(settings, lambda key, number: Fixed(0.5 * number) if key == name else number)
    assert furthest(builder(**other), builder(**settings), case) > 1e-6


# --- schedules that move, against torch.optim -------------------------------------------------------------------------

TORCH: dict[str, tuple[Any, bool]] = {
    # Where torch corrects a bias it does so with the newest decay rate only: with it, decay rates stay.
    "sgd": (torch.optim.SGD, True),
    "sgd_nesterov": (torch.optim.SGD, True),
    "rmsprop": (torch.optim.RMSprop, True),
    "rmsprop_centered": (torch.optim.RMSprop, True),
    "adagrad": (torch.optim.Adagrad, True),
    "adafactor": (torch.optim.Adafactor, True),
    "muon": (torch.optim.Muon, True),
    "adam": (torch.optim.Adam, False),
    "adamw": (torch.optim.AdamW, False),
    "radam": (torch.optim.RAdam, False),
    "radam_decoupled": (torch.optim.RAdam, False),
}


def furthest_from_torch(case: str, settings: Settings, ours: Settings) -> float:
    builder, _ = CASES[case]
    twins = {name: param.clone().requires_grad_() for name, param in numbers(0, case).items()}
    reference = TORCH[case][0](twins.values(), **at(settings, 0))
    worst = 0.0
    for step, (params, *_) in enumerate(walk(builder(**ours), case)):
        reference.param_groups[0].update(at(settings, step))
        for name, grad in gradients(step, case).items():
            twins[name].grad = grad
        reference.step()
        worst = max(worst, *(float((params[name] - twins[name].detach()).abs().max()) for name in params))
    return worst


@pytest.mark.parametrize("case", TORCH)
def test_schedules_that_move_are_torch_with_its_settings_changed_between_steps(
    case: str,
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # torch.optim keeps some scalars of its state in the default dtype
    try:
        settings = moving(CASES[case][1], shares=TORCH[case][1])
        assert furthest_from_torch(case, settings, settings) <= EXACT
        late = moving(CASES[case][1], shares=TORCH[case][1])
        for value in late.values():
            if isinstance(value, Moving):
                value.phase += 0.01
        assert furthest_from_torch(case, settings, late) > 1e-6  # the control
    finally:
        torch.set_default_dtype(before)


# --- schedules that move, against oracles that keep every gradient ----------------------------------------------------


def weights(betas: list[float]) -> np.ndarray:
    """Weights of the values of a running mean whose decay rate was ``betas[i]`` when value i came."""
    return np.array([(1 - beta) * math.prod(betas[index + 1 :]) for index, beta in enumerate(betas)])


class Past:
    """Every gradient of one parameter, and every setting, up to now."""

    def __init__(self) -> None:
        self.grads: list[np.ndarray] = []
        self.settings: list[Settings] = []

    def first(self) -> tuple[np.ndarray, float]:
        """The sum of the gradients by the weights of their mean, and the sum of those weights."""
        own = weights([settings["betas"][0] for settings in self.settings])
        return sum(w * g for w, g in zip(own, self.grads, strict=True)), own.sum()

    def second(self) -> tuple[np.ndarray, float, float]:
        """Likewise of their squares, and the mean age of those, in steps."""
        own = weights([settings["betas"][1] for settings in self.settings])
        age = (own * np.arange(len(own))[::-1]).sum() / own.sum()
        return sum(w * g**2 for w, g in zip(own, self.grads, strict=True)), own.sum(), age


def adam_oracle(past: Past, param: np.ndarray, now: Settings, ahead: Settings) -> np.ndarray:
    (m, m_weight), (v, v_weight, _) = past.first(), past.second()
    return -now["lr"] * (m / m_weight) / ((v / v_weight) ** 0.5 + now["eps"])


def adamw_oracle(past: Past, param: np.ndarray, now: Settings, ahead: Settings) -> np.ndarray:
    return adam_oracle(past, param, now, ahead) - now["lr"] * now["weight_decay"] * param


def lamb_oracle(past: Past, param: np.ndarray, now: Settings, ahead: Settings) -> np.ndarray:
    direction = adam_oracle(past, param, now | {"lr": -1.0}, ahead) + now["weight_decay"] * param
    return -now["lr"] * np.linalg.norm(param) / np.linalg.norm(direction) * direction


def nadam_oracle(past: Past, param: np.ndarray, now: Settings, ahead: Settings) -> np.ndarray:
    (m, _), (v, v_weight, _) = past.first(), past.second()
    coefficients = [
        settings["betas"][0] * (1 - 0.5 * 0.96 ** ((index + 1) * settings["momentum_decay"]))
        for index, settings in enumerate([*past.settings, ahead])
    ]
    product, later = math.prod(coefficients[:-1]), math.prod(coefficients)
    direction = coefficients[-1] * m / (1 - later) + (1 - coefficients[-2]) * past.grads[-1] / (1 - product)
    return -now["lr"] * direction / ((v / v_weight) ** 0.5 + now["eps"])


def radam_oracle(past: Past, param: np.ndarray, now: Settings, ahead: Settings) -> np.ndarray:
    (m, m_weight), (v, v_weight, age) = past.first(), past.second()
    length = 1 + 2 * age
    if length <= 5:
        return -now["lr"] * m / m_weight
    most = max(2 / (1 - now["betas"][1]) - 1, length)
    factor = (v_weight * (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)) ** 0.5
    return -now["lr"] * m / m_weight * factor / (v**0.5 + now["eps"])


def lion_oracle(past: Past, param: np.ndarray, now: Settings, ahead: Settings) -> np.ndarray:
    # The momentum before this gradient, whose own second rate is that of each gradient's step.
    own = weights([settings["betas"][1] for settings in past.settings[:-1]])
    before = sum((w * g for w, g in zip(own, past.grads[:-1], strict=True)), np.zeros_like(param))
    mixed = now["betas"][0] * before + (1 - now["betas"][0]) * past.grads[-1]
    return -now["lr"] * (np.sign(mixed) + now["weight_decay"] * param)


ORACLES: dict[str, tuple[Callable[..., np.ndarray], bool]] = {
    # The oracle, and whether weight decay is added to the gradients before it.
    "adam": (adam_oracle, True),
    "adamw": (adamw_oracle, False),
    "lamb": (lamb_oracle, False),
    "nadam": (nadam_oracle, True),
    "radam": (radam_oracle, True),
    "lion": (lion_oracle, False),
}


def furthest_from_oracle(case: str, settings: Settings, ours: Settings, oracle: Callable[..., np.ndarray]) -> float:
    builder, _ = CASES[case]
    theirs = {name: param.numpy() for name, param in numbers(0, case).items()}
    past = {name: Past() for name in theirs}
    worst = 0.0
    for step, (params, *_) in enumerate(walk(builder(**ours), case)):
        now = at(settings, step)
        for name, grad in gradients(step, case).items():
            decayed = now["weight_decay"] * theirs[name] if ORACLES[case][1] else 0.0
            past[name].grads.append(grad.numpy() + decayed)
            past[name].settings.append(now)
            theirs[name] = theirs[name] + oracle(past[name], theirs[name], now, at(settings, step + 1))
            worst = max(worst, np.abs(params[name].numpy() - theirs[name]).max())
    return worst


@pytest.mark.parametrize("case", ORACLES)
def test_schedules_that_move_are_sums_over_all_the_past(case: str) -> None:
    settings = moving(CASES[case][1])
    assert furthest_from_oracle(case, settings, settings, ORACLES[case][0]) <= EXACT


@pytest.mark.parametrize("case", ORACLES)
def test_control_a_past_with_other_weights_is_noticed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = moving(CASES[case][1])
    # Each decay rate taken for that of the whole past, as with 1 - beta^t.
    monkeypatch.setattr(
        f"{__name__}.weights",
        lambda betas: np.array([(1 - betas[-1]) * betas[-1] ** index for index in range(len(betas))][::-1]),
    )
    assert furthest_from_oracle(case, settings, settings, ORACLES[case][0]) > 1e-6


def test_radam_needs_both_of_its_branches_here() -> None:
    settings = moving(ADAM)
    past, lengths = Past(), []
    for step in range(STEPS):
        past.settings.append(at(settings, step))
        past.grads.append(np.zeros(1))
        lengths.append(1 + 2 * past.second()[2])
    assert min(lengths) <= 5 < max(lengths)
    limits = [2 / (1 - at(settings, step)["betas"][1]) - 1 for step in range(STEPS)]
    assert any(5 < length > limit for length, limit in zip(lengths, limits, strict=True))


def still(optimizer: Callable[[list[Tensor]], Any] | Transform, betas: tuple[Moving, Moving]) -> list[float]:
    """Updates of one number whose gradient is always 2."""
    if isinstance(optimizer, Transform):
        param = {"w": torch.zeros(1, dtype=torch.float64)}
        state, found = optimizer.init(param), []
        for step in range(STEPS):
            updates, state = optimizer.update({"w": torch.full((1,), 2.0).double()}, state, param, torch.tensor(step))
            found.append(float(updates["w"]))
        return found
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    reference, found = optimizer([weight]), []
    for step in range(STEPS):
        before = float(weight.detach())
        reference.param_groups[0]["betas"] = tuple(beta.at(step) for beta in betas)
        weight.grad = torch.full((1,), 2.0).double()
        reference.step()
        found.append(float(weight.detach()) - before)
    return found


def test_debiased_moments_are_means_whatever_the_decay_rates_do() -> None:
    betas = Moving(0.8, 0, share=True), Moving(0.95, 1, share=True)
    exact = pytest.approx([-0.1] * STEPS, rel=1e-12)
    assert still(optim.adam(0.1, betas=betas, eps=0.0), betas) == exact
    assert still(optim.adam(0.1, betas=(betas[0], 0.9), eps=0.0), betas) == exact
    assert still(optim.adam(0.1, betas=(0.9, betas[1]), eps=0.0), betas) == exact
    # The control: torch's correction takes the newest decay rate for that of all steps.
    torchs = still(lambda params: torch.optim.Adam(params, 0.1, eps=0.0), betas)
    assert max(abs(update + 0.1) for update in torchs) > 0.01


# --- state, dtypes, programs ------------------------------------------------------------------------------------------


def test_only_a_scheduled_decay_rate_adds_to_the_state() -> None:
    params, moves = {"w": torch.ones(2)}, Moving(0.9, 0, share=True)

    def leaves(optimizer: Transform) -> set[str]:
        return {name for name, _ in named_leaves(optimizer.init(params))}

    plain = {"mu.w", "nu.w"}
    for builder in (optim.adam, optim.adamw, optim.lamb, optim.radam):
        assert leaves(builder(0.1)) == plain
        assert leaves(builder(moves, eps=moves, weight_decay=moves)) == plain
        assert leaves(builder(0.1, betas=(moves, 0.9))) == plain | {"mu_weight"}
        aged = {"nu_age"} if builder is optim.radam else set()
        assert leaves(builder(0.1, betas=(0.9, moves))) == plain | {"nu_weight"} | aged
    assert leaves(optim.nadam(0.1)) == leaves(optim.nadam(0.1, betas=(moves, 0.9), momentum_decay=moves))
    assert leaves(optim.nadam(0.1, betas=(moves, moves))) - leaves(optim.nadam(0.1)) == {"moments.nu_weight"}
    # A momentum that moves may begin at 0, where a plain one needs no buffer.
    assert leaves(optim.sgd(0.1, momentum=optim.linear(0.0, 0.9, total=9))) == {"momentum.w"}
    assert leaves(optim.sgd(0.1, momentum=0.0)) == set()


def check_dtypes(optimizer: Transform, case: str, dtype: torch.dtype) -> None:
    """Parameters, updates and their state stay of ``dtype`` and finite; scalars of the state stay of float64."""
    before = {name: leaf.dtype for name, leaf in named_leaves(optimizer.init(numbers(0, case, dtype)))}
    assert not before or {dtype} <= set(before.values()) <= {dtype, torch.float64}
    for params, updates, state in walk(optimizer, case, dtype):
        assert {leaf.dtype for leaf in (*params.values(), *updates.values())} == {dtype}, "another dtype"
        assert {name: leaf.dtype for name, leaf in named_leaves(state)} == before
        assert all(leaf.isfinite().all() for _, leaf in named_leaves((params, updates, state))), "not finite"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", ["plain", "moving"])
@pytest.mark.parametrize("case", CASES)
def test_dtypes_stay_and_numbers_are_finite(case: str, kind: str, dtype: torch.dtype) -> None:
    builder, settings = CASES[case]
    check_dtypes(builder(**(moving(settings) if kind == "moving" else settings)), case, dtype)


@pytest.mark.parametrize(("factor", "told"), [(0.1, "another dtype"), (math.inf, "not finite")])
def test_control_a_scalar_that_is_not_narrowed_is_noticed(factor: float, told: str) -> None:
    def update(grads: Params, state: Any, params: Params, step: Tensor) -> tuple[Params, Any]:
        size = torch.tensor(factor, dtype=torch.float64)
        if told == "not finite":
            size = size.bfloat16()
        return {name: grad * size for name, grad in grads.items()}, state

    with pytest.raises(AssertionError, match=told):
        check_dtypes(Transform(lambda params: (), update, "wrong"), "sgd", torch.bfloat16)


def test_a_slow_second_moment_is_not_stopped_by_bfloat16() -> None:
    # 0.999 is 1.0 there: as a factor it would let squares grow without end.
    param = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    optimizer = optim.rmsprop(0.1, alpha=Fixed(0.999), eps=0.0)
    state = optimizer.init(param)
    for step in range(400):
        _, state = optimizer.update({"w": torch.ones_like(param["w"])}, state, param, torch.tensor(step))
    assert float(torch.tensor(0.999).bfloat16()) == 1.0
    assert 0.1 < float(state.nu["w"][0]) < 1.0


# Compiling takes a second: every day the first case of each builder, and those schedules that add to the state or reach
# into powers and limits.
FIRST = {builder: case for case, (builder, _) in reversed(CASES.items())}.values()
EVERY_DAY = {("plain", case) for case in FIRST} | {("moving", case) for case in ("radam", "adafactor", "clip_by_value")}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, marks=() if (kind, case) in EVERY_DAY else pytest.mark.slow)
        for kind in ("plain", "moving")
        for case in CASES
    ],
)
def test_compiled_updates_are_the_eager_ones_bit_for_bit(kind: str, case: str) -> None:
    builder, settings = CASES[case]
    optimizer = builder(**(moving(settings) if kind == "moving" else settings))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = optimizer._replace(update=torch.compile(optimizer.update, fullgraph=True, backend=counter))
    eager, graph = walk(optimizer, case, torch.float32), walk(compiled, case, torch.float32)
    programs = []
    for _ in range(5):
        assert digest(next(eager)) == digest(next(graph))
        programs.append(counter.frame_count)
    # None for another step; the first may take dynamo two looks, where the state holds a float64 of no dimensions.
    assert programs == [programs[0]] * 5


# --- refusals and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "name"), cases_and_hypers())
def test_a_number_out_of_range_is_refused_and_schedules_are_offered(case: str, name: str) -> None:
    builder, settings = CASES[case]
    for bad in (-1.5, math.nan, "0.1", True):
        with pytest.raises(ConfigError) as caught:
            builder(**replaced(settings, lambda key, number, bad=bad: bad if key == name else number))
        assert f"{name}={bad!r}" in str(caught.value.got)
        assert "a schedule" in str(caught.value.expected)


def test_plain_numbers_stay_plain() -> None:
    moves = Moving(0.9, 0, share=True)
    with pytest.raises(ConfigError, match="three numbers"):
        optim.muon(ns_coefficients=(moves, 1.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="initial_accumulator_value"):
        optim.adagrad(initial_accumulator_value=moves)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_a_name_shows_the_calls_of_its_schedules(case: str) -> None:
    builder, settings = CASES[case]
    scope = {name: getattr(optim, name) for name in optim.__all__} | {"Moving": Moving}
    name = builder(**moving(settings)).name
    assert name.count("Moving(") == len(list(hypers(settings)))
    assert eval(name, scope).name == name
    assert builder(**settings).name != name


def test_a_function_in_a_name_has_no_address() -> None:
    def rising(step: Tensor) -> Tensor:
        return 0.9 - 1.0 / (step.double() + 2.0)

    assert "rising, 0.999)" in optim.adam(betas=(rising, 0.999)).name
    assert "0x" not in optim.adam(betas=(rising, 0.999)).name
    assert optim.adam(betas=(optim.constant(0.9), 0.999)).name != optim.adam(betas=(0.9, 0.999)).name
    assert "eps=linear(0.1, 0.2, total=5)" in optim.adam(eps=optim.linear(0.1, 0.2, total=5)).name
    assert optim.adam(np.float64(0.1), eps=np.float64(1e-6)).name == optim.adam(0.1, eps=1e-6).name


# --- what a schedule may return ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [optim.adamw, optim.sgd, optim.lion, optim.adagrad])
def test_a_schedule_may_give_a_python_number(build: Any) -> None:
    """``min`` of a tensor and a number is, after a warm-up, the number."""
    given = [build(lambda step: 3e-4 * min(1.0, (step + 1) / 10)), build(optim.constant(3e-4))]
    params, grads, found = {"w": torch.ones(2)}, {"w": torch.full((2,), 0.5)}, []
    for optimizer in given:
        found.append(optimizer.update(grads, optimizer.init(params), params, torch.tensor(20))[0]["w"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("wrong", [lambda step: "0.1", lambda step: torch.ones(2), lambda step: None])
def test_a_schedule_that_gives_no_number_is_answered(wrong: Any) -> None:
    optimizer, params = optim.sgd(wrong), {"w": torch.ones(2)}
    with pytest.raises(ConfigError, match="gives something that is no number"):
        optimizer.update(params, optimizer.init(params), params, torch.tensor(0))


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999)])
@pytest.mark.parametrize("build", [optim.adamw, optim.lion])
def test_two_decay_rates_are_two(build: Any, betas: Any) -> None:
    with pytest.raises(ConfigError, match="betas two decay rates"):
        build(betas=betas)
