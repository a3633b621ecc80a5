"""Frozen parameters: as if they were not there for every optimizer, clip and norm, and the same bits after any step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainfn import optim
from trainfn.errors import ConfigError
from trainfn.optim import Transform, adamw, chain, clip_by_global_norm, freeze, partition, sgd
from trainfn.state import Params
from trainfn.tree import digest, named_leaves

STEPS = 4


def backbone(name: str, param: Tensor) -> bool:
    return name.startswith("backbone.")


def matrices(name: str, param: Tensor) -> bool:
    return param.ndim == 2


def by_shape(name: str, param: Tensor) -> str:
    return "matrices" if param.ndim == 2 else "others"


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> Params:
    own = torch.Generator().manual_seed(seed)
    shapes = {"backbone.w": (3, 2), "backbone.b": (2,), "head.w": (2, 4), "head.b": (4,)}
    params = {name: torch.randn(shape, generator=own).to(dtype) for name, shape in shapes.items()}
    params["backbone.b"][0], params["backbone.w"][0, 0] = -0.0, 0.0
    return params


def only(names: list[str], tree: Params) -> Params:
    return {name: leaf for name, leaf in tree.items() if name in names}


OPTIMIZERS: dict[str, Callable[[], Transform]] = {
    "adamw": lambda: adamw(0.1, weight_decay=0.3),
    "sgd": lambda: sgd(0.1, momentum=0.9, weight_decay=0.3),
    "clipped": lambda: chain(clip_by_global_norm(0.1), optim.adaptive_clip(0.1), optim.adam(0.1)),
    "partition": lambda: partition(by_shape, {"matrices": optim.muon(0.1), "others": optim.lion(0.1)}),
    "adafactor": lambda: optim.adafactor(0.1, weight_decay=0.3),
    "scheduled": lambda: adamw(0.1, betas=(optim.linear(0.8, 0.9, total=9), 0.9), weight_decay=0.3),
    "nadam": lambda: optim.nadam(0.1, weight_decay=0.3),
}

# Places where freeze may stand; each leaves the head to the optimizer.
PLACES: dict[str, Callable[[Transform], Transform]] = {
    "first": lambda optimizer: chain(freeze(backbone), optimizer),
    "last": lambda optimizer: chain(optimizer, freeze(backbone)),
    "inside": lambda optimizer: chain(chain(freeze(backbone), clip_by_global_norm(1e9)), optimizer),
    "twice": lambda optimizer: chain(
        freeze(lambda name, param: name == "backbone.w"), freeze(lambda name, param: name == "backbone.b"), optimizer
    ),
    "labelled": lambda optimizer: partition(lambda name, _: name[:4], {"back": freeze(backbone), "head": optimizer}),
    "labelled chains": lambda optimizer: partition(
        lambda name, _: name[:4], {"back": chain(freeze(lambda *_: True), adamw(0.1)), "head": optimizer}
    ),
    "around": lambda optimizer: chain(freeze(backbone), partition(lambda *_: "all", {"all": optimizer})),
}


def trained(optimizer: Transform, names: list[str]) -> tuple[Params, Params, Any]:
    """Parameters, updates and state after some steps with gradients of ``names`` only."""
    params = only(names, numbers(0))
    state, updates = optimizer.init(params), {}
    for step in range(STEPS):
        updates, state = optimizer.update(only(names, numbers(1 + step)), state, params, torch.tensor(step))
        assert list(updates) == list(params)
        params = {name: param + updates[name] for name, param in params.items()}
    return params, updates, state


HEAD, ALL = ["head.w", "head.b"], list(numbers(0))


def check_frozen(optimizer: Transform, alone: Transform, given: list[str]) -> None:
    """Frozen ones keep their bits and have no state; the others move as if they were alone."""
    before, (params, updates, state) = only(given, numbers(0)), trained(optimizer, given)
    expected, _, own = trained(alone, HEAD)
    kept = [name for name in given if name not in HEAD]
    assert digest(only(kept, params)) == digest(only(kept, before)), "a frozen parameter moved"
    assert all(not updates[name].any() for name in kept), "an update of a frozen parameter is not 0"
    assert digest(only(HEAD, params)) == digest(expected), "the others do not move as alone"
    leaves = [name for name, _ in named_leaves(state)]
    assert not any("backbone" in name for name in leaves), "a frozen parameter has state"
    # The states of freeze and of clips are empty, so the leaves are those of the optimizer, wherever they stand.
    assert digest([leaf for _, leaf in named_leaves(state)]) == digest([leaf for _, leaf in named_leaves(own)])


@pytest.mark.parametrize("given", [ALL, HEAD], ids=["all given", "trained given"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_are_as_if_they_were_not_there(name: str, place: str, given: list[str]) -> None:
    check_frozen(PLACES[place](OPTIMIZERS[name]()), OPTIMIZERS[name](), given)


def masked(predicate: Callable[[str, Tensor], bool], zero: float = -0.0) -> Transform:
    """A freeze that only sets what passes it to zero and tells the chain nothing."""

    def update(grads: Params, state: Any, params: Params, step: Tensor) -> tuple[Params, Any]:
        return {
            name: torch.full_like(grad, zero) if predicate(name, params[name]) else grad for name, grad in grads.items()
        }, state

    return Transform(lambda params: (), update, "masked")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: adamw(0.1, weight_decay=0.3), "a frozen parameter moved"),
        (lambda: chain(masked(backbone), adamw(0.1, weight_decay=0.3)), "a frozen parameter moved"),
        (lambda: chain(adamw(0.1, weight_decay=0.3), masked(backbone, zero=0.0)), "a frozen parameter moved"),
        (lambda: chain(adamw(0.1, weight_decay=0.3), masked(backbone)), "a frozen parameter has state"),
        (lambda: chain(freeze(backbone), clip_by_global_norm(0.1), adamw(0.1)), "as alone"),
    ],
    ids=["none", "gradients only", "plus zero", "updates only", "another optimizer"],
)
def test_control_half_a_freeze_is_noticed(wrong: Callable[[], Transform], told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_frozen(wrong(), adamw(0.1, weight_decay=0.3), ALL)


def test_norms_are_those_of_the_others() -> None:
    params = {"backbone.w": torch.zeros(1), "head.w": torch.zeros(2)}
    grads = {"backbone.w": torch.full((1,), 1e6), "head.w": torch.tensor([3.0, 4.0])}
    for optimizer in (
        chain(freeze(backbone), clip_by_global_norm(1.0)),
        chain(clip_by_global_norm(1.0), freeze(backbone)),
    ):
        updates, _ = optimizer.update(grads, optimizer.init(params), params, torch.tensor(0))
        torch.testing.assert_close(updates["head.w"], torch.tensor([0.6, 0.8]))
    # The control: a clip that sees the frozen gradient leaves nothing of the other.
    blind = chain(clip_by_global_norm(1.0), masked(backbone))
    assert float(blind.update(grads, blind.init(params), params, torch.tensor(0))[0]["head.w"].norm()) < 1e-5


def test_a_frozen_gradient_that_is_not_a_number_stays_where_it_is() -> None:
    optimizer = chain(freeze(backbone), clip_by_global_norm(1.0), adamw(0.1))
    params, grads = numbers(0), numbers(1)
    grads["backbone.w"].fill_(float("nan"))
    updates, state = optimizer.update(grads, optimizer.init(params), params, torch.tensor(0))
    assert all(leaf.isfinite().all() for _, leaf in named_leaves((updates, state)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    optimizer, params = chain(freeze(backbone), adamw(0.1)), numbers(0, dtype)
    updates, _ = optimizer.update(numbers(1, dtype), optimizer.init(params), params, torch.tensor(0))
    assert {name: (leaf.dtype, leaf.shape) for name, leaf in updates.items()} == {
        name: (leaf.dtype, leaf.shape) for name, leaf in params.items()
    }


def test_a_transform_says_what_it_freezes() -> None:
    params = numbers(0)

    def frozen(optimizer: Transform) -> list[str]:
        assert optimizer.frozen is not None
        return [name for name, param in params.items() if optimizer.frozen(name, param)]

    assert frozen(freeze(backbone)) == ["backbone.w", "backbone.b"]
    assert frozen(chain(freeze(backbone), freeze(matrices), sgd(0.1))) == ["backbone.w", "backbone.b", "head.w"]
    parts = {"matrices": chain(freeze(backbone), sgd(0.1)), "others": sgd(0.1)}
    assert frozen(partition(by_shape, parts)) == ["backbone.w"]
    assert frozen(chain(partition(by_shape, parts), freeze(lambda name, _: name == "head.b"))) == [
        "backbone.w",
        "head.b",
    ]
    for optimizer in (sgd(0.1), chain(clip_by_global_norm(1.0), sgd(0.1)), partition(by_shape, {"matrices": sgd(0.1)})):
        assert optimizer.frozen is None


def test_a_label_without_a_transform_is_still_reported_by_init() -> None:
    optimizer = partition(by_shape, {"matrices": freeze(backbone)})
    assert optimizer.frozen is not None
    assert not optimizer.frozen("head.b", torch.zeros(4))
    with pytest.raises(ConfigError, match="no Transform"):
        optimizer.init(numbers(0))


def test_without_anything_frozen_nothing_is_another() -> None:
    optimizer = chain(freeze(lambda name, param: False), adamw(0.1))
    assert digest(trained(optimizer, ALL)[:2]) == digest(trained(chain(adamw(0.1)), ALL)[:2])


@pytest.mark.parametrize(
    "optimizer",
    [
        chain(freeze(lambda name, param: True), adamw(0.1)),
        chain(freeze(backbone), freeze(lambda name, param: not backbone(name, param)), adamw(0.1)),
        partition(by_shape, {"matrices": freeze(matrices), "others": freeze(lambda name, param: True)}),
        freeze(lambda name, param: True),
    ],
    ids=["chain", "two", "partition", "alone"],
)
def test_freezing_everything_is_refused_by_init(optimizer: Transform) -> None:
    with pytest.raises(ConfigError, match="nothing is left to train") as caught:
        optimizer.init(numbers(0))
    assert str(caught.value.where) == "backbone.w, backbone.b, head.w, head.b"
    assert str(caught.value.got) == optimizer.name
    assert caught.value.hint is not None


@pytest.mark.parametrize("wrong", [None, "backbone.", ["backbone.w"]])
def test_a_predicate_that_is_no_function_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"predicate a function of \(name, parameter\)") as caught:
        freeze(wrong)
    assert repr(wrong) in str(caught.value.got)


def test_the_name_says_what_is_frozen() -> None:
    assert freeze(backbone).name == "freeze(backbone)"
    assert chain(freeze(backbone), sgd(0.1)).name.startswith("chain(freeze(backbone), sgd(")


@pytest.mark.parametrize(("place", "given"), [("first", ALL), ("labelled", HEAD)])
def test_compiled_it_is_the_same_bit_for_bit(place: str, given: list[str]) -> None:
    optimizer = PLACES[place](chain(clip_by_global_norm(0.5), adamw(0.1)))
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.update, fullgraph=True, backend="aot_eager")
    assert digest(trained(optimizer._replace(update=compiled), given)) == digest(trained(optimizer, given))
