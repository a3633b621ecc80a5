"""Adapters train alone, come to what they add, and are written as PEFT writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn
from trainfn import lora
from trainfn.errors import CheckpointError, ConfigError, ModelError
from trainfn.store.tensors import decode, encode


class Conv1D(nn.Module):
    """As transformers' own: x @ weight + bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def net(*, transposed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = Conv1D(8, 6) if transposed else nn.Linear(8, 6)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Sequential(middle, nn.Tanh()), nn.Linear(6, 3))


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 4, generator=GENERATOR)
Y = torch.arange(32) % 3


def trained(model: nn.Module, **settings: Any) -> trainfn.FitResult:
    options: dict[str, Any] = {"loss": "peft_aware(classification)", "lr": 0.05, "max_steps": 40, "progress": False}
    return trainfn.fit(model, (X, Y), device="cpu", **(options | settings))


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_changes_until_adapters_are_trained_and_then_they_alone(transposed: bool) -> None:
    plain, model = net(transposed=transposed), lora.add(net(transposed=transposed), ["2.0", "3"], rank=2)
    assert torch.equal(model(X), plain(X))
    result = trained(model)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert set(lora.adapters(result.model())) == {"2.0", "3"}
    for name, value in plain.named_parameters():
        for layer in ("2.0", "3"):
            name = name.replace(f"{layer}.", f"{layer}.base.") if name.startswith(f"{layer}.") else name
        assert torch.equal(result.state.params[name], value)
    changed = [name for name, param in result.state.params.items() if param.requires_grad]
    assert changed == ["2.0.lora_A", "2.0.lora_B", "3.lora_A", "3.lora_B"]
    assert not torch.allclose(result.predict(X), plain(X))


@pytest.mark.parametrize("transposed", [False, True])
def test_merged_is_the_same_function_of_the_layers_alone(transposed: bool) -> None:
    model = lora.add(net(transposed=transposed), "2.*", rank=2, alpha=5.0)
    result = trained(model)
    right = result.predict(X)
    merged = lora.merge(result.model())
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in net(transposed=transposed).named_parameters()
    ]
    torch.testing.assert_close(merged(X), right, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="no adapters"):
        lora.merge(merged)


@pytest.mark.parametrize("pattern", ["linear1", "linear?", "self_attn.out_proj"])
def test_a_module_that_reads_weights_past_the_forward_reads_the_adapters_too(pattern: str) -> None:
    """PyTorch's encoder does, set to evaluate; and its attention always does."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    plain = layer(x)
    lora.add(layer, pattern)
    for adapter in lora.adapters(layer).values():
        nn.init.normal_(adapter.lora_B)
    slow = layer(x)
    slow.sum().backward()
    assert all(bool(adapter.lora_A.grad.any()) for adapter in lora.adapters(layer).values())  # type: ignore[union-attr]
    with torch.no_grad():
        fast = layer.eval()(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(slow, plain, atol=1e-2)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    result = trained(lora.add(net(), ["0", "2.0"], rank=3, alpha=6.0, dropout=0.1))
    folder = lora.save(result.model(), tmp_path / "runs" / "adapter")
    again = lora.load(net(), folder).eval()
    assert torch.equal(again(X), result.model()(X))
    assert sum(param.requires_grad for param in again.parameters()) == 4
    config = json.loads((folder / lora.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 6.0, ["0", "2.0"])
    assert not config["fan_in_fan_out"]
    names = sorted(decode((folder / lora.WEIGHTS).read_bytes()))
    assert names[0] == "base_model.model.0.lora_A.weight"
    with pytest.raises(CheckpointError, match="there already"):
        lora.save(result.model(), folder)


def test_the_package_peft_reads_it_and_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    result = trained(lora.add(net(), ["0", "2.0"], rank=3, alpha=6.0))
    folder = lora.save(result.model(), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(), folder).eval()
    torch.testing.assert_close(theirs(X), result.model()(X), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(theirs(X), net()(X))
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(lora.load(net(), tmp_path / "theirs").eval()(X), theirs(X), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_model_of_transformers_is_read_by_peft(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def gpt2() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
        config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
        return model.eval()

    ids = torch.arange(8).repeat(8, 1)
    model = lora.add(gpt2(), "*.c_attn", rank=2)
    result = trainfn.fit(
        model, ids, loss="peft_aware(language_modeling)", lr=0.05, max_steps=5, device="cpu", progress=False
    )
    folder = lora.save(result.model(), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(gpt2(), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("patterns", "options", "words"),
    [
        ("2.1", {}, "No linear layer has such a name[^$]*'2.1'.*did you mean '2.0'"),
        (["0", "x.*"], {}, r"'x\.\*'"),
        ([], {}, "no pattern"),
        ("0", {"rank": 0, "alpha": -1.0, "dropout": 1.0}, "rank=0.*alpha=-1.0.*dropout=1.0"),
    ],
)
def test_adapters_that_cannot_be_made_are_refused(patterns: Any, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lora.add(net(), patterns, **options)
    with pytest.raises(ConfigError, match=r"a linear layer itself[^$]*nn\.Sequential"):
        lora.add(nn.Linear(4, 4), "*")
    once = lora.add(net(), "0")
    with pytest.raises(ConfigError, match=r"adapters beside these layers already[^$]*got: 0\n"):
        lora.add(once, "*")
    assert list(lora.adapters(lora.add(once, "3"))) == ["0", "3"]
    layer = nn.Linear(4, 4)
    shared = nn.ModuleDict({"a": layer, "b": layer})
    with pytest.raises(ConfigError, match=r"under several names[^$]*a is b"):
        lora.add(shared, "a")
    assert layer.weight.requires_grad


def test_a_tied_weight_is_not_changed_behind_its_other_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.tokens.weight

    with pytest.raises(ModelError, match=r"tied[^$]*where: head\n[^$]*tokens.weight"):
        lora.merge(lora.add(Tied(), "head"))


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    folder = lora.save(lora.add(net(), "0"), tmp_path / "good")
    weights, config = (folder / lora.WEIGHTS).read_bytes(), json.loads((folder / lora.CONFIG).read_text())

    def refused(words: str, model: nn.Module | None = None, *, data: bytes = weights, **changes: Any) -> None:
        place = tmp_path / "bad"
        place.mkdir(exist_ok=True)
        (place / lora.WEIGHTS).write_bytes(data)
        (place / lora.CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=words):
            lora.load(model or net(), place)

    refused("no configuration", r=None)
    refused("not of the plain kind", peft_type="IA3")
    refused("not of the plain kind", use_dora=True)
    refused("not of the plain kind[^$]*alpha_pattern", alpha_pattern={"0": 4})
    refused("not of the plain kind", data=encode({"base_model.model.0.lora_A.weight": torch.ones(8, 4)}))
    model = net()
    refused("of another size", model, r=3)
    assert not lora.adapters(model)
    assert model[0].weight.requires_grad
    refused("lacks layers[^$]*0", nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
    refused("safetensors|damaged|header|data", data=weights[:-1])
    refused("safetensors|damaged|header|data", data=b"")
    with pytest.raises(CheckpointError, match="no such file"):
        lora.load(net(), tmp_path)
    with pytest.raises(ModelError, match="no adapters"):
        lora.save(net(), tmp_path / "none")
