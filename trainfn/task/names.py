"""What other trainers call the settings of ``fit``: answered with ours, never accepted in silence."""

from __future__ import annotations

from collections.abc import Iterable

from trainfn.errors import suggest

SAME = {
    # Hugging Face
    "attn_implementation": "attention",
    "data_collator": "collate",
    "data_seed": "seed",
    "dataloader_drop_last": "drop_last",
    "dataloader_num_workers": "workers",
    "eval_dataset": "val_data",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "lr",
    "logging_steps": "log_every",
    "max_grad_norm": "clip_norm",
    "metric_for_best_model": "monitor",
    "num_train_epochs": "max_epochs",
    "output_dir": "out_dir",
    "per_device_train_batch_size": "batch_size",
    "save_steps": "save_every",
    "train_dataset": "data",
    # Lightning
    "accumulate_grad_batches": "accumulate",
    "callbacks": "observers",
    "ckpt_path": "resume",
    "default_root_dir": "out_dir",
    "enable_progress_bar": "progress",
    "log_every_n_steps": "log_every",
    "resume_from_checkpoint": "resume",
    "train_dataloaders": "data",
    "val_dataloaders": "val_data",
    # others
    "epochs": "max_epochs",
    "early_stopping_min_delta": "min_delta",
    "early_stopping_threshold": "min_delta",
    "eval_steps": "eval_every",
    "gradient_clip": "clip_norm",
    "grad_clip": "clip_norm",
    "num_epochs": "max_epochs",
    "num_steps": "max_steps",
    "num_workers": "workers",
    "patience": "early_stopping_patience",
    "random_state": "seed",
    "timeout": "worker_timeout",
    "train_batch_size": "batch_size",
    "val_dataset": "val_data",
    "validation_data": "val_data",
}
"""Other trainers' names for settings of ours that mean the same."""

_OPTIMIZER = "it belongs to the optimizer: optimizer=trainfn.optim.adamw(lr=..., weight_decay=..., beta1=...)"
_ONE_DEVICE = 'trainfn trains on one device: device="auto", "cpu", "cuda:0"'
_STEPS = "here it is a number of steps"
_SCHEDULE = "a schedule is the optimizer's lr: optimizer=trainfn.optim.adamw(lr=trainfn.optim.warmup_cosine(...))"
_OBSERVERS = "what watches a run is passed as observers=[...]"
_NO_DIRECTORY = "without out_dir= nothing is written, and with it there are checkpoints and a history"

DIFFERENT = {
    # precision
    "amp": 'here it is precision="bf16-mixed" or "16-mixed"',
    "bf16": 'here it is precision="bf16-mixed"',
    "fp16": 'here it is precision="16-mixed"',
    "mixed_precision": 'here it is precision="bf16-mixed" or "16-mixed"',
    "use_amp": 'here it is precision="bf16-mixed" or "16-mixed"',
    # optimizer and schedule
    "adam_beta1": _OPTIMIZER,
    "adam_beta2": _OPTIMIZER,
    "adam_epsilon": _OPTIMIZER,
    "betas": _OPTIMIZER,
    "lr_scheduler": _SCHEDULE,
    "lr_scheduler_type": _SCHEDULE,
    "momentum": "it belongs to the optimizer: optimizer=trainfn.optim.sgd(lr=..., momentum=...)",
    "optim": "here it is optimizer=, a value such as trainfn.optim.adamw(lr=3e-4)",
    "optimizers": "here it is optimizer=, a value such as trainfn.optim.adamw(lr=3e-4)",
    "scheduler": _SCHEDULE,
    "warmup_ratio": "here it is warmup_steps, a number of steps and no share of them",
    "weight_decay": _OPTIMIZER,
    # gradients
    "gradient_clip_algorithm": "clip_norm clips the norm; trainfn.optim has what clips values",
    "gradient_clip_val": "here it is called 'clip_norm', and it is on: None, not 0, switches it off",
    "gradient_checkpointing": 'here it is checkpoint="blocks.*", names of the modules that are recomputed',
    "activation_checkpointing": 'here it is checkpoint="blocks.*", names of the modules that are recomputed',
    "detect_anomaly": "a run that halts is diagnosed without being asked: see halt_after, and trainfn.diagnose",
    "terminate_on_nan": "here it is halt_after, a number of steps in a row",
    # evaluation and checkpoints
    "check_val_every_n_epoch": f"here it is eval_every, and {_STEPS}; once an epoch if it is left out",
    "compute_metrics": 'here it is metrics=["accuracy", ...], sums that merge over batches',
    "enable_checkpointing": _NO_DIRECTORY,
    "eval_strategy": f"here it is eval_every, and {_STEPS}; once an epoch if it is left out",
    "evaluation_strategy": f"here it is eval_every, and {_STEPS}; once an epoch if it is left out",
    "greater_is_better": 'here it is mode="max" or "min"',
    "limit_val_batches": "here it is limit_eval_batches, a number of batches and no share of them",
    "load_best_model_at_end": "load it afterwards: trainfn.load(result.best_checkpoint, like=result.state)",
    "overwrite_output_dir": 'here it is resume="auto" to go on, or another out_dir to start afresh',
    "per_device_eval_batch_size": "evaluation takes batch_size; what it finds does not depend on it",
    "save_strategy": "here it is save_every, a number of steps; None saves at the end only",
    "save_top_k": "here it is called 'keep_best'; keep_last=None keeps all, which was -1",
    "save_total_limit": "here it is called 'keep_last'; the best ones and the newest healthy one stay besides",
    "val_check_interval": f"here it is eval_every, and {_STEPS}, never a share of an epoch",
    "validation_split": "split first: train, held_out = trainfn.split(data, 0.1), then val_data=held_out",
    # data
    "dataloader_pin_memory": "it is done for GPUs without being asked",
    "label_smoothing": 'it belongs to the loss: task=TaskSpec(..., loss_options={"label_smoothing": 0.1})',
    "label_smoothing_factor": 'it belongs to the loss: task=TaskSpec(..., loss_options={"label_smoothing": 0.1})',
    "pin_memory": "it is done for GPUs without being asked",
    "processing_class": 'the data is made of ids beforehand, by trainfn.data.Tokenized, and padded by collate="text"',
    "tokenizer": 'the data is made of ids beforehand, by trainfn.data.Tokenized, and padded by collate="text"',
    "max_time": "here it is max_seconds, a number",
    "steps_per_epoch": "an epoch is one pass over the data; max_steps counts steps",
    # the machine
    "accelerator": _ONE_DEVICE,
    "auto_find_batch_size": "here it is a function to call beforehand: trainfn.find_batch_size",
    "auto_lr_find": "here it is a function to call beforehand: trainfn.find_lr",
    "auto_scale_batch_size": "here it is a function to call beforehand: trainfn.find_batch_size",
    "devices": _ONE_DEVICE,
    "gpus": _ONE_DEVICE,
    "no_cuda": 'here it is device="cpu"',
    "num_nodes": _ONE_DEVICE,
    "strategy": _ONE_DEVICE,
    "torch_compile": 'here it is compile="auto", or "eager" for none',
    "use_cpu": 'here it is device="cpu"',
    # what is shown
    "disable_tqdm": "here it is progress=False",
    "enable_model_summary": "the run header says it; progress=False shows neither",
    "logger": _OBSERVERS,
    "logging_dir": "the history is written into out_dir",
    "report_to": _OBSERVERS,
    "verbose": "here it is progress, True or False",
}
"""Other trainers' names for what means something else here, or is said elsewhere, and how."""


def answer(name: str, known: Iterable[str]) -> str:
    """Return what is said about the name of a setting that there is not.

    >>> answer("learning_rate", ["lr", "seed"]), answer("sed", ["lr", "seed"])
    ("here it is called 'lr'", "did you mean 'seed'?")
    >>> answer("warmup_ratio", ["lr", "seed"])
    'here it is warmup_steps, a number of steps and no share of them'
    """
    if name in SAME:
        return f"here it is called {SAME[name]!r}"
    if name in (known := list(known)):
        return "it is an argument of fit, and not taken here"
    return DIFFERENT[name] if name in DIFFERENT else suggest(name, known)


def renamed(fields: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """Return settings under our names, of those that mean the same under another's, and what was done.

    A name that both have is left as it is, to be answered.

    >>> renamed({"learning_rate": 0.1, "seed": 1})
    ({'lr': 0.1, 'seed': 1}, ['learning_rate -> lr'])
    """
    new = {name: SAME.get(name, name) for name in fields}
    twice = [name for name in new.values() if list(new.values()).count(name) > 1]
    new = {name: name if ours in twice else ours for name, ours in new.items()}
    done = [f"{name} -> {ours}" for name, ours in new.items() if name != ours]
    return {new[name]: value for name, value in fields.items()}, done
