"""What multiplies every element is computed once, and not in the loop over the elements."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._functorch import config as autograd_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import trainfn
import trainfn.engine.program
from trainfn.engine.scalars import scalars_first
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


def test_schedules_and_corrections_are_not_in_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is Inductor by itself, which calls ``cos`` for every few parameters."""
    monkeypatch.setattr(trainfn.engine.program, "SMALL", 0)  # a wrapper in Python is compiled sooner
    eager, found, source = compiled_step()
    assert "std::cos" in source
    assert "std::expm1" in source
    assert calls_in_loops(source, "std::cos") == calls_in_loops(source, "std::expm1") == 0
    for name, param in eager.params.items():
        torch.testing.assert_close(found.params[name], param)
        torch.testing.assert_close(found.ema[name], eager.ema[name])  # type: ignore[index]

    monkeypatch.setattr(trainfn.engine.program, "scalars_first", lambda: None)
    source = compiled_step()[2]
    assert calls_in_loops(source, "std::cos") > 0


def test_a_view_of_a_scalar_among_others_is_read_where_it_is() -> None:
    """A conversion that changes nothing may be taken for the view that it is of."""

    def scaled(counts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x * counts[2].to(torch.float64).to(x.dtype) + counts[1].clone()

    counts, x = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64), torch.arange(4.0)
    options = {"post_grad_custom_post_pass": scalars_first()}
    assert torch.equal(torch.compile(scaled, fullgraph=True, options=options)(counts, x), scaled(counts, x))
