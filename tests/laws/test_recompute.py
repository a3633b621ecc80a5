"""Activation checkpointing changes what is kept, and not one bit of what comes out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainfn
from tests.strategies import MlpRecipe, Setup, few, mlps, relative_error, setups, torch_warns_of_itself
from trainfn.errors import ConfigError, ModelError
from trainfn.optim import adamw, sgd
from trainfn.per_sample import per_sample_gradients
from trainfn.recompute import recomputing
from trainfn.state import TrainState
from trainfn.step import Step, make_step
from trainfn.tree import digest

pytestmark = [
    torch_warns_of_itself,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


def made(setup: Setup, model: nn.Module, checkpoint: Any, precision: str = "32-true") -> Step:
    return make_step(
        model,
        loss=setup.net.loss,
        optimizer=setup.optimizer,
        accumulate=setup.accumulate,
        clip_norm=setup.clip_norm,
        ema=setup.ema,
        precision=precision,
        checkpoint=checkpoint,
    )


def run(
    setup: Setup, checkpoint: Any, *, mode: Any = None, backend: str = "eager", precision: str = "32-true"
) -> TrainState:
    model = setup.net.model()
    step: Any = made(setup, model, checkpoint, precision)
    if mode is not None:
        step = trainfn.compile(step, mode=mode, donate=True, backend=backend)
    state = trainfn.init(model, setup.optimizer, seed=7, ema=setup.ema is not None, precision=precision)
    for seed in range(3):
        state = step(state, setup.batch(seed))
    return state


# --- the law ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(setups(mlps().filter(lambda net: net.blocks)), st.sampled_from(["blocks.*", ["*norm", "*.dense"], "*"]))
def test_recomputed_is_kept_to_the_bit(setup: Setup, patterns: Any) -> None:
    """BatchNorm, dropout, tied and frozen parameters, accumulation: state and report."""
    torch.manual_seed(3)
    outside = torch.get_rng_state()
    found = run(setup, patterns)
    assert torch.equal(torch.get_rng_state(), outside)
    assert digest(found) == digest(run(setup, None))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("mode", [None, "eager"])
def test_in_16_bits_too(precision: str, mode: str | None) -> None:
    net = MlpRecipe(blocks=("layer_norm", "batch_norm"), dropout=0.3, width=6)
    setup = Setup(net, adamw(0.01), clip_norm=0.1, ema=0.9, accumulate=2)
    found = run(setup, "blocks.*", mode=mode, precision=precision)
    assert digest(found) == digest(run(setup, None, mode=mode, precision=precision))


@settings(few, max_examples=1)
@given(setups(mlps(dropout=False).filter(lambda net: net.blocks)))
def test_two_programs_agree(setup: Setup) -> None:
    found = run(setup, "blocks.*", mode="split", backend="aot_eager")
    assert digest(found) == digest(run(setup, None, mode="split", backend="aot_eager"))
    tolerance = 1e-5 if setup.net.dtype == torch.float32 else 1e-12
    right = run(setup, None)
    for name in ("params", "buffers", "opt", "ema"):
        assert relative_error(getattr(found, name), getattr(right, name)) <= tolerance


@pytest.mark.slow
def test_inductor_agrees() -> None:
    setup = Setup(MlpRecipe(blocks=("batch_norm",), width=4), sgd(0.1, momentum=0.9))
    found, right = run(setup, "blocks.*", mode="split", backend="inductor"), run(setup, None)
    for name in ("params", "buffers", "opt"):
        assert relative_error(getattr(found, name), getattr(right, name)) <= 1e-5


@pytest.mark.parametrize("accumulate", [1, 3])
def test_dropout_draws_the_same_twice(accumulate: int) -> None:
    """The gradient of a linear net with dropout shows the mask: another one would be seen."""
    setup = Setup(MlpRecipe(blocks=("plain", "plain"), dropout=0.5, width=16), sgd(0.5), accumulate=accumulate)
    for mode, backend in (("eager", "eager"), ("split", "aot_eager")):
        found = run(setup, "blocks.*", mode=mode, backend=backend)
        assert digest(found) == digest(run(setup, None, mode=mode, backend=backend))


def test_a_module_is_as_before_and_may_be_called_after_an_error() -> None:
    net = MlpRecipe(blocks=("batch_norm",))
    model = net.model()
    model.blocks[0].forward = own = model.blocks[0].forward  # somebody else's, kept
    before = digest(dict(model.state_dict()))
    step = made(Setup(net, sgd(0.1)), model, "*")
    state = trainfn.init(model, sgd(0.1))
    step(state, net.batch())
    with pytest.raises(RuntimeError):
        step(state, net.batch() | {"x": torch.ones(6, 99)})
    assert vars(model.blocks[0])["forward"] is own
    assert all("forward" not in vars(module) for module in model.modules() if module is not model.blocks[0])
    assert digest(dict(model.state_dict())) == before


def test_hooks_of_a_module_are_called_once() -> None:
    net = MlpRecipe(blocks=("plain",))
    model, calls = net.model(), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append("after"))
    made(Setup(net, sgd(0.1)), model, "blocks.*")(trainfn.init(model, sgd(0.1)), net.batch())
    assert calls == ["after"]


class Counter(nn.Module):
    """A forward that reads a buffer and writes to it, in place and by exchange."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(3, 3)
        self.register_buffer("calls", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        made = self.linear(x) * self.calls.clone()
        if self.kind == "in place":
            self.calls.add_(made.detach().mean(0))
        else:
            self.calls = self.calls + made.detach().mean(0)
        return torch.tanh(made)


@pytest.mark.parametrize("kind", ["in place", "exchanged"])
def test_a_buffer_that_the_forward_reads_is_read_as_it_was_and_advanced_once(kind: str) -> None:
    found = []
    for checkpoint in (None, "1"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), Counter(kind), nn.Linear(3, 3))
        step = make_step(model, loss="classification", optimizer=sgd(0.1), accumulate=2, checkpoint=checkpoint)
        state = trainfn.init(model, sgd(0.1))
        for seed in range(2):
            state = step(state, MlpRecipe().batch(4, seed))
        found.append(digest(state))
    assert found[0] == found[1]


# --- what uses a step without its gradients ---------------------------------------------------------------------------


def test_evaluation_and_gradients_of_each_example_know_nothing_of_it() -> None:
    setup = Setup(MlpRecipe(blocks=("layer_norm", "plain")), adamw(0.01))
    found = []
    for checkpoint in (None, "blocks.*"):
        model = setup.net.model()
        step, state = made(setup, model, checkpoint), setup.state(model)
        samples = per_sample_gradients(step.loss, state.params, state.buffers, setup.batch())
        diagnosis = trainfn.diagnose(step, state, setup.batch())
        found.append((digest(step.evaluate(state, setup.batch())), digest(samples), diagnosis.to_json()))
    assert found[0] == found[1]


def test_a_run_with_checkpoints_of_both_kinds_resumes(tmp_path: Any) -> None:
    x, y = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    kept = {"loss": "classification", "batch_size": 8, "progress": False, "device": "cpu", "noise_scale_every": 4}

    def fitted(steps: int, **more: Any) -> TrainState:
        model = MlpRecipe(blocks=("plain", "layer_norm"), dropout=0.2).model()
        data = {"x": x, "y": y}
        return trainfn.fit(model, data, val_data=data, max_steps=steps, optimizer=adamw(0.01), **kept, **more).state

    whole = fitted(6, checkpoint="blocks.*")
    assert digest(fitted(6).params) == digest(whole.params)
    fitted(3, checkpoint=["blocks.0", "blocks.1"], out_dir=tmp_path, resume="auto")
    again = fitted(6, checkpoint=("blocks.*",), out_dir=tmp_path, resume="auto")
    assert digest(again.params) == digest(whole.params)


# --- modes and mistakes -----------------------------------------------------------------------------------------------


def test_auto_takes_two_programs_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["trainfn.engine.choice"], "_missing_tool", lambda device: None)
    setup = attrs.evolve(Setup(MlpRecipe(), sgd(0.1)), accumulate=8)
    model = setup.net.model()
    for steps, mode in ((None, "split"), (10**6, "split"), (10, "eager")):
        step = trainfn.compile(made(setup, model, "blocks.*"), steps=steps)
        assert step.settle(setup.state(model))[0] == mode
    control = trainfn.compile(made(setup, model, None))
    assert control.settle(setup.state(model))[0] == "accum"


@pytest.mark.parametrize("mode", ["graph", "accum"])
def test_a_mode_that_would_not_recompute_is_refused(mode: Any) -> None:
    setup = Setup(MlpRecipe(), sgd(0.1))
    with pytest.raises(ConfigError, match="does not recompute"):
        trainfn.compile(made(setup, setup.net.model(), "blocks.*"), mode=mode)
    trainfn.compile(made(setup, setup.net.model(), None), mode=mode)


@pytest.mark.parametrize(
    ("patterns", "near"),
    [
        ("block.*", "blocks"),
        (["blocks.*", "haed"], "head"),
        ("blocks", "blocks"),
        ("", "one of"),
        ("blocks.7", "blocks"),
    ],
)
def test_a_pattern_that_matches_nothing_is_answered_with_a_near_name(patterns: Any, near: str) -> None:
    with pytest.raises(ConfigError, match="No module to checkpoint") as caught:
        made(Setup(MlpRecipe(), sgd(0.1)), MlpRecipe().model(), patterns)
    assert near in str(caught.value)


def test_fit_knows_the_other_names() -> None:
    with pytest.raises(ConfigError, match=r"gradient_checkpointing \(here it is checkpoint="):
        trainfn.fit(nn.Linear(1, 1), torch.ones(2, 1), loss="mse", max_steps=1, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="expected a pattern"):
        trainfn.fit(nn.Linear(1, 1), torch.ones(2, 1), loss="mse", max_steps=1, checkpoint=True)


class InPlace(nn.Module):
    """Writes to a checkpointed block's input: inside the block, or after it."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5, inplace=inside), nn.Linear(3, 3))
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        hidden = self.block(x)
        if not self.inside:
            x += 1.0
        return hidden + x


class Remembering(nn.Module):
    """Its second run does not do what the first one did."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.cache = Growing(), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.cache)


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(self.linear(x))
        return torch.tanh(torch.cat(cache)).sum() * torch.ones(len(x), 3) + self.linear(x)


@pytest.mark.parametrize(
    ("make", "patterns", "message"),
    [
        (lambda: InPlace(inside=True), "block", "its own forward"),
        (lambda: InPlace(inside=False), "block", "what came after it"),
        (Remembering, "inner", "something else in its second run"),
    ],
)
def test_what_cannot_be_run_twice_is_refused_rather_than_computed_wrongly(
    make: Callable[[], nn.Module], patterns: str, message: str
) -> None:
    for checkpoint in (patterns, None):
        model = make()
        step = make_step(model, loss="classification", optimizer=sgd(0.1), checkpoint=checkpoint)
        state, batch = trainfn.init(model, sgd(0.1)), MlpRecipe().batch()
        if checkpoint is None:  # control: it is only the second run that cannot be
            step(state, batch)
        else:
            with pytest.raises(ModelError, match=message):
                step(state, batch)


# --- memory -----------------------------------------------------------------------------------------------------------


def kept_bytes(checkpoint: str | None) -> int:
    """Return the bytes that a forward keeps for its backward, parameters apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh()) for _ in range(6)]
        model = nn.Sequential(*blocks)
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    names = trainfn.recompute.matching(model, checkpoint)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), recomputing(model, names):
        model(torch.ones(256, 64)).sum()
    return sum(storage.nbytes() for storage in storages.values())


def test_what_is_kept_for_the_backward_falls() -> None:
    activation = 256 * 64 * 4
    assert kept_bytes("*") <= 7 * activation
    assert kept_bytes(None) >= 18 * activation  # the control keeps three a block


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_forward_keeps_less(backend: str) -> None:
    """What the backward's program is given, as autograd holds it."""
    sizes = {}
    for checkpoint in (None, "*"):
        model = nn.Sequential(
            *[nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU()) for _ in "abc"]
        )
        step = make_step(model, loss="mse", optimizer=sgd(0.1), checkpoint=checkpoint)
        compiled = trainfn.compile(step, mode="split", backend=backend)
        state, batch = trainfn.init(model, sgd(0.1)), (torch.ones(512, 64), torch.zeros(512, 64))
        compiled(state, batch)
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            if len(tensor) == 512:  # an activation
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            compiled(state, batch)
        sizes[checkpoint] = sum(storages.values())
    assert 0 < sizes["*"] < 0.6 * sizes[None]
