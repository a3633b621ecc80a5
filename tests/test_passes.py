"""What is rewritten in a program: scalars are computed once and not in loops; small biases are added in loops;
large products are oneDNN's; and ``1 + tanh`` is a logistic function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._functorch import config as autograd_config
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import remove_noop_ops
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import trainfn
import trainfn.engine.products
import trainfn.engine.program
from trainfn.engine.biases import add_biases_late
from trainfn.engine.passes import passes
from trainfn.engine.products import multiply_by_onednn
from trainfn.engine.tanh import add_tanh_as_sigmoid
from trainfn.state import TrainState


def calls_in_loops(source: str, function: str) -> int:
    """Count the calls of a C++ function that are inside a ``for``."""
    depth, loops, count = 0, [], 0
    for line in source.splitlines():
        text = line.strip()
        if text.startswith("for("):
            loops.append(depth)
        count += bool(loops) and function in text
        depth += text.count("{") - text.count("}")
        while loops and text.endswith("}") and depth <= loops[-1]:
            loops.pop()
    return count


def compiled_step() -> tuple[TrainState, TrainState, str]:
    """Return the states after three eager steps and after three compiled ones, and the C++ of these."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    batch = torch.randn(4, 64), torch.randn(4, 64)
    optimizer = trainfn.optim.adamw(trainfn.optim.warmup_cosine(0.01, warmup=2, total=9))
    plain = trainfn.make_step(model, loss="mse", optimizer=optimizer, clip_norm=0.1, ema=0.9)
    state = trainfn.init(model, optimizer, ema=True)
    eager = plain(plain(plain(state, batch), batch), batch)
    step = trainfn.compile(plain, mode="graph")
    # The source is seen when it is made, and not when it is found.
    with inductor_config.patch(fx_graph_cache=False), autograd_config.patch(enable_autograd_cache=False):
        first, sources = run_and_get_code(step, state, batch)
    return eager, step(step(first, batch), batch), "\n".join(sources)


def test_schedules_and_corrections_are_not_in_loops_and_biases_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is Inductor by itself, which calls ``cos`` for every few parameters, and ``addmm``."""
    monkeypatch.setattr(trainfn.engine.program, "SMALL", 0)  # a wrapper in Python is compiled sooner
    eager, found, source = compiled_step()
    assert "std::cos" in source
    assert "std::expm1" in source
    assert calls_in_loops(source, "std::cos") == calls_in_loops(source, "std::expm1") == 0
    assert "addmm" not in source
    for name, param in eager.params.items():
        torch.testing.assert_close(found.params[name], param)
        torch.testing.assert_close(found.ema[name], eager.ema[name])  # type: ignore[index]

    monkeypatch.setattr(trainfn.engine.program, "passes", lambda: None)
    source = compiled_step()[2]
    assert calls_in_loops(source, "std::cos") > 0
    assert "addmm" in source


def rewritten(made: torch.fx.GraphModule, rewrite: Callable[[torch.fx.Graph], None], *targets: Any) -> int:
    """Rewrite a graph, in a way that holds together; return how many of its nodes still call one of the targets."""
    rewrite(made.graph)
    made.graph.lint()
    made.recompile()
    return sum(node.target in targets for node in made.graph.nodes)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x, weight)


@pytest.mark.parametrize(
    ("fn", "rows", "dtype", "left"),
    [
        (lambda *given: linear(*given).tanh(), 4, torch.float32, 0),
        (lambda *given: linear(*given).view(2, -1).sum([1]), 4, torch.float64, 0),
        (lambda *given: (linear(*given).exp(), linear(*given).permute(1, 0).neg()), 4, torch.float32, 0),
        (lambda *given: linear(*given), 4, torch.float32, 1),  # the caller reads it
        (lambda *given: linear(*given) @ given[1], 4, torch.float32, 1),  # another product does
        (lambda *given: (y := linear(*given)).tanh() @ y.view(8, -1), 4, torch.float32, 1),  # does, too
        (lambda *given: torch.addmm(given[2], *given[:2], beta=0.5).tanh(), 4, torch.float32, 1),
        (lambda *given: linear(*given).tanh(), 4, torch.bfloat16, 1),
        (lambda *given: linear(*given).tanh(), 2**16, torch.float32, 1),
    ],
)
def test_a_bias_is_added_where_its_sum_is_read(
    fn: Callable[..., Any], rows: int, dtype: torch.dtype, left: int
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(rows, 8, dtype=dtype), torch.randn(8, 8, dtype=dtype), torch.randn(8, dtype=dtype)]
    made = make_fx(fn, tracing_mode="fake")(*given)
    assert rewritten(made, add_biases_late, torch.ops.aten.addmm.default) == left
    torch.testing.assert_close(made(*given), fn(*given))


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x, weight.t())


@pytest.mark.parametrize(
    ("fn", "rows", "dtype", "left"),
    [
        (product, 1, torch.float32, 0),
        (product, 64, torch.float32, 0),
        (lambda x, weight, bias: x @ weight.t(), 64, torch.float32, 0),
        (lambda x, weight, bias: x @ weight[:, :24], 64, torch.float32, 1),  # neither of them lies in memory so
        (lambda x, weight, bias: x @ weight.clone(), 64, torch.float32, 0),
        (lambda x, weight, bias: x @ weight.clone(), 1, torch.float32, 1),  # few rows, and a matrix that lies across
        (lambda x, weight, bias: x[:32].clone().t() @ weight, 32, torch.float32, 1),  # the gradient of a weight
        (product, 64, torch.float64, 1),
        (product, 64, torch.bfloat16, 1),
        (product, 63, torch.float32, 1),  # too small
        (lambda x, weight, bias: torch.addmm(bias, x, weight.t(), beta=2.0), 64, torch.float32, 1),
        (lambda x, weight, bias: torch.addmm(x.clone(), x, weight.t()), 64, torch.float32, 1),
        (lambda x, weight, bias: torch.addmm(bias[:1], x, weight.t()), 64, torch.float32, 1),
        (lambda x, weight, bias: torch.addmm(bias[:1].expand(32), x, weight.t()), 64, torch.float32, 0),
    ],
)
def test_large_products_are_onednns(
    fn: Callable[..., Any], rows: int, dtype: torch.dtype, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainfn.engine.products, "_LEAST", 64 * 32 * 32 if rows > 1 else 1)
    torch.manual_seed(0)
    given = [torch.randn(rows, 32, dtype=dtype), torch.randn(32, 32, dtype=dtype), torch.randn(32, dtype=dtype)]
    made = make_fx(fn, tracing_mode="fake")(*given)
    assert rewritten(made, multiply_by_onednn, torch.ops.aten.addmm.default, torch.ops.aten.mm.default) == left
    if torch.backends.mkldnn.is_available():
        torch.testing.assert_close(made(*given), fn(*given))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.sampled_from(["whole", "turned", "part", "spread"])] * 3))
def test_onednn_reads_what_lies_in_any_way(sizes: tuple[int, int, int], lies: tuple[str, str, str]) -> None:
    rows, inner, columns = sizes

    def laid(shape: tuple[int, ...], how: str) -> torch.Tensor:
        values = torch.randn(shape)
        if how == "turned" and values.ndim == 2:
            return values.T.contiguous().T
        if how == "part":  # of something larger
            return torch.randn([2 * size for size in shape])[tuple(slice(0, 2 * size, 2) for size in shape)]
        return values[..., :1].expand(shape) if how == "spread" else values

    x, weight = laid((rows, inner), lies[0]), laid((columns, inner), lies[1])
    for bias in (None, laid((columns,), lies[2])):
        right = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(torch.ops.trainfn.linear(x, weight, bias).double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("small", [0, 2**20])
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_a_step_by_onednn_is_the_step(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the wrapper in Python and the one in C++."""
    monkeypatch.setattr(trainfn.engine.program, "SMALL", small)
    monkeypatch.setattr(trainfn.engine.products, "_LEAST", 1)
    monkeypatch.setattr(trainfn.engine.products, "is_faster", lambda: True)
    eager, found, source = compiled_step()
    assert re.search(r"trainfn(\.|::)linear", source)
    for name, param in eager.params.items():
        torch.testing.assert_close(found.params[name], param)


@pytest.mark.parametrize(
    ("vendor", "is_faster"), [("vendor_id\t: AuthenticAMD", True), ("vendor_id\t: GenuineIntel", False), ("", False)]
)
def test_onednn_is_for_processors_that_are_not_intels(
    vendor: str, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: f"processor\t: 0\n{vendor}\n")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    there = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    assert trainfn.engine.products.is_faster.__wrapped__() == (is_faster and there)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert not trainfn.engine.products.is_faster.__wrapped__()


def by_hand(x: torch.Tensor) -> torch.Tensor:
    """GELU as transformers writes it out for GPT-2."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def with_gradient(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    def both(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = fn(x)
            return [value.detach(), *torch.autograd.grad(value.sum(), x)]

    return both


@pytest.mark.parametrize(
    ("fn", "dtype", "left"),
    [
        (by_hand, torch.float32, 0),
        (lambda x: F.gelu(x, approximate="tanh"), torch.float64, 0),
        (lambda x: F.gelu(x, approximate="tanh"), torch.bfloat16, 0),  # computed in float32
        (torch.tanh, torch.float32, 1),  # near 0 all of its digits count
        (lambda x: (y := x.tanh()) + (1.0 + y), torch.float32, 1),
        (lambda x: 2.0 + x.tanh(), torch.float32, 1),
        (lambda x: 1.0 + x.tanh(), torch.float16, 1),
    ],
)
def test_tanh_beside_one_is_a_logistic_function(fn: Callable[..., Any], dtype: torch.dtype, left: int) -> None:
    x = torch.linspace(-12.0, 12.0, 97).to(dtype)
    made = make_fx(with_gradient(fn), decomposition_table=select_decomp_table(), tracing_mode="fake")(x)
    remove_noop_ops(made.graph)
    assert rewritten(made, add_tanh_as_sigmoid, torch.ops.aten.tanh.default) == left
    torch.testing.assert_close(made(x), with_gradient(fn)(x))


def test_what_is_rewritten_has_more_digits_where_tanh_is_near_minus_one() -> None:
    """The control is PyTorch's own."""
    x = torch.linspace(-5.0, -3.0, 64)
    right = F.gelu(x.double(), approximate="tanh")
    gelu = partial(F.gelu, approximate="tanh")

    def error(found: torch.Tensor) -> float:
        return float(((found - right) / right).abs().max())

    compiled = torch.compile(gelu, fullgraph=True, options={"post_grad_custom_post_pass": passes()})
    assert error(compiled(x)) < 1e-5 < 1e-3 < error(gelu(x))


def test_a_view_of_a_scalar_among_others_is_read_where_it_is() -> None:
    """A conversion that changes nothing may be taken for the view that it is of."""

    def scaled(counts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x * counts[2].to(torch.float64).to(x.dtype) + counts[1].clone()

    counts, x = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64), torch.arange(4.0)
    options = {"post_grad_custom_post_pass": passes()}
    assert torch.equal(torch.compile(scaled, fullgraph=True, options=options)(counts, x), scaled(counts, x))
