"""A small convolutional net on scikit-learn's handwritten digits (8 x 8 pixels, they come with the package).

python examples/digits.py --steps 400 --out-dir runs/digits
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import trainfn


def main() -> None:
    """Train on four fifths of the digits, and count how many of the rest are read correctly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out-dir", default="runs/digits")
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (N, 1, 8, 8), in [0, 1]
    labels = torch.tensor(digits.target)
    shuffled = trainfn.data.order(torch.arange(len(labels)), len(labels), seed=0)
    train, test = shuffled[360:], shuffled[:360]

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(64 * 4 * 4, 10),
    )
    result = trainfn.fit(
        model,
        (images[train], labels[train]),
        val_data=(images[test], labels[test]),
        loss="classification",
        lr=3e-3,
        batch_size=64,
        drop_last=True,
        max_steps=args.steps,
        device=args.device,
        out_dir=args.out_dir,
        resume="auto",
    )
    with torch.no_grad():
        read = result.model()(images[test]).argmax(1)
    print(f"held-out accuracy: {(read == labels[test]).float().mean():.1%}")


if __name__ == "__main__":
    main()
