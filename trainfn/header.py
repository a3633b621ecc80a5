"""The run header: everything a plan has decided, as lines for people."""

from __future__ import annotations

import os
import platform

import torch
from torch import nn

from trainfn.data import Feed, Stream
from trainfn.directory import changes
from trainfn.errors import listed
from trainfn.plan import Plan
from trainfn.precision import resolve
from trainfn.store import Retention
from trainfn.task import TrainConfig


def header(plan: Plan) -> list[str]:
    """Return the lines that say what will be run, on what, how, and why.

    >>> import trainfn
    >>> made = trainfn.plan(nn.Linear(2, 2), torch.ones(8, 2), loss=lambda outputs, batch: outputs.mean(),
    ...                     max_steps=3, device="cpu")
    >>> header(made)[1]
    'model     Linear, 6 parameters in 2 tensors (6 trained), float32'
    """
    mode, reason = plan.step.settle(plan.state)
    if plan.is_short and plan.config.compile == "auto" and mode == "eager":
        reason = f"a run of {plan.config.max_seconds:g} s may not earn back the compilation"
    lines = {
        "trainfn": f"on torch {torch.__version__}, python {platform.python_version()}",
        "model": _describe_model(plan.model),
        "task": _describe_task(plan),
        "data": _describe_data(plan),
        "device": _describe_device(plan.device),
        "step": _describe_step(plan.config, plan.loader, plan.counted),
        "optimizer": plan.optimizer.name,
        "precision": _describe_precision(plan.config.precision),
        "attention": _describe_attention(plan),
        "health": _describe_health(plan.config),
        "compile": f"{mode}: {reason}" + ("; the first step waits for the compiler" if mode != "eager" else ""),
        "memory": _describe_memory(plan),
        "roofline": "" if plan.roofline is None else str(plan.roofline),
        "limits": _describe_limits(plan),
        "output": _describe_output(plan.config, plan.stop, plan.retention),
        "start": _describe_start(plan),
    }
    return [f"{name:<10}{text}" for name, text in lines.items() if text]


def _describe_model(model: nn.Module) -> str:
    sizes = [(param.numel(), param.requires_grad, str(param.dtype)) for param in model.parameters()]
    total, trained = sum(size for size, _, _ in sizes), sum(size for size, is_trained, _ in sizes if is_trained)
    dtypes = ", ".join(sorted({dtype.removeprefix("torch.") for _, _, dtype in sizes}))
    return f"{type(model).__name__}, {total:,} parameters in {len(sizes)} tensors ({trained:,} trained), {dtypes}"


def _describe_task(plan: Plan) -> str:
    if plan.task is None:
        return ""
    task, measured = plan.task, [metric.name for metric in plan.metrics]
    kind = "" if task.title == task.kind else f" ({task.kind})"
    return (
        f"{task.title}{kind}, {task.modality_in_use}: loss {plan.record['config']['loss']}, "
        f"collator {task.collator_in_use}, ignoring label {task.ignore_index}"
        + (f", measuring {listed(measured)}" if measured else "")
    )


def _describe_data(plan: Plan) -> str:
    loader = plan.loader
    sizes = {
        name.removeprefix("val").lstrip("_"): "a stream" if isinstance(each, Stream) else f"{each.examples:,}"
        for name, each in plan.val_loaders.items()
    }
    held_out = listed([f"{size}{' ' * bool(name)}{name}" for name, size in sizes.items()])
    held_out = f"; {held_out} to evaluate on" if held_out else "" if loader.endless else "; nothing to evaluate on"
    if loader.endless:
        return f"batches that a function makes{held_out}"
    if isinstance(loader, Stream):
        return f"{loader.title}{held_out}"
    grouped = ", grouped by length" if loader.is_grouped else ""
    return f"{loader.examples:,} examples{grouped}, {loader.batches_per_epoch:,} steps an epoch{held_out}"


def _describe_limits(plan: Plan) -> str:
    """Say what ends the run early, and what of the data is left out."""
    config, said = plan.config, []
    if config.max_seconds is not None:
        said.append(f"the run ends after {config.max_seconds:g} s")
    if config.early_stopping_patience is not None:
        by = "epochs" if plan.patience.by_epoch else "evaluations"
        delta = f" by more than {config.min_delta:g}" if config.min_delta else ""
        said.append(
            f"it ends after {config.early_stopping_patience} {by} without a better {plan.retention.monitor}{delta}"
        )
    if config.overfit_batches is not None:
        said.append(f"an epoch is the first {config.overfit_batches} batches, unshuffled, which are evaluated on, too")
    if config.limit_train_batches is not None:
        said.append(f"an epoch ends after {config.limit_train_batches} steps")
    if config.limit_eval_batches is not None and config.overfit_batches is None:
        said.append(f"an evaluation is over the first {config.limit_eval_batches} batches")
    return "; ".join(said)


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def _describe_step(config: TrainConfig, loader: Feed, first_weight: float) -> str:
    examples = min(config.batch_size * config.accumulate, loader.examples)
    per_step = first_weight * config.accumulate
    clip = "no clipping" if config.clip_norm is None else f"clip to norm {config.clip_norm:g}"
    ema = "" if config.ema is None else f", EMA {config.ema:g} (evaluated and returned)"
    size = f"{examples} examples ({config.batch_size} x {config.accumulate})"
    if loader.endless or (isinstance(loader, Stream) and loader.is_whole):
        size = f"one batch of the {'function' if loader.endless else 'stream'}"
        size += f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    return f"{size}, about {per_step:,.0f} counted by the loss (tokens, labels); {clip}{ema}; seed {config.seed}"


def _describe_precision(name: str) -> str:
    policy = resolve(name)
    if policy.compute is None:
        return f"{name}: everything in the dtypes that the model has"
    stored = str(policy.stored or "the model's dtype").removeprefix("torch.")
    scale = "; dynamic loss scale" if policy.scaled else ""
    return f"{name}: parameters in {stored}, forward in {str(policy.compute).removeprefix('torch.')}{scale}"


def _describe_attention(plan: Plan) -> str:
    if not plan.kernels:
        return ""
    calls = ", ".join(f"{name} ({count} calls a forward)" for name, count in sorted(plan.kernels.items()))
    return calls + (", chosen by PyTorch" if plan.config.attention == "auto" else ", as asked")


def _describe_health(config: TrainConfig) -> str:
    spikes = {"off": "not looked for", "warn": "warned of", "skip": "skipped", "halt": "skipped, and halt the run"}
    norms = f"; gradient norm of each tensor every {config.health_every} steps" if config.health_every else ""
    then = "halt the run"
    if config.on_divergence == "rollback":
        then = f"send it back to its last healthy checkpoint, at most {config.max_rollbacks} times"
        if config.rollback_lr_factor != 1:
            then += f", with {config.rollback_lr_factor:g} of the learning rate"
    return (
        f"steps with NaN or infinity are skipped, {config.halt_after} in a row {then}; "
        f"spikes are {spikes[config.on_spike]}{norms}"
    )


def _describe_memory(plan: Plan) -> str:
    names = plan.step.step.checkpoint
    return f"activations of {len(names)} modules are recomputed: {listed(names, 4)}" if names else ""


def _describe_output(config: TrainConfig, stop: int, retention: Retention) -> str:
    if config.out_dir is None:
        return "nothing is saved" + (" (fast_dev_run)" if config.fast_dev_run else ": pass out_dir= to keep the run")
    every = f"every {config.save_every} steps and " if config.save_every and config.save_every < stop else ""
    kept = "all of them are kept"
    if retention.last is not None:
        kept = f"the last {retention.last}" + (
            f" and the best {retention.best} by {retention.monitor}" if retention.best else ""
        )
        kept += " are kept"
    return f"{os.fspath(config.out_dir)}: history.jsonl, checkpoints {every}at the end; {kept}"


def _describe_start(plan: Plan) -> str:
    state, stop, record = plan.state, plan.stop, plan.record
    if plan.previous is None:
        return f"step 0{plan.of_stop}"
    if plan.over_by is not None:
        larger = "max_steps or max_epochs" if state.cursor >= stop else plan.over_by
        return f"this run is complete: step {state.cursor}{plan.of_stop}; a larger {larger} continues it"
    changed = changes(plan.previous, record)
    bits = f"; not bit for bit the run that went on ({', '.join(changed.inexact)})" if changed.inexact else ""
    return f"step {state.cursor}{plan.of_stop}, resumed from {plan.resumed_from}" + (
        f"; changed: {changed}{bits}" if changed else ""
    )
