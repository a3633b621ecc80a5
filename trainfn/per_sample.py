"""What each example of a batch says by itself: its gradient, the gradient's norm, and how noisy the batch's mean is.

    g[i] = gradient of the total of example i alone, w[i] = its weight;   sum of g[i] = the gradient of the batch

by ``torch.func``, vmap over grad: the one thing that ``torch.autograd`` cannot do. The gradient noise scale is
B_simple = tr Sigma / |G*|^2, where G* = E g / E w is the true gradient of the mean loss and Sigma / B the covariance of
its estimate G = sum g / W, W = sum w, from B examples. To first order G - G* = sum of r*[i] / W, r* = g - w G*, so
Sigma = Cov(r*) / (E w)^2. Over the B examples of a batch that count (w > 0), with r[i] = g[i] - w[i] G:

    weight       = B (1 - sum w[i]^2 / W^2)                                  degrees of freedom; B - 1 for equal weights
    trace        = (B / W)^2 sum |r[i]|^2                                    expectation: weight * tr Sigma
    squared_norm = B / W^2 sum over i != j of g[i] . g[j]                    expectation: weight * |G*|^2

(the last sum is |sum g|^2 - sum |g|^2). For equal weights both expectations are exact. Else, for given weights and
E[g | w] = w G*: that of squared_norm is exact whatever the variances, that of trace where the variance of g[i] is in
proportion to w[i], as for a sum over w[i] independent tokens; else trace is off by a share of O(1 / B). |G|^2 in place
of squared_norm / weight would be too large by tr Sigma / B: the scale would never come out above B, whatever it is.

References:
    S. McCandlish, J. Kaplan, D. Amodei et al., "An Empirical Model of Large-Batch Training",
    https://arxiv.org/abs/1812.06162, 2018: section 2.2 and appendix A.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from trainfn.batch import Batch, micro_batches
from trainfn.errors import CompileError, DataError, ModelError, TrainfnError
from trainfn.grad import LossFn
from trainfn.loss.base import LossSum, check_count
from trainfn.state import Buffers, Params, trainable
from trainfn.tree import Tree, batch_length, describe, map_leaves, record, wide_float

_MOST_PROGRAMS = 64  # batch shapes for which a program is kept
_BUG = "https://github.com/pytorch/pytorch/issues/193279"
_OWN = (TrainfnError, torch.OutOfMemoryError, MemoryError)  # what is raised as it is


@record
class SampleGradients:
    """What each of B examples contributes to a step; the sums over B are those of :class:`trainfn.grad.Gradients`.

    Attributes:
        grads: gradient of each example's ``total`` by name of trained parameter, [B, *shape].
        total: summed loss of each example, [B].
        weight: what each total is a sum over, [B].
    """

    grads: Params
    total: Tensor
    weight: Tensor


@record
class NoiseScale:
    """Sums over one or more batches, by the equations at the top of this file; the one division is ``scale``.

    Attributes:
        trace: [] float64, sum whose mean estimates tr Sigma (squared gradient of the mean loss, per example).
        squared_norm: [] float64, sum whose mean estimates |G*|^2. May be negative where noise drowns the gradient.
        weight: [] float64, what the sums are over, degrees of freedom; 0 where fewer than two examples counted.
    """

    trace: Tensor
    squared_norm: Tensor
    weight: Tensor

    @property
    def scale(self) -> Tensor:
        """B_simple, [] float64, in examples; meaningless while ``squared_norm`` is not well above 0: merge more."""
        return self.trace / self.squared_norm


def per_sample_gradients(
    loss: LossFn | CompiledSamples, params: Params, buffers: Buffers, batch: Batch, *, chunk_size: int | None = None
) -> SampleGradients:
    """Return the gradient of each example's total, as if it were a batch of one; nothing given is written to.

    What a forward writes to its buffers is dropped. The mode of the model and the global generators are the caller's
    (see :func:`trainfn.step.surroundings`); each example has draws of its own, other ones than those of a step over
    the batch. A loss over pairs of examples has no such gradients: these are those of batches of one.

    Args:
        loss: from :func:`trainfn.grad.make_loss`, or what :func:`compile_samples` makes of that.
        params, buffers, batch: as in :func:`trainfn.grad.make_gradients`; leaves without a batch dimension go to each.
        chunk_size: most examples to differentiate at a time; all if None.

    Raises:
        ConfigError: the chunk size is out of range.
        DataError: a batch without examples.
        ModelError: BatchNorm in training mode, a custom ``autograd.Function`` that torch.func (or, compiled, PyTorch)
            cannot differentiate, anything else that it cannot, or a loss that depends on no trained parameter.

    >>> from trainfn.grad import make_loss
    >>> loss = make_loss(torch.nn.Linear(1, 1), lambda outputs, batch: outputs.mean())
    >>> params = {"weight": torch.ones(1, 1, requires_grad=True), "bias": torch.zeros(1)}
    >>> per_sample_gradients(loss, params, {}, torch.tensor([[2.0], [3.0]])).grads["weight"].tolist()
    [[[2.0]], [[3.0]]]
    """
    parts = list(_parts(loss, params, buffers, batch, chunk_size))
    return parts[0] if len(parts) == 1 else map_leaves(lambda *rows: torch.cat(rows), *parts)


def per_sample_norms(
    loss: LossFn | CompiledSamples, params: Params, buffers: Buffers, batch: Batch, *, chunk_size: int | None = None
) -> Tensor:
    """Return the 2-norm of each example's gradient, over all trained parameters together, [B] float64.

    Holds the gradients of ``chunk_size`` examples at a time. The rest is as in :func:`per_sample_gradients`.

    >>> from trainfn.grad import make_loss
    >>> loss = make_loss(torch.nn.Linear(2, 1), lambda outputs, batch: outputs.mean())
    >>> params = {"weight": torch.ones(1, 2, requires_grad=True), "bias": torch.zeros(1)}
    >>> per_sample_norms(loss, params, {}, torch.tensor([[3.0, 4.0], [5.0, 12.0]]), chunk_size=1)
    tensor([ 5., 13.], dtype=torch.float64)
    """
    return torch.cat([_squares(part).sqrt() for part in _parts(loss, params, buffers, batch, chunk_size)])


def noise_scale(
    loss: LossFn | CompiledSamples, params: Params, buffers: Buffers, batch: Batch, *, chunk_size: int | None = None
) -> NoiseScale:
    """Return one batch's share in an estimate of the gradient noise scale B_simple = tr Sigma / |G*|^2.

    One batch is a rough estimate: merge many, then read ``scale``. Examples of weight 0 are left out. A NaN stays in
    what it is merged into: merge batches whose step was applied. Holds the gradients of ``chunk_size`` examples and
    float64 sums of the size of two; the rest is as in :func:`per_sample_gradients`.

    >>> from trainfn.grad import make_loss
    >>> loss = make_loss(torch.nn.Linear(1, 1), lambda outputs, batch: outputs.mean())
    >>> params = {"weight": torch.ones(1, 1, requires_grad=True), "bias": torch.zeros(1)}
    >>> found = noise_scale(loss, params, {}, torch.tensor([[1.0], [3.0]]))     # gradients 1 and 3
    >>> float(found.trace), float(found.squared_norm), float(found.weight)      # sample variance 2, 1 * 3
    (2.0, 3.0, 1.0)
    """
    sums: Tree = None
    for more in map(_sums, _parts(loss, params, buffers, batch, chunk_size)):
        sums = more if sums is None else map_leaves(torch.add, sums, more)
    count, total, total2, squares, first, second = sums
    norm2 = torch.stack([leaf.square().sum() for leaf in first.values()]).sum()  # |sum g|^2
    cross = torch.stack([(leaf * second[name]).sum() for name, leaf in first.items()]).sum()  # sum g . sum of w g
    safe = torch.where(total > 0, total, 1.0)
    weight = count * (1.0 - total2 / safe.square())  # 0 for one example, which leaves rounding error in the others
    residuals = (squares - 2.0 * cross / safe + norm2 * total2 / safe.square()).clamp(min=0.0)  # sum |g - w G|^2
    trace = torch.where(weight > 0, residuals * (count / safe).square(), 0.0)
    squared_norm = torch.where(weight > 0, (norm2 - squares) * count / safe.square(), 0.0)
    return NoiseScale(trace=trace, squared_norm=squared_norm, weight=weight)


def merge_scales(left: NoiseScale, right: NoiseScale) -> NoiseScale:
    """Return the sum of two shares: their scale is the ratio of the means, not the mean of the ratios.

    >>> one = NoiseScale(trace=torch.tensor(6.0), squared_norm=torch.tensor(1.0), weight=torch.tensor(3.0))
    >>> two = NoiseScale(trace=torch.tensor(6.0), squared_norm=torch.tensor(5.0), weight=torch.tensor(3.0))
    >>> float(merge_scales(one, two).scale)     # and not (6 + 1.2) / 2
    2.0
    """
    return map_leaves(torch.add, left, right)


def compile_samples(loss: LossFn, *, backend: str = "inductor") -> CompiledSamples:
    """Return what stands in for ``loss`` in this room's functions, and runs their differentiation as one program.

    Under ``torch.compile``, ``torch.func.grad`` differentiates what a custom ``autograd.Function`` computes instead of
    calling its backward, without a word (torch 2.13, https://github.com/pytorch/pytorch/issues/193279). So before
    anything is compiled (in the first call, for each new shape, and when the model has changed) one example is run
    uncompiled, and if such a Function takes part it is refused. A last chunk that is shorter is another shape.

    Args:
        loss, backend: from :func:`trainfn.grad.make_loss`, and a ``torch.compile`` backend.

    Raises:
        CompileError: (from the call, as is a ModelError) it does not compile as one program.

    >>> from trainfn.grad import make_loss
    >>> loss = make_loss(torch.nn.Linear(1, 1), lambda outputs, batch: outputs.mean())
    >>> params = {"weight": torch.ones(1, 1, requires_grad=True), "bias": torch.zeros(1)}
    >>> per_sample_norms(compile_samples(loss, backend="eager"), params, {}, torch.tensor([[2.0], [3.0]]))
    tensor([2., 3.], dtype=torch.float64)
    """
    return CompiledSamples(loss, backend)


class CompiledSamples:
    """A loss whose per-sample gradients are a compiled program; made by :func:`compile_samples`."""

    def __init__(self, loss: LossFn, backend: str) -> None:
        self.loss, self.backend = loss, backend
        self._program: Any = None
        self._checked = False  # whether what is being compiled has been looked at

    def __call__(self, params: Params, buffers: Buffers, batch: Batch) -> SampleGradients:
        """Return the gradients of all examples in the batch."""
        with torch.no_grad():
            try:
                if self._program is not None:
                    return cast(SampleGradients, self._program(params, buffers, batch))
            except Exception as error:  # a new shape, or the model has changed: a new program is asked for
                if not type(error).__module__.startswith("torch._dynamo"):
                    raise
            return self._first_run(params, buffers, batch)

    def _first_run(self, params: Params, buffers: Buffers, batch: Batch) -> SampleGradients:
        from torch._dynamo import config

        hint = "pass the loss itself in place of compile_samples(loss)"
        called = _functions(self.loss, params, buffers, batch)
        if names := sorted(cls.__qualname__ for cls, matters in called.items() if matters):
            raise ModelError(
                "Compiled, the gradients would ignore the backward of a custom autograd.Function.",
                where=", ".join(names),
                expected=f"a model and a loss of torch's own operations ({_BUG})",
                hint=f"{hint}: uncompiled, the backward is called",
            )
        self._program = self._program or self._make()
        self._checked = True
        try:
            with config.patch(recompile_limit=_MOST_PROGRAMS):
                return cast(SampleGradients, self._program(params, buffers, batch))
        except _OWN:
            raise
        except Exception as error:
            _eager(self.loss, params, buffers, batch)  # a mistake in the batch or the model is raised here as itself
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CompileError("The gradients do not compile as one program.", got=cause, hint=hint) from error
        finally:
            self._checked = False

    def _make(self) -> Any:
        from torch._dynamo import lookup_backend

        backend = lookup_backend(self.backend)

        def guarded(graph: Any, inputs: Any) -> Any:
            if not self._checked:
                raise RuntimeError("nothing is compiled that has not been checked")
            return backend(graph, inputs)

        # Programs are cached by code object, up to a limit: each loss gets one of its own.
        own = types.FunctionType(_differentiate.__code__.replace(), globals())
        return torch.compile(partial(own, self.loss), fullgraph=True, dynamic=False, backend=guarded)


class _BatchNorms(TorchFunctionMode):
    """Notes the BatchNorms that take statistics from the batch, by the names of their tensors, and skips them."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.found = names, list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm or not kwargs["training"]:
            return func(*args, **(kwargs or {}))
        owned = [self.names.get(id(tensor), "") for tensor in (args[1], kwargs["weight"], kwargs["bias"])]
        self.found += [name.rpartition(".")[0] or "the model" for name in owned if name][:1] or ["a nameless one"]
        return args[0]


def _watched(loss: LossFn, params: Params, buffers: Buffers, batch: Batch) -> LossSum:
    """Return the loss, unless it has no gradient of one example, or none at all."""
    with _BatchNorms({id(tensor): name for name, tensor in (params | buffers).items()}) as watch:
        result = loss(params, buffers, batch)
    if watch.found:
        raise ModelError(
            "BatchNorm in training mode mixes examples: the gradient of one by itself is not defined.",
            where=", ".join(dict.fromkeys(watch.found)),
            hint="use norms within an example (GroupNorm, LayerNorm), or .eval() on these to use running statistics",
        )
    if not result.total.requires_grad:
        hint = "look for no_grad, detach or .data in the model or the loss"
        raise ModelError("The loss does not depend on any trained parameter.", got="a constant", hint=hint)
    return result


def _parts(
    loss: LossFn | CompiledSamples, params: Params, buffers: Buffers, batch: Batch, chunk_size: int | None
) -> Iterator[SampleGradients]:
    """Return the gradients of each chunk. No generator: it would run, and what it calls be traced all the same."""
    if torch.compiler.is_compiling():
        hint = "call it from outside, and compile nothing but the loss: compile_samples(loss)"
        raise ModelError("Per-sample gradients are being traced by somebody's torch.compile.", where=_BUG, hint=hint)
    check_count("chunk_size", chunk_size, optional=True)
    length = batch_length(batch)
    if length == 0:
        raise DataError("The batch holds no example.", expected="at least one", got=describe(batch))
    run = loss if isinstance(loss, CompiledSamples) else partial(_eager, loss)
    on_cpu = all(param.device.type == "cpu" for param in params.values())

    def unfused(part: Batch) -> SampleGradients:
        # vmap has no rule for a CPU's fused attention (2.13): it would loop over the examples, and warn.
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            return run(params, buffers, part)

    return map(unfused, micro_batches(batch, -(-length // (chunk_size or length))))


def _eager(loss: LossFn, params: Params, buffers: Buffers, batch: Batch) -> SampleGradients:
    try:
        return _differentiate(partial(_watched, loss), params, buffers, batch)
    except _OWN:
        raise
    except Exception as error:
        failure = error
    called = _functions(loss, params, buffers, batch)  # a mistake in the batch or the model is raised here as itself
    old, by_hand = torch.autograd.Function.setup_context, torch.autograd.Function.vmap
    poor = [cls for cls in called if cls.setup_context is old or not (cls.generate_vmap_rule or cls.vmap != by_hand)]
    needs = "setup_context, a forward without ctx, and generate_vmap_rule = True or a vmap staticmethod"
    raise ModelError(
        f"{'A custom autograd.Function' if poor else 'The model or the loss'} cannot be differentiated by example.",
        where=", ".join(cls.__qualname__ for cls in poor) or None,
        expected=needs if poor else "operations that torch.func can map over examples",
        got=f"{type(failure).__name__}: {failure}".splitlines()[0],
        hint="look for .item(), branches on values, custom Functions and buffers that the batch is written into",
    ) from failure


def _differentiate(loss: LossFn, params: Params, buffers: Buffers, batch: Batch) -> SampleGradients:
    """The mathematics, eager or traced."""

    def one(trained: Params, example: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        single = map_leaves(lambda leaf, dim: leaf if dim is None else leaf.unsqueeze(0), example, dims)
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        result = loss(params | trained, fresh, single)
        return result.total, (result.total, result.weight)

    dims = map_leaves(lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.ndim else None, batch)
    trained = {name: param.detach() for name, param in trainable(params).items()}
    each = vmap(grad(one, has_aux=True), in_dims=(None, dims), randomness="different")
    grads, (total, weight) = each(trained, batch)
    return SampleGradients(grads=grads, total=total.detach(), weight=weight.detach())


def _functions(loss: LossFn, params: Params, buffers: Buffers, batch: Batch) -> dict[Any, bool]:
    """Return the custom Functions that one example's forward calls, and whether a gradient depends on each.

    The graph lacks those whose outputs are non-differentiable, the calls those in a compiled submodule: look at both.
    """
    called: dict[Any, bool] = {}
    apply = cast(Any, torch.autograd.Function.apply).__func__.__code__

    def note(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is apply:
            cls, args, kwargs = (frame.f_locals[name] for name in ("cls", "args", "kwargs"))
            given = any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values()))
            called[cls] = called.get(cls, False) or (given and torch.is_grad_enabled())

    devices = {param.get_device() for param in params.values() if param.is_cuda}
    before = sys.getprofile()
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        leaves = {name: param.detach().requires_grad_(param.requires_grad) for name, param in params.items()}
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        try:
            sys.setprofile(note)
            result = _watched(loss, leaves, fresh, micro_batches(batch, batch_length(batch))[0])
        finally:
            sys.setprofile(before)
    ahead, seen = [result.total.grad_fn], set()
    while ahead:
        if (node := ahead.pop()) is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                called[getattr(node, "_forward_cls", type(node))] = True
    return called


def _sums(part: SampleGradients) -> Tree:
    """Return the sums of 1, w, w^2, |g|^2, g and w g over the examples that count, float64."""
    wide = wide_float(part.weight)
    counts = part.weight > 0  # by selection: 0 times an infinite gradient would be NaN
    weight = torch.where(counts, part.weight.to(wide), 0.0)
    squares, first, second = torch.where(counts, _squares(part), 0.0), {}, {}
    for name, each in part.grads.items():
        rows = torch.where(counts[:, None], each.reshape(each.shape[0], -1).to(wide), 0.0)  # (B, P)
        first[name], second[name] = rows.sum(0), weight @ rows
    return counts.sum().to(wide), weight.sum(), weight.square().sum(), squares.sum(), first, second


def _squares(part: SampleGradients) -> Tensor:
    """Return the squared 2-norm of each example's gradient, [B] float64; no copy of the gradients is made."""
    rows = [each.reshape(each.shape[0], -1) for each in part.grads.values()]  # (B, P)
    return torch.stack([torch.linalg.vector_norm(each, dim=1, dtype=wide_float(each)) for each in rows]).square().sum(0)
