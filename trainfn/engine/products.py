"""Matrix products by oneDNN: a rewriting of compiled programs, on processors with AVX-512 that are not Intel's.

PyTorch has products of float32 computed by MKL, which does without AVX-512 there (2024.2). oneDNN, which is part of
PyTorch too, does not: on an AMD EPYC its products are 5 to 20 % faster, and those of few rows with a large matrix up to
twice as fast. A step of a transformer as wide as GPT-2's is 5 to 7 % shorter. Its calls cost 20 us, so only products
of 2^25 multiplications and more are given to it; and none whose left side does not lie in memory row by row, the
gradients of weights, in which it is no faster. All that is looked at are shapes and the kind of processor: a run that
is resumed computes what it would have computed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trainfn.engine.processor import cpuinfo
from trainfn.engine.values import on_cpu

_LEAST = 2**25  # multiplications
_FEW = 8  # rows, for which a matrix that lies the other way round is slower to read

torch.library.define("trainfn::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("trainfn::linear", "CPU")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    own = None if bias is None else bias.contiguous()  # it is read as if it were
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), weight, own, "none", [], "")
    return found


@torch.library.register_fake("trainfn::linear")  # type: ignore[untyped-decorator]
def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@functools.cache
def is_faster() -> bool:
    """Return whether oneDNN is there, and uses instructions that MKL does not."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return False
    if not (hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.cpu._is_avx512_supported()):
        return False
    vendors = {line.partition(":")[2].strip() for line in cpuinfo() if line.startswith("vendor_id")}
    return bool(vendors) and "GenuineIntel" not in vendors


def multiply_by_onednn(graph: torch.fx.Graph) -> None:
    """Replace the products of the graph in which oneDNN is faster."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, left, right = node.args
        if not _is_large(left, right) or any(each.meta["val"].shape != node.meta["val"].shape[1:] for each in bias):
            continue
        with graph.inserting_before(node):
            weight = graph.call_function(aten.permute.default, (right, [1, 0]))
            product = graph.call_function(torch.ops.trainfn.linear.default, (left, weight, bias[0] if bias else None))
        weight.meta["val"], product.meta["val"] = right.meta["val"].t(), node.meta["val"]
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _is_large(left: torch.fx.Node, right: torch.fx.Node) -> bool:
    x, y = on_cpu(left, torch.float32), on_cpu(right, torch.float32)
    if x is None or y is None:
        return False
    sizes = (*x.shape, y.shape[1])
    if not all(isinstance(size, int) for size in sizes):  # known when compiling
        return False
    lies_well = x.is_contiguous() and (y.t().is_contiguous() or (y.is_contiguous() and x.shape[0] >= _FEW))
    return lies_well and sizes[0] * sizes[1] * sizes[2] >= _LEAST
