"""Packing: documents one after another in rows of one length, without one learning from the other.

Letters: R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainfn.data.padding import IGNORED, check_int
from trainfn.errors import DataError


class Packed:
    """Rows of whole documents, in order: a map-style data set for language models, hardly any of it padding.

    A document goes into the current row if it fits, and else begins the next one; one that is longer than a row is
    cut into pieces. ``labels`` are the tokens, with -100 at the first one of each document, which nothing in the
    document predicts, and at padding: no loss crosses a boundary. What a model attends to is another matter:

    Args:
        documents: sequences of token ids.
        length: tokens of a row, >= 2.
        pad_id: token id of what is left of a row.
        position_ids: give the model positions that begin at 0 in each document.
        block_mask: give the model a mask under the name ``attention_mask``, bool [1, T, T], by which a token attends
            to the tokens before it in its own document, and to itself: then the logits are those of the documents
            alone.

    Raises:
        ConfigError: ``length`` below 2, or ``pad_id`` below 0.
        DataError: no documents, or one that is no sequence of at least 2 ids.

    >>> rows = Packed([[1, 2, 3], [4, 5], [6, 7, 8]], length=6)
    >>> len(rows), rows[0]["input_ids"], rows[0]["labels"]
    (2, tensor([1, 2, 3, 4, 5, 0]), tensor([-100,    2,    3, -100,    5, -100]))
    """

    draws = False

    def __init__(
        self,
        documents: Sequence[Any],
        *,
        length: int,
        pad_id: int = 0,
        position_ids: bool = False,
        block_mask: bool = False,
    ) -> None:
        check_int("length", length, 2)
        check_int("pad_id", pad_id, 0)
        if len(documents) == 0:
            raise DataError("There are no documents to pack.", expected="at least one")
        pieces = [piece for at, document in enumerate(documents) for piece in torch.split(_ids(at, document), length)]
        starts: list[tuple[int, int]] = []  # row and column of each piece
        row, column = 0, 0
        for piece in pieces:
            if column + len(piece) > length:
                row, column = row + 1, 0
            starts.append((row, column))
            column += len(piece)
        self._ids = torch.full((row + 1, length), pad_id)  # (R, T)
        self._document = torch.full((row + 1, length), -1)  # which piece a token belongs to; -1: padding
        self._first = torch.zeros((row + 1, length), dtype=torch.int64)  # column where its piece begins
        for at, (piece, (row, column)) in enumerate(zip(pieces, starts, strict=True)):
            there = slice(column, column + len(piece))
            self._ids[row, there], self._document[row, there], self._first[row, there] = piece, at, column
        self._positions, self._blocks = position_ids, block_mask

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch at once."""
        ids, document, first = self._ids[indices], self._document[indices], self._first[indices]
        column = torch.arange(ids.shape[1])
        learnt = (document >= 0) & (column > first)
        batch = {"input_ids": ids, "labels": torch.where(learnt, ids, IGNORED)}
        if self._positions:
            batch["position_ids"] = torch.where(document >= 0, column - first, 0)
        if self._blocks:
            same = document[:, :, None] == document[:, None, :]  # (B, T, T)
            batch["attention_mask"] = (same & (column[:, None] >= column))[:, None]  # (B, 1, T, T)
        return batch


def _ids(at: int, document: Any) -> Tensor:
    try:
        ids = torch.as_tensor(document)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError("A document is no sequence of ids.", where=f"document {at}", got=repr(document)[:80]) from error
    if ids.ndim != 1 or ids.is_floating_point() or len(ids) < 2:
        raise DataError(
            "A document is no sequence to learn from.",
            where=f"document {at}",
            expected="at least 2 token ids",
            got=f"{str(ids.dtype).removeprefix('torch.')}{list(ids.shape)}",
        )
    return ids.long()
