"""Scalars computed once: a rewriting of compiled programs.

Inductor puts what a 0-d tensor is computed from into the loop over the elements that it multiplies. Vectors are written
in that loop, for all that a C++ compiler knows over the scalars it reads, so the whole computation runs anew for every
few elements: with a cosine schedule for the learning rate, an update of 16.8 million parameters calls ``cos`` two
million times, and takes 85 ms instead of 35. (Where it finds ``exp`` or ``sigmoid``, and a second user, Inductor stores
the scalar first by itself; 2.13.)

So every 0-d tensor that something larger is computed from is stored, and read from there. On a GPU, where a kernel more
costs more than some arithmetic, nothing is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn.engine.values import on_cpu


def store_scalars(graph: torch.fx.Graph) -> None:
    """Have every 0-d tensor of the graph that something larger is computed from stored first."""
    for node in list(graph.nodes):
        if not _is_computed_scalar(node):
            continue
        larger = [user for user in node.users if _has_dimensions(user)]
        if larger:
            stored = _stored(graph, node)
            for user in larger:
                user.replace_input_with(node, stored)


def _stored(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    """Return a node for the value of another, kept in memory of its own.

    A view by strides is of memory, so what it is of gets stored; and a copy makes that what was computed, at offset 0.
    """
    value = node.meta["val"]
    with graph.inserting_after(node):
        copy = graph.call_function(torch.ops.aten.clone.default, (node,))
    with graph.inserting_after(copy):
        stored = graph.call_function(torch.ops.aten.as_strided.default, (copy, [], [], 0))
    copy.meta["val"] = stored.meta["val"] = value
    return stored


def _is_computed_scalar(node: torch.fx.Node) -> bool:
    value = on_cpu(node)
    is_computed = node.op == "call_function" and bool(node.all_input_nodes)  # no constant
    return value is not None and value.ndim == 0 and is_computed


def _has_dimensions(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 0
