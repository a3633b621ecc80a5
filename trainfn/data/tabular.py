"""Tables and texts from files: CSV and JSONL (one JSON object a line), and frames with named columns.

Nothing is guessed: a cell that is empty, or no number, is an error that says in which line it is.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from trainfn.errors import DataError, listed, suggest

Row = dict[str, Any]


@attrs.frozen(eq=False)
class Table:
    """Rows of numbers and what to predict of them: a map-style data set of ``{"features": ..., "labels": ...}``.

    Attributes:
        features: [N, columns] float32.
        labels: [N], int64 for whole numbers and classes, float32 for other numbers.
        columns: names of the features.
        classes: what the labels are numbers of, in order; None if the target is a number.
    """

    features: Tensor
    labels: Tensor
    columns: tuple[str, ...]
    classes: tuple[str, ...] | None = None

    draws = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch at once."""
        return {"features": self.features[indices], "labels": self.labels[indices]}


def read_csv(
    path: str | Path,
    *,
    target: str,
    features: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    delimiter: str = ",",
) -> Table:
    """Return the table in a CSV file whose first line names the columns.

    Args:
        path: the file, in UTF-8.
        target: column to predict. Numbers stay numbers; words are classes.
        features: columns to predict it from; all others if None.
        classes: the words of the target, in the order of their numbers, as another table has them; None sorts them.
        delimiter: what stands between two cells.

    Raises:
        DataError: no file, nothing in it, a column that is not there, a cell that cannot be used; with the line.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     _ = file.write("wide,long,kind\\n1,2,cat\\n3,4.5,dog\\n")
    ...     file.flush()
    ...     table = read_csv(file.name, target="kind")
    >>> table.features, table.labels, table.classes
    (tensor([[1.0000, 2.0000],
            [3.0000, 4.5000]]), tensor([0, 1]), ('cat', 'dog'))
    """
    names, rows = _csv_rows(Path(path), delimiter)
    return _table(names, rows, str(path), target, features, classes)


def read_jsonl(
    path: str | Path, *, target: str, features: Sequence[str] | None = None, classes: Sequence[str] | None = None
) -> Table:
    """Return the table in a file of JSON objects, one a line.

    Args:
        path, target, features, classes: as in :func:`read_csv`.

    Raises:
        DataError: as there; and a line that is no JSON object.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     _ = file.write('{"wide": 1, "y": 0.5}\\n{"wide": 2, "y": 1.5}\\n')
    ...     file.flush()
    ...     read_jsonl(file.name, target="y").labels
    tensor([0.5000, 1.5000])
    """
    rows = _json_rows(Path(path))
    return _table(list(rows[0][1]), rows, str(path), target, features, classes)


def read_frame(
    frame: Any, *, target: str, features: Sequence[str] | None = None, classes: Sequence[str] | None = None
) -> Table:
    """Return a pandas ``DataFrame`` as a table.

    Args:
        frame: has ``columns``, and a column for each of them under its name.
        target, features, classes: as in :func:`read_csv`.

    Raises:
        DataError: a column that is not there, a cell that cannot be used; with the number of its row.
    """
    names = [str(name) for name in frame.columns]
    if len(frame) == 0:
        raise DataError("The frame has no rows.", got=f"columns {', '.join(names)}")
    columns = [frame[name].to_numpy().tolist() for name in frame.columns]
    rows = [(at, dict(zip(names, cells, strict=True))) for at, cells in enumerate(zip(*columns, strict=True))]
    return _table(names, rows, "row", target, features, classes)


def read_texts(
    paths: str | Path | Iterable[str | Path], *, field: str = "text", target: str | None = None
) -> list[Any]:
    """Return the texts of one or more files: of each a whole, or of CSV and JSONL the column ``field``.

    Args:
        paths: files in UTF-8. What does not end in ``.csv`` or ``.jsonl`` is one text.
        field: column that holds the texts.
        target: column of the label, for texts as pairs ``(text, label)``: numbers stay, words are numbered in order.

    Returns:
        Texts, or pairs of a text and a label.

    Raises:
        DataError: no file, nothing in it, a column that is not there; with the line.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     _ = file.write('text,mood\\n"well, well",good\\noh no,bad\\n')
    ...     file.flush()
    ...     read_texts(file.name), read_texts(file.name, target="mood")
    (['well, well', 'oh no'], [('well, well', 1), ('oh no', 0)])
    """
    texts: list[Any] = []
    labels: list[Any] = []
    files = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    for path in files:
        if path.suffix not in (".csv", ".jsonl"):
            if target is not None:
                raise DataError("A text file has no column of labels.", where=str(path), got=f"target={target!r}")
            texts.append(_text(path))
            continue
        rows = _csv_rows(path, ",")[1] if path.suffix == ".csv" else _json_rows(path)
        for line, row in rows:
            for name in (field, *([target] if target else [])):
                if row.get(name) in (None, ""):
                    raise _no_column(name, row, f"{path}:{line}")
            if not isinstance(row[field], str):
                kind = type(row[field]).__name__
                raise DataError("This is no text.", where=f"{path}:{line}, column {field}", got=kind)
            texts.append(row[field])
            if target is not None:
                labels.append((f"{path}:{line}", row[target]))
    if target is None:
        return texts
    numbers, _ = _labels(labels, target, None)
    return list(zip(texts, numbers.tolist(), strict=True))


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError("The file cannot be read.", where=str(path), got=str(error.strerror or error)) from error
    except UnicodeDecodeError as error:
        raise DataError("The file is no UTF-8.", where=f"{path}, byte {error.start}", got=error.reason) from error
    if not text.strip():
        raise DataError("The file is empty.", where=str(path))
    return text


def _csv_rows(path: Path, delimiter: str) -> tuple[list[str], list[tuple[int, Row]]]:
    reader = csv.reader(_text(path).splitlines(keepends=True), delimiter=delimiter, strict=True)
    rows: list[tuple[int, Row]] = []
    try:
        names = next(reader)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError("Two columns have one name.", where=f"{path}:1", got=", ".join(twice))
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    "A line has another number of cells than the first.",
                    where=f"{path}:{reader.line_num}",
                    expected=f"{len(names)}: {listed(names, 8)}",
                    got=f"{len(cells)}",
                )
            rows.append((reader.line_num, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise DataError("This is no CSV.", where=f"{path}:{reader.line_num}", got=str(error)) from error
    if not rows:
        raise DataError("The file holds no rows.", where=str(path), got=f"the columns {listed(names, 8)} only")
    return names, rows


def _json_rows(path: Path) -> list[tuple[int, Row]]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError("A line is no JSON.", where=f"{path}:{number}", got=str(error)) from error
        if not isinstance(row, dict):
            raise DataError("A line is no JSON object.", where=f"{path}:{number}", got=type(row).__name__)
        rows.append((number, row))
    return rows


def _table(
    names: list[str],
    rows: list[tuple[int, Row]],
    source: str,
    target: str,
    features: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> Table:
    columns = tuple(name for name in names if name != target) if features is None else tuple(features)
    for name in (target, *columns):
        if name not in names:
            raise _no_column(name, dict.fromkeys(names), source)
    if not columns or target in columns:
        expected = f"columns other than the target, {target!r}"
        raise DataError("There is nothing to predict from.", where=source, expected=expected, got=", ".join(columns))
    places = [f"{source} {line}" if source == "row" else f"{source}:{line}" for line, _ in rows]
    values = list(_numbers(columns, rows, places))
    wanted = [(place, row.get(target)) for place, (_, row) in zip(places, rows, strict=True)]
    labels, words = _labels(wanted, target, classes)
    return Table(torch.tensor(values, dtype=torch.float32), labels, columns, words)


def _numbers(columns: Sequence[str], rows: list[tuple[int, Row]], places: list[str]) -> Iterator[list[float]]:
    bad: list[str] = []
    for place, (_, row) in zip(places, rows, strict=True):
        cells = [_number(row.get(name)) for name in columns]
        bad += [
            f"{place}, column {name}: {row.get(name)!r}"
            for name, cell in zip(columns, cells, strict=True)
            if cell is None
        ]
        yield [cell or 0.0 for cell in cells]
    if bad:
        raise DataError(
            "A table needs a number in every cell.",
            where=bad[0].rpartition(": ")[0],
            got=f"{bad[0].rpartition(': ')[2]}; {len(bad)} of {len(columns) * len(rows)} cells are no numbers",
            hint="fill or drop missing values, turn words into numbers, or choose the columns: features=[...]",
        )


def _number(cell: Any) -> float | None:
    if cell is None or isinstance(cell, (list, dict)):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _labels(
    cells: Sequence[tuple[str, Any]], target: str, classes: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...] | None]:
    empty = next((place for place, cell in cells if cell is None or cell == ""), None)
    if empty is not None:
        raise DataError("A row has no target.", where=f"{empty}, column {target}")
    numbers = [_number(cell) for _, cell in cells]
    if classes is None and all(number is not None for number in numbers):
        found = torch.tensor(numbers, dtype=torch.float64)
        whole = all(isinstance(cell, int) or (isinstance(cell, str) and "." not in cell and "e" not in cell.lower())
                    for _, cell in cells) and bool(found.isfinite().all())  # fmt: skip
        return (found.long() if whole else found.float()), None
    words = tuple(sorted({str(cell) for _, cell in cells})) if classes is None else tuple(classes)
    number_of = {word: number for number, word in enumerate(words)}
    unknown = next(((place, cell) for place, cell in cells if str(cell) not in number_of), None)
    if unknown is not None:
        expected = f"one of {listed(words, 16)}"
        raise DataError("There is no such class.", where=f"{unknown[0]}, column {target}", expected=expected,
                        got=repr(unknown[1]))  # fmt: skip
    return torch.tensor([number_of[str(cell)] for _, cell in cells]), words


def _no_column(name: str, row: Row, where: str) -> DataError:
    empty = name in row and row[name] is not None
    what = "A cell is empty." if empty else "There is no such column."
    return DataError(what, where=where, expected=f"a column {name!r}", got=listed(list(row), 16),
                     hint=None if empty else suggest(name, map(str, row)))  # fmt: skip
