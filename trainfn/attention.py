"""Which kernel computes ``scaled_dot_product_attention``: choosing one, and finding out which one it was.

| name | kernel |
|---|---|
| ``auto`` | PyTorch chooses, by device, dtype, shapes, mask and dropout |
| ``flash`` | FlashAttention: no matrix of T x T numbers in memory; on a CPU, PyTorch's own |
| ``efficient`` | memory-efficient attention (GPU) |
| ``cudnn`` | cuDNN's (GPU) |
| ``math`` | matrix products and a softmax: runs anywhere, and needs memory for T x T numbers |

References:
    T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, 2023.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar, get_args

from torch.utils._python_dispatch import TorchDispatchMode

from trainfn.errors import ConfigError, TrainfnError, suggest

Attention = Literal["auto", "flash", "efficient", "math", "cudnn"]

T = TypeVar("T")

_NOTHING: AbstractContextManager[None] = nullcontext()
_FUSED = re.compile(r"::_scaled_dot_product_([a-z]+)_attention")
_MATH = "::_safe_softmax"  # what the composite of PyTorch's own is the only one to call
_NO_KERNEL = re.compile("No available kernel|No viable backend")


def check_attention(name: str) -> None:
    """Raise unless there is a kernel of this name.

    Raises:
        ConfigError: there is none; the nearest name is given.

    >>> check_attention("flash")
    """
    if name not in get_args(Attention):
        raise ConfigError(
            "There is no attention kernel of this name.", got=repr(name), hint=suggest(str(name), get_args(Attention))
        )


def attending(name: str) -> AbstractContextManager[None]:
    """Return a context in which ``scaled_dot_product_attention`` runs by this kernel, or is an error.

    A program that is compiled in it keeps the kernel. ``"auto"`` costs nothing; any other costs 30 us.

    >>> import torch
    >>> with attending("math"):
    ...     torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3)[0, 0, 0]
    tensor([1., 1.])
    """
    if name == "auto":
        return _NOTHING
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    return sdpa_kernel(kernels[name])


def watched(run: Callable[[], T], name: str, where: str) -> tuple[T, dict[str, int]]:
    """Run a forward with the kernel asked for; return what it returns, and how often which kernel ran in it.

    What is counted are the operations that PyTorch dispatches to, which it has chosen by then.

    Args:
        run: calls the model. It is called a second time, unwatched, where it fails.
        name: the kernel asked for.
        where: what is run, for a message.

    Raises:
        ConfigError: the kernel asked for cannot run here, with PyTorch's reasons; or nothing asks for one.

    >>> import torch
    >>> q = torch.ones(1, 1, 2, 2)
    >>> watched(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q).shape, "math", "a test")
    (torch.Size([1, 1, 2, 2]), {'math': 1})
    """
    seen = _Seen()
    with attending(name):
        try:
            with seen:
                found = run()
        except TrainfnError:
            raise
        except Exception as error:
            if name == "auto" and isinstance(error, Warning):
                raise
            found = run() if name == "auto" else _explained(run, name, where)
            return found, {}  # under watch it went wrong, and else not: a program compiled by someone else, for one
    if name != "auto" and not seen.kernels:
        raise ConfigError(
            "The model calls no attention that a kernel could be chosen for.",
            where=where,
            expected="calls of torch.nn.functional.scaled_dot_product_attention",
            got=f"attention={name!r}",
            hint='attention="auto"; a model of transformers calls it with attn_implementation="sdpa"',
        )
    return found, dict(seen.kernels)


def _explained(run: Callable[[], T], name: str, where: str) -> T:
    """Run it again; where there is no kernel, say why not, which PyTorch does in warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = run()
        except RuntimeError as error:
            if not _NO_KERNEL.search(str(error)):
                raise
            said = [str(warning.message).partition(" (Triggered")[0].strip() for warning in caught]
            reasons = [text for text in dict.fromkeys(said) if not text.endswith("because:")]
            raise ConfigError(
                "The attention kernel asked for cannot run here.",
                where=where,
                got=f"attention={name!r}: " + ("; ".join(reasons) or "PyTorch has no such kernel for this device"),
                hint='attention="auto" takes the fastest one that can',
            ) from None
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return found


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the kernels of attention among the operations of a forward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer PyTorch, which would import its compiler, for 1 s, to say that this is not to be compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        fused = _FUSED.search(name)
        if fused is not None:
            self.kernels[fused[1]] += 1
        elif name.endswith(_MATH):
            self.kernels["math"] += 1
        return func(*args, **(kwargs or {}))
