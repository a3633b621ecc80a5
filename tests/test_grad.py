"""Gradients: what is differentiated, what is left alone, and buffers on their way through."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainfn
from tests.strategies import LmRecipe, MlpRecipe, Recipe, language_models, mlps
from trainfn.errors import ModelError
from trainfn.grad import Gradients, fold, make_gradients, make_loss, merge
from trainfn.loss import LossSum, resolve
from trainfn.optim import sgd
from trainfn.state import Params
from trainfn.tree import digest


def plain_sum(outputs: Tensor, batch: Any) -> LossSum:
    return LossSum(total=outputs.sum(), weight=torch.ones(()))


def parameters(model: nn.Module) -> Params:
    return dict(model.named_parameters())


@settings(max_examples=40)
@given(mlps(dropout=False) | language_models(dropout=False))
def test_they_are_those_of_backward_on_the_model_itself(net: Recipe) -> None:
    model, twin, batch = net.model(), net.model(), net.batch()
    loss = resolve(net.loss)
    found = make_gradients(model, loss)(parameters(model), dict(model.named_buffers()), batch)
    outputs = twin(batch["x"]) if isinstance(net, MlpRecipe) else twin(batch["input_ids"])
    total = loss(outputs, batch).total
    total.backward()
    right = {name: param.grad for name, param in twin.named_parameters() if param.requires_grad}
    assert digest(found.grads) == digest(right)
    assert digest(found.total) == digest(total)
    assert digest(found.buffers) == digest(dict(twin.named_buffers()))
    assert list(found.grads) == [name for name, param in twin.named_parameters() if param.requires_grad]


def test_nothing_that_comes_back_requires_grad() -> None:
    net = MlpRecipe(blocks=("batch_norm",))
    model = net.model()
    found = make_gradients(model, resolve(net.loss))(parameters(model), dict(model.named_buffers()), net.batch())
    tensors = [*found.grads.values(), *found.buffers.values(), found.total, found.weight]
    assert not any(tensor.requires_grad for tensor in tensors)


class Twice(nn.Module):
    """One matrix, used twice, the second time in what is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(weakref.ref(self.weight))
        return checkpoint(lambda y: (y @ self.weight).tanh(), x @ self.weight, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("least", "is_held"), [(0, False), (2**20, True)])
def test_a_large_copy_in_16_bits_is_gone_before_its_gradient_is_converted(
    least: int, is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is that of a small one, which is held until the end."""
    monkeypatch.setattr("trainfn.forward._LARGE", least)
    model, x, alive = Twice(), torch.ones(3, 16), []
    params = {"weight": model.weight.detach().requires_grad_()}
    params["weight"].register_hook(lambda gradient: alive.append(model.seen[0]() is not None))
    found = make_gradients(model, plain_sum, "bf16-mixed")(params, {}, (x, x))
    assert alive == [is_held]
    assert model.weight.dtype == torch.float32
    low, y = params["weight"].bfloat16(), x.bfloat16()
    right = torch.autograd.grad(((y @ low) @ low).tanh().float().sum(), params["weight"])
    assert digest(found.grads["weight"]) == digest(right[0])


def test_under_no_grad_they_are_the_same() -> None:
    net = LmRecipe(tied=True)
    model = net.model()
    gradients = make_gradients(model, resolve(net.loss))
    with torch.no_grad():
        inside = gradients(parameters(model), {}, net.batch())
    assert digest(inside) == digest(gradients(parameters(model), {}, net.batch()))


def test_a_tied_weight_has_one_gradient_from_both_its_places() -> None:
    net = LmRecipe(tied=True, dtype=torch.float64)
    model, apart = net.model(), net.model()
    apart.head.weight = nn.Parameter(apart.embedding.weight.detach().clone())
    loss, batch = resolve(net.loss), net.batch()
    found = make_gradients(model, loss)(parameters(model), {}, batch).grads
    both = make_gradients(apart, loss)(parameters(apart), {}, batch).grads
    assert "head.weight" not in found
    torch.testing.assert_close(found["embedding.weight"], both["embedding.weight"] + both["head.weight"])


def test_the_state_is_applied_and_not_the_model() -> None:
    """The model's own tensors may be anything: only its forward is used."""
    net = MlpRecipe(blocks=("batch_norm",))
    model = net.model()
    gradients = make_gradients(model, resolve(net.loss))
    params = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    right = digest(gradients(params, buffers, net.batch()))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    assert digest(gradients(params, buffers, net.batch())) == right


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used * x


def test_a_parameter_without_influence_has_a_gradient_of_zeros() -> None:
    model = Unused()
    found = make_gradients(model, plain_sum)(parameters(model), {}, torch.ones(4, 2))
    assert found.grads["used"].tolist() == [4.0, 4.0]
    assert found.grads["unused"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, batch: outputs.detach().mean(),
        lambda outputs, batch: LossSum(total=torch.ones(()), weight=torch.ones(())),
    ],
)
def test_a_loss_that_depends_on_nothing_trained_is_refused(loss: Any) -> None:
    model = Unused()
    with pytest.raises(ModelError, match="does not depend on any trained parameter"):
        make_gradients(model, loss)(parameters(model), {}, torch.ones(4, 2))


class Counter(nn.Module):
    """Keeps its buffers the ways that people do: in place, by assignment, and as another dtype's neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(1), persistent=False)
        self.register_buffer("untouched", torch.full((2,), 5.0))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.assigned = self.assigned + 1
        self.largest = torch.maximum(self.largest, (self.weight * x).amax())
        return self.weight * x


def test_buffers_changed_in_any_way_come_back() -> None:
    model = Counter()
    buffers = dict(model.named_buffers())
    gradients = make_gradients(model, plain_sum)
    found = fold(gradients, parameters(model), buffers, [torch.full((1, 1), value) for value in (2.0, 9.0, 4.0)])
    after = {name: buffer.tolist() for name, buffer in found.buffers.items()}
    assert after == {"in_place": 3.0, "assigned": 3, "largest": [9.0], "untouched": [5.0, 5.0]}
    assert digest(dict(model.named_buffers())) == digest(dict(Counter().named_buffers()))
    assert not found.buffers["largest"].requires_grad
    assert float(found.total) == 15.0


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("donate", [False, True])
def test_buffers_changed_in_any_way_come_back_from_a_step(backend: str | None, donate: bool) -> None:
    model, optimizer = Counter(), sgd(0.0)
    plain = trainfn.make_step(model, loss=plain_sum, optimizer=optimizer, accumulate=2)
    mode = "eager" if backend is None else "graph"
    step = trainfn.compile(plain, mode=mode, donate=donate, backend=backend or "eager")
    state = trainfn.init(model, optimizer)
    for high in (3.0, 8.0, 1.0):
        state = step(state, torch.tensor([[high], [0.5]]))
    after = {name: buffer.tolist() for name, buffer in state.buffers.items()}
    assert after == {"in_place": 6.0, "assigned": 6, "largest": [8.0], "untouched": [5.0, 5.0]}
    assert digest(dict(model.named_buffers())) == digest(dict(Counter().named_buffers()))


def test_make_loss_changes_the_buffers_it_is_given() -> None:
    model = Counter()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    make_loss(model, plain_sum)(parameters(model), buffers, torch.ones(1, 1))
    assert (float(buffers["in_place"]), int(buffers["assigned"])) == (1.0, 1)


def test_fold_of_one_is_that_one_and_of_more_their_merge() -> None:
    net = LmRecipe()
    model = net.model()
    gradients = make_gradients(model, resolve(net.loss))
    one, two = (gradients(parameters(model), {}, net.batch(3, seed)) for seed in (1, 2))
    assert digest(fold(gradients, parameters(model), {}, [net.batch(3, 1)])) == digest(one)
    both = fold(gradients, parameters(model), {}, [net.batch(3, 1), net.batch(3, 2)])
    assert digest(both) == digest(merge(one, two))
    assert isinstance(both, Gradients)
