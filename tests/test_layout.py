"""Packs: what lies in one, that nothing is lost on the way in and out, and that optimizers do not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import trainfn
from tests.strategies import Setup, language_models, mlps, setups, torch_warns_of_itself
from trainfn import optim
from trainfn.engine.held import Held as HeldState
from trainfn.engine.layout import Layout
from trainfn.grad import Gradients
from trainfn.optim import Transform
from trainfn.state import TrainState
from trainfn.tree import digest, evolve, map_named, named_leaves

pytestmark = torch_warns_of_itself


class Odd(nn.Module):
    """Tensors of every kind: 0-d, empty, of two dtypes, tied, frozen, not contiguous, and buffers of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(3, 5)
        self.second.weight = self.first.weight
        self.scale, self.nothing = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 4))
        self.wide = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("counts", torch.arange(3, dtype=torch.int32))
        self.register_buffer("spread", torch.ones(1).expand(4))


def odd_state(optimizer: Transform) -> TrainState:
    torch.manual_seed(0)
    return trainfn.init(Odd(), optimizer, ema=True)


def test_what_goes_in_comes_out_as_views_of_few_buffers() -> None:
    optimizer = optim.adamw(decay=optim.matrices_only)
    state = odd_state(optimizer)
    layout = Layout(state, optimizer)
    packed = layout.pack(state)
    views = evolve(layout.views(packed), report=state.report)
    assert digest(views) == digest(state)
    for name, leaf in named_leaves(state.params):
        assert views.params[name].requires_grad == leaf.requires_grad
        assert views.params[name].is_leaf
    assert views.params["frozen"] is state.params["frozen"]
    # float32 with decay and without, float64, and what is not contiguous
    assert [len(tree) for tree in (packed.params, packed.opt.mu, packed.ema)] == [4, 4, 4]
    assert sorted(str(tensor.dtype) for tensor in packed.rest.values()) == [
        "torch.bool",
        "torch.float64",
        "torch.int64",
    ]
    with torch.no_grad():
        packed.params["nothing"].fill_(7.0)
        packed.rest["step"].fill_(3)
    assert bool((views.params["first.weight"] == 7.0).all())
    assert int(views.step) == 3


def test_what_a_compiled_forward_reads_is_the_same_memory_and_no_view() -> None:
    optimizer = optim.adamw()
    state = odd_state(optimizer)
    layout = Layout(state, optimizer)
    held = HeldState(layout, layout.pack(state))
    assert digest(evolve(held.inputs, report=state.report)) == digest(state)
    for name, view in held.views.params.items():
        read = held.inputs.params[name]
        assert (read.data_ptr(), read.stride(), read.dtype) == (view.data_ptr(), view.stride(), view.dtype)
        assert read.requires_grad == view.requires_grad
        assert read.is_leaf
        assert read.storage_offset() == 0
    assert any(view.storage_offset() for view in held.views.params.values())
    with torch.no_grad():
        for pack in held.packed.params.values():
            pack += 1
    written = {name: param + param.requires_grad for name, param in state.params.items()}
    assert digest(held.inputs.params) == digest(written) == digest(held.views.params)


def test_leaves_begin_at_a_cache_line() -> None:
    optimizer = optim.sgd(0.1)
    state = trainfn.init(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)), optimizer)
    layout = Layout(state, optimizer)
    views = layout.views(layout.pack(state))
    assert {param.data_ptr() % 64 for param in views.params.values()} == {0}


def test_packs_are_copies_and_copies_of_packs_are_too() -> None:
    optimizer = optim.adamw()
    state = odd_state(optimizer)
    layout, before = Layout(state, optimizer), digest(state)
    packed = layout.pack(state)
    again = layout.copy(packed)
    with torch.no_grad():
        for _, leaf in named_leaves(evolve(packed, frozen={})):
            leaf.zero_()
    assert digest(state) == before
    assert digest(evolve(layout.views(again), report=state.report)) == before


def by_kind(name: str, param: Tensor) -> str:
    return "matrices" if param.ndim == 2 and param.numel() else "others"


def rest(name: str, param: Tensor) -> bool:
    return name == "scale"


OPTIMIZERS: dict[str, tuple[Callable[[], Transform], int]] = {  # and how many packs the float32 parameters come to
    "sgd": (lambda: optim.sgd(0.1), 2),
    "momentum": (lambda: optim.sgd(0.1, momentum=0.9, weight_decay=0.1, decay=optim.matrices_only), 3),
    "adam": (lambda: optim.adam(0.1, betas=(optim.constant(0.9), 0.99)), 2),
    "adamw": (lambda: optim.adamw(optim.cosine(0.1, total=9), decay=optim.matrices_only), 3),
    "nadam": (lambda: optim.nadam(0.1), 2),
    "radam": (lambda: optim.radam(0.1, betas=(0.9, 0.9)), 2),
    "rmsprop": (lambda: optim.rmsprop(0.1, momentum=0.9, centered=True), 2),
    "adagrad": (lambda: optim.adagrad(0.1), 2),
    "lion": (lambda: optim.lion(0.1, weight_decay=0.1), 2),
    "lamb": (lambda: optim.lamb(0.1), 8),
    "adafactor": (lambda: optim.adafactor(0.1), 8),
    "partition": (
        lambda: optim.partition(by_kind, {"matrices": optim.muon(0.1), "others": optim.adamw(0.1, decay=rest)}),
        4,
    ),
    "chain": (lambda: optim.chain(optim.clip_by_global_norm(0.1), optim.clip_by_value(0.01), optim.adam(0.1)), 2),
    "adaptive": (lambda: optim.chain(optim.adaptive_clip(0.1), optim.sgd(0.1)), 8),
    "freeze": (lambda: optim.chain(optim.freeze(rest), optim.adamw(0.1)), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_does_the_same_to_packs(name: str) -> None:
    make, packs = OPTIMIZERS[name]
    optimizer = make()
    state = odd_state(optimizer)
    layout = Layout(state, optimizer)
    packed = layout.pack(state)
    assert sum(pack.dtype == torch.float32 for pack in packed.params.values()) == packs
    update, in_packs = (trainfn.update.Update(optimizer=each, ema=0.9) for each in (optimizer, layout.optimizer))
    own = torch.Generator().manual_seed(1)
    for _ in range(3):
        trained = {key: param for key, param in state.params.items() if param.requires_grad}
        grads = {key: torch.randn(p.shape, generator=own, dtype=p.dtype) for key, p in trained.items()}
        found = Gradients(
            grads=grads,
            total=torch.tensor(1.0),
            weight=torch.tensor(2.0),
            micro_batches=torch.tensor(1),
            buffers={key: buffer + 1 for key, buffer in state.buffers.items()},
        )
        state = update(evolve(state, params=map_named(lambda _, leaf: leaf, state.params)), found)
        state = evolve(state, params={k: p.requires_grad_(k in trained) for k, p in state.params.items()})
        after = layout.written(in_packs(layout.packs(packed), layout.joined(found)))
        packed = layout.copy(evolve(after, frozen=packed.frozen))
    views = layout.views(packed)
    for part in ("params", "buffers", "opt", "ema", "step"):
        left, right = dict(named_leaves(getattr(views, part))), dict(named_leaves(getattr(state, part)))
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_control_a_decay_that_is_not_bound_is_noticed() -> None:
    """A pack has one dimension: to ``matrices_only``, no matrix."""
    optimizer = optim.adamw(0.1, weight_decay=0.5, decay=optim.matrices_only)
    state = odd_state(optimizer)
    packed = Layout(state, optimizer).pack(state)
    zeros = {name: torch.zeros_like(pack) for name, pack in packed.params.items()}
    assert packed.params["nothing"].ndim == 1  # an empty matrix, and the matrix after it
    bound = Layout(state, optimizer).optimizer
    found = [
        chosen.update(zeros, packed.opt, packed.params, torch.tensor(0))[0]["nothing"].detach().abs().max()
        for chosen in (bound, optimizer)
    ]
    assert float(found[0]) > 0.0 == float(found[1])


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias.sum()


def odd_moments() -> Transform:
    """An optimizer of someone's own, that says it may be bound, and keeps one number for each parameter."""

    def update(grads: Any, state: Any, params: Any, step: Tensor) -> Any:
        size = {name: state["size"][name] + grad.abs().sum() for name, grad in grads.items()}
        return {name: -0.1 * grad / size[name] for name, grad in grads.items()}, {"size": size}

    plain = Transform(lambda params: {"size": {name: torch.zeros(()) for name in params}}, update, "odd_moments")
    return plain._replace(bind=lambda choose: plain)


def test_what_an_optimizer_keeps_in_another_shape_keeps_parameters_apart() -> None:
    optimizer = odd_moments()
    step = trainfn.make_step(model := Held(), loss="mse", optimizer=optimizer)
    state, batch = trainfn.init(model, optimizer), (torch.ones(2, 3), torch.zeros(2, 2))
    packed = Layout(state, optimizer).pack(state)
    assert {name: tuple(pack.shape) for name, pack in packed.params.items()} == {"weight": (3, 2), "bias": (4,)}
    found = trainfn.compile(step, mode="graph", backend="aot_eager")(state, batch)
    torch.testing.assert_close(found.params["weight"], step(state, batch).params["weight"])


@settings(max_examples=30)
@given(setups(mlps() | language_models()))
def test_any_state_survives_packing(setup: Setup) -> None:
    model = setup.net.model()
    state = setup.step(model)(setup.state(model), setup.batch())
    layout = Layout(state, setup.optimizer)
    assert digest(evolve(layout.views(layout.pack(state)), report=state.report, cursor=state.cursor)) == digest(state)
