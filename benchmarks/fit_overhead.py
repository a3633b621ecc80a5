"""What does ``fit`` cost over the bare compiled step (F)? C1, from tensors, everything that can be off switched off.

python benchmarks/fit_overhead.py
"""

from __future__ import annotations

import os
import time


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from harness import measure, record, summary
    from peers import Ours
    from workloads import mlp

    import trainfn

    torch.set_num_threads(1)
    work = mlp()

    class Fitted:
        """A run whose steps are counted from its 100th on."""

        def __init__(self) -> None:
            x, y = work.batch
            self.made = trainfn.plan(
                work.model(), (x.repeat(64, 1), y.repeat(64, 1)), loss="mse", batch_size=16, max_steps=10**9,
                compile="graph", progress=False, device="cpu", on_spike="off", health_every=None, ema=None,
                log_every=1000,
            )  # fmt: skip

        def loss(self) -> float:
            raise NotImplementedError

        def run(self, steps: int) -> float:
            from trainfn.observers import Recorder

            recorder, states = Recorder(self.made), trainfn.run(self.made)
            for _, state in zip(range(20), states, strict=False):
                recorder.step(state)
            began = time.perf_counter()
            for _, state in zip(range(steps), states, strict=False):
                recorder.step(state)
            seconds = time.perf_counter() - began
            states.close()
            self.made = _continued(self.made, state)
            return seconds

    def _continued(made: trainfn.Plan, state: trainfn.TrainState) -> trainfn.Plan:
        import attrs

        return attrs.evolve(made, state=state)

    bare = Ours(work, "graph")
    bare.take()
    rows = summary(measure({"bare step": bare, "fit": Fitted()}, rounds=11, steps=500), "bare step")
    record("fit-overhead", rows, over_us=round(rows[1]["us"] - rows[0]["us"], 1))


if __name__ == "__main__":
    main()
