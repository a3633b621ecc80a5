"""``fit``: observers over ``run``, which is the fold of a step over batches."""

from __future__ import annotations

import contextlib
import inspect
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import nn

from trainfn.batch import Batch
from trainfn.data import CopyStream, prefetched
from trainfn.engine import collecting_at_rows
from trainfn.errors import CheckpointError, DivergenceError
from trainfn.evaluation import check_noise, evaluate_plan, noise_columns
from trainfn.faults import Rescue, is_out_of_memory, memory_error
from trainfn.halt import divergence, make_finite_check, make_halt_check
from trainfn.loss import Loss
from trainfn.metric import Metric
from trainfn.observers import Observer, Progress, Recorder, observe
from trainfn.optim import Transform
from trainfn.plan import Plan, decide, plan
from trainfn.result import FitResult, best_row, checkpoint_at
from trainfn.rollback import Course, Rollback
from trainfn.signals import OnSignal, leave, listening, until_told
from trainfn.state import TrainState
from trainfn.store import Saver, save, steps
from trainfn.task import TaskSpec, TrainConfig


def fit(
    model: nn.Module,
    data: object,
    *,
    loss: str | Loss | None = None,
    task: str | TaskSpec | None = None,
    val_data: object = None,
    metrics: Sequence[str | Metric] = (),
    optimizer: Transform | None = None,
    collate: str | Callable[[list[Any]], Batch] | None = None,
    observers: Sequence[Observer] = (),
    on_signal: OnSignal | None = None,
    **settings: Any,
) -> FitResult:
    """Train a model.

    Everything is decided and checked first and said in the run header. Then the step is folded over the data; a step
    with a non-finite loss or gradient changes nothing, and ``halt_after`` of them in a row end the run. With
    ``out_dir`` there are a history, flushed as it goes, and checkpoints to resume from, bit for bit.

    SIGTERM and SIGINT (Ctrl-C) end the run between two steps, after saving: by a SystemExit of 143 and a
    KeyboardInterrupt, which both have the ``result`` so far as an attribute. A second signal does not wait. Off the
    main thread, signals are not listened to.

    Args:
        model: any module. Its own tensors are not changed; ``result.model()`` writes the trained ones into it.
        data: a tensor or NumPy array, a tuple ``(inputs, target)`` or a dict of them, a map-style data set, a
            ``torch.utils.data.DataLoader`` (its data set, batch size, shuffling, collate function and workers are
            read), a pandas frame with a ``task`` that says the target, or a function ``batch(index)`` with
            ``max_steps``.
        loss: a registered name, or a function ``loss(outputs, batch)`` that returns a ``LossSum`` or a mean. It may be
            left out where there is a ``task``, and comes before the task's where there are both.
        task: what kind of problem it is, by name (``"vision_classification"``) or as a :class:`trainfn.TaskSpec`: it
            chooses what is not passed of loss, collator and metrics.
        val_data: data to evaluate on, with the same loss and weighting.
        metrics: measured on ``val_data`` besides the loss: names such as ``"accuracy"``, or values from
            :mod:`trainfn.metric`; those of the task if there are none. They are in the history as ``val_accuracy``.
        optimizer: a Transform; if None, AdamW that spares norms and biases its decay, with warm-up and a cosine to 0.
        collate: makes a batch of a list of a data set's items: a function, or the name of a collator (``"text"`` pads).
        observers: functions called with the state after every step.
        on_signal: called with the signal and the checkpoint (None without ``out_dir``) once that is safe, before the
            run ends. With it, SIGUSR1 is listened to as well; if it then returns True, the run goes on.
        **settings: the fields of :class:`trainfn.TrainConfig`; ``max_steps`` or ``max_epochs`` is needed.

    Returns:
        The last state, the history, the best row, the last checkpoint's path.

    Raises:
        ConfigError, DataError, ModelError, CheckpointError: before the first step; see :func:`trainfn.plan`.
        DivergenceError: too many steps in a row gave non-finite numbers. The last good state is saved first, and the
            error tells, by a replay, which example, module or parameter they came from. Or the state itself is no
            longer finite, because of an update or a forward; it is not saved. With ``on_divergence="rollback"``, only
            after ``max_rollbacks`` (:mod:`trainfn.rollback`).
        RunLockedError: somebody else is writing into ``out_dir``.
        CheckpointWriteError: a checkpoint or a row could not be written, with ``on_save_error="stop"``.
        StepMemoryError: there is no memory for a step; the error says what to lower.
        Anything else that observers, data or evaluation raise: the state before it is saved, and a note says where.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(64, 2)
    >>> result = fit(nn.Linear(2, 2), (x, (x[:, 0] > 0).long()), loss="classification", lr=0.1, batch_size=16,
    ...              max_steps=100, progress=False, device="cpu")
    >>> result.history[-1]["loss"] < 0.2
    True
    """
    given = (loss, task, val_data, metrics, optimizer, collate)
    with contextlib.ExitStack() as held:
        planned = decide(held, model, data, *given, settings=settings)
        return carry_out(planned, observers, on_signal)


def carry_out(planned: Plan, observers: Sequence[Observer] = (), on_signal: OnSignal | None = None) -> FitResult:
    """Run a plan to its end, recording, showing, evaluating and saving on the way; what ``fit`` does after ``plan``."""
    began = saved = time.perf_counter()
    state, config = planned.state, planned.config
    check_noise(planned)
    recorder, progress = Recorder(planned), Progress(planned)
    must_halt, spoilt_by, rollback = make_halt_check(planned), make_finite_check(planned), Rollback(planned)
    saver = Saver(
        config.out_dir or "",
        planned.retention,
        background=config.save_async,
        on_error=config.on_save_error,
        last=planned.resumed_from,
    )
    last = {"val_loss": math.nan}

    def known() -> dict[str, Any]:
        row = recorder.rows[-1] if recorder.rows else {}
        metrics = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        mode = {"config": planned.record["config"] | {"compile_mode": planned.step.mode} | rollback.record}
        return planned.record | mode | {"metrics": metrics}

    def keep(state: TrainState) -> Path | None:
        saver.drain()
        return save(state, config.out_dir, **known()) if config.out_dir is not None else None

    def result() -> FitResult:
        best = best_row(recorder.rows, planned.retention)
        return FitResult(
            state=state,
            history=recorder.rows,
            best=best,
            checkpoint=saver.drain(),
            best_checkpoint=checkpoint_at(config.out_dir, best),
            seconds=time.perf_counter() - began,
            _step=planned.step.step,
            _reader=planned.reader,
        )

    def answer(told: signal.Signals) -> bool:
        return on_signal is not None and bool(on_signal(told, saver.drain())) and told == signal.SIGUSR1

    def rescue(error: Exception) -> None:
        here = course.state
        if config.out_dir is None or here is None or isinstance(error, (DivergenceError, CheckpointError)):
            return
        try:
            if spoilt_by(here, saver.newest) is None:
                recorder.rest(here)
                error.add_note(f"The state after step {here.cursor} is saved in {keep(here)}.")
        except CheckpointError as failure:  # which must not hide why the run ends
            error.add_note(f"The state after step {here.cursor} could not be saved: {failure.what}")

    left, unsaved = None, False
    taken = contextlib.closing(Course(planned, run))
    listened = listening(usr1=on_signal is not None)
    with listened as listener, saver, taken as course, collecting_at_rows() as collect, Rescue(rescue):
        if rollback.wanted and not steps(config.out_dir or ""):
            saver.save(state, **known())
        for state in until_told(course, listener):
            recorder.step(state)
            progress.step(state)
            observe(observers, state)
            saver.check()
            told = listener.heard
            late = config.save_every_minutes and time.perf_counter() - saved >= 60 * config.save_every_minutes
            due = _due(planned, state.cursor, now=told is not None or bool(late))
            halted = must_halt(state, due.row)
            spoilt = spoilt_by(state, saver.newest) if (due.evaluation or due.checkpoint) and not halted else None
            if halted or spoilt:
                refused = recorder.last_refused(state) if halted else None
                back = rollback.back(state, saver.drain) if rollback.wanted else None
                recorder.row(state, {"rolled_back_to": rollback.windows[-1][0]} if back else {})
                if back is None:
                    error = divergence(planned, state, *refused, keep) if refused else spoilt
                    assert error is not None
                    rollback.explain(error)
                    raise error
                state = course.go_on(back)
            wanted = due.checkpoint
            if due.row:
                metrics = evaluate_plan(planned, state) if due.evaluation else {}
                if due.noise:
                    metrics |= noise_columns(planned, state, recorder.rows)
                last |= metrics
                row = recorder.row(state, metrics)
                progress.row(row)
                collect()
                wanted |= due.evaluation and planned.retention.among_best(recorder.rows[:-1], row)
            unsaved = not wanted and config.out_dir is not None
            if wanted and config.out_dir is not None:
                saver.save(state, **known())
                saved = time.perf_counter()
            if told is not None:
                if not answer(told):
                    left = told
                    break
                listener.heard = None
    if left is None and listener.heard is not None:  # in the last step, or there was no other batch
        if unsaved:
            if spoilt := spoilt_by(state, saver.newest):
                raise spoilt
            recorder.row(state, {})
            saver.save(state, **known())
        left = listener.heard
        answer(left)
    if left is not None:
        said = f"stopped by {left.name} after step {state.cursor}, checkpoint {saver.drain()}"
        progress.end(said)
        leave(left, said, result())
    done = result()
    progress.end(_ending(planned, state, done.seconds, last["val_loss"], done.checkpoint))
    return done


def run(planned: Plan) -> Iterator[TrainState]:
    """Yield the state after each step of a plan: the fold itself, without history, evaluation or checkpoints.

    A state may be used until the next one is asked for: the step that makes it writes into the memory of the last.

    >>> import torch
    >>> x, y = torch.ones(8, 2), torch.zeros(8, dtype=torch.long)
    >>> made = plan(nn.Linear(2, 2), (x, y), loss="classification", max_steps=3, device="cpu")
    >>> [int(state.step) for state in run(made)]
    [1, 2, 3]
    """
    state = planned.state
    batches = planned.loader.batches(state.cursor, max(planned.stop, state.cursor))
    if planned.device.type == "cuda":
        batches = prefetched(batches, CopyStream(planned.device))
    try:
        for batch in batches:
            try:
                state = planned.step(state, planned.to_device(batch))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                sizes = planned.config.batch_size, planned.config.accumulate
                raise memory_error(error, f"step {state.cursor + 1}", batch, *sizes) from error
            yield state
    finally:
        batches.close()


@attrs.frozen
class _Due:
    evaluation: bool
    checkpoint: bool
    noise: bool
    row: bool


def _due(planned: Plan, cursor: int, *, now: bool) -> _Due:
    config, end = planned.config, cursor >= planned.stop

    def every(steps: int | None) -> bool:
        return steps is not None and cursor % steps == 0

    evaluation = planned.val_loader is not None and (
        end or every(config.eval_every or planned.loader.batches_per_epoch)
    )
    checkpoint = config.out_dir is not None and (end or now or every(config.save_every))
    noise = every(config.noise_scale_every)
    # A checkpoint closes a row, so that a run that resumes from it writes the rows it would have written anyway.
    row = evaluation or checkpoint or noise or end or every(config.log_every) or every(config.health_every)
    return _Due(evaluation, checkpoint, noise, row)


def _ending(planned: Plan, state: TrainState, seconds: float, val_loss: float, checkpoint: Path | None) -> str:
    parts = [f"done: step {state.cursor} of {planned.stop}, {seconds:.1f} s"]
    if planned.step.compiles:
        parts[0] += f" ({planned.step.compile_seconds:.1f} s of it compiling)"
    if math.isfinite(val_loss):
        parts.append(f"val_loss {val_loss:.4f}")
    if checkpoint is not None:
        parts.append(f"checkpoint {checkpoint}")
    return ", ".join(parts)


def _show_settings() -> None:
    """Let ``help(fit)`` and completion list the settings, which are written down once, in TrainConfig."""
    functions: tuple[Any, ...] = (fit, plan)
    for function in functions:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        settings = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in attrs.fields(TrainConfig)
        ]
        function.__signature__ = signature.replace(parameters=[*kept, *settings])


_show_settings()
