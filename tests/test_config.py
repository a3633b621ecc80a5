"""``TrainConfig``: what it refuses, how it is written and read, its presets, and in what two of them differ."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainfn
from trainfn import TaskSpec, TrainConfig
from trainfn.errors import ConfigError
from trainfn.header import header
from trainfn.store import CheckpointWarning, CheckpointWriteError
from trainfn.task import names, presets
from trainfn.task.config import differences

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
FIELDS = {field.name: field for field in attrs.fields(TrainConfig)}


def fit(**settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    options = {"data": (X, Y), "loss": "classification", "device": "cpu", "progress": False} | settings
    return trainfn.fit(nn.Linear(4, 3), **options)


def refused(*words: str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**settings)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in\n{caught.value}"
    return str(caught.value)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_together() -> None:
    refused(
        "learning_rate (here it is called 'lr')", "seeed (did you mean 'seed'?)", "batch_size=0 (expected an int >= 1)",
        "clip_norm=nan", "ema=1.0 (expected a number in [0, 1), or None)", "did you mean 'bf16-mixed'?", "mode=3",
        "max_steps, max_epochs and max_seconds all missing", 'resume="auto" without out_dir',
        learning_rate=1.0, seeed=1, batch_size=0, clip_norm=float("nan"), ema=1.0, precision="bf16_mixed", mode=3,
        resume="auto",
    )  # fmt: skip


def test_control_without_a_mistake_nothing_is_refused() -> None:
    with pytest.raises(pytest.fail.Exception):
        refused(max_steps=1)


@pytest.mark.parametrize("make", [TrainConfig, TrainConfig(max_steps=1).evolve])
def test_unknown_names_are_answered_wherever_settings_are_given(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps \(here it is called 'accumulate'\)"):
        make(max_steps=1, gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="did you mean 'val_data'"):
        fit(max_steps=1, val_dat=(X, Y))


junk: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=3)
    | st.sampled_from([10**400, torch.ones(2), torch.ones(2).numpy(), Path("a"), object, float("inf"), 2**63, "\0"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*FIELDS, "sed", "epochs"]), junk, max_size=4))
def test_whatever_is_not_refused_can_be_written_and_read(fields: dict[str, Any]) -> None:
    try:
        config = TrainConfig(**{"max_steps": 1} | fields)
    except ConfigError:
        return
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


OURS = {*FIELDS, *inspect.signature(trainfn.fit).parameters}
USUAL = re.findall(
    r"\w+",
    """
    max_epochs min_steps accumulate_grad_batches gradient_clip_val val_check_interval check_val_every_n_epoch
    log_every_n_steps enable_progress_bar enable_checkpointing default_root_dir accelerator devices strategy
    num_nodes detect_anomaly logger callbacks num_workers output_dir overwrite_output_dir eval_strategy
    evaluation_strategy per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
    learning_rate weight_decay adam_beta1 adam_epsilon max_grad_norm num_train_epochs lr_scheduler_type
    warmup_ratio logging_steps save_strategy save_steps save_total_limit fp16 bf16 dataloader_drop_last
    dataloader_num_workers eval_steps label_smoothing_factor metric_for_best_model greater_is_better
    load_best_model_at_end optim gradient_checkpointing report_to no_cuda torch_compile disable_tqdm
    resume_from_checkpoint data_collator compute_metrics train_dataset eval_dataset
    """,
)


def test_the_usual_names_of_other_trainers_are_answered() -> None:
    without = [name for name in USUAL if name not in {**names.SAME, **names.DIFFERENT} and name not in FIELDS]
    assert without == ["min_steps"], "control: a name that has no answer is found"
    for name in {*names.SAME, *names.DIFFERENT}:
        refused(f"{name} ({names.answer(name, FIELDS)})", max_steps=1, **{name: 1})


def test_the_answers_are_names_that_there_are() -> None:
    assert set(names.SAME.values()) <= OURS
    assert not OURS & {*names.SAME, *names.DIFFERENT}, "these are ours by now: take them out of task/names.py"
    inner = {"weight_decay", "beta1", "momentum", "like", "loss_options", "task"}  # of functions, and of TaskSpec
    for text in names.DIFFERENT.values():
        named = set(re.findall(r"\b([a-z_0-9]+)=", text)) | set(re.findall(r"here it is (?:called ')?([a-z_]+)", text))
        assert named - {"a"} <= OURS | inner, text
        for path in re.findall(r"\btrainfn((?:\.[A-Za-z_]+)+)", text):
            found: Any = trainfn
            for part in path[1:].split("."):
                found = getattr(found, part)


# --- written and read -------------------------------------------------------------------------------------------------


count, share = st.integers(1, 10**6), st.floats(1e-9, 1e9)
path = st.text(min_size=1, max_size=8).filter(lambda text: "\0" not in text)
configs = st.builds(
    TrainConfig,
    max_steps=count,
    max_epochs=st.none() | count,
    lr=share | count,
    clip_norm=st.none() | share,
    ema=st.none() | st.floats(0, 0.999),
    precision=st.sampled_from(["32-true", "bf16-mixed"]),
    save_every=st.none() | count,
    keep_last=st.none() | count,
    monitor=st.none() | st.just("none") | st.text(max_size=8),
    out_dir=path | path.map(Path),
    resume=st.none() | path | st.just("none"),
    seed=st.integers(0, 2**63 - 1),
    cuda_graph=st.booleans() | st.just("auto"),
    checkpoint=st.none() | st.text(max_size=5) | st.lists(st.text(max_size=5), min_size=1, max_size=2),
    shuffle=st.booleans(),
)


@given(configs)
def test_a_configuration_goes_through_json_and_toml_and_back(config: TrainConfig) -> None:
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert TrainConfig.from_toml(config.to_toml()) == config
    assert tomllib.loads(config.to_toml())["seed"] == config.seed
    assert config.evolve() == config == pickle.loads(pickle.dumps(config))


def test_odd_characters_go_through_toml() -> None:
    for name in ("\x7f\n\r\t\x1f", '"quoted" \\n', "é😀\u2028", "none", "#"):
        config = TrainConfig(max_steps=1, out_dir=name)
        assert TrainConfig.from_toml(config.to_toml()) == config
    with pytest.raises(ConfigError, match="surrogates"):
        TrainConfig(max_steps=1, out_dir="\ud800").to_toml()


@pytest.mark.parametrize("name", ["deep/run.toml", "run.json"])
def test_a_file_holds_the_old_or_the_new_settings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / name
    old, new = TrainConfig(max_steps=1), TrainConfig(max_steps=2, clip_norm=None, checkpoint=["a", "b"])
    old.save(file)
    assert TrainConfig.load(file) == old

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for call in ("os.rename", "os.write", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(call, fails)
            with pytest.raises(CheckpointWriteError, match="No space left"):
                new.save(file)
        assert TrainConfig.load(file) == old
        assert [path.name for path in file.parent.iterdir() if path.is_file()] == [file.name]
    new.save(file)
    assert TrainConfig.load(file) == new


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.toml"
    os.mkfifo(fifo)
    cases: dict[str, tuple[bytes | None, str]] = {
        "absent.toml": (None, "no settings to be read"),
        "run.yaml": (b"version: 1", r"\.toml or \.json"),
        "a.toml": (b"version = 1\nlr = \nseed = 1", "line 2"),
        "b.toml": (b"version = 1\nlr = 1\nlr = 2", "overwrite"),
        "c.json": (b'{"version": 1, "lr": 1, "lr": 2}', "lr twice"),
        "d.json": (b"[1]", "no JSON object"),
        "e.json": (b"[" * 100_000, "no JSON"),
        "f.toml": (b"a = " + b"[" * 100_000, "no TOML"),
        "g.toml": (b"\xff", "utf-8"),
        "h.toml": (b"#" * (2 << 20), "too long"),
        "i.toml": (b"max_steps = 1", "no version"),
        "j.toml": (b"version = 2\nmax_steps = 1", "version 2"),
        "k.toml": (b"version = true\nmax_steps = 1", "version True"),
        "l.toml": (b"version = 1\nmax_steps = 1979-05-27\n[optimizer]\nlr = 1", "optimizer"),
        "fifo.toml": (None, "no settings to be read"),
        "": (None, "no settings to be read"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            TrainConfig.load(tmp_path / name)
        assert str(tmp_path) in str(caught.value)


def test_a_configuration_of_version_0_is_refused_with_the_migration() -> None:
    written = {"version": 0, "learning_rate": 0.1, "num_train_epochs": 3, "seed": 5}
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_json(written)
    for word in ("version 1", "version 0", "0 to 1, names of other trainers", "learning_rate -> lr", "migrate=True"):
        assert word in str(caught.value)
    assert TrainConfig.from_json(written, migrate=True) == TrainConfig(lr=0.1, max_epochs=3, seed=5)
    with pytest.raises(ConfigError, match="0 to 1"):
        TrainConfig.from_toml("version = 0\nmax_steps = 3")
    for twice in ({"lr": 1.0}, {"learning_rate": 1.0, "max_steps": 1, "lr": 1.0}, {"fp16": True, "max_steps": 1}):
        with pytest.raises(ConfigError):
            TrainConfig.from_json({"version": 0} | twice, migrate=True)


def test_there_is_a_migration_from_every_version() -> None:
    for owner in (TrainConfig, TaskSpec):
        assert sorted(owner.form.migrations) == list(range(owner.form.version))


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_is_what_its_line_says_and_trains(name: str, tmp_path: Path) -> None:
    (line,) = [line for line in (presets.__doc__ or "").splitlines() if line.startswith(f"| ``{name}`` |")]
    said = {pair.split()[0]: pair.split()[1].strip('"') for pair in line.split("|")[3].strip().split(", ")}
    config = TrainConfig.preset(name, max_steps=2, out_dir=tmp_path / "run")
    found = TrainConfig(max_steps=2, out_dir=tmp_path / "run").diff(config)
    differ = {field: str(new) for field, (_, new) in {**found.changed, **found.volatile}.items()}
    assert differ == {field: value for field, value in said.items() if field != "max_steps"}
    assert fit(config=config).state.cursor == 2


def test_presets_that_there_are_not() -> None:
    with pytest.raises(ConfigError, match="did you mean 'production'"):
        TrainConfig.preset("prodction", max_steps=1)
    with pytest.raises(ConfigError, match="one device"):
        TrainConfig.preset("distributed", max_steps=1)
    with pytest.raises(ConfigError, match="no such preset"):
        TrainConfig.preset(["quick"], max_steps=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="here it is called 'lr'"):
        TrainConfig.preset("quick", learning_rate=1)


# --- fit(config=) -----------------------------------------------------------------------------------------------------


def test_what_is_passed_by_hand_comes_before_the_configuration(tmp_path: Path) -> None:
    config = TrainConfig(max_steps=3, lr=0.1, batch_size=4)
    by_config, by_hand = fit(config=config), fit(max_steps=3, lr=0.1, batch_size=4)
    assert by_config.history[-1]["loss"] == by_hand.history[-1]["loss"]
    assert fit(config=config, max_steps=2).state.cursor == 2
    config.save(tmp_path / "run.toml")
    assert fit(config=tmp_path / "run.toml").history[-1]["loss"] == by_hand.history[-1]["loss"]
    loader = DataLoader(TensorDataset(X, Y), batch_size=6)
    with pytest.raises(ConfigError, match="batch_size: 6 in the DataLoader, 4 in fit"):
        fit(config=config, data=loader)
    assert trainfn.plan(
        nn.Linear(4, 3), loader, loss="classification", config=TrainConfig(max_steps=1), device="cpu"
    ).config.batch_size == 6  # fmt: skip
    with pytest.raises(ConfigError, match="given twice"):
        fit(config=config, optimizer=trainfn.optim.sgd(lr=0.1))
    with pytest.raises(ConfigError, match="The configuration is none"):
        fit(config={"max_steps": 1})
    with pytest.raises(ConfigError, match=r"A preset is a value[^$]*TrainConfig\.preset\(.quick.\)"):
        fit(config="quick")


def test_the_settings_of_a_run_are_in_its_directory(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=6)
    fit(data=loader, max_steps=2, lr=0.1, out_dir=tmp_path)
    config = TrainConfig.load(tmp_path)
    assert (config.max_steps, config.lr, config.batch_size, config.shuffle) == (2, 0.1, 6, False)
    fit(data=loader, config=tmp_path, resume="auto", max_steps=3)
    assert TrainConfig.load(tmp_path).max_steps == 3
    fit(max_steps=2, out_dir=tmp_path / "dry", fast_dev_run=True)
    trainfn.plan(nn.Linear(4, 3), (X, Y), loss="classification", max_steps=1, out_dir=tmp_path / "dry", device="cpu")
    assert not (tmp_path / "dry" / "config.toml").exists()


def test_settings_that_cannot_be_written_end_the_run_or_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise CheckpointWriteError("The disk refused.")

    monkeypatch.setattr(TrainConfig, "save", fails)
    with pytest.raises(CheckpointWriteError):
        fit(max_steps=1, out_dir=tmp_path)
    with pytest.warns(CheckpointWarning, match="settings were not written"):
        assert fit(max_steps=1, out_dir=tmp_path, on_save_error="warn").state.cursor == 1


# --- differences ------------------------------------------------------------------------------------------------------


def test_a_difference_is_told_by_what_changed() -> None:
    old = TrainConfig(max_steps=10, out_dir="a", log_every=5)
    new = old.evolve(lr=0.1, log_every=2, out_dir="b", workers=2, device="cpu", progress=False)
    found = old.diff(new)
    assert found.changed == {"lr": (1e-3, 0.1), "log_every": (5, 2)}
    assert found.inexact == ("lr",)
    assert list(found.volatile) == ["out_dir", "workers", "device", "progress"]
    assert (found.added, found.removed, bool(found)) == ({}, {}, True)
    assert not old.diff(old.evolve(out_dir="b"))
    assert str(old.diff(old)) == ""


def test_a_setting_that_was_not_there_yet_counts_as_its_default() -> None:
    new = TrainConfig(max_steps=10).to_json() | {"task": {"kind": "tabular"}, "threads": 2}
    old = {name: value for name, value in new.items() if name not in ("halt_after", "task")} | {"gone": 1}
    found = differences(old, new)
    assert (found.changed, found.added, found.removed) == ({}, {"task": {"kind": "tabular"}}, {"gone": 1})
    assert differences(old, new | {"halt_after": 7}).changed == {"halt_after": (3, 7)}


def test_another_way_to_compile_is_told_when_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(max_steps=2, out_dir=tmp_path, compile="eager")
    fit(max_steps=3, out_dir=tmp_path, resume="auto", progress=True)
    assert "compile" not in capsys.readouterr().err.partition("; changed")[2].partition("\n")[0]
    planned = trainfn.plan(
        nn.Linear(4, 3), (X, Y), loss="classification", max_steps=4, out_dir=tmp_path, resume="auto", device="cpu",
        compile="graph",
    )  # fmt: skip
    assert header(planned)[-1].endswith("not bit for bit the run that went on (compile, optimizer)")
