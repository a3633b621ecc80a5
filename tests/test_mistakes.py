"""What a beginner gets wrong, and the answer: one of the house's errors, before the first step."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import trainfn
from trainfn.errors import ConfigError, DataError, ModelError, TrainfnError
from trainfn.store import CheckpointWarning

X, Y = torch.randn(8, 4), torch.randint(0, 3, (8,))


class Two(nn.Module):
    def forward(self, image, caption):
        return image


def refused(kind, *words, model=None, data=None, **settings):
    """Fit with a mistake; hold that it is refused by ``kind``, in these words, and that no step was taken."""
    taken = []
    options = {"loss": "classification", "max_steps": 3, "device": "cpu", "progress": False} | settings
    with pytest.raises(kind) as caught:
        trainfn.fit(
            nn.Linear(4, 3) if model is None else model, (X, Y) if data is None else data,
            observers=[taken.append], **options,
        )  # fmt: skip
    assert isinstance(caught.value, TrainfnError)
    assert not taken
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in\n{caught.value}"


def test_control_without_a_mistake_it_trains():
    with pytest.raises(pytest.fail.Exception):
        refused(TrainfnError)


def test_loss_with_a_typo():
    refused(ConfigError, "clasification", "did you mean 'classification'?", loss="clasification")


def test_loss_of_another_kind():
    refused(ConfigError, "neither a name nor a function", loss=3)


@pytest.mark.parametrize("labels", [Y.float(), Y.bool()])
def test_labels_of_the_wrong_dtype(labels):
    refused(DataError, "labels have the wrong dtype", "integer", "[8]", data=(X, labels), batch_size=8)


def test_labels_of_the_wrong_shape():
    refused(DataError, "[8]", "[8, 1]", data=(X, Y[:, None]), batch_size=8)


def test_labels_out_of_range():
    refused(DataError, "labels", data=(X, Y + 3))


def test_leaves_that_disagree_in_length():
    refused(DataError, "disagree in length", "x: 8", "y: 7", data={"x": X, "y": Y[:7]})


def test_batch_whose_leaves_disagree_in_length():
    items = [{"x": X[i], "y": Y[i]} for i in range(8)]

    def crooked(chosen):
        return {"x": torch.stack([item["x"] for item in chosen]), "y": torch.zeros(1, dtype=torch.long)}

    refused(DataError, "disagree in length", "x: 4", "y: 1", data=items, collate=crooked, batch_size=4)


def test_forward_that_does_not_take_what_the_loader_gives():
    refused(
        ModelError, "Two.forward(image, caption)", "x: float32", model=with_a_parameter(Two()), data={"x": X, "y": Y}
    )


def test_forward_that_fails_on_the_shapes():
    refused(ModelError, "first batch", "Linear", model=nn.Linear(5, 3))


def test_logits_of_the_wrong_rank():
    refused(ModelError, "logits [batch, positions, vocabulary]", loss="language_modeling")


def test_sequences_too_short_to_learn_from():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    refused(
        DataError,
        "too short",
        "8 of 8",
        "fewer than 2",
        model=model,
        data=torch.zeros(8, 1, dtype=torch.long),
        loss="language_modeling",
    )


@pytest.mark.parametrize("data", [[], torch.empty(0, 4), (torch.empty(0, 4), torch.empty(0))])
def test_empty_data(data):
    refused(DataError, data=data)


class Objects:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return object()


def of_objects(items):
    return {"input": items, "labels": torch.zeros(len(items), dtype=torch.long)}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Objects(), ["must contain tensors", "found <class 'object'>", "collate="]),
        (DataLoader(Objects(), batch_size=2, collate_fn=list), ["no tensor with a batch dimension", "0: object"]),
        (DataLoader(Objects(), batch_size=2, collate_fn=of_objects), ["input.0 holds object objects", "make tensors"]),
        ([("to be", 0), ("or not", 1)], ["0.0 holds str objects", "trainfn.data.Tokenized"]),
    ],
)
def test_python_objects_in_place_of_tensors(data, words):
    refused(DataError, *words, data=data)


IMAGES = [(torch.zeros(3, 8, 8), 0)] * 5


@pytest.mark.parametrize("settings", [{}, {"loss": None, "task": "vision_classification"}])
def test_an_image_of_another_shape(settings):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    data = [*IMAGES, (torch.zeros(3, 9, 8), 1)]
    words = ["differ in shape", "[3, 8, 8]", "[3, 9, 8]", "trainfn.data.ImageFolder(path, size="]
    refused(DataError, *words, model=net, data=data, batch_size=6, **settings)
    refused(ModelError, "6x216 and 192x3", "float32[6, 3, 9, 8]", model=net, data=data[5:] * 6, **settings)
    task = trainfn.TaskSpec(kind="vision_classification", shapes={"image": (3, 8, 8)})
    words = ["shape that the task says", "[3, 8, 8]", "[3, 9, 8]"]
    refused(DataError, *words, model=net, data=data[5:] * 6, loss=None, task=task)


@pytest.mark.parametrize("rows", [[[1.0, 2.0, 3.0], [1.0, 2.0]], [([1.0, 2.0], 0), ([1.0], 1)]])
def test_ragged_lists_without_a_collator(rows):
    refused(DataError, "differ in shape", 'collate="text" pads sequences', data=rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", ["The file is empty"]), ("a,b\n", ["no rows", "a, b"]), ("a,b\n1,2\n", ["no such column", "'price'"])],
)
def test_a_table_without_rows_or_target(tmp_path, text, words):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        trainfn.data.read_csv(tmp_path / "table.csv", target="price")
    for word in words:
        assert word in str(caught.value)


def test_data_of_an_unsupported_kind():
    refused(DataError, data={1, 2})


def test_neither_max_steps_nor_max_epochs():
    refused(ConfigError, "max_steps, max_epochs and max_seconds all missing", max_steps=None)


def test_unwritable_out_dir(tmp_path):
    (tmp_path / "file").write_text("")
    refused(ConfigError, "cannot be written to", str(tmp_path / "file"), out_dir=tmp_path / "file" / "run")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_out_dir(tmp_path):
    tmp_path.chmod(0o500)
    refused(ConfigError, "cannot be written to", out_dir=tmp_path)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("max_step", "max_steps"),
        ("batchsize", "batch_size"),
        ("learning_rate", "lr"),
        ("gradient_accumulation_steps", "accumulate"),
        ("accumulate_grad_batches", "accumulate"),
        ("validation_data", "val_data"),
    ],
)
def test_unknown_keyword(given, right):
    refused(ConfigError, given, repr(right), **{given: 3})


def test_all_settings_out_of_range_are_reported_together():
    refused(
        ConfigError, "batch_size=0", "lr=-1", "clip_norm=nan", "device=3", "accumulate=True",
        batch_size=0, lr=-1, clip_norm=float("nan"), device=3, accumulate=True,
    )  # fmt: skip


def test_learning_rate_given_twice():
    refused(ConfigError, "given twice", optimizer=trainfn.optim.sgd(lr=0.1), lr=0.1)


def test_warmup_longer_than_the_run():
    refused(ConfigError, "warm-up", "warmup_steps=3", warmup_steps=3)


def test_nothing_to_train():
    refused(ModelError, "nothing to train", model=nn.Linear(4, 3).requires_grad_(False))


def test_device_that_is_not_there():
    refused(ConfigError, "device='cudaa'", device="cudaa")
    refused(ConfigError, "device='meta'", "no numbers", device="meta")


def test_run_directory_that_holds_a_run(tmp_path):
    options = {"loss": "classification", "max_steps": 3, "device": "cpu", "progress": False, "out_dir": tmp_path}
    trainfn.fit(nn.Linear(4, 3), (X, Y), **options)
    refused(ConfigError, "already holds a run", 'resume="auto"', out_dir=tmp_path)


def test_resume_with_other_data_or_settings(tmp_path):
    options = {"loss": "classification", "device": "cpu", "progress": False, "out_dir": tmp_path}
    trainfn.fit(nn.Linear(4, 3), (X, Y), max_steps=3, **options)
    changed = {"seed": 1, "batch_size": 4, "resume": "auto", "max_steps": 5, "out_dir": tmp_path}
    refused(TrainfnError, "data:", "seed: 0 then, 1 now", "batch_size: 32 then, 4 now", data=(X + 1, Y), **changed)


def test_resume_with_another_optimizer_or_other_ties_is_one_report(tmp_path):
    class Tied(nn.Module):
        def __init__(self, tie):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            if tie:
                self.two.bias = self.one.bias

        def forward(self, x):
            return self.two(self.one(x))

    options = {"loss": "classification", "device": "cpu", "progress": False, "out_dir": tmp_path}
    trainfn.fit(Tied(True), (X, Y), max_steps=3, optimizer=trainfn.optim.adam(lr=0.1), **options)
    refused(
        TrainfnError, "optimizer: adam then, adamw now", "tied to one.bias: two.bias then, nothing now",
        "params.two.bias: not in the checkpoint", "seed: 0 then, 1 now",
        model=Tied(False), optimizer=trainfn.optim.adamw(lr=0.1), resume="auto", max_steps=5, out_dir=tmp_path, seed=1,
    )  # fmt: skip


def test_resume_on_another_machine_is_warned_of(tmp_path, monkeypatch):
    options = {"loss": "classification", "device": "cpu", "progress": False, "out_dir": tmp_path}
    trainfn.fit(nn.Linear(4, 3), (X, Y), max_steps=3, **options)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    with pytest.warns(CheckpointWarning, match="not bit for bit.*threads 1 then, 7 now"):
        trainfn.fit(nn.Linear(4, 3), (X, Y), max_steps=4, resume="auto", **options)
    monkeypatch.setattr("torch.__version__", "9.9")
    with pytest.warns(CheckpointWarning, match="torch .* then, 9.9 now"):
        trainfn.fit(nn.Linear(4, 3), (X, Y), max_steps=5, resume="auto", **options)


def test_settings_that_change_the_bits_are_told_from_those_that_do_not(tmp_path, capsys):
    options = {"loss": "classification", "device": "cpu", "out_dir": tmp_path, "optimizer": trainfn.optim.sgd(lr=0.1)}
    trainfn.fit(nn.Linear(4, 3), (X, Y), max_steps=3, **options)
    trainfn.fit(nn.Linear(4, 3), (X, Y), max_steps=4, log_every=2, resume="auto", **options)
    said = capsys.readouterr().err
    assert "log_every 10 -> 2" in said
    assert "not bit for bit" not in said
    trainfn.fit(nn.Linear(4, 3), (X, Y), max_steps=5, clip_norm=0.5, resume="auto", **options)
    assert "not bit for bit the run that went on (clip_norm)" in capsys.readouterr().err


def test_resume_with_another_model(tmp_path):
    options = {"loss": "classification", "device": "cpu", "progress": False, "out_dir": tmp_path}
    trainfn.fit(nn.Linear(4, 3), (X, Y), max_steps=3, **options)
    refused(TrainfnError, "weight", model=nn.Linear(4, 5), resume="auto", max_steps=5, out_dir=tmp_path)


def with_a_parameter(model):
    model.scale = nn.Parameter(torch.ones(()))
    return model
