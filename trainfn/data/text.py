"""Text as bytes: 256 tokens, no tokenizer, nothing to download. The smallest data set for a language model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trainfn.errors import ConfigError, DataError


class ByteText:
    """Windows over the bytes of a text: a map-style data set whose items are ``{"input_ids": int64 (length,)}``.

    Labels are the input ids themselves: the language-modelling loss shifts by one inside. There are
    ``(bytes - length) // stride + 1`` windows; what is left at the end of the text is not used. The text is held once,
    one byte a token, and windows are cut when they are asked for.

    Args:
        text: a str, encoded as UTF-8, or bytes.
        length: tokens a window, >= 2 (one to read, one to predict).
        stride: tokens from the start of one window to the start of the next; ``length`` if None, so that windows
            do not overlap.

    Raises:
        ConfigError: ``length`` below 2 or ``stride`` below 1.
        DataError: not a text, or shorter than one window.

    >>> text = ByteText("to be or not to be", length=5)
    >>> len(text), text[0]["input_ids"].tolist(), text.decode(text[1]["input_ids"])
    (3, [116, 111, 32, 98, 101], ' or n')
    """

    vocab_size = 256
    draws = False  # the same index gives the same item: see trainfn.data.source.Items

    def __init__(self, text: str | bytes, *, length: int, stride: int | None = None) -> None:
        stride = length if stride is None else stride
        for name, value, least in (("length", length, 2), ("stride", stride, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is out of range.", expected=f"an int >= {least}", got=repr(value))
        if not isinstance(text, (str, bytes, bytearray)):
            raise DataError("ByteText reads a text.", expected="str or bytes", got=type(text).__name__)
        raw = bytearray(text.encode() if isinstance(text, str) else text)
        if len(raw) < length:
            raise DataError(
                "The text is shorter than one window.",
                expected=f"at least {length} bytes",
                got=f"{len(raw)} bytes",
                hint="pass a shorter length or a longer text",
            )
        self._windows = torch.frombuffer(raw, dtype=torch.uint8).unfold(0, length, stride)  # (windows, length), a view

    def __len__(self) -> int:
        return self._windows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index].to(torch.int64)}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch at once: ``{"input_ids": int64 (len(indices), length)}``."""
        return {"input_ids": self._windows[indices].to(torch.int64)}

    @staticmethod
    def decode(ids: Tensor | Iterable[int]) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become the replacement character.

        Raises:
            DataError: an id is not a byte.

        >>> ByteText.decode(torch.tensor([110, 111, 255]))
        'no\ufffd'
        """
        tokens = ids.flatten().tolist() if isinstance(ids, Tensor) else list(ids)
        try:
            return bytes(tokens).decode(errors="replace")
        except ValueError as error:
            raise DataError("A token id is not a byte.", expected="ids in [0, 256)", got=f"{tokens[:8]}...") from error
