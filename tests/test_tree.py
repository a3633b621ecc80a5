"""Trees: records that cannot be written to, names of leaves, maps and digests."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

from trainfn.errors import DataError
from trainfn.tree import (
    batch_length,
    describe,
    digest,
    evolve,
    map_leaves,
    map_named,
    named_leaves,
    record,
    select,
)


@record
class Inner:
    w: Tensor
    extra: Any = None


@record
class Outer:
    inner: Inner
    table: dict[str, Tensor]
    count: int = 0


class Point(NamedTuple):
    x: Any
    y: Any


def nested() -> Outer:
    return Outer(
        inner=Inner(w=torch.ones(2, requires_grad=True)),
        table={"a.b": torch.zeros(3, dtype=torch.int64), "c": [torch.ones(()), (None, torch.ones(0))]},
        count=5,
    )


NAMES = ["inner.w", "table.a.b", "table.c.0", "table.c.1.1", "count"]

# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_is_frozen_keyword_only_and_has_no_equality() -> None:
    inner = Inner(w=torch.ones(1))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        inner.w = torch.zeros(1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        del inner.w
    with pytest.raises(TypeError):
        Inner(torch.ones(1))
    with pytest.raises(TypeError, match="unexpected"):
        Inner(w=torch.ones(1), v=2)
    with pytest.raises(TypeError, match="missing"):
        Inner()
    assert inner != Inner(w=inner.w)  # identity: a comparison of tensors is not a truth value
    assert inner == inner
    assert len({inner, Inner(w=inner.w)}) == 2
    assert repr(inner) == "Inner(w=tensor([1.]), extra=None)"


@pytest.mark.parametrize("default", [torch.ones(1), {}, [], set(), attrs.Factory(dict)], ids=repr)
def test_a_default_that_instances_would_share_is_refused(default: object) -> None:
    with pytest.raises(TypeError, match=r"Bad\.field"):

        @record
        class Bad:
            field: Any = default


def test_records_are_built_read_and_evolved_inside_one_program() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def program(outer: Outer) -> Outer:
        w = outer.inner.w * 2
        return evolve(outer, inner=Inner(w=w, extra=None), table=map_leaves(lambda leaf: leaf + 1, outer.table))

    given_ = nested()
    found = program(given_)
    assert digest(found.inner) == digest(Inner(w=torch.full((2,), 2.0)))
    assert found.table["a.b"].tolist() == [1, 1, 1]
    assert found.count == 5
    assert given_.inner.w.tolist() == [1.0, 1.0]


def test_pytorch_sees_a_record_as_a_tree() -> None:
    outer = nested()
    flat, structure = torch_pytree.tree_flatten(outer)
    assert digest(torch_pytree.tree_unflatten(flat, structure)) == digest(outer)
    doubled = torch.func.vmap(lambda inner: evolve(inner, w=inner.w * 2))(Inner(w=torch.ones(3, 2), extra=[]))
    assert doubled.w.tolist() == [[2.0, 2.0]] * 3
    paths = [torch_pytree.keystr(path) for path, _ in torch_pytree.tree_flatten_with_path(outer)[0]]
    assert paths[0] == ".inner.w"


# --- names and maps ---------------------------------------------------------------------------------------------------


def test_leaves_are_named_by_their_path_and_none_is_no_leaf() -> None:
    assert [name for name, _ in named_leaves(nested())] == NAMES
    assert [name for name, _ in named_leaves(nested(), "state")] == [f"state.{name}" for name in NAMES]
    assert list(named_leaves(None)) == []
    assert list(named_leaves(7)) == [("", 7)]


def test_maps_keep_structure_and_none() -> None:
    outer = nested()
    named = map_named(lambda name, leaf: name, outer)
    assert isinstance(named, Outer)
    assert isinstance(named.table["c"][1], tuple)
    assert [leaf for _, leaf in named_leaves(named)] == NAMES
    assert named.inner.extra is None
    point = map_leaves(lambda a, b: a + b, Point(1, [2, None]), Point(10, [20, None]))
    assert point == Point(11, [22, None])
    assert type(point) is Point
    with pytest.raises((KeyError, ValueError)):
        map_leaves(lambda a, b: a, {"w": 1, "v": 2}, {"w": 1})


def test_a_map_in_another_key_order_meets_the_same_leaves() -> None:
    assert map_leaves(lambda a, b: a - b, {"x": 5, "y": 7}, {"y": 2, "x": 1}) == {"x": 4, "y": 5}


def test_select_takes_a_branch_whole_and_keeps_the_dtype() -> None:
    nan, fine = {"w": torch.full((2,), math.nan), "n": torch.tensor(3)}, {"w": torch.ones(2), "n": torch.tensor(4)}
    assert digest(select(torch.tensor(False), nan, fine)) == digest(fine)
    assert digest(select(torch.tensor(True), nan, fine)) == digest(nan)
    narrow = select(torch.tensor(True), {"w": torch.ones(2, dtype=torch.float64)}, {"w": torch.zeros(2).bfloat16()})
    assert narrow["w"].dtype == torch.bfloat16


# --- digests ----------------------------------------------------------------------------------------------------------


def test_the_digest_reads_names_dtypes_shapes_and_bits() -> None:
    base = {"w": torch.zeros(2, 2), "n": 1}
    others = [
        {"v": torch.zeros(2, 2), "n": 1},
        {"w": torch.zeros(4), "n": 1},
        {"w": torch.zeros(2, 2, dtype=torch.int32), "n": 1},
        {"w": torch.zeros(2, 2).index_fill(0, torch.tensor([0]), -0.0), "n": 1},
        {"w": torch.zeros(2, 2), "n": 2},
        {"w": torch.zeros(2, 2), "n": 1.0},
        {"w": torch.zeros(2, 2)},
        {"w": torch.zeros(2, 2), "n": 1, "m": torch.zeros(0)},
    ]
    assert len({digest(tree) for tree in [base, *others]}) == len(others) + 1
    assert digest({"w": torch.zeros(2, 2, requires_grad=True), "n": 1}) == digest(base)


def test_the_digest_tells_apart_nans_of_different_bits_and_finds_equal_ones_equal() -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert digest(bits[0]) == digest(bits[1]) != digest(bits[2])


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.uint16,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.cfloat,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[:, 1],
        lambda t: t[1:1],
        lambda t: t[0, 0],
        lambda t: t[:1, 0].expand(3),
        lambda t: t[:1, 0].expand(1),
        lambda t: t[0, 0].expand(1),
        lambda t: t.as_strided((1,), (0,)),
        lambda t: t.as_strided((1, 1), (0, 0)),
        lambda t: t.as_strided((1, 2), (0, 2)),
        lambda t: t[None],
    ],
)
def test_the_digest_does_not_see_strides(dtype: torch.dtype, view: Any) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    found = view(tensor)
    copied = torch.tensor(found.tolist(), dtype=dtype).reshape(found.shape)
    assert digest(found) == digest(copied)


def test_the_digest_of_a_size_one_view_without_a_stride() -> None:
    view = torch.zeros(1, dtype=torch.uint16).expand(1)
    assert digest(view) == digest(torch.zeros(1, dtype=torch.uint16))
    assert digest(torch.zeros((), dtype=torch.uint16).expand(1)) == digest(torch.zeros(1, dtype=torch.uint16))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_the_length_of_a_batch_is_that_of_its_tensors() -> None:
    assert batch_length(torch.ones(4, 2)) == 4
    assert batch_length((torch.ones(4), {"a": torch.ones(4, 1), "scale": torch.tensor(2.0), "name": "x"})) == 4
    assert batch_length({"x": torch.ones(0, 3)}) == 0


def test_leaves_that_disagree_in_length_are_all_listed() -> None:
    with pytest.raises(DataError) as caught:
        batch_length({"x": torch.ones(4), "y": torch.ones(3), "z": torch.ones(4)})
    assert caught.value.got == "x: 4, y: 3, z: 4"


@pytest.mark.parametrize("batch", [{}, None, {"x": torch.tensor(1.0)}, {"x": "text"}, []])
def test_a_batch_without_a_batch_dimension_is_refused(batch: Any) -> None:
    with pytest.raises(DataError, match="no tensor with a batch dimension"):
        batch_length(batch)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        (torch.ones(2, 3), "float32[2, 3]"),
        ({"x": torch.ones(()).bfloat16(), "n": [1, "s"]}, "x: bfloat16[], n.0: int, n.1: str"),
        ({}, "an empty dict"),
        (None, "an empty NoneType"),
    ],
)
def test_describe_is_one_line(tree: Any, line: str) -> None:
    assert describe(tree) == line
