"""Data from files: tables, texts, tokens, images; what is wrong with a file is said with the line it is in."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trainfn
from trainfn.data import (
    ByteTokenizer,
    ImageFolder,
    Loader,
    TokenFile,
    Tokenized,
    load_tokenizer,
    read_csv,
    read_jsonl,
    read_texts,
    train_bpe,
    write_tokens,
)
from trainfn.errors import ConfigError, DataError, MissingPackageError
from trainfn.tree import digest

workers_may_fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- tables


def test_a_csv_and_its_jsonl_are_the_same_table(tmp_path: Path) -> None:
    rows = [{"wide": i / 4, "long": -i, "kind": "cba"[i % 3]} for i in range(9)]
    text = "\r\n".join(["wide,long,kind", *[f"{r['wide']},{r['long']},{r['kind']}" for r in rows]])
    table = read_csv(written(tmp_path, "a.csv", "\ufeff" + text), target="kind")
    other = read_jsonl(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"), target="kind")
    for each in (table, other):
        assert each.columns == ("wide", "long")
        assert each.classes == ("a", "b", "c")
        assert each.features.tolist() == [[r["wide"], r["long"]] for r in rows]
        assert each.labels.tolist() == [2 - i % 3 for i in range(9)]
    assert digest(Loader(table, batch_size=4).batch(0)) == digest(Loader(other, batch_size=4).batch(0))
    assert digest(Loader([table[3]], batch_size=1).batch(0)) == digest(table.__getitems__([3]))
    result = trainfn.fit(nn.Linear(2, 3), table, task="tabular", max_steps=2, batch_size=4, progress=False)
    assert result.state.cursor == 2


@pytest.mark.parametrize(
    ("cells", "dtype"),
    [
        (["1", "2"], torch.int64),
        (["1", "2.0"], torch.float32),
        (["1e1", "2"], torch.float32),
        (["a", "1"], torch.int64),
    ],
)
def test_a_target_is_a_number_a_whole_number_or_a_class(tmp_path: Path, cells: list[str], dtype: torch.dtype) -> None:
    table = read_csv(written(tmp_path, "a.csv", "x,y\n" + "".join(f"0,{cell}\n" for cell in cells)), target="y")
    assert table.labels.dtype == dtype
    assert (table.classes is not None) == (cells == ["a", "1"])


def test_classes_can_be_those_of_another_table(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "x,y\n1,dog\n")
    assert read_csv(path, target="y", classes=["cat", "dog"]).labels.tolist() == [1]
    with pytest.raises(DataError, match="no such class"):
        read_csv(path, target="y", classes=["cat"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["empty"]),
        ("\n \n", ["empty"]),
        ("wide,kind\n", ["no rows", "wide, kind"]),
        ("wide,kid\n1,2\n", ["no such column", "'kind'", "did you mean 'kid'"]),
        ("wide,kind\n1,2\n1,2,3\n", [":3", "2: wide, kind", "3"]),
        ("wide,kind\n1,2\n,2\n", [":3, column wide", "''", "1 of 2"]),
        ('wide,kind\n"a\nb",2\n1,2\n', [":3, column wide", "1 of 2"]),
        ("wide,kind\n1,\n", [":2, column kind", "no target"]),
        ("kind\n1\n", ["nothing to predict from"]),
        ("wide,wide,kind\n1,2,3\n", ["one name", "wide"]),
        ('wide,kind\n"1,2\n', ["no CSV"]),
        (b"wide,kind\n\xff\xfe,2\n", ["no UTF-8", "byte 10"]),
    ],
)
def test_what_is_wrong_with_a_csv_is_said_with_its_line(tmp_path: Path, content: Any, words: list[str]) -> None:
    path = written(tmp_path, "bad.csv", content)
    with pytest.raises(DataError) as caught:
        read_csv(path, target="kind")
    for word in (*words, str(path)):
        assert word in str(caught.value), f"{word!r} is not in\n{caught.value}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"wide": 1, "kind": 2}\n{"wide": 1, "kind"', [":2", "no JSON"]),
        ("[1, 2]\n", [":1", "no JSON object", "list"]),
        ('{"wide": 1, "kind": 1}\n\n{"kind": 1}\n', [":3, column wide", "None", "1 of 2"]),
        ('{"wide": 1, "kind": 1}\n{"wide": 1}\n', [":2, column kind", "no target"]),
        ('{"wide": [1], "kind": 1}\n', [":1, column wide", "[1]"]),
        ("[" * 100_000, [":1", "no JSON"]),
    ],
)
def test_what_is_wrong_with_a_jsonl_is_said_with_its_line(tmp_path: Path, content: str, words: list[str]) -> None:
    path = written(tmp_path, "bad.jsonl", content)
    with pytest.raises(DataError) as caught:
        read_jsonl(path, target="kind")
    for word in (*words, str(path)):
        assert word in str(caught.value), f"{word!r} is not in\n{caught.value}"


def test_files_that_are_not_there() -> None:
    for read in (lambda: read_csv("nowhere.csv", target="y"), lambda: read_texts("nowhere.txt")):
        with pytest.raises(DataError, match="nowhere"):
            read()
    with pytest.raises(DataError, match="nowhere"):
        TokenFile("nowhere.bin", length=4)


# --- texts and tokenizers


def test_texts_from_files_train_a_language_model_and_a_classifier(tmp_path: Path) -> None:
    plain = written(tmp_path, "a.txt", "to be or not to be")
    lines = written(tmp_path, "b.jsonl", '{"text": "well", "mood": "good"}\n{"text": "oh no", "mood": "bad"}\n')
    assert read_texts([plain, lines]) == ["to be or not to be", "well", "oh no"]
    pairs = read_texts(lines, target="mood")
    assert pairs == [("well", 1), ("oh no", 0)]
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))
    data = Tokenized(read_texts([plain, lines]), ByteTokenizer())
    result = trainfn.fit(model, data, task="language_modeling", max_steps=1, batch_size=3, progress=False)
    assert result.history[0]["weight"] == 17 + 3 + 4
    classes = trainfn.TaskSpec(kind="text_classification", loss_options={"pooling": "mean"})
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 2))
    result = trainfn.fit(model, Tokenized(pairs, ByteTokenizer()), task=classes, max_steps=1, progress=False)
    assert result.history[0]["weight"] == 2
    with pytest.raises(DataError, match=r"b\.jsonl:1[^$]*'words'"):
        read_texts(lines, field="words")
    with pytest.raises(DataError, match=r"b\.jsonl:1, column text"):
        read_texts(written(tmp_path, "b.jsonl", '{"text": 3}'))
    with pytest.raises(DataError, match="no column of labels"):
        read_texts(plain, target="mood")


def test_texts_that_are_none() -> None:
    for texts in ([], "a text", b"bytes"):
        with pytest.raises(DataError, match="no texts"):
            Tokenized(texts, ByteTokenizer())
    with pytest.raises(DataError, match="no text"):
        Tokenized([3], ByteTokenizer())[0]
    with pytest.raises(ConfigError, match="no tokenizer"):
        Tokenized(["a"], None)


def test_a_tokenizer_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    texts = ["the cat sat on the mat", "the dog sat on the cat"] * 20
    made = train_bpe(texts, vocab_size=280, special_tokens=["<pad>", "<mask>"])
    assert made.get_vocab_size() <= 280
    assert len(made.encode(texts[0]).ids) < len(texts[0])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    again = load_tokenizer(path)
    assert again.encode(texts[1]).ids == made.encode(texts[1]).ids
    data = Tokenized(texts, again, max_length=5)
    assert data[0]["input_ids"].tolist() == made.encode(texts[0]).ids[:5]
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokenizer(written(tmp_path, "bad.json", "{}"))
    with pytest.raises(ConfigError, match="vocab_size"):
        train_bpe(texts, vocab_size=100)


# --- files of tokens


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_files_of_tokens_are_windows(tmp_path: Path, dtype: str) -> None:
    documents = [[1, 2, 3], [250], list(range(100))]
    flat = [token for document in documents for token in document]
    assert write_tokens(tmp_path / "a.bin", documents, dtype=dtype) == len(flat)
    np.save(tmp_path / "a.npy", np.array(flat, dtype=dtype))
    for path, given in ((tmp_path / "a.bin", dtype), (tmp_path / "a.npy", None), (tmp_path / "a.npy", dtype)):
        tokens = TokenFile(path, length=5, stride=3, dtype=given)
        want = [flat[at : at + 5] for at in range(0, len(flat) - 4, 3)]
        assert len(tokens) == len(want)
        assert tokens.__getitems__(list(range(len(want))))["input_ids"].tolist() == want
        assert tokens[-1]["input_ids"].tolist() == want[-1]
        assert tokens[0]["input_ids"].dtype == torch.int64
        with pytest.raises(IndexError):
            tokens[len(want)]


@workers_may_fork
def test_a_worker_maps_the_file_anew(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [range(60_000)])
    tokens = TokenFile(tmp_path / "a.bin", length=8)
    sent = pickle.dumps(tokens)
    assert len(sent) < 1000, "the tokens are not sent"
    assert digest(pickle.loads(sent)[100]) == digest(tokens[100])
    here, there = (Loader(tokens, batch_size=4, workers=workers).batches(3, 6) for workers in (0, 1))
    assert [digest(batch) for batch in here] == [digest(batch) for batch in there]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "empty"),
        ("a.bin", b"123", "multiple of 2 bytes"),
        ("a.bin", b"1234", "less than one window"),
        ("a.npy", b"123", "no .npy file"),
        ("a.npy", b"", "empty"),
    ],
)
def test_files_without_tokens(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenFile(written(tmp_path, name, content), length=4)


def test_arrays_that_are_no_tokens(tmp_path: Path) -> None:
    for number, array in enumerate([np.ones(9), np.ones((3, 3), int), np.array([{}] * 9)]):
        np.save(tmp_path / f"{number}.npy", array, allow_pickle=True)
        with pytest.raises(DataError):
            TokenFile(tmp_path / f"{number}.npy", length=4)
    np.save(tmp_path / "a.npy", np.ones(9, np.uint16))
    with pytest.raises(DataError, match="uint32"):
        TokenFile(tmp_path / "a.npy", length=4, dtype="uint32")
    with pytest.raises(ConfigError, match="float"):
        TokenFile(tmp_path / "a.npy", length=4, dtype="float32")
    with pytest.raises(DataError, match="0 to 65535"):
        write_tokens(tmp_path / "b.bin", [[65536]])


BIG = """
import sys
from pathlib import Path
import torch
from torch import nn
import trainfn
path, out_dir = sys.argv[1:]
asked = []
class Counted(trainfn.data.TokenFile):
    def __getitems__(self, indices):
        asked.append(len(indices))
        return super().__getitems__(indices)
data = Counted(path, length=128)
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 64))
for steps in (20, 22):
    asked.clear()
    result = trainfn.fit(model, data, task="language_modeling", max_steps=steps, batch_size=16, out_dir=out_dir,
                         resume="auto", progress=False, device="cpu")
    print(result.state.cursor, len(asked))
# Not getrusage: what that says of a process begins with the memory of its parent.
print(len(data), Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
def test_a_file_of_two_gigabytes_trains_and_resumes_in_little_memory(tmp_path: Path) -> None:
    """The file is sparse: it takes no room on the disk, and reads as zeros."""
    path = tmp_path / "big.bin"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 2 * 2**30)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BIG, str(path), str(tmp_path / "run")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cursor, first, cursor_then, resumed, windows, memory = map(int, done.stdout.split())
    assert (cursor, cursor_then, windows) == (20, 22, 2**30 // 128)
    assert memory < 600_000, f"{memory} kB"
    assert first - resumed == 18, "the steps before are not replayed to find the place"


# --- images


def test_a_folder_of_images_trains(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(6):
        kind = "ba"[number % 2]
        (tmp_path / kind).mkdir(exist_ok=True)
        pixels = np.full((6 + number % 2, 5, 3), 40 * number, dtype=np.uint8)
        image.fromarray(pixels).save(tmp_path / kind / f"{number}.png")
    written(tmp_path, "notes.txt", "not an image")
    data = ImageFolder(tmp_path, size=(4, 5))
    assert data.classes == ["a", "b"]
    assert [data[i][1] for i in range(6)] == data.labels == [0, 0, 0, 1, 1, 1]
    assert data[1][0].shape == (3, 4, 5)
    assert float(data[1][0].max()) == pytest.approx(120 / 255)
    assert ImageFolder(tmp_path, mode="L")[3][0].shape == (1, 6, 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 2))
    result = trainfn.fit(model, data, val_data=data, task="vision_classification", max_steps=3, progress=False)
    assert "val_accuracy" in result.history[-1]
    with pytest.raises(DataError, match="ImageFolder"):
        Loader(ImageFolder(tmp_path), batch_size=6).batch(0)
    written(tmp_path / "a", "9.png", b"no image")
    with pytest.raises(DataError, match=r"9\.png"):
        ImageFolder(tmp_path)[3]


def test_folders_without_classes(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    with pytest.raises(DataError, match="no image"):
        ImageFolder(tmp_path)
    written(tmp_path, "a.png", b"")
    with pytest.raises(DataError, match=r"outside of a class: a\.png"):
        ImageFolder(tmp_path)
    with pytest.raises(ConfigError, match="size"):
        ImageFolder(tmp_path, size=(0, 3))
    with pytest.raises(ConfigError, match="mode"):
        ImageFolder(tmp_path, mode="CMYK")


# --- packages that are not there


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("PIL", lambda: ImageFolder(".")),
        ("tokenizers", lambda: load_tokenizer(__file__)),
        ("tokenizers", lambda: train_bpe([], vocab_size=300)),
    ],
)
def test_a_package_that_is_not_there_is_answered_with_the_command(
    package: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return right(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match="pip install"):
        call()
