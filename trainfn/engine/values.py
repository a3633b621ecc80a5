"""What is known of the values in a compiled program's graph."""

from __future__ import annotations

import torch
from torch import Tensor


def on_cpu(node: torch.fx.Node, *dtypes: torch.dtype) -> Tensor | None:
    """Return what stands for a node's value, if that is a tensor on a CPU of one of these dtypes; none named, of any.

    >>> graph = torch.fx.Graph()
    >>> node = graph.placeholder("x")
    >>> node.meta["val"] = torch.ones(2)
    >>> on_cpu(node, torch.float32).shape, on_cpu(node, torch.float64) is None
    (torch.Size([2]), True)
    """
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.device.type == "cpu" and (not dtypes or value.dtype in dtypes):
        return value
    return None
