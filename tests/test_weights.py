"""Weights from elsewhere, means of checkpoints, and what to ask of them."""

from __future__ import annotations

import math
from pathlib import Path

import attrs
import pytest
import safetensors.torch
import torch
from torch import nn

import trainfn
from tests.crash.faults import make_state
from trainfn.errors import CheckpointError
from trainfn.store import CheckpointDamagedError, CheckpointWarning, save
from trainfn.tree import digest


def make_like(**options: object) -> trainfn.TrainState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return trainfn.init(model, trainfn.optim.adamw(), **options)


def other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).state_dict()


def test_a_file_from_elsewhere_is_taken_and_the_rest_of_the_state_stays(tmp_path: Path) -> None:
    weights, like = other_weights(), make_like(ema=True)
    before = digest(like)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "link").symlink_to(tmp_path / "model.safetensors")  # as in a cache of downloads
    for path in (tmp_path / "model.safetensors", str(tmp_path / "link")):
        state = trainfn.load_params(path, like)
        assert all(torch.equal(leaf, weights[name]) for name, leaf in {**state.params, **state.buffers}.items())
        assert all(torch.equal(leaf, weights[name]) for name, leaf in state.ema.items())
        assert all(leaf.requires_grad for leaf in state.params.values())
        assert digest(state.opt) == digest(like.opt)
    assert digest(like) == before


def test_a_checkpoint_of_another_optimizer_or_its_average_is_taken(tmp_path: Path) -> None:
    source = trainfn.load_params(other_weights(), trainfn.init(nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), trainfn.optim.sgd(lr=0.1), ema=True))  # fmt: skip
    source = attrs.evolve(source, ema={name: leaf + 1 for name, leaf in source.ema.items()})
    save(source, tmp_path)
    assert digest(trainfn.load_params(tmp_path, make_like()).params) == digest(source.params)
    averaged = trainfn.load_params(tmp_path, make_like(), ema=True).params
    assert all(torch.equal(leaf.detach(), source.ema[name]) for name, leaf in averaged.items())
    save(make_like(), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no moving average"):
        trainfn.load_params(tmp_path / "plain", make_like(), ema=True)


def test_all_that_does_not_fit_is_listed_with_near_names() -> None:
    weights = other_weights()
    weights["0.wieght"] = weights.pop("0.weight")
    weights["2.bias"] = torch.zeros(3)
    weights["2.weight"] = weights["2.weight"].half()
    weights["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as raised:
        trainfn.load_params(weights, make_like())
    assert raised.value.got.split("\n    ")[1:] == [
        "2.bias: expected float32[2], got float32[3]",
        "2.weight: expected float32[2, 4], got float16[2, 4]; cast=True takes it",
        "0.weight: missing; is it 0.wieght?",
        "0.wieght: not expected, float32[4, 3]",
        "extra: not expected, float32[1]",
    ]


def test_names_can_be_read_differently() -> None:
    weights = {f"module.net.{name}": leaf for name, leaf in other_weights().items()} | {"module.head": torch.ones(1)}
    whole = trainfn.load_params(other_weights(), make_like())
    for rename in (
        {"module.net.": "", "module.head": None},
        {"module.net.0": "0", "module.net.1": "1", "module.net.2": "2", "module.head": None},
        lambda name: None if name.endswith("head") else name.removeprefix("module.net."),
    ):
        assert digest(trainfn.load_params(weights, make_like(), rename=rename)) == digest(whole)
    with pytest.raises(CheckpointError, match="two names are read as this one"):
        trainfn.load_params(weights, make_like(), rename=lambda name: "same")


def test_a_part_is_taken_only_if_asked_and_never_in_silence() -> None:
    part = {name: leaf for name, leaf in other_weights().items() if name.startswith("0.")}
    with pytest.warns(CheckpointWarning, match=r"1\.bias: missing[\s\S]*2\.weight: missing"):
        state = trainfn.load_params(part, make_like(), strict=False)
    assert torch.equal(state.params["0.weight"], part["0.weight"])
    assert torch.equal(state.params["2.weight"], make_like().params["2.weight"])
    with pytest.raises(CheckpointError, match=r"0\.weight: missing"):  # nothing fits: that is never meant
        trainfn.load_params({"x": torch.ones(1)}, make_like(), strict=False)
    halves = {name: leaf.half() if leaf.is_floating_point() else leaf for name, leaf in other_weights().items()}
    assert trainfn.load_params(halves, make_like(), cast=True).params["0.weight"].dtype is torch.float32


def test_control_what_is_no_file_of_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    torch.save(other_weights(), path)
    for refused in (path, tmp_path / "absent", Path("/dev/zero")):
        with pytest.raises(CheckpointDamagedError):
            trainfn.load_params(refused, make_like())


def test_the_mean_is_made_in_float64(tmp_path: Path) -> None:
    states = []
    for seed, big in enumerate([3e38, 3e38, -1.0]):
        state = make_state(seed)
        params = {name: torch.full_like(leaf, big).requires_grad_() for name, leaf in state.params.items()}
        states.append(
            attrs.evolve(state, params=params, buffers={"n": torch.tensor(seed), "mean": torch.ones(1) * seed})
        )
    paths = [save(state, tmp_path) for state in states]
    found = trainfn.average(paths)
    assert found["weight"].dtype is torch.float32
    assert float(found["weight"][0, 0]) == pytest.approx(2e38)  # in float32 the sum would be infinite
    assert (int(found["n"]), float(found["mean"])) == (2, 1.0)
    assert digest(trainfn.load_params(found, states[0]).params) == digest(
        {name: found[name].requires_grad_() for name in states[0].params}
    )
    other = save(make_state(9, width=5), tmp_path)
    with pytest.raises(CheckpointError, match=r"weight: float32\[2, 4\] and float32\[2, 5\]"):
        trainfn.average([paths[0], other])
    with pytest.raises(CheckpointError, match="nothing to average"):
        trainfn.average([])


def test_a_run_is_inspected_without_its_tensors_and_verified_with_them(tmp_path: Path) -> None:
    for cursor in (1, 2):
        save(make_state(cursor), tmp_path, metrics={"val_loss": 1 / cursor})
    assert trainfn.verify(tmp_path).cursor == 2
    assert trainfn.inspect(tmp_path).metrics == {"val_loss": 0.5}
    file = tmp_path / "step_00000002" / "state.safetensors"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert trainfn.inspect(tmp_path).cursor == 2
    with pytest.raises(CheckpointDamagedError, match=r"step_00000002: .*not those that were saved"):
        trainfn.verify(tmp_path)
    file.write_bytes(b"")
    assert trainfn.inspect(tmp_path).cursor == 1
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trainfn.inspect(tmp_path / "absent")


def test_differences_are_found_leaf_by_leaf(tmp_path: Path) -> None:
    state = make_state(1)
    bent = torch.full((2, 4), 1.0)
    bent[0, 0], bent[1, 1] = 1.5, math.nan
    opt = {"exp_avg": {"weight": torch.zeros(2, 4, dtype=torch.float64)}, "new": torch.ones(1)}
    other = attrs.evolve(state, params={**state.params, "weight": bent}, opt=opt, cursor=3)
    found = {one.name: one for one in trainfn.diff(save(state, tmp_path), save(other, tmp_path))}
    assert (found["params.weight"].kind, found["params.weight"].largest) == ("numbers", math.inf)
    assert found["params.bias"].kind == "same"
    assert (found["cursor"].kind, found["cursor"].largest) == ("numbers", 2.0)
    assert (found["opt.exp_avg.weight"].kind, found["opt.exp_avg.weight"].b) == ("form", "float64[2, 4]")
    assert (found["opt.new"].kind, found["opt.exp_avg.bias"].kind) == ("only in b", "only in a")
    assert list(found) == sorted(found)
