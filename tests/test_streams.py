"""Data that can only be iterated over: what becomes of it, and what is said before a run where it cannot go well."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import trainfn
from tests.laws.stream_program import EXAMPLES, Examples, Remembering, generated
from trainfn.data import Batched, Loader, Stream, StreamWarning, is_stream, make_feed
from trainfn.data.position import from_json, to_json
from trainfn.errors import CheckpointError, ConfigError, DataError
from trainfn.tree import digest

workers_may_fork = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def fit(data: Any, **settings: Any) -> trainfn.FitResult:
    options = {
        "loss": "classification", "lr": 0.01, "max_steps": 3, "device": "cpu", "compile": "eager", "progress": False,
        "log_every": 1,
    } | settings  # fmt: skip
    return trainfn.fit(nn.Linear(4, 3), data, **options)


def numbers(stream: Stream, stop: int) -> list[list[int]]:
    return [batch[0][:, 0].int().tolist() for batch in stream.batches(0, stop)]


class Numbered(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        for index in range(first, 10, stride):
            yield torch.full((4,), float(index)), 0


# --- what becomes of it -----------------------------------------------------------------------------------------------


@workers_may_fork
@pytest.mark.parametrize(
    ("workers", "order"),
    [
        (0, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]),
        (1, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]),
        (2, [[0, 2, 4, 6], [1, 3, 5, 7], [8], [9], [0, 2, 4, 6]]),
    ],
)
def test_workers_take_turns_with_batches_of_their_shards(workers: int, order: list[list[int]]) -> None:
    assert numbers(Stream(Numbered(), batch_size=4, workers=workers), len(order)) == order
    theirs = DataLoader(Numbered(), batch_size=4, num_workers=workers)
    assert numbers(Stream(theirs), len(order)) == order, "PyTorch's own loader has the same order"


def test_a_step_is_batch_size_times_accumulate_examples_or_one_batch_of_a_loader() -> None:
    sizes = {
        "examples": (Numbered(), {"batch_size": 2, "accumulate": 2}, [4, 4, 2]),
        "batches": (DataLoader(Numbered(), batch_size=5), {"accumulate": 2}, [5, 5, 5]),
        "short ones left out": (Numbered(), {"batch_size": 2, "accumulate": 2, "drop_last": True}, [4, 4, 4]),
    }
    for name, (data, settings, weights) in sizes.items():
        assert [row["weight"] for row in fit(data, **settings).history] == weights, name


def test_whole_batches_are_finished_and_examples_collated_by_the_task() -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "labels": 0}, {"input_ids": [5], "labels": 1}]
    padded = next(Stream(iter(rows), batch_size=2, collate="text").batches())
    assert padded["input_ids"].tolist() == [[1, 2, 3, 4], [5, 0, 0, 0]]
    image = {"image": torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), "labels": torch.zeros(2).long()}
    (whole,) = Stream(Batched([image]), collate="image").batches(0, 1)
    assert whole["image"].dtype == torch.float32


def test_evaluation_over_a_stream_is_that_over_the_whole_and_can_be_repeated() -> None:
    torch.manual_seed(0)
    made = fit(Numbered(), batch_size=4, val_data=Numbered(), eval_every=1)
    step = trainfn.make_step(nn.Linear(4, 3), loss="classification", optimizer=trainfn.optim.sgd(0.1))
    items = list(Numbered())
    whole = trainfn.evaluate(step, made.state, (torch.stack([x for x, _ in items]), torch.zeros(10).long()))
    for data in (Numbered(), DataLoader(Numbered(), batch_size=3), iter(items)):
        found = trainfn.evaluate(step, made.state, data, batch_size=4)
        assert (found["weight"], found["loss"]) == (10, pytest.approx(whole["loss"], rel=1e-6))
    assert made.history[-1]["val_loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert [len(row) for row in made.history] == [len(made.history[0])] * 3


def test_draws_follow_from_the_seed_alone_and_the_callers_are_left_as_they_were() -> None:
    random.seed(1)
    before = (random.getstate(), torch.get_rng_state())
    first, other = (digest(list(Stream(Examples(), batch_size=4, seed=seed).batches(0, 8))) for seed in (0, 1))
    assert (random.getstate(), digest(torch.get_rng_state())) == (before[0], digest(before[1]))
    random.seed(2)
    torch.rand(3)
    assert digest(list(Stream(Examples(), batch_size=4).batches(0, 8))) == first != other


def test_which_data_are_streams() -> None:
    assert all(map(is_stream, [iter([1]), Numbered(), generated, Batched([1]), DataLoader(Numbered()), {1: 2}.keys()]))
    assert not any(map(is_stream, [[1], (1,), {"a": 1}, {1}, "text", np.ones(2), range(3), DataLoader([1]), None, 3]))
    assert isinstance(make_feed([1, 2], batch_size=1), Loader)


@workers_may_fork
def test_no_process_is_left_behind() -> None:
    fit(Numbered(), batch_size=3, workers=1)
    fit(DataLoader(Numbered(), num_workers=1))
    assert multiprocessing.active_children() == []


def test_a_resume_says_what_it_costs(tmp_path: Path) -> None:
    fit(generated, batch_size=4, out_dir=tmp_path)
    with pytest.warns(StreamWarning, match=r"3 batches of epoch 0 are fetched .* took \d+\.\d s before.*Stateful"):
        fit(generated, batch_size=4, out_dir=tmp_path, max_steps=5, resume="auto")


def test_an_error_in_the_middle_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    class Fails(Remembering):
        is_broken = True

        def __iter__(self) -> Iterator[Any]:
            for number, item in enumerate(super().__iter__()):
                if self.is_broken and number == 13:
                    raise OSError("gone")
                yield item

    with pytest.raises(DataError, match=r"(?s)could not be iterated over.*batch 3.*OSError: gone") as raised:
        fit(Fails(), batch_size=4, out_dir=tmp_path, max_steps=9)
    assert "step_00000003" in raised.value.__notes__[0]
    Fails.is_broken = False
    with pytest.warns(StreamWarning):  # its own state was further than the batch
        again = fit(Fails(), batch_size=4, out_dir=tmp_path, max_steps=9, resume="auto", lr=0.01)
    assert again.state.cursor == 9


# --- refused ----------------------------------------------------------------------------------------------------------


def refused(kind: type[Exception], match: str, data: Any, **settings: Any) -> None:
    with pytest.raises(kind, match=match):
        fit(data, **settings)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (iter([]), "(?s)ends at once.*batch 0"),
        (Batched([]), "ends at once"),
        (iter("abc"), "(?s)no tensor.*batch 0"),
        (iter([object()]), "(?s)Collating a batch failed.*batch 0"),
        (Batched([object()]), "no tensor"),
        (DataLoader(Numbered(), batch_size=2, collate_fn=str), "no tensor"),
        (iter([(torch.ones(4), 0), (torch.ones(3), 0)]), "(?s)differ in shape.*batch 0"),
        (iter([(torch.ones(4), 7)] * 4), "(?s)Labels are out of range.*7"),
        (iter([(torch.full((4,), float("nan")), 0)] * 4), "Features are NaN"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_the_first_step(data: Any, match: str, tmp_path: Path) -> None:
    refused(DataError, match, data, out_dir=tmp_path)
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.parametrize(
    ("data", "settings", "match"),
    [
        (Numbered(), {"max_steps": None, "max_epochs": 2}, "max_epochs=2: how long"),
        (Numbered(), {"shuffle": True}, "shuffle=True"),
        (DataLoader(Numbered()), {"batch_size": 4, "workers": 1}, "batch_size=4; workers=1"),
        (Batched([1]), {"collate": list}, "nothing to collate"),
        (iter([1]), {"workers": 1}, "cannot be shared"),
    ],
)
def test_settings_that_a_stream_contradicts(data: Any, settings: Any, match: str) -> None:
    refused(ConfigError, match, data, **settings)


def test_an_iterator_that_would_be_needed_again(tmp_path: Path) -> None:
    def ten() -> Iterator[Any]:
        return iter(list(Numbered()))

    refused(DataError, "evaluations are many", Numbered(), val_data=ten())
    with pytest.raises(DataError, match=r"(?s)cannot be begun again.*max_steps=3 is as far.*generator function") as one:
        fit(ten(), batch_size=4, max_steps=5, out_dir=tmp_path)
    assert "step_00000003" in one.value.__notes__[0]
    refused(DataError, "cannot be brought to", ten(), batch_size=4, max_steps=5, out_dir=tmp_path, resume="auto")


def test_an_iterable_that_gives_itself_up_or_shrinks(tmp_path: Path) -> None:
    class Once:
        def __init__(self) -> None:
            self.items = iter(list(Numbered()))

        def __iter__(self) -> Iterator[Any]:
            yield from self.items

    refused(DataError, r"(?s)ends at once again.*begin at the first", Once(), batch_size=4, max_steps=5)

    class Shrinks(Numbered):
        least = 10

        def __iter__(self) -> Iterator[Any]:
            return iter(list(super().__iter__())[: self.least])

    fit(Shrinks(), batch_size=2, max_steps=4, out_dir=tmp_path)
    Shrinks.least = 4
    with pytest.warns(StreamWarning):
        refused(DataError, "shorter than it was", Shrinks(), batch_size=2, max_steps=9, out_dir=tmp_path, resume="auto")


def test_other_data_and_an_order_that_nothing_decides_are_refused_at_a_resume(tmp_path: Path) -> None:
    class Random(Numbered):
        draws = False  # as it says

        def __iter__(self) -> Iterator[Any]:
            for x, y in super().__iter__():
                yield x + int.from_bytes(os.urandom(2)), y

    fit(Random(), batch_size=2, out_dir=tmp_path)
    refused(CheckpointError, "data: .* then", Random(), batch_size=2, out_dir=tmp_path, resume="auto", max_steps=5)


def test_a_state_that_is_no_json_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Bad(Remembering):
        def state_dict(self) -> dict[str, Any]:
            return {"at": {"handle": object()}}

    with pytest.raises(DataError, match=r"(?s)cannot be saved.*state_dict\(\)\['at'\]\['handle'\].*object"):
        fit(Bad(), batch_size=3, out_dir=tmp_path)
    assert fit(Bad(), batch_size=3).state.cursor == 3, "where nothing is saved it does not matter"


# --- positions as JSON ------------------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was() -> None:
    generator = np.random.default_rng(0)
    state = {
        "torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state(),
        "new": generator.bit_generator.state, "keys": {1: "a", (2, 3): b"\x00\xff"}, "~": ["~", None, True, 0.1],
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16), "none": torch.empty(0, 3), "scalar": torch.tensor(3),
    }  # fmt: skip
    found = from_json(json.loads(json.dumps(to_json(state))))
    assert repr(found) == repr(state)
    assert found["python"] == state["python"]
    assert torch.equal(found["torch"], state["torch"])
    assert (found["half"].dtype, found["none"].shape) == (torch.bfloat16, (0, 3))


@pytest.mark.parametrize(
    "bad",
    [
        {"~": "tensor", "of": ["Tensor", [1], "AA=="]}, {"~": "tensor", "of": ["int64", [2**40], "AA=="]},
        {"~": "array", "of": ["|O", [1], "AAAAAAAAAAA="]}, {"~": "os.system", "of": "true"}, {"~": "tuple", "of": 3},
        {"~": "bytes", "of": "?"}, {"~": "dict", "of": [[{}, 1]]}, {"~": []}, {"~": "tensor"},
    ],
)  # fmt: skip
def test_what_was_not_written_by_it_is_refused(bad: Any) -> None:
    with pytest.raises(CheckpointError, match="not one"):
        from_json(bad)


def test_the_pass_is_all_examples() -> None:
    assert sum(len(batch[1]) for batch in Stream(Examples(), batch_size=4).one_pass()) == EXAMPLES


def test_so_many_batches_may_be_an_epoch_of_a_stream() -> None:
    made = fit(Numbered(), batch_size=4, max_steps=None, max_epochs=2, limit_train_batches=2, val_data=Numbered())
    assert made.state.cursor == 4
    assert [row["epoch"] for row in made.epochs] == [0, 1]
    assert [row["step"] for row in made.history if "val_loss" in row] == [2, 4]
    limited = fit(Numbered(), batch_size=4, val_data=Numbered(), limit_eval_batches=1)
    assert limited.history[-1]["val_loss"] != made.history[-1]["val_loss"]


def test_a_result_predicts_over_a_stream() -> None:
    made = fit(Numbered(), batch_size=4)
    whole = made.predict((torch.stack([x for x, _ in Numbered()]), torch.zeros(10).long()))
    for data in (Numbered(), iter(list(Numbered())), DataLoader(Numbered(), batch_size=3)):
        assert torch.allclose(made.predict(data), whole)
