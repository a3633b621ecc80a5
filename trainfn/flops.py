"""Arithmetic of a step, counted, against what a device can do: model FLOP utilisation (MFU) and a roofline.

    mfu = F s / (t P)            F: operations of a step's forward and backward, s: steps in t seconds, P: peak
    t_step >= max(F / P, B / W)  B: bytes of the state, read and written once; W: memory bandwidth

F is counted by ``torch.utils.flop_counter`` over the forward and backward of one micro-batch, which is run for that: a
multiplication and an addition are two, elementwise operations are not counted, and neither is what a checkpoint
computes again. Kernels that PyTorch does not know (of other packages) count as nothing.

References:
    A. Chowdhery et al., "PaLM", arXiv:2204.02311, 2022, appendix B (MFU).
    S. Williams, A. Waterman, D. Patterson, "Roofline", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import contextlib
import re

import attrs
import torch

from trainfn.batch import Batch, micro_batches
from trainfn.errors import warn
from trainfn.precision import resolve
from trainfn.state import TrainState, trainable
from trainfn.step import Step, surroundings
from trainfn.tree import batch_length, leaves, map_leaves

_TERA, _GIGA = 1e12, 1e9

GPUS: dict[str, tuple[float, float, float, float, float]] = {
    # name in torch.cuda.get_device_name: (float32, TF32, float16, bfloat16 [TFLOP/s, dense], memory [GB/s]).
    # 0 where the hardware has none. From NVIDIA's data sheets (nvidia.com/en-us/data-center/<name>), halved where they
    # give sparse rates; RTX: the Ampere and Ada GA102/AD102 white papers, with float32 accumulation.
    "B200": (75, 1125, 2250, 2250, 7700),
    "H200": (67, 494.7, 989.4, 989.4, 4800),
    "H100 PCIe": (51, 378, 756, 756, 2000),
    "H100 NVL": (60, 417.5, 835.5, 835.5, 3900),
    "H100": (67, 494.7, 989.4, 989.4, 3350),
    "A100-SXM4-80GB": (19.5, 156, 312, 312, 2039),
    "A100 80GB PCIe": (19.5, 156, 312, 312, 1935),
    "A100": (19.5, 156, 312, 312, 1555),
    "L40S": (91.6, 183, 362, 362, 864),
    "L4": (30.3, 60, 121, 121, 300),
    "A10": (31.2, 62.5, 125, 125, 600),
    "V100-SXM2": (15.7, 0, 125, 0, 900),
    "T4": (8.1, 0, 65, 0, 320),
    "RTX 4090": (82.6, 82.6, 165.2, 165.2, 1008),
    "RTX 3090": (35.6, 35.6, 71, 71, 936),
}


class FlopsWarning(UserWarning):
    """The operations of a step could not be counted, so there is no ``mfu`` in the history."""


@attrs.frozen(kw_only=True)
class Roofline:
    """What a step has to do, and what the device can do.

    Attributes:
        flops: operations of a step.
        bytes: of the state, read and written once in a step.
        peak: operations a second.
        bandwidth: bytes a second, or None if it is not known.
        source: how the peak is known.
    """

    flops: float
    bytes: float
    peak: float
    bandwidth: float | None
    source: str

    def utilisation(self, steps: int, seconds: float) -> float:
        """Return the share of the peak that so many steps in so many seconds are.

        >>> Roofline(flops=1e9, bytes=0, peak=1e12, bandwidth=None, source="").utilisation(100, 1.0)
        0.1
        """
        return self.flops * steps / (seconds * self.peak)

    def __str__(self) -> str:
        said = (
            f"{_short(self.flops)}FLOP a step (counted), peak {_short(self.peak)}FLOP/s ({self.source}): "
            f"at least {_time(self.flops / self.peak)} a step"
        )
        if self.bandwidth is None:
            return said
        return f"{said}, and {_time(self.bytes / self.bandwidth)} to read and write the state"


def make_roofline(step: Step, state: TrainState, batch: Batch, peak_flops: float | None) -> Roofline | None:
    """Return the roofline of a step; None where the device's peak is not known. Counting costs a micro-batch.

    Args:
        step: its model, loss and precision are used.
        state: read, not changed.
        batch: a whole batch, on the state's device.
        peak_flops: operations a second that the device can do, for devices that are not in the table.
    """
    peak, bandwidth, source = _peak(state.step.device, step.precision)
    if peak_flops is not None:
        peak, source = peak_flops, "given"
    if not peak:
        return None
    part = micro_batches(batch, step.accumulate)[0]
    try:
        flops = count_flops(step, state, part) * batch_length(batch) / batch_length(part)
    except Exception as error:  # which must not keep a run from its beginning
        warn(f"There will be no mfu: the operations of a step were not counted: {error}", FlopsWarning)
        return None
    trained = trainable(state.params)
    moved = [state.opt, state.ema or {}, trained, trained]  # and gradients, as large as what is trained
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves(moved))
    return Roofline(flops=flops, bytes=2.0 * size, peak=peak, bandwidth=bandwidth, source=source)


def count_flops(step: Step, state: TrainState, batch: Batch) -> int:
    """Return the operations of forward and backward over a batch that is not divided.

    >>> import trainfn
    >>> model, optimizer = torch.nn.Linear(10, 5), trainfn.optim.sgd(lr=0.1)
    >>> step = trainfn.make_step(model, loss="mse", optimizer=optimizer)
    >>> count_flops(step, trainfn.init(model, optimizer), (torch.ones(4, 10), torch.ones(4, 5)))  # 2 products
    800
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    params = {name: param.detach().requires_grad_(param.requires_grad) for name, param in state.params.items()}
    buffers = map_leaves(torch.clone, state.buffers)
    # The counter knows no attention kernel of a CPU, but the products that it is made of.
    plain = sdpa_kernel(SDPBackend.MATH) if state.step.device.type == "cpu" else contextlib.nullcontext()
    counter = FlopCounterMode(display=False)
    with surroundings(step.model, state, training=True), plain, counter:
        total = step.loss(params, buffers, batch).total
        torch.autograd.grad(total, list(trainable(params).values()), allow_unused=True)
    return int(counter.get_total_flops())


def _peak(device: torch.device, precision: str) -> tuple[float, float | None, str]:
    """Return operations and bytes a second of a device, and how that is known; 0 and None if it is not."""
    if device.type != "cuda":
        return 0.0, None, ""
    title = torch.cuda.get_device_name(device)
    name = next((name for name in GPUS if re.search(rf"\b{name}\b", title)), None)
    if name is None:
        return 0.0, None, ""
    compute = resolve(precision).compute or torch.float32
    column, word = {torch.float16: (2, "float16"), torch.bfloat16: (3, "bfloat16")}.get(compute, (0, "float32"))
    if column == 0 and torch.get_float32_matmul_precision() != "highest" and GPUS[name][1]:
        column, word = 1, "TF32"
    return GPUS[name][column] * _TERA, GPUS[name][4] * _GIGA, f"{name}, {word}"


def _short(value: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
