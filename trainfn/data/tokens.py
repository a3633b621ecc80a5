"""Texts as tokens: the bytes themselves, Hugging Face's ``tokenizers``, and files of tokens larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainfn.data.padding import check_int
from trainfn.data.text import ByteText
from trainfn.errors import ConfigError, DataError, MissingPackageError

_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


class ByteTokenizer:
    """The tokenizer that needs nothing: a token is a byte of UTF-8.

    >>> ByteTokenizer().encode("no"), ByteTokenizer().decode([110, 111])
    ([110, 111], 'no')
    """

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some bytes; see :meth:`trainfn.data.ByteText.decode`."""
        return ByteText.decode(ids)


class Tokenized:
    """Texts as token ids: a map-style data set of ``{"input_ids": int64 [tokens]}``, and ``"labels"`` of pairs.

    Texts differ in length: ``collate="text"`` pads them, and the tasks about text do so by themselves. A text is
    tokenized when it is asked for.

    Args:
        texts: texts, or pairs of a text and a label.
        tokenizer: anything whose ``encode(text)`` returns ids, or an object with ``.ids``: a :class:`ByteTokenizer`, a
            ``tokenizers.Tokenizer``, a tokenizer of transformers.
        max_length: cut longer texts; None cuts nothing.

    Raises:
        DataError: no texts; or, when it is asked for, an item that is none.

    >>> Tokenized(["no", "yes"], ByteTokenizer())[0]
    {'input_ids': tensor([110, 111])}
    """

    draws = False

    def __init__(self, texts: Sequence[Any], tokenizer: Any, *, max_length: int | None = None) -> None:
        check_int("max_length", max_length, 1, optional=True)
        if isinstance(texts, (str, bytes)) or len(texts) == 0:
            got = type(texts).__name__ if isinstance(texts, (str, bytes)) else "none"
            raise DataError("There are no texts.", expected="a list of texts, or of pairs (text, label)", got=got)
        if not callable(getattr(tokenizer, "encode", None)):
            raise ConfigError("This is no tokenizer.", expected="an object with encode(text)", got=repr(tokenizer))
        self._texts, self._tokenizer, self._max_length = texts, tokenizer, max_length

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._texts[index]
        text, *label = item if isinstance(item, (tuple, list)) else (item,)
        if not isinstance(text, str) or len(label) > 1:
            raise DataError("An item is no text.", expected="a str, or (str, label)", got=repr(item)[:80])
        encoded = self._tokenizer.encode(text)
        ids = torch.tensor(list(getattr(encoded, "ids", encoded)), dtype=torch.int64)[: self._max_length]
        return {"input_ids": ids, **({"labels": label[0]} if label else {})}


def load_tokenizer(path: str | Path) -> Any:
    """Return the ``tokenizers.Tokenizer`` in a ``tokenizer.json``.

    Raises:
        MissingPackageError: ``tokenizers`` is not installed.
        DataError: there is no such file, or it is no tokenizer.

    >>> load_tokenizer("nowhere.json")
    Traceback (most recent call last):
        ...
    trainfn.errors.DataError: There is no such file.
      where: nowhere.json
    """
    if not Path(path).is_file():
        raise DataError("There is no such file.", where=str(path))
    tokenizers = _tokenizers("load_tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exceptions
        raise DataError("This file is no tokenizer.", where=str(path), got=str(error)) from error


def train_bpe(texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = ()) -> Any:
    """Return a ``tokenizers.Tokenizer`` trained on texts: byte-level pair encoding, as GPT-2's.

    Args:
        texts: to learn the pairs of.
        vocab_size: tokens in all, at least 256 and the special ones; fewer if the texts have fewer pairs.
        special_tokens: names that are given the ids from 0 on.

    Raises:
        MissingPackageError: ``tokenizers`` is not installed.
        ConfigError: ``vocab_size`` is too small.

    >>> train_bpe(["to be or not to be"], vocab_size=100)
    Traceback (most recent call last):
        ...
    trainfn.errors.ConfigError: vocab_size is out of range.
      expected: an int >= 256
      got: 100
    """
    check_int("vocab_size", vocab_size, 256 + len(special_tokens))
    tokenizers = _tokenizers("train_bpe")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


class TokenFile:
    """Windows over a file of token ids that stays on disk: a map-style data set of ``{"input_ids": int64 [length]}``.

    The file is mapped into memory: what is read of it is what is asked for, so it may be larger than memory. A worker
    maps it anew. There are ``(tokens - length) // stride + 1`` windows.

    Args:
        path: a ``.npy`` file of one dimension, or the bare numbers, as ``numpy.ndarray.tofile`` and nanoGPT write them.
        length: tokens a window, >= 2.
        stride: tokens from the start of one window to that of the next; ``length`` if None.
        dtype: of the bare numbers: ``"uint16"`` (the default), ``"uint32"``, ``"uint8"``, ``"int32"``, ``"int64"``; a
            ``.npy`` file says its own.

    Raises:
        ConfigError: an option is out of range.
        DataError: no such file, no whole number of tokens, fewer than one window.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".bin") as file:
    ...     np.arange(10, dtype=np.uint16).tofile(file.name)
    ...     tokens = TokenFile(file.name, length=4)
    ...     len(tokens), tokens[1]["input_ids"]
    (2, tensor([4, 5, 6, 7]))
    """

    draws = False

    def __init__(self, path: str | Path, *, length: int, stride: int | None = None, dtype: str | None = None) -> None:
        check_int("length", length, 2)
        check_int("stride", stride, 1, optional=True)
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError("There are no tokens of this dtype.", expected=", ".join(_DTYPES), got=repr(dtype))
        self.path, self.length, self.stride, self.dtype = Path(path), length, stride or length, dtype
        self._tokens = self._map()
        if len(self._tokens) < length:
            raise DataError(
                "The file holds less than one window.",
                where=str(path),
                expected=f"at least {length} tokens",
                got=f"{len(self._tokens)}",
            )

    def __len__(self) -> int:
        return (len(self._tokens) - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.__getitems__([index])["input_ids"][0]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch at once: ``{"input_ids": int64 [len(indices), length]}``."""
        starts = [range(len(self))[index] * self.stride for index in indices]
        rows = np.stack([self._tokens[start : start + self.length] for start in starts])
        return {"input_ids": torch.from_numpy(rows.astype(np.int64))}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = self._map()

    def _map(self) -> Any:
        place = str(self.path)
        if not self.path.is_file():
            raise DataError("There is no such file.", where=place)
        size = self.path.stat().st_size
        if size == 0:
            raise DataError("The file is empty.", where=place)
        if self.path.suffix == ".npy":
            try:
                found = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise DataError("This is no .npy file of numbers.", where=place, got=str(error)) from error
            if found.ndim != 1 or found.dtype.name not in _DTYPES or self.dtype not in (None, found.dtype.name):
                expected = f"one dimension of {self.dtype or ', '.join(_DTYPES)}"
                got = f"{found.dtype.name}{list(found.shape)}"
                raise DataError("The file does not hold such tokens.", where=place, expected=expected, got=got)
            return found
        width = np.dtype(self.dtype or "uint16").itemsize
        if size % width:
            expected = f"a multiple of {width} bytes ({self.dtype or 'uint16'})"
            raise DataError("The file does not hold whole tokens.", where=place, expected=expected, got=f"{size} bytes")
        return np.memmap(self.path, dtype=self.dtype or "uint16", mode="r")


def write_tokens(path: str | Path, ids: Iterable[Iterable[int]], *, dtype: str = "uint16") -> int:
    """Write token ids as bare numbers, one document after the other, for a :class:`TokenFile`; return how many.

    Args:
        path: the file; what is there is replaced.
        ids: documents, each a sequence of ids, written as they come.
        dtype: of the numbers in the file, as for :class:`TokenFile`.

    Raises:
        ConfigError: there are no tokens of this dtype.
        DataError: an id that the dtype does not hold.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".bin") as file:
    ...     write_tokens(file.name, [[1, 2, 3], [4]])
    4
    """
    if dtype not in _DTYPES:
        raise ConfigError("There are no tokens of this dtype.", expected=", ".join(_DTYPES), got=repr(dtype))
    limits, total = np.iinfo(dtype), 0
    with Path(path).open("wb") as file:
        for number, document in enumerate(ids):
            tokens = np.asarray(list(document), dtype=np.int64)
            if len(tokens) and (tokens.min() < limits.min or tokens.max() > limits.max):
                expected = f"ids from {limits.min} to {limits.max} ({dtype})"
                got = f"{tokens.min()} to {tokens.max()}"
                raise DataError("An id does not fit.", where=f"document {number}", expected=expected, got=got)
            file.write(tokens.astype(dtype).tobytes())
            total += len(tokens)
    return total


def _tokenizers(asked: str) -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "Tokenizers of this kind need a package.", where=f"trainfn.data.{asked}", hint="pip install tokenizers"
        ) from error
    return tokenizers
