"""Models as people bring them, unmodified: ``fit`` trains them, a cut run goes on to the bit, and all can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trainfn
from tests.strategies import torch_warns_of_itself
from tests.zoo import ZOO, T
from trainfn.errors import CompileError
from trainfn.loss import logits_of
from trainfn.tree import digest, map_leaves, named_leaves

STEPS = 30


def fit(name: str, steps: int, out_dir: Path, **settings: Any) -> trainfn.FitResult:
    member = ZOO[name]
    torch.manual_seed(0)
    options: dict[str, Any] = {"loss": member.loss, "batch_size": 8, "log_every": 1, "device": "cpu", "seed": 1}
    optimizer = trainfn.optim.adamw(lr=member.lr)
    settings = options | {"progress": False, "out_dir": out_dir, "resume": "auto", "ema": 0.9} | settings
    return trainfn.fit(member.make(), member.data, optimizer=optimizer, max_steps=steps, **settings)


def check(name: str, folder: Path, **settings: Any) -> None:
    whole = fit(name, STEPS, folder / "whole", **settings)
    losses = [row["loss"] for row in whole.history]
    assert len(losses) == int(whole.state.step) == STEPS
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

    fit(name, STEPS // 2, folder / "cut", **settings)
    resumed = fit(name, STEPS, folder / "cut", **settings)
    assert digest(resumed.state) == digest(whole.state)
    assert [row["loss"] for row in resumed.history] == losses

    if ZOO[name].loss in ("own", "language_modeling"):
        check_continued(whole)
    data = ZOO[name].data
    found = whole.predict(data, batch_size=16)
    counts = {leaf.shape[0] for _, leaf in named_leaves(found)}
    assert counts == {len(next(leaf for _, leaf in named_leaves(data)))}
    other = map_leaves(lambda leaf: leaf.flip(0), data)
    assert digest(whole.predict(other, batch_size=16)) != digest(found)  # control: it is the data that is read


def check_continued(result: trainfn.FitResult) -> None:
    model, ids = result.model(), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        for _ in range(T):
            following = logits_of(model(ids[:, -T:]))[:, -1].argmax(1)
            ids = torch.cat([ids, following[:, None]], 1)
    assert torch.equal(result.generate([3, 4, 5], max_new_tokens=T, temperature=0, context=T), ids[0])


@torch_warns_of_itself
@pytest.mark.parametrize("name", ZOO)
def test_a_model_as_it_comes_trains_resumes_to_the_bit_and_predicts(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@torch_warns_of_itself
@pytest.mark.parametrize("mode", ["graph", "accum"])
@pytest.mark.parametrize("name", ZOO)
def test_and_so_it_does_compiled(name: str, mode: str, tmp_path: Path) -> None:
    if name == "LSTM":  # PyTorch does not trace these: it would write each position out
        with pytest.raises(CompileError, match="LSTM"):
            check(name, tmp_path, compile=mode)
        return
    check(name, tmp_path, compile=mode)
