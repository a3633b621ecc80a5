"""The kernel of attention is the one that was asked for, in every mode, and the header says which one it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

import trainfn
from trainfn.attention import attending, watched
from trainfn.engine import CompiledStep
from trainfn.errors import ConfigError, ModelError
from trainfn.tree import digest

NAMES = ("flash", "math", "auto")
KERNELS = {"flash": "aten::_scaled_dot_product_flash_attention_for_cpu", "math": "aten::_safe_softmax"}


class Attends(nn.Module):
    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.head, self.dropout = nn.Linear(8, 24), nn.Linear(8, 2), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 5, 8, generator=GENERATOR), torch.arange(16) % 2


def fit(model: nn.Module | None = None, **settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    options: dict[str, Any] = {"loss": "classification", "max_steps": 2, "device": "cpu", "progress": False}
    return trainfn.fit(model or Attends(), (X, Y), **(options | settings))


def kernels_in(step: trainfn.Step | CompiledStep, state: trainfn.TrainState) -> set[str]:
    """Which kernels PyTorch's profiler has seen in a step."""
    with profile() as seen:
        step(state, (X, Y))
    names = {event.name for event in seen.events()}
    return {name for name, operation in KERNELS.items() if operation in names}


@pytest.mark.parametrize("asked", ["flash", "math", "auto"])
def test_the_kernel_asked_for_is_the_one_that_runs(asked: Any) -> None:
    model, optimizer = Attends(), trainfn.optim.sgd(lr=0.1)
    step = trainfn.make_step(model, loss="classification", optimizer=optimizer, attention=asked)
    state = trainfn.init(model, optimizer)
    right = {"flash"} if asked == "auto" else {asked}
    assert kernels_in(step, state) == kernels_in(trainfn.compile(step, mode="eager"), state) == right


def compiled_in(mode: Any, asked: Any, backend: str = "inductor") -> tuple[set[str], str]:
    """Return the kernels of attention in a compiled program, and the digest of what it comes to."""
    torch.manual_seed(0)
    model, optimizer = Attends(), trainfn.optim.sgd(lr=0.1)
    step = trainfn.make_step(model, loss="classification", optimizer=optimizer, attention=asked)
    state = trainfn.init(model, optimizer)
    compiled = trainfn.compile(step, mode=mode, backend=backend)
    after = compiled(state, (X, Y))
    found = kernels_in(compiled, state)
    assert compiled.compiles == 1
    return found, digest(after.params)


@pytest.mark.slow
@pytest.mark.parametrize("asked", NAMES)
@pytest.mark.parametrize("mode", ["graph", "split", "accum"])
def test_a_program_keeps_the_kernel_that_it_was_compiled_with(mode: Any, asked: Any) -> None:
    """Of math there are products and a softmax in it."""
    assert ("flash" in compiled_in(mode, asked, "aot_eager")[0]) == (asked != "math")


@pytest.mark.slow
def test_a_program_of_another_kernel_is_not_taken_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for asked in ("math", "flash", "auto", "math"):
        torch._dynamo.reset()
        found.append(compiled_in("split", asked)[1])
    assert found[0] == found[3]
    assert found[1] == found[2] != found[0]


def test_kernels_agree_and_are_not_the_same() -> None:
    flash, math, auto = (fit(attention=name, optimizer=trainfn.optim.sgd(lr=0.1)).state for name in NAMES)
    for name, value in flash.params.items():
        torch.testing.assert_close(math.params[name], value, rtol=1e-4, atol=1e-5)
    assert digest(math.params) != digest(flash.params) == digest(auto.params)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "attention flash (1 calls a forward), chosen by PyTorch"),
        ({"attention": "math"}, "attention math (1 calls a forward), as asked"),
        ({"model": Attends(dropout=0.1)}, "attention math (1 calls a forward), chosen by PyTorch"),
    ],
)
def test_the_header_says_which_kernel_runs(settings: Any, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit(**settings, progress=True)
    assert line in capsys.readouterr().err


def test_the_header_is_silent_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    fit(nn.Sequential(nn.Flatten(), nn.Linear(40, 2), nn.Softmax(1)), progress=True)
    assert "attention" not in capsys.readouterr().err


def refused(*words: str, **settings: Any) -> None:
    taken: list[Any] = []
    with pytest.raises(ConfigError) as caught:
        fit(observers=[taken.append], **settings)
    assert not taken
    for word in words:
        assert word in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has these kernels, which are not asked for on the CPU")
@pytest.mark.parametrize("name", ["efficient", "cudnn"])
def test_a_kernel_that_cannot_run_here_is_refused(name: str) -> None:
    refused("cannot run here", f"attention={name!r}: PyTorch has no such kernel for this device", attention=name)


def test_why_it_cannot_run_is_said_in_pytorchs_words() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused("cannot run here", "do not support non-zero dropout", model=Attends(dropout=0.1), attention="flash")


def test_a_choice_that_nothing_asks_for_is_refused() -> None:
    refused("calls no attention", model=nn.Sequential(nn.Flatten(), nn.Linear(40, 2)), attention="flash")


def test_an_unknown_kernel_is_refused() -> None:
    refused("attention='flsh'", "'flash'", attention="flsh")
    with pytest.raises(ConfigError, match="did you mean 'flash'"):
        trainfn.make_step(Attends(), loss="classification", optimizer=trainfn.optim.sgd(0.1), attention="flsh")  # type: ignore[arg-type]


def test_what_goes_wrong_in_the_first_forward_is_told_as_ever() -> None:
    class Broken(Attends):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken on purpose")

    for name in ("auto", "math"):
        with pytest.raises(ModelError, match="broken on purpose"):
            fit(Broken(), attention=name)


def test_the_choice_ends_with_the_step() -> None:
    fit(attention="math")
    q = torch.ones(1, 1, 2, 2)
    found = watched(lambda: F.scaled_dot_product_attention(q, q, q), "auto", "here")[1]
    assert found == {"flash": 1}


def test_pytorch_means_by_its_names_what_is_counted() -> None:
    """What the watch rests on: one operation of its own for each kernel; none of these is run otherwise."""
    q = torch.randn(1, 2, 3, 4)
    for backend, right in ((SDPBackend.FLASH_ATTENTION, {"flash": 1}), (SDPBackend.MATH, {"math": 1})):
        with sdpa_kernel(backend):
            assert watched(lambda: F.scaled_dot_product_attention(q, q, q), "auto", "here")[1] == right
    assert watched(lambda: (q @ q.mT).softmax(-1) @ q, "auto", "here")[1] == {}
    with attending("auto") as nothing:
        assert nothing is None
