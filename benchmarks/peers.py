"""What else a user would write or install, each doing the same work: clip to norm 1, AdamW, EMA, and a finite check."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import timed
from torch import Tensor, nn
from workloads import Workload

import trainfn

LR, DECAY, CLIP, EMA = 1e-3, 0.01, 1.0, 0.999


class Ours:
    """``trainfn.compile(step)``, donating, as ``fit`` runs it."""

    keeps_pages = True

    def __init__(
        self,
        work: Workload,
        mode: Any,
        *,
        accumulate: int = 1,
        batch: Any = None,
        device: str = "cpu",
        precision: str = "32-true",
        checkpoint: str | None = None,
        cuda_graph: Any = False,
        backend: Any = "inductor",
    ) -> None:
        model, optimizer = work.model().to(device), trainfn.optim.adamw(LR, weight_decay=DECAY)
        plain = trainfn.make_step(
            model,
            loss=work.loss,
            optimizer=optimizer,
            clip_norm=CLIP,
            ema=EMA,
            accumulate=accumulate,
            precision=precision,
            checkpoint=checkpoint,
        )
        self.step = trainfn.compile(plain, mode=mode, donate=True, cuda_graph=cuda_graph, backend=backend)
        self.state = trainfn.init(model, optimizer, ema=True, precision=precision)
        self.batch = tuple(each.to(device) for each in batch or work.batch)

    def take(self) -> None:
        self.state = self.step(self.state, self.batch)

    def loss(self) -> float:
        self.take()
        return float(self.state.report.loss)

    def run(self, steps: int) -> float:
        return timed(self.take, steps)


class Plain:
    """The loop that people write by hand, with fused AdamW; the model compiled or not."""

    def __init__(
        self, work: Workload, *, compiled: bool, accumulate: int = 1, device: str = "cpu", bf16: bool = False
    ) -> None:
        self.model = work.model().to(device)
        self.call = torch.compile(self.model) if compiled else self.model
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.params, lr=LR, weight_decay=DECAY, fused=True)
        self.ema = [param.detach().clone() for param in self.params]
        self.work, self.accumulate, self.norm = work, accumulate, torch.zeros(())
        self.batch = tuple(each.to(device) for each in work.batch)
        self.cast = torch.autocast(device, torch.bfloat16, enabled=bf16)

    def take(self) -> Tensor:
        losses = []
        inputs, targets = (each.chunk(self.accumulate) for each in self.batch)
        for x, y in zip(inputs, targets, strict=True):
            with self.cast:
                loss = self.work.mean(self.call(x), y) / self.accumulate
            loss.backward()
            losses.append(loss.detach())
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self.norm = nn.utils.clip_grad_norm_(self.params, CLIP)
        if torch.isfinite(total) and torch.isfinite(self.norm):
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, [param.detach() for param in self.params], 1 - EMA)
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def loss(self) -> float:
        return float(self.take())

    def run(self, steps: int) -> float:
        return timed(self.take, steps)


class Accelerated(Plain):
    """The same loop under Hugging Face Accelerate."""

    def __init__(self, work: Workload) -> None:
        from accelerate import Accelerator

        super().__init__(work, compiled=False)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.call, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def take(self) -> Tensor:
        x, y = self.work.batch
        loss = self.work.mean(self.call(x), y)
        self.accelerator.backward(loss)
        self.norm = self.accelerator.clip_grad_norm_(self.params, CLIP)
        if torch.isfinite(loss.detach()) and torch.isfinite(self.norm):
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, [param.detach() for param in self.params], 1 - EMA)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class _Repeated(torch.utils.data.IterableDataset[Any]):
    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __iter__(self) -> Any:
        return iter([self.batch] * self.count)


_UNTIMED = 20  # steps at the beginning of each round of a trainer that owns its loop


class Lightning:
    """Lightning's Trainer, everything that it lets one switch off switched off."""

    def __init__(self, work: Workload) -> None:
        import lightning

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
        outer = self

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = work.model()
                self.average = [param.detach().clone() for param in self.net.parameters()]

            def training_step(self, batch: Any, index: int) -> Tensor:
                loss = work.mean(self.net(batch[0]), batch[1])
                outer.last = loss.detach()
                return loss if torch.isfinite(outer.last) else None

            def on_train_batch_end(self, *_: Any) -> None:
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, [param.detach() for param in self.net.parameters()], 1 - EMA)
                outer.ends.append(time.perf_counter())

            def configure_optimizers(self) -> Any:
                return outer.optimizer

        self.lightning, self.work = lightning, work
        self.module, self.last, self.ends = Module(), torch.zeros(()), list[float]()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LR, weight_decay=DECAY, fused=True)

    def _fit(self, steps: int) -> None:
        trainer = self.lightning.Trainer(
            max_steps=steps,
            accelerator="cpu" if not torch.cuda.is_available() else "gpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=CLIP,
            barebones=False,
        )
        loader = torch.utils.data.DataLoader(_Repeated(self.work.batch, steps), batch_size=None)
        self.ends.clear()
        trainer.fit(self.module, loader)

    def loss(self) -> float:
        self._fit(1)
        return float(self.last)

    def run(self, steps: int) -> float:
        self._fit(steps + _UNTIMED)
        return self.ends[-1] - self.ends[_UNTIMED - 1]


class HuggingFace:
    """transformers' Trainer."""

    def __init__(self, work: Workload) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        outer = self

        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = work.model()

            def forward(self, x: Tensor, labels: Tensor) -> Any:
                loss = work.mean(self.net(x), labels)
                outer.last = loss.detach()
                return {"loss": loss}

        class Ends(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                with torch.no_grad():
                    torch._foreach_lerp_(outer.average, [param.detach() for param in outer.model.parameters()], 1 - EMA)
                outer.ends.append(time.perf_counter())

        self.transformers, self.work, self.callback = transformers, work, Ends()
        self.model, self.last, self.ends = Wrapped(), torch.zeros(()), list[float]()
        self.average = [param.detach().clone() for param in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=DECAY, fused=True)

    def _fit(self, steps: int) -> None:
        x, y = self.work.batch
        items = [{"x": x[i], "labels": y[i]} for i in range(len(x))]
        arguments = self.transformers.TrainingArguments(
            output_dir=tempfile.gettempdir(),
            max_steps=steps,
            per_device_train_batch_size=len(x),
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        trainer = self.transformers.Trainer(
            self.model,
            arguments,
            train_dataset=items * steps,
            data_collator=lambda _: {"x": x, "labels": y},
            optimizers=(self.optimizer, schedule),
            callbacks=[self.callback],
        )
        self.ends.clear()
        trainer.train()

    def loss(self) -> float:
        self._fit(1)
        return float(self.last)

    def run(self, steps: int) -> float:
        self._fit(steps + _UNTIMED)
        return self.ends[-1] - self.ends[_UNTIMED - 1]


class Jax:
    """JAX: one jitted function with donated state, and optax."""

    def __init__(self, work: Workload) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        model = work.model()
        params = {name: jnp.asarray(param.detach().numpy()) for name, param in model.named_parameters()}
        forward = _jax_forward(work, model)
        chain = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LR, weight_decay=DECAY))

        def step(state: Any, batch: Any) -> Any:
            params, opt, ema = state
            loss, grads = jax.value_and_grad(lambda p: forward(p, *batch))(params)
            norm = optax.global_norm(grads)
            updates, new_opt = chain.update(grads, opt, params)
            new = optax.apply_updates(params, updates)
            ok = jnp.isfinite(loss) & jnp.isfinite(norm)
            averaged = jax.tree.map(lambda a, b: a + (1 - EMA) * (b - a), ema, new)
            chosen = jax.tree.map(lambda a, b: jnp.where(ok, a, b), (new, new_opt, averaged), state)
            return chosen, (loss, norm)

        self.step = jax.jit(step, donate_argnums=0)
        copies = jax.tree.map(jnp.copy, params)
        self.state = (params, chain.init(params), copies)
        self.batch = tuple(jnp.asarray(each.numpy()) for each in work.batch)
        self.jax, self.report = jax, (jnp.zeros(()), jnp.zeros(()))

    def take(self) -> None:
        self.state, self.report = self.step(self.state, self.batch)

    def loss(self) -> float:
        self.take()
        return float(self.report[0])

    def run(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            self.take()
        self.jax.block_until_ready((self.state, self.report))
        return time.perf_counter() - began


def _jax_forward(work: Workload, model: nn.Module) -> Callable[..., Any]:
    """The same forward and loss, written for JAX."""
    import jax
    import jax.numpy as jnp

    def linear(p: Any, name: str, x: Any) -> Any:
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def norm(p: Any, name: str, x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    if isinstance(model, nn.Sequential):
        count = len(model) // 2

        def sequential(p: Any, x: Any, y: Any) -> Any:
            for index in range(count):
                x = jnp.tanh(linear(p, str(2 * index), x))
            return ((x - y) ** 2).mean()

        return sequential
    if isinstance(model, nn.Linear):
        return lambda p, x, y: ((x @ p["weight"].T - y) ** 2).mean()
    layers, heads = len(model.blocks), model.blocks[0].heads

    def transformer(p: Any, ids: Any, y: Any) -> Any:
        b, t = ids.shape
        x = p["wte.weight"][ids] + p["wpe.weight"][:t]
        mask = jnp.tril(jnp.ones((t, t), bool))
        for index in range(layers):
            name = f"blocks.{index}"
            q, k, v = jnp.split(linear(p, f"{name}.qkv", norm(p, f"{name}.ln1", x)), 3, axis=-1)
            q, k, v = (each.reshape(b, t, heads, -1).transpose(0, 2, 1, 3) for each in (q, k, v))
            scores = q @ k.transpose(0, 1, 3, 2) / jnp.sqrt(q.shape[-1])
            mixed = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1) @ v
            x = x + linear(p, f"{name}.proj", mixed.transpose(0, 2, 1, 3).reshape(b, t, -1))
            hidden = jax.nn.gelu(linear(p, f"{name}.up", norm(p, f"{name}.ln2", x)), approximate=True)
            x = x + linear(p, f"{name}.down", hidden)
        logits = linear(p, "head", norm(p, "ln", x))
        logs = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.take_along_axis(logs, y[..., None], axis=-1).mean()

    return transformer
