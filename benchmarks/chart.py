"""Draws the newest results of ``step_time.py`` as a chart, ``results/step.png``: a step of each peer over one of ours.

python benchmarks/chart.py    (needs matplotlib: pip install -c constraints.txt -e ".[plots]")
"""

from __future__ import annotations

import json
from typing import Any

from harness import RESULTS

WORKS = ("C1", "C4b", "C4", "C3")


def newest(work: str, threads: int) -> dict[str, Any] | None:
    """Return the last results for a workload; the dates in their names sort them."""
    found = sorted(RESULTS.glob(f"*-step-{work}-{threads}t.json"))
    return json.loads(found[-1].read_text()) if found else None


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, threads in zip(axes, (1, 2), strict=True):
        results = {work: found for work in WORKS if (found := newest(work, threads)) is not None}
        peers = list(dict.fromkeys(row["peer"] for found in results.values() for row in found["rows"]))
        width = 0.8 / max(1, len(peers))
        for place, peer in enumerate(peers):
            ratios = [next((r["ratio"] for r in found["rows"] if r["peer"] == peer), 0.0) for found in results.values()]
            axis.bar([i + place * width for i in range(len(results))], ratios, width, label=peer)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(results))], list(results))
        axis.set_title(f"{threads} thread{'s' if threads > 1 else ''}")
    axes[0].set_ylabel("time of a step, over trainfn's in the first mode")
    axes[0].set_yscale("log")
    axes[1].legend(fontsize="small")
    about = next(found["about"] for work in WORKS if (found := newest(work, 1)) is not None)
    figure.suptitle(f"{about['processor']}, torch {about['torch']}, {about['date']}", fontsize="small")
    path = RESULTS / "step.png"
    figure.savefig(path, dpi=120)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
