"""``1 + tanh`` by way of the logistic function: a rewriting of compiled programs.

    1 + tanh(x) = 2 / (1 + exp(-2x)) = 2 sigmoid(2x)

GELU, as GPT-2 has it, adds tanh to 1, and its derivative takes the square of tanh from 1. In a loop on a CPU, tanh
takes 1.6 ns a number and the logistic function 0.5: it is a tenth of a small transformer's step, and then a
twenty-fifth. Near tanh = -1 digits are won by it, too. Where tanh itself is asked for it stays: near 0 it has digits
that ``2 sigmoid(2x) - 1`` has not. So it does on a GPU, which has an instruction for it.
"""

from __future__ import annotations

import torch

from trainfn.engine.values import on_cpu


def add_tanh_as_sigmoid(graph: torch.fx.Graph) -> None:
    """Replace every ``tanh`` of the graph that is read beside 1 alone."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is not aten.tanh.default or not node.users or on_cpu(node, torch.float32, torch.float64) is None:
            continue
        sums = [user for user in node.users if _is_added_to_one(user, node)]
        squares = [user for user in node.users if user.args == (node, node) and _is_taken_from_one(user)]
        if len(sums) + len(squares) < len(node.users):
            continue
        with graph.inserting_before(node):
            twice = graph.call_function(aten.mul.Tensor, (node.args[0], 2.0))
            share = graph.call_function(aten.sigmoid.default, (twice,))
            added = graph.call_function(aten.mul.Tensor, (share, 2.0))
            alone = graph.call_function(aten.sub.Tensor, (added, 1.0))
        for made in (twice, share, added, alone):
            made.meta["val"] = node.meta["val"]
        for user in sums:
            user.replace_all_uses_with(added)
            graph.erase_node(user)
        node.replace_all_uses_with(alone)
        graph.erase_node(node)
        if not alone.users:
            graph.erase_node(alone)


def _is_added_to_one(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    return user.target is torch.ops.aten.add.Tensor and not user.kwargs and user.args in ((node, 1), (1, node))


def _is_taken_from_one(square: torch.fx.Node) -> bool:
    return square.target is torch.ops.aten.mul.Tensor and all(
        user.target is torch.ops.aten.sub.Tensor and not user.kwargs and user.args == (1, square)
        for user in square.users
    )
