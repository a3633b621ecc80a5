"""The forms of data: each gives the same batches for the same data and seed, and what contradicts is refused."""

from __future__ import annotations

import math
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

import trainfn
from trainfn.data import Loader, order, split
from trainfn.errors import ConfigError, DataError
from trainfn.tree import digest

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 4, generator=GENERATOR)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
SIZE, SEED = 8, 3
workers_may_fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Frame:
    """The little of a pandas frame that is used; tests with the real one are below."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self._columns = {name: np.asarray(values) for name, values in columns.items()}
        self.columns = list(columns)
        self.iloc = self

    def to_numpy(self) -> Any:
        return np.stack(list(self._columns.values()), axis=1)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, str):
            return Column(self._columns[which])
        return Frame({name: values[which] for name, values in self._columns.items()})


class Column:
    def __init__(self, values: Any) -> None:
        self._values, self.iloc = values, self

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, which: Any) -> Any:
        return Column(self._values[which])

    def to_numpy(self) -> Any:
        return self._values

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self._values, *args)


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index], int(Y[index])


class Fields(Pairs):
    def __getitem__(self, index: int) -> Any:
        return {"x": X[index].tolist(), "y": int(Y[index])}


def by_function(index: int) -> Any:
    epoch, number = divmod(index, math.ceil(len(X) / SIZE))
    positions = torch.arange(number * SIZE, min(len(X), (number + 1) * SIZE))
    chosen = order(positions, len(X), seed=SEED, epoch=epoch)
    return X[chosen], Y[chosen]


def columns() -> dict[str, Any]:
    return {f"x{at}": X[:, at].numpy() for at in range(4)} | {"kind": Y.numpy()}


LOADED = {"shuffle": True, "batch_size": SIZE}
TUPLES: dict[str, Any] = {
    "tensors": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "tensor and array": (X, Y.numpy()),
    "columns of a frame": (Frame({f"x{at}": X[:, at] for at in range(4)}), Column(Y.numpy())),
    "TensorDataset": TensorDataset(X, Y),
    "list of tuples": [(X[i], int(Y[i])) for i in range(len(X))],
    "list of arrays": [(X[i].numpy(), Y[i].numpy()) for i in range(len(X))],
    "list of lists": [(X[i].tolist(), int(Y[i])) for i in range(len(X))],
    "data set": Pairs(),
    "DataLoader": DataLoader(Pairs(), **LOADED),
    "DataLoader of tensors": DataLoader(TensorDataset(X, Y), **LOADED),
    "DataLoader with a collate_fn": DataLoader(
        TensorDataset(X, Y),
        collate_fn=lambda items: (torch.stack([a for a, _ in items]), torch.stack([b for _, b in items])),
        **LOADED,
    ),
    "function": by_function,
}
DICTS: dict[str, Any] = {
    "tensors": {"x": X, "y": Y},
    "arrays": {"x": X.numpy(), "y": Y.numpy()},
    "mapping": UserDict({"x": X.numpy(), "y": Y}),
    "list of dicts": [{"x": X[i], "y": Y[i]} for i in range(len(X))],
    "rows as datasets gives them": Fields(),
    "DataLoader": DataLoader(Fields(), **LOADED),
    "function": lambda index: dict(zip("xy", by_function(index), strict=True)),
}


def fit(data: object, **settings: Any) -> trainfn.FitResult:
    torch.manual_seed(0)
    options = {"loss": "classification", "max_steps": 6, "seed": SEED, "device": "cpu", "progress": False} | settings
    if not callable(data) or isinstance(data, Dataset):
        options = {"batch_size": SIZE} | options
    return trainfn.fit(nn.Linear(4, 3), data, **options)


def batches(data: object, **settings: Any) -> list[str]:
    """Digests of the batches that ``fit`` trains on."""
    options = {"max_steps": 6, "seed": SEED, "device": "cpu", "loss": "classification"} | settings
    if not callable(data) or isinstance(data, Dataset):
        options = {"batch_size": SIZE} | options
    return [digest(batch) for batch in trainfn.plan(nn.Linear(4, 3), data, **options).loader.batches(0, 6)]


def naive(make: Any) -> list[str]:
    return [digest(make(by_function(number))) for number in range(6)]


@pytest.mark.parametrize("form", TUPLES)
def test_every_form_of_a_pair_gives_the_batches_of_the_order(form: str) -> None:
    assert batches(TUPLES[form]) == naive(tuple)


@pytest.mark.parametrize("form", DICTS)
def test_every_form_of_named_fields_gives_the_batches_of_the_order(form: str) -> None:
    assert batches(DICTS[form]) == naive(lambda pair: dict(zip("xy", pair, strict=True)))


def test_control_other_data_another_seed_and_another_order_give_other_batches() -> None:
    right = naive(tuple)
    assert batches((X + 1, Y)) != right
    assert batches((X, Y), seed=4) != right
    assert batches((X, Y), shuffle=False) != right


def test_every_form_makes_the_same_run() -> None:
    want = digest(fit((X, Y)).state.params)
    assert {name: digest(fit(data).state.params) for name, data in TUPLES.items()} == dict.fromkeys(TUPLES, want)
    assert {name: digest(fit(data).state.params) for name, data in DICTS.items()} == dict.fromkeys(DICTS, want)


@workers_may_fork
@pytest.mark.parametrize("form", ["arrays", "list of lists", "function"])
def test_workers_make_the_same_run(form: str) -> None:
    runs = {digest(fit(TUPLES[form], workers=workers).state.params) for workers in (0, 1, 2)}
    assert runs == {digest(fit((X, Y)).state.params)}


@pytest.mark.filterwarnings("ignore:Cannot (locate|pickle)")
def test_frames_of_pandas_and_rows_of_datasets() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(columns())
    assert batches((frame.drop(columns="kind"), frame["kind"])) == naive(tuple)
    task = trainfn.TaskSpec(kind="tabular", target="kind")
    assert batches(frame, task=task) == naive(lambda pair: {"features": pair[0], "labels": pair[1]})
    assert [len(part) for part in split(frame, 0.2)] == [24, 6]
    datasets = pytest.importorskip("datasets")
    table = datasets.table.InMemoryTable.from_pydict({"x": X.tolist(), "y": Y.tolist()})
    rows = datasets.Dataset(table, fingerprint="rows")
    assert batches(rows) == naive(lambda pair: dict(zip("xy", pair, strict=True)))
    assert batches(split(rows, 0.2).train) != batches(rows)


def test_a_frame_is_read_by_the_target_of_the_task() -> None:
    task = trainfn.TaskSpec(kind="tabular", target="kind")
    want = naive(lambda pair: {"features": pair[0], "labels": pair[1]})
    assert batches(Frame(columns()), task=task) == want
    assert (
        batches(Frame(columns() | {"noise": np.ones(30)}), task=task.evolve(inputs=[f"x{i}" for i in range(4)])) == want
    )
    words = Frame(columns() | {"kind": np.array(["abc"[y] for y in Y])})
    assert batches(words, task=task) == want
    few = Frame(
        {name: values[Y.numpy() > 0] for name, values in columns().items()} | {"kind": ["abc"[y] for y in Y if y]}
    )
    planned = trainfn.plan(nn.Linear(4, 3), words, val_data=few, task=task, max_steps=1, device="cpu", batch_size=SIZE)
    assert torch.equal(planned.val_loaders["val"].batch(0)["labels"], Y[Y > 0][:SIZE]), (
        "numbered as in the training data"
    )
    with pytest.raises(DataError, match=r"Which column.*\n.*\n.*read_frame"):
        fit(Frame(columns()))
    with pytest.raises(DataError, match=r"no such column[^$]*did you mean 'kind'"):
        fit(Frame(columns()), task=task.evolve(target="kin"))


def test_evaluation_takes_every_form() -> None:
    results = [fit((X, Y), val_data=data, metrics=["accuracy"]).history[-1] for data in (
        (X, Y), (X.numpy(), Y.numpy()), Pairs(), DataLoader(Pairs(), batch_size=5, shuffle=True)
    )]  # fmt: skip
    for row in results:
        assert row["val_loss"] == pytest.approx(results[0]["val_loss"], rel=1e-6)
        assert row["val_accuracy"] == results[0]["val_accuracy"]
    with pytest.raises(ConfigError, match="over all examples"):
        fit((X, Y), val_data=DataLoader(Pairs(), batch_size=4, drop_last=True))
    with pytest.raises(DataError, match="no end"):
        fit((X, Y), val_data=by_function)
    step = trainfn.make_step(nn.Linear(4, 3), loss="classification", optimizer=trainfn.optim.sgd(lr=0.1))
    state = trainfn.init(step.model, step.optimizer)
    assert trainfn.evaluate(step, state, DataLoader(Pairs(), batch_size=5)) == trainfn.evaluate(step, state, Pairs())


# --- arrays


def test_arrays_keep_their_dtype_and_share_their_memory() -> None:
    for dtype in ("bool", "uint8", "int32", "int64", "float16", "float32", "float64", ">i4", ">f8"):
        array = np.arange(10).astype(dtype)
        found = Loader(array, batch_size=10, shuffle=False).batch(0)
        assert str(found.dtype) == f"torch.{array.dtype.newbyteorder('=').name}"
        assert found.tolist() == array.tolist()
    for dtype, wider in (("uint16", torch.int32), ("uint32", torch.int64)):
        found = Loader(np.array([np.iinfo(dtype).max], dtype=dtype), batch_size=1).batch(0)
        assert (found.dtype, found.tolist()) == (wider, [np.iinfo(dtype).max])
    array = np.zeros(4)
    loader = Loader(array, batch_size=4, shuffle=False)
    array[0] = 7
    assert loader.batch(0)[0] == 7
    array.flags.writeable = False
    assert Loader(array, batch_size=4).batch(0).shape == (4,)
    assert Loader(np.arange(12).reshape(4, 3).T[::-1], batch_size=3, shuffle=False).batch(0)[0].tolist() == [
        2,
        5,
        8,
        11,
    ]


@pytest.mark.parametrize(
    "array", [np.array(["a", "b"]), np.array([None, 1]), np.array(["2020-01-01"], "datetime64[D]")]
)
def test_arrays_without_numbers_are_refused(array: Any) -> None:
    with pytest.raises(DataError, match="does not hold numbers") as caught:
        Loader({"x": {"words": array}}, batch_size=1)
    assert caught.value.where == "x.words"


def test_a_list_of_numbers_is_a_row_and_not_several_fields() -> None:
    batch = Loader([{"ids": [1, 2, 3]}, {"ids": [4, 5, 6]}], batch_size=2, shuffle=False).batch(0)
    assert batch["ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert Loader([0.5, 1.5], batch_size=2, shuffle=False).batch(0).dtype == torch.float32


# --- DataLoaders


def test_what_a_data_loader_says_is_what_fit_does() -> None:
    loader = DataLoader(Pairs(), batch_size=7, shuffle=False, drop_last=True, num_workers=1)
    planned = trainfn.plan(nn.Linear(4, 3), loader, loss="classification", max_epochs=1, device="cpu")
    read = planned.loader
    assert (read.batch_size, read.shuffle, read.drop_last, read.workers) == (7, False, True, 1)
    assert planned.config.batch_size == 7
    assert planned.stop == 4
    assert trainfn.plan(nn.Linear(4, 3), loader, loss="classification", max_epochs=1, batch_size=7).stop == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 9}, "batch_size: 8 in the DataLoader, 9 in fit"),
        ({"shuffle": False, "workers": 2}, "shuffle: True.*; workers: 0 in the DataLoader, 2"),
        ({"drop_last": True}, "drop_last"),
    ],
)
def test_settings_that_contradict_a_data_loader(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(DataLoader(Pairs(), **LOADED), **settings)


def test_two_collate_functions_are_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="collate"):
        fit(DataLoader(Pairs(), collate_fn=lambda items: items, **LOADED), collate="default")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * 30, 30)}, "sampler=WeightedRandomSampler"),
        ({"sampler": RandomSampler(Pairs(), replacement=True)}, "replacement=True"),
        ({"batch_sampler": [[0, 1], [2]]}, "batch_size=None"),
        ({"batch_size": None}, "batch_size=None"),
        ({"generator": torch.Generator(), "shuffle": True}, "generator"),
        ({"worker_init_fn": print}, "worker_init_fn"),
    ],
)
def test_data_loaders_with_an_order_of_their_own(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainfn.plan(nn.Linear(4, 3), DataLoader(Pairs(), **options), loss="classification", max_steps=1)


# --- functions


def test_a_function_resumes_at_its_batch(tmp_path: Any) -> None:
    asked: list[int] = []

    def function(index: int) -> Any:
        asked.append(index)
        return by_function(index)

    whole = fit(function, max_steps=6, optimizer=trainfn.optim.adam(lr=0.1))
    fit(function, max_steps=3, optimizer=trainfn.optim.adam(lr=0.1), out_dir=tmp_path)
    asked.clear()
    result = fit(function, max_steps=6, optimizer=trainfn.optim.adam(lr=0.1), out_dir=tmp_path, resume="auto")
    assert digest(result.state.params) == digest(whole.state.params)
    assert asked[-3:] == [3, 4, 5]


def test_draws_of_a_function_are_of_seed_and_index() -> None:
    def noisy(index: int) -> Any:
        return torch.randn(4, 4), torch.randint(3, (4,))

    first, second = batches(noisy), batches(noisy)
    assert first == second
    assert len(set(first)) == 6
    assert batches(noisy, seed=9) != first


@pytest.mark.parametrize("setting", [{"batch_size": 4}, {"shuffle": True}, {"drop_last": True}, {"max_epochs": 2}])
def test_settings_that_a_function_decides_itself(setting: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        fit(by_function, **setting)


@pytest.mark.parametrize("bad", [lambda index: object(), lambda index: [], lambda index: 1 / 0, lambda: X])
def test_functions_that_make_no_batches(bad: Any) -> None:
    with pytest.raises(DataError):
        fit(bad)


# --- split


@given(st.integers(2, 200), st.floats(0.001, 0.999), st.integers(0, 2**63 - 1))
def test_a_split_is_a_partition_in_order(length: int, fraction: float, seed: int) -> None:
    data = torch.arange(length)
    train, held_out = split(data, fraction, seed)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(length))
    assert train.tolist() == sorted(train.tolist())
    assert held_out.tolist() == sorted(held_out.tolist())
    assert split(data, fraction, seed).sizes == (len(train), len(held_out))
    assert abs(len(held_out) - fraction * length) <= 1
    assert torch.equal(split(data, fraction, seed).held_out, held_out)


@pytest.mark.parametrize("form", [name for name in TUPLES if not name.startswith(("DataLoader", "function"))])
def test_a_split_keeps_the_form_and_agrees_between_forms(form: str) -> None:
    data = TUPLES[form]
    made = split(data, 0.2, seed=1)
    assert made.sizes == (24, 6)
    assert "24 examples to train on, 6 held out" in repr(made)
    assert isinstance(made.train, tuple) == isinstance(data, tuple)
    assert batches(made.train) == batches(split((X, Y), 0.2, seed=1).train)
    assert split(made.train, 0.5).sizes == (12, 12), "a part can be split again"


def test_a_view_asks_for_whole_batches_where_the_data_can_answer() -> None:
    text = trainfn.data.ByteText(bytes(range(64)), length=4)
    part = split(text, 0.25).held_out
    assert hasattr(part, "__getitems__")
    assert not hasattr(split(Pairs(), 0.25).held_out, "__getitems__")
    assert part.draws is False
    assert torch.equal(Loader(part, batch_size=4, shuffle=False).batch(0)["input_ids"][1], part[1]["input_ids"])


def test_seeds_make_different_splits() -> None:
    assert not torch.equal(split(X, 0.5, 0).train, split(X, 0.5, 1).train)


@pytest.mark.parametrize("data", [by_function, DataLoader(Pairs()), iter([1]), torch.ones(1), "text", 3])
def test_what_cannot_be_split(data: Any) -> None:
    with pytest.raises(DataError):
        split(data, 0.5)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, math.nan, True, "half"])
def test_fractions_out_of_range(fraction: Any) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        split(X, fraction)
