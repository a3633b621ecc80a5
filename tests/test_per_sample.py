"""Per-sample gradients, their norms and the noise scale: laws, what is refused, and controls of each refusal."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.strategies import (
    IGNORED,
    LmRecipe,
    MlpRecipe,
    Recipe,
    Tripled,
    few,
    language_models,
    mlps,
    relative_error,
    torch_warns_of_itself,
)
from trainfn.errors import CompileError, ConfigError, DataError, ModelError
from trainfn.grad import LossFn, make_gradients, make_loss
from trainfn.loss import LossSum, resolve
from trainfn.norms import norm
from trainfn.per_sample import (
    NoiseScale,
    compile_samples,
    merge_scales,
    noise_scale,
    per_sample_gradients,
    per_sample_norms,
)
from trainfn.state import Params
from trainfn.tree import digest

double = st.just(torch.float64)


def parts(net: Recipe) -> tuple[LossFn, Params, dict[str, Tensor]]:
    model = net.model()
    return make_loss(model, resolve(net.loss)), dict(model.named_parameters()), dict(model.named_buffers())


def right_backward(net: MlpRecipe) -> bool:
    return not net.wrong_backward


# ---------------------------------------------------------------- gradients


@settings(max_examples=40)
@given(
    mlps(batch_norm=False, dropout=False, dtype=double).filter(right_backward)
    | language_models(dropout=False, dtype=double),
    st.integers(1, 7),
    st.none() | st.integers(1, 8),
)
def test_their_sum_is_the_gradient_of_the_batch(net: Recipe, length: int, chunk_size: int | None) -> None:
    model, batch = net.model(), net.batch(length)
    whole = make_gradients(model, resolve(net.loss))(dict(model.named_parameters()), {}, batch)
    found = per_sample_gradients(*parts(net), batch, chunk_size=chunk_size)
    assert list(found.grads) == list(whole.grads)
    assert all(each.shape == (length, *whole.grads[name].shape) for name, each in found.grads.items())
    assert relative_error({name: each.sum(0) for name, each in found.grads.items()}, whole.grads) < 1e-12
    assert float((found.total.sum() - whole.total).abs()) <= 1e-12 * float(whole.total.abs())
    assert float(found.weight.sum()) == float(whole.weight)


@settings(max_examples=20)
@given(
    mlps(batch_norm=False, dropout=False, dtype=double).filter(right_backward)
    | language_models(dropout=False, dtype=double)
)
def test_each_is_the_gradient_of_a_batch_of_one(net: Recipe) -> None:
    model, batch = net.model(), net.batch(4)
    gradients = make_gradients(model, resolve(net.loss))
    found = per_sample_gradients(*parts(net), batch, chunk_size=3)
    norms = per_sample_norms(*parts(net), batch, chunk_size=3)
    for index in range(4):
        one = {name: leaf[index : index + 1] for name, leaf in batch.items()}
        alone = gradients(dict(model.named_parameters()), {}, one)
        assert relative_error({name: each[index] for name, each in found.grads.items()}, alone.grads) < 1e-12
        assert float(found.weight[index]) == float(alone.weight)
        torch.testing.assert_close(norms[index], norm(alone.grads), rtol=1e-12, atol=0.0)


def test_nothing_given_is_written_to_and_nothing_that_comes_back_requires_grad() -> None:
    net = MlpRecipe(dropout=0.3, frozen=("first.bias",))
    loss, params, buffers = parts(net)
    batch = net.batch()
    before = digest((params, buffers, batch))
    found = per_sample_gradients(loss, params, buffers, batch)
    noise_scale(loss, params, buffers, batch)
    assert digest((params, buffers, batch)) == before
    assert all(param.grad is None for param in params.values())
    assert "first.bias" not in found.grads
    assert not any(tensor.requires_grad for tensor in [*found.grads.values(), found.total, found.weight])


def test_they_are_the_same_under_no_grad() -> None:
    net = LmRecipe(tied=True)
    with torch.no_grad():
        inside = per_sample_gradients(*parts(net), net.batch())
    assert digest(inside) == digest(per_sample_gradients(*parts(net), net.batch()))


class Scaled(nn.Module):
    """Keeps a count, and takes a leaf without a batch dimension and one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1, 2))

    def forward(self, x: Tensor, factor: Tensor, power: int) -> Tensor:
        self.calls += 1
        self.last = x * self.weight
        return (x * self.weight) ** power * factor


def test_leaves_without_a_batch_dimension_go_to_each_example() -> None:
    model = Scaled()
    loss = make_loss(model, lambda outputs, batch: LossSum(total=outputs.sum(), weight=torch.ones(())))
    batch = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), "factor": torch.tensor(10.0), "power": 2}
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for chunk_size in (None, 2):
        found = per_sample_gradients(loss, params, buffers, batch, chunk_size=chunk_size)
        assert found.grads["weight"].tolist() == [[20.0, 80.0], [180.0, 320.0], [500.0, 720.0]]
        assert found.grads["unused"].tolist() == [[0.0] * 3] * 3
    assert float(buffers["calls"]) == 0.0


def test_each_example_has_draws_of_its_own_and_they_follow_the_global_generator() -> None:
    net = MlpRecipe(dropout=0.5, width=6)
    batch = {name: leaf[:1].expand(8, *leaf.shape[1:]) for name, leaf in net.batch().items()}
    torch.manual_seed(1)
    first = per_sample_norms(*parts(net), batch)
    torch.manual_seed(1)
    assert digest(per_sample_norms(*parts(net), batch)) == digest(first)
    assert float(first.max() - first.min()) > 1e-3
    plain = MlpRecipe(width=6)  # control: without dropout, equal examples have equal gradients
    same = per_sample_norms(*parts(plain), batch)
    assert float(same.max() - same.min()) < 1e-6


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that anything returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("measure", [per_sample_norms, noise_scale])
def test_a_chunk_bounds_what_is_held(measure: Any) -> None:
    net = MlpRecipe(width=32)
    arguments = (*parts(net), net.batch(24))
    with _Largest() as chunked:
        some = measure(*arguments, chunk_size=2)
    with _Largest() as unchunked:
        whole = measure(*arguments)
    assert chunked.numel == 2 * 32 * 32
    assert unchunked.numel == 24 * 32 * 32  # control
    torch.testing.assert_close(norm(some), norm(whole), rtol=1e-6, atol=0.0)


# ---------------------------------------------------------------- what is refused


class Threefold(torch.autograd.Function):
    """``Tripled`` as torch.func wants it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3.0


class Stopped(Threefold):
    """Has no gradient: autograd leaves it out of the graph, so nobody who looks there finds it."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)


class Through(nn.Module):
    def __init__(self, function: Any = None, only_in_training: bool = False) -> None:
        super().__init__()
        self.weight, self.function, self.only = nn.Parameter(torch.ones(2)), function, only_in_training

    def forward(self, x: Tensor) -> Tensor:
        outputs = x * self.weight
        if self.function is not None and (self.training or not self.only):
            outputs = outputs + self.function.apply(outputs)
        return outputs


class ThroughWeight(Through):
    """The same gradients, and a compiler that does not even stumble: here the Function maps over nothing."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.only:
            return x * (self.weight + self.function.apply(self.weight))
        return x * self.weight


class Around(Threefold):
    """Is called in a way of its own, which nobody who watches calls would see."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super(torch.autograd.Function, cls).apply(*args)


def summed(model: nn.Module) -> tuple[LossFn, Params, dict[str, Tensor]]:
    loss = make_loss(model, lambda outputs, batch: LossSum(total=outputs.sum(), weight=torch.ones(())))
    return loss, dict(model.named_parameters()), dict(model.named_buffers())


INPUTS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(("function", "factor"), [(None, 1.0), (Threefold, 4.0), (Stopped, 1.0)])
def test_uncompiled_a_custom_backward_is_called(function: Any, factor: float) -> None:
    found = per_sample_gradients(*summed(Through(function)), INPUTS)
    assert found.grads["weight"].tolist() == (factor * INPUTS).tolist()


@torch_warns_of_itself
@pytest.mark.parametrize("model", [Through, ThroughWeight])
@pytest.mark.parametrize("function", [Threefold, Stopped, Around])
def test_compiled_a_custom_backward_is_refused(model: type[Through], function: Any) -> None:
    loss, params, buffers = summed(model(function))
    with pytest.raises(ModelError, match=r"ignore the backward(?s:.)*where: " + function.__name__):
        per_sample_gradients(compile_samples(loss, backend="eager"), params, buffers, INPUTS)


@torch_warns_of_itself
@pytest.mark.parametrize(("function", "right"), [(Threefold, 4.0), (Stopped, 1.0)])
def test_control_torch_by_itself_ignores_it_without_a_word(function: Any, right: float) -> None:
    def total(weight: Tensor, x: Tensor) -> Tensor:
        return (x * (weight + function.apply(weight))).sum()

    differentiate = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))
    assert differentiate(torch.ones(2), INPUTS).tolist() == (right * INPUTS).tolist()
    found = torch.compile(differentiate, backend="aot_eager", fullgraph=True)(torch.ones(2), INPUTS)
    if found.tolist() == (right * INPUTS).tolist():
        pytest.skip(f"pytorch#193279 is mended in torch {torch.__version__}: the refusal may go")
    assert found.tolist() == (2.0 * INPUTS).tolist()


@torch_warns_of_itself
def test_what_is_compiled_later_is_looked_at_too() -> None:
    """A program is made anew when the model has changed; the Function in that one is found."""
    model = ThroughWeight(Threefold, only_in_training=True).eval()
    loss, params, buffers = summed(model)
    compiled = compile_samples(loss, backend="eager")
    assert per_sample_gradients(compiled, params, buffers, INPUTS).grads["weight"].tolist() == INPUTS.tolist()
    model.train()
    for _ in range(2):
        with pytest.raises(ModelError, match="Threefold"):
            per_sample_gradients(compiled, params, buffers, INPUTS)
    model.eval()
    assert per_sample_gradients(compiled, params, buffers, INPUTS).grads["weight"].tolist() == INPUTS.tolist()


@torch_warns_of_itself
def test_a_function_inside_a_compiled_submodule_is_refused_too() -> None:
    loss, params, buffers = summed(nn.Sequential(torch.compile(Through(Threefold), backend="aot_eager")))
    with pytest.raises(ModelError, match=r"where: .*CompiledFunction"):
        per_sample_gradients(compile_samples(loss, backend="eager"), params, buffers, INPUTS)


@torch_warns_of_itself
def test_a_function_whose_backward_does_not_matter_is_not_refused() -> None:
    """On data or under no_grad it has no backward: compiled or not, nothing is lost."""

    class Prepared(Through):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                shift = Threefold.apply(self.weight)
            return Threefold.apply(x) * self.weight + shift

    loss, params, buffers = summed(Prepared())
    found = per_sample_gradients(compile_samples(loss, backend="eager"), params, buffers, INPUTS)
    assert found.grads["weight"].tolist() == INPUTS.tolist()


class WithoutRule(Threefold):
    generate_vmap_rule = False


@pytest.mark.parametrize("function", [Tripled, WithoutRule])
def test_a_function_that_torch_func_cannot_take_is_named(function: Any) -> None:
    with pytest.raises(ModelError, match=f"where: {function.__name__}\n  expected: setup_context(?s:.)*vmap") as caught:
        per_sample_gradients(*summed(Through(function)), INPUTS)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert per_sample_gradients(*summed(Through(Threefold)), INPUTS)  # control


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("measure", [per_sample_gradients, per_sample_norms, noise_scale])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_somebody_elses_compilation_is_refused(measure: Any, fullgraph: bool) -> None:
    loss, params, buffers = summed(Through())

    def around(x: Tensor) -> Any:
        return measure(loss, params, buffers, x + 0.0)

    assert around(INPUTS) is not None  # control
    # Where nothing may break the graph, the compiler's own error quotes the line that refuses.
    expected = torch._dynamo.exc.Unsupported if fullgraph else ModelError
    with (
        _fresh_compiler(),
        pytest.raises(expected, match=r"(?i)per-sample gradients are (being traced|no part of a compiled)"),
    ):
        torch.compile(around, backend="eager", fullgraph=fullgraph)(INPUTS)


class Normed(nn.Module):
    def __init__(self, *norms: nn.Module) -> None:
        super().__init__()
        self.first, self.norms = nn.Linear(2, 4), nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)[:, :, None]  # (B, 4, 1)
        for layer in self.norms:
            hidden = layer(hidden.expand(-1, -1, 2))
        return hidden


@pytest.mark.parametrize("compiled", [False, True])
def test_batch_norm_in_training_mode_is_refused_by_name(compiled: bool) -> None:
    plain = nn.BatchNorm1d(4, affine=False)
    bare = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
    model = Normed(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), plain, bare)
    loss, params, buffers = summed(model)
    given_loss = compile_samples(loss, backend="eager") if compiled else loss
    with pytest.raises(ModelError, match=r"BatchNorm(?s:.)*where: norms.0, norms.2, a nameless one"):
        per_sample_gradients(given_loss, params, buffers, INPUTS)
    bare.train(False)  # it has no running statistics: it takes the batch's in either mode
    with pytest.raises(ModelError, match="a nameless one"):
        per_sample_gradients(given_loss, params, buffers, INPUTS)


def test_batch_norm_in_evaluation_mode_is_not_refused_and_neither_are_other_norms() -> None:
    model = Normed(nn.BatchNorm1d(4).eval(), nn.InstanceNorm1d(4), nn.GroupNorm(2, 4)).double()
    loss, params, buffers = summed(model)
    whole = make_gradients(model, lambda outputs, batch: LossSum(total=outputs.sum(), weight=torch.ones(())))
    right = whole(params, buffers, INPUTS.double())
    found = per_sample_gradients(loss, params, buffers, INPUTS.double())
    assert float(norm({name: each.sum(0) - right.grads[name] for name, each in found.grads.items()})) < 1e-12


class Reading(Through):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (x.sum().item() if self.only else 1.0)


class Branching(Through):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if x.sum() > 0 else -x * self.weight


class Keeping(Through):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.sum(0)
        return x * self.weight


@pytest.mark.parametrize(
    "model", [Reading(only_in_training=True), Branching(), Keeping()], ids=lambda m: type(m).__name__
)
def test_what_torch_func_cannot_map_is_refused_with_its_cause(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="cannot be differentiated by example") as caught:
        per_sample_gradients(*summed(model), INPUTS)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_mistake_in_the_batch_shows_as_itself() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        per_sample_gradients(*summed(nn.Linear(3, 1)), INPUTS)
    loss, params, buffers = summed(nn.Linear(3, 1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        per_sample_gradients(compile_samples(loss, backend="eager"), params, buffers, INPUTS)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        heads = (x * self.weight).unflatten(-1, (2, 4)).transpose(1, 2)  # (B, 2, T, 4)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_is_differentiated_without_a_warning(compiled: bool) -> None:
    model, x = Attention(), torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, params, buffers = summed(model)
    whole = make_gradients(model, lambda outputs, batch: LossSum(total=outputs.sum(), weight=torch.ones(())))
    found = per_sample_gradients(compile_samples(loss, backend="aot_eager") if compiled else loss, params, buffers, x)
    assert relative_error(found.grads["weight"].sum(0), whole(params, buffers, x).grads["weight"]) < 1e-12


def test_control_attention_by_itself_warns() -> None:
    x = torch.ones(3, 1, 2, 5, 4)
    attend = torch.func.vmap(torch.func.grad(lambda x: F.scaled_dot_product_attention(x, x, x).sum()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attend(x)
    if not caught:
        pytest.skip(f"torch {torch.__version__} maps its fused attention: per_sample need not leave it out")
    assert "performance drop" in str(caught[0].message)


def test_what_cannot_be_asked_is_refused() -> None:
    loss, params, buffers = summed(Through())
    for wrong in (0, -1, True, 2.0):
        with pytest.raises(ConfigError, match="chunk_size"):
            per_sample_norms(loss, params, buffers, INPUTS, chunk_size=wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no example"):
        per_sample_norms(loss, params, buffers, INPUTS[:0])
    frozen = {"weight": torch.ones(2)}
    for given_loss in (loss, compile_samples(loss, backend="eager")):
        with pytest.raises(ModelError, match="does not depend on any trained parameter"):
            per_sample_norms(given_loss, frozen, buffers, INPUTS)


# ---------------------------------------------------------------- compiled


@settings(few, max_examples=2)
@given(
    mlps(batch_norm=False, dropout=False, dtype=double).filter(right_backward)
    | language_models(dropout=False, dtype=double)
)
def test_compiled_they_are_the_same(net: Recipe) -> None:
    loss, params, buffers = parts(net)
    compiled = compile_samples(loss, backend="aot_eager")
    for length in (3, 2):
        batch = net.batch(length)
        right = per_sample_gradients(loss, params, buffers, batch)
        found = per_sample_gradients(compiled, params, buffers, batch)
        assert relative_error(found.grads, right.grads) < 1e-12
        assert digest(found.weight) == digest(right.weight)


@pytest.mark.slow
def test_compiled_by_the_default_backend_with_dropout() -> None:
    net = MlpRecipe(dropout=0.5)
    loss, params, buffers = parts(net)
    compiled = compile_samples(loss)
    batch = {name: leaf[:1].expand(8, *leaf.shape[1:]) for name, leaf in net.batch().items()}
    norms = per_sample_norms(compiled, params, buffers, batch)
    assert float(norms.max() - norms.min()) > 1e-3
    assert norms.tolist() != per_sample_norms(compiled, params, buffers, batch).tolist()


def test_to_look_before_compiling_draws_nothing() -> None:
    net = MlpRecipe(dropout=0.5)
    loss, params, buffers = parts(net)
    compiled = compile_samples(loss, backend="eager")
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(per_sample_norms(compiled, params, buffers, net.batch()).tolist())
    assert found[0] == found[1]


def test_what_does_not_compile_as_one_program_is_said_so() -> None:
    class Broken(Through):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x * self.weight

    loss, params, buffers = summed(Broken())
    with pytest.raises(CompileError, match="do not compile as one program"):
        per_sample_gradients(compile_samples(loss, backend="eager"), params, buffers, INPUTS)
    assert per_sample_gradients(loss, params, buffers, INPUTS)


# ---------------------------------------------------------------- the noise scale


class Dot(nn.Module):
    """``g[i]`` is the sum of the tokens that count: gradients are made to order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float64))

    def forward(self, g: Tensor) -> Tensor:
        return g @ self.weight


def measure(g: Tensor, w: Tensor, chunk_size: int | None = None) -> NoiseScale:
    model = Dot(g.shape[1])
    loss = make_loss(model, lambda outputs, batch: LossSum(total=outputs.sum(), weight=batch["w"].sum()))
    return noise_scale(loss, dict(model.named_parameters()), {}, {"g": g, "w": w}, chunk_size=chunk_size)


def oracle(g: Tensor, w: Tensor) -> tuple[float, float, float]:
    """The equations at the top of the module, pair by pair."""
    kept = [index for index in range(len(w)) if float(w[index]) > 0]
    g, w = g[kept], w[kept]
    count, total = len(kept), float(w.sum())
    if not count:
        return 0.0, 0.0, 0.0
    residuals = g - w[:, None] * g.sum(0) / total
    pairs = sum(float(g[i] @ g[j]) for i, j in itertools.permutations(range(count), 2))
    trace = (count / total) ** 2 * float(residuals.square().sum())
    return trace, pairs * count / total**2, count * (1.0 - float(w.square().sum()) / total**2)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=7), st.integers(1, 4), st.integers(0, 999), st.none() | st.just(2)
)
def test_it_is_what_its_equations_say(weights: list[int], width: int, seed: int, chunk_size: int | None) -> None:
    own = torch.Generator().manual_seed(seed)
    w = torch.tensor(weights, dtype=torch.float64)
    g = torch.randn(len(w), width, generator=own, dtype=torch.float64) + w[:, None]
    g[w == 0] = torch.nan  # what is excluded may hold anything
    found = measure(g, w, chunk_size)
    right = oracle(g, w)
    assert (float(found.trace), float(found.squared_norm), float(found.weight)) == pytest.approx(
        right, rel=1e-10, abs=1e-10
    )
    assert all(
        leaf.dtype == torch.float64 and leaf.ndim == 0 for leaf in (found.trace, found.squared_norm, found.weight)
    )


@settings(max_examples=12)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 999))
def test_its_expectations_are_exact(weights: list[int], seed: int) -> None:
    """All 2^B outcomes of noise that is +s[i] or -s[i] with equal chances, averaged: no statistical error is left."""
    own = torch.Generator().manual_seed(seed)
    w = torch.tensor(weights, dtype=torch.float64)
    mean = torch.randn(3, generator=own, dtype=torch.float64)
    direction = torch.randn(len(w), 3, generator=own, dtype=torch.float64)
    in_proportion = F.normalize(direction, dim=1) * w.sqrt()[:, None]  # |s[i]|^2 = w[i]
    for spread in (in_proportion, direction):
        sums = NoiseScale(trace=torch.zeros(()), squared_norm=torch.zeros(()), weight=torch.zeros(()))
        for signs in itertools.product((-1.0, 1.0), repeat=len(w)):
            noise = spread * torch.tensor(signs, dtype=torch.float64)[:, None]
            sums = merge_scales(sums, measure(w[:, None] * mean + noise, w))
        squared = float(sums.squared_norm / sums.weight)
        assert squared == pytest.approx(float(mean @ mean), rel=1e-10)  # whatever the variances
        trace = len(w) * float(spread.square().sum()) / float(w.sum()) ** 2
        if spread is in_proportion or len(set(weights)) == 1:
            assert float(sums.trace / sums.weight) == pytest.approx(trace, rel=1e-10)


def test_synthetic_gradients_of_known_noise() -> None:
    """Sigma = diag(1, 4, 9), |G|^2 = 0.14: B_simple = 100 examples, from 2,000 batches of 32."""
    own = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mean = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    trace, squared, size, batches = 14.0, 0.14, 32, 2000
    rows = []
    for _ in range(batches):
        g = mean + spread * torch.randn(size, 3, generator=own, dtype=torch.float64)
        found = measure(g, torch.ones(size, dtype=torch.float64))
        rows.append(
            (float(found.trace) / (size - 1), float(found.squared_norm) / (size - 1), float(g.mean(0) @ g.mean(0)))
        )
    table = torch.tensor(rows, dtype=torch.float64)
    (traces, norms, naive), errors = table.mean(0).tolist(), (table.std(0) / math.sqrt(batches)).tolist()
    assert abs(traces - trace) < 4 * errors[0] < 0.02 * trace
    assert abs(norms - squared) < 4 * errors[1] < 0.4 * squared
    # Control: without the correction |G|^2 is too large by trace / B = 0.4375, 3 times itself, and the scale is 24.
    assert naive == pytest.approx(squared + trace / size, rel=0.05)
    assert traces / naive == pytest.approx(24.2, rel=0.05)
    assert abs(naive - squared) > 30 * errors[2]


def test_examples_of_different_weight() -> None:
    """Tokens ~ N(mean, 1), an example is 1 to 9 of them: tr Sigma = P / E n, and lengths are no noise."""
    own = torch.Generator().manual_seed(0)
    mean = torch.tensor([2.0, -1.0], dtype=torch.float64)
    sums, equal = None, None
    for _ in range(400):
        w = torch.randint(1, 10, (12,), generator=own).double()
        g = w[:, None] * mean + w.sqrt()[:, None] * torch.randn(12, 2, generator=own, dtype=torch.float64)
        found, control = measure(g, w), measure(g, torch.ones_like(w))
        sums = found if sums is None else merge_scales(sums, found)
        equal = control if equal is None else merge_scales(equal, control)
    assert sums is not None
    assert equal is not None
    assert float(sums.trace / sums.weight) == pytest.approx(2 / 5, rel=0.06)
    assert float(sums.squared_norm / sums.weight) == pytest.approx(5.0, rel=0.02)
    assert float(sums.scale) == pytest.approx(2 / 5 / 5.0, rel=0.06)
    # Control: examples taken as equal count the spread of their lengths (variance 20 / 3) as noise: 1.73 for 0.08.
    assert float(equal.scale) == pytest.approx((2 * 5 + 5 * 20 / 3) / (25 * 5), rel=0.2)


def test_too_few_examples_say_nothing() -> None:
    for w in ([1.0], [0.0], [0.0, 3.0], [0.0, 0.0]):
        found = measure(torch.ones(len(w), 2, dtype=torch.float64), torch.tensor(w, dtype=torch.float64))
        assert (float(found.trace), float(found.squared_norm), float(found.weight)) == (0.0, 0.0, 0.0)


def test_labels_that_do_not_count_leave_an_example_out() -> None:
    net = MlpRecipe(dtype=torch.float64)
    batch = net.batch(12)
    kept = batch["y"] != IGNORED
    assert not bool(kept.all())
    found = noise_scale(*parts(net), batch, chunk_size=5)
    right = noise_scale(*parts(net), {name: leaf[kept] for name, leaf in batch.items()})
    assert float(found.scale) == pytest.approx(float(right.scale), rel=1e-10)
    assert float(found.weight) == float(kept.sum()) - 1.0


def test_merging_is_a_ratio_of_means() -> None:
    one, two = (
        measure(torch.eye(2).double(), torch.ones(2).double()),
        measure(torch.ones(3, 2).double(), torch.ones(3).double()),
    )
    both = merge_scales(one, two)
    assert float(both.scale) == float((one.trace + two.trace) / (one.squared_norm + two.squared_norm))
    assert math.isinf(float(one.scale))  # control: the mean of the ratios is no number at all
