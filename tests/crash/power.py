"""What a disk may hold after the power has failed: a model of every state that POSIX allows, from recorded calls.

A directory is a table of names. A call that changes a table (create, mkdir, unlink, rmdir; a rename changes two lines
of it at once) is *pending* until that directory is fsynced; at a power cut any of the pending ones may have reached the
disk, and any not. What was written into a file is pending until the file is fsynced; at a power cut the file may hold
none of it, half of it, all of it, or zeros in its place. File systems promise more; nothing here relies on it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

Contents = dict[str, bytes]
"""The files of a directory."""


@attrs.define(eq=False)
class Node:
    """A file or a directory: what it certainly holds, and what is pending."""

    is_directory: bool
    names: dict[str, Node] = attrs.field(factory=dict)
    changes: list[dict[str, Node | None]] = attrs.field(factory=list)
    data: bytes = b""
    written: bytes = b""

    def now(self) -> dict[str, Node]:
        """The table of names as programs see it, all that is pending included."""
        return applied(self.names, self.changes)


def applied(names: Mapping[str, Node], changes: Any) -> dict[str, Node]:
    made: dict[str, Node | None] = dict(names)
    for change in changes:
        made |= change
    return {name: node for name, node in made.items() if node is not None}


class Model:
    """A disk on which everything below ``root`` is safe in the beginning, and then calls happen."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = self._safe(root)

    def _safe(self, path: Path) -> Node:
        if path.is_dir():
            return Node(True, names={entry.name: self._safe(entry) for entry in path.iterdir()})
        return Node(False, data=path.read_bytes())

    def _at(self, path: Path) -> Node:
        node = self.top
        for name in path.relative_to(self.root).parts:
            node = node.now()[name]
        return node

    def happens(self, call: str, path: Path, detail: Any) -> None:
        """Take in one call, as ``Disk`` records it."""
        if call in ("create", "mkdir"):
            self._at(path.parent).changes.append({path.name: Node(call == "mkdir")})
        elif call in ("unlink", "rmdir"):
            self._at(detail.parent).changes.append({detail.name: None})
        elif call == "write":
            self._at(path).written += detail
        elif call == "rename":
            assert detail.parent == path.parent
            self._at(path.parent).changes.append({detail.name: None, path.name: self._at(detail)})
        elif call == "fsync":
            node = self._at(path)
            node.names, node.changes = node.now(), []
            node.data, node.written = node.data + node.written, b""

    def cuts(self, run: Path) -> Iterator[dict[str, Contents]]:
        """Yield what may be found in the run's directories after a power cut now, by name; nothing twice in a row."""
        yield from self._found(self.top, list(run.relative_to(self.root).parts))

    def _found(self, node: Node, way: list[str]) -> Iterator[dict[str, Contents]]:
        for table in tables(node):
            if way and way[0] not in table:
                yield {}
            elif way:
                yield from self._found(table[way[0]], way[1:])
            else:
                kept = {name: child for name, child in table.items() if child.is_directory}
                for some in itertools.product(*(list(contents(child)) for child in kept.values())):
                    yield dict(zip(kept, some, strict=True))


def tables(node: Node) -> Iterator[dict[str, Node]]:
    """Yield the tables that a directory may have after a power cut."""
    for chosen in itertools.product([True, False], repeat=len(node.changes)):
        yield applied(node.names, itertools.compress(node.changes, chosen))


def contents(node: Node) -> Iterator[Contents]:
    """Yield what a directory of files may hold after a power cut; the files share one fate, to keep the number low."""
    for table in tables(node):
        for fate in range(4 if any(child.written for child in table.values()) else 1):
            yield {name: child.data + left(child.written, fate) for name, child in table.items()}


def left(written: bytes, fate: int) -> bytes:
    return (written, b"", written[: len(written) // 2], bytes(len(written)))[fate]


def lay_out(run: Path, found: Mapping[str, Contents]) -> None:
    """Make a run directory that holds this."""
    run.mkdir(parents=True)
    for name, files in found.items():
        os.mkdir(run / name)
        for file, data in files.items():
            (run / name / file).write_bytes(data)
