"""A vision transformer on scikit-learn's handwritten digits, each of which is never seen twice in the same way.

The data is a function ``batch(index)``: which digits are in a batch, and how each is moved, turned and dimmed, depends
on the seed and the number of the batch alone. So a run that is cut goes on with the batches that it would have had.

    python examples/digits_vit.py --steps 400 --out-dir runs/digits_vit
"""

import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import trainfn

SEED, BATCH, WIDTH = 0, 64, 64


class ViT(nn.Module):
    """Sixteen patches of 2 x 2 pixels, through PyTorch's encoder, and the mean of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).mT + self.places  # (B, 16, d)
        return self.head(self.norm(self.layers(x).mean(1)))  # (B, 10)


def changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, 1, 8, 8), each moved by up to half a pixel, turned by up to 9 degrees, and dimmed."""
    shift, turn, dim = (torch.rand(len(images), n, generator=generator) for n in (2, 1, 1))
    angle = (2 * turn[:, 0] - 1) * math.pi / 20
    where = torch.zeros(len(images), 2, 3)
    where[:, 0, 0], where[:, 0, 1] = angle.cos(), -angle.sin()
    where[:, 1, 0], where[:, 1, 1] = angle.sin(), angle.cos()
    where[:, :, 2] = (2 * shift - 1) / 8
    grid = F.affine_grid(where, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) * (1 - 0.2 * dim[:, :, None, None])


def main() -> None:
    """Train on four fifths of the digits, as they are never seen again, and read the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out-dir", default="runs/digits_vit")
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (N, 1, 8, 8), in [0, 1]
    labels = torch.tensor(digits.target)
    shuffled = trainfn.data.order(torch.arange(len(labels)), len(labels), seed=SEED)
    train, test = shuffled[360:], shuffled[:360]

    def batch(index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index * BATCH, len(train))
        places = (place + torch.arange(BATCH)) % len(train)
        chosen = train[trainfn.data.order(places, len(train), seed=SEED, epoch=epoch)]
        generator = torch.Generator().manual_seed(SEED + index)
        return {"pixel_values": changed(images[chosen], generator), "labels": labels[chosen]}

    torch.manual_seed(SEED)
    result = trainfn.fit(
        ViT(),
        batch,
        val_data={"pixel_values": images[test], "labels": labels[test]},
        task="vision_classification",
        optimizer=trainfn.optim.adamw(
            lr=trainfn.optim.warmup_cosine(2e-3, warmup=args.steps // 20, total=args.steps), weight_decay=0.05
        ),
        max_steps=args.steps,
        eval_every=200,
        ema=0.98,
        device=args.device,
        out_dir=args.out_dir,
        resume="auto",
    )
    read = result.predict(images[test]).argmax(1).cpu()
    print(f"held-out accuracy: {(read == labels[test]).float().mean():.1%}")


if __name__ == "__main__":
    main()
