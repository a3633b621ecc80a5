"""What does ``fit`` cost over the bare compiled step (F)? C1, from tensors, everything that can be off switched off.

python benchmarks/fit_overhead.py
"""

from __future__ import annotations

import os
import time


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import attrs
    import torch
    from harness import measure, record, summary
    from peers import Ours
    from workloads import mlp

    import trainfn
    from trainfn.fit import carry_out

    torch.set_num_threads(1)
    work, untimed = mlp(), 20

    class Fitted:
        """All that ``fit`` does after its plan is made: the steps from the 20th on, with an observer that looks on."""

        def __init__(self) -> None:
            x, y = work.batch
            self.made = trainfn.plan(
                work.model(), (x.repeat(4096, 1), y.repeat(4096, 1)), loss="mse", batch_size=16, max_steps=10**9,
                optimizer=trainfn.optim.adamw(1e-3), compile="graph", progress=False, device="cpu", on_spike="off",
                health_every=None, ema=0.999, log_every=1000,
            )  # fmt: skip

        def loss(self) -> float:
            raise NotImplementedError

        def run(self, steps: int) -> float:
            first = self.made.state.cursor + untimed
            stamps: list[float] = []

            def watch(state: trainfn.TrainState) -> None:
                if state.cursor in (first, first + steps):
                    stamps.append(time.perf_counter())

            done = carry_out(attrs.evolve(self.made, stop=first + steps), [watch])
            self.made = attrs.evolve(self.made, state=done.state)
            return stamps[1] - stamps[0]

    bare = Ours(work, "graph")
    bare.take()
    rows = summary(measure({"bare step": bare, "fit": Fitted()}, rounds=11, steps=500), "bare step")
    record("fit-overhead", rows, over_us=round(rows[1]["us"] - rows[0]["us"], 1))


if __name__ == "__main__":
    main()
