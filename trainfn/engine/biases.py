"""Biases added where a matrix product is read: a rewriting of compiled programs.

``addmm`` on a CPU copies the bias into every row of its result first, by a call of its own, and has the product added
to it. For a small layer that is most of its time: a step of twelve of them takes 129 us, and 104 where the biases are
added in the loops that Inductor writes for what reads the result. They stay where something else reads it, an attention
kernel or another product; in large layers, which gain nothing; in 16 bits, where the sum would be rounded twice; and on
a GPU, whose kernels add them by the way.
"""

from __future__ import annotations

import torch

from trainfn.engine.values import on_cpu

_MOST = 2**16  # numbers in a result; from there on the copy is a small part of the product


def add_biases_late(graph: torch.fx.Graph) -> None:
    """Divide every ``addmm`` of the graph that is read by loops alone into a product and a sum."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is not aten.addmm.default or node.kwargs or not _is_small(node) or not _in_loops(node):
            continue
        bias, left, right = node.args
        with graph.inserting_before(node):
            product = graph.call_function(aten.mm.default, (left, right))
            total = graph.call_function(aten.add.Tensor, (product, bias))
        product.meta["val"] = total.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def _is_small(node: torch.fx.Node) -> bool:
    value = on_cpu(node, torch.float32, torch.float64)
    # The number is an int where it is known when compiling.
    return value is not None and isinstance(value.numel(), int) and value.numel() <= _MOST


def _in_loops(node: torch.fx.Node) -> bool:
    """Return whether what reads a value, or a view of it, is elementwise or a reduction, all of it."""
    return bool(node.users) and all(
        _in_loops(user) if _is_view(user) else _is_elementwise(user) or user.target in _reductions()
        for user in node.users
    )


def _is_view(node: torch.fx.Node) -> bool:
    aten = torch.ops.aten
    return node.target in (aten.view.default, aten.reshape.default, aten.permute.default)


def _is_elementwise(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _reductions() -> tuple[object, ...]:
    aten = torch.ops.aten
    return aten.var_mean.correction, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default
