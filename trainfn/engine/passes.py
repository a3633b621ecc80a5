"""What is rewritten in compiled programs before Inductor makes code of them."""

from __future__ import annotations

import functools
from typing import Any

import torch

from trainfn.engine import biases, products, scalars, tanh, values


@functools.cache
def passes() -> Any:
    """Return the pass, for Inductor's option ``post_grad_custom_post_pass``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Passes(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            biases.add_biases_late(graph)
            if products.is_faster():
                products.multiply_by_onednn(graph)
            tanh.add_tanh_as_sigmoid(graph)
            scalars.store_scalars(graph)

        def uuid(self) -> Any:
            files = tuple(module.__file__ for module in (biases, products, scalars, tanh, values))
            return get_hash_for_files((__file__, *files), extra=str(products.is_faster()))

    return Passes()
