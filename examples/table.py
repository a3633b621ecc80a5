"""A small network on a table: how far diabetes has gone in a year, from ten measurements (the data of scikit-learn).

The table is written to a CSV file first and read from there, as yours would be.

python examples/table.py --steps 400 --out-dir runs/table
"""

import argparse
import csv
import tempfile
from pathlib import Path

from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import trainfn
from trainfn.data import read_csv


class Net(nn.Module):
    """Ten features in, one number out; the features are normalised over the batch."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(features), nn.Linear(features, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        return 150 + 80 * self.layers(features).squeeze(1)  # (B,), in the units of the target


def write(path: Path) -> None:
    """Write scikit-learn's table as a CSV file, whose first line names the columns."""
    table = load_diabetes()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*table.feature_names, "progression"])
        writer.writerows([*row, target] for row, target in zip(table.data, table.target, strict=True))


def main() -> None:
    """Train on four fifths of the patients, and measure the error on the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out-dir", default="runs/table")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "diabetes.csv")
        table = read_csv(Path(folder) / "diabetes.csv", target="progression")
    parts = trainfn.split(table, 0.2, seed=0)
    print(parts)
    result = trainfn.fit(
        Net(len(table.columns)),
        parts.train,
        val_data=parts.held_out,
        task=trainfn.TaskSpec(kind="regression", name="diabetes", metrics=["root_mean_squared_error", "r2"]),
        lr=1e-2,
        batch_size=32,
        drop_last=True,
        max_steps=args.steps,
        eval_every=100,
        ema=0.99,
        device=args.device,
        out_dir=args.out_dir,
        resume="auto",
    )
    print(f"held-out r2: {result.history[-1]['val_r2']:.2f}")


if __name__ == "__main__":
    main()
