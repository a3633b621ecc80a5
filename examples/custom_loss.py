"""A loss and an observer of your own: a net that says how sure it is, and a look at it while it learns.

The data is a wave whose noise grows to the right. The net gives a mean and the logarithm of a standard deviation for
each point, and the loss is what the normal distribution makes of it: the negative log-likelihood.

    python examples/custom_loss.py --steps 600 --out-dir runs/custom_loss
"""

import argparse
import math

import torch
from torch import Tensor, nn

import trainfn
from trainfn import LossSum


class Net(nn.Module):
    """A number in; a mean and the logarithm of a standard deviation out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_std = self.layers(x).unbind(1)
        return {"mean": mean, "log_std": log_std.clamp(-5, 5)}


def negative_log_likelihood(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> LossSum:
    """Return the loss as a sum and what it is a sum over: so micro-batches of any size add up to the whole.

    A mean would do as well: ``return loss.mean()``, which is taken for one over the batch's examples.
    """
    error = (batch["y"] - outputs["mean"]) * torch.exp(-outputs["log_std"])
    loss = 0.5 * error.square() + outputs["log_std"] + 0.5 * math.log(2 * math.pi)  # (B,)
    return LossSum(total=loss.sum(), weight=torch.tensor(float(len(loss))))


def make_observer(model: nn.Module, every: int):  # a function of the state, called after each step
    """Return an observer that prints, now and then, how much noise the net sees at three points."""
    points = torch.tensor([[0.0], [0.5], [1.0]])

    def observe(state: trainfn.TrainState) -> None:
        if state.cursor % every == 0:
            with torch.no_grad():
                params = {name: value.cpu() for name, value in state.params.items()}
                found = torch.func.functional_call(model, params, (points,))["log_std"].exp()
            print(f"step {state.cursor}: noise seen at 0, 0.5 and 1: " + ", ".join(f"{each:.2f}" for each in found))

    return observe


def main() -> None:
    """Train, watch, and compare the noise that is seen with the noise that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out-dir", default="runs/custom_loss")
    args = parser.parse_args()

    torch.manual_seed(0)
    x = torch.rand(4000, 1)
    noise = 0.05 + 0.45 * x[:, 0]
    data = {"x": x, "y": torch.sin(6 * x[:, 0]) + noise * torch.randn(4000)}
    parts = trainfn.split(data, 0.1, seed=0)
    model = Net()
    result = trainfn.fit(
        model,
        parts.train,
        val_data=parts.held_out,
        loss=negative_log_likelihood,
        observers=[make_observer(model, every=max(1, args.steps // 5))],
        lr=3e-3,
        batch_size=128,
        max_steps=args.steps,
        ema=0.99,
        device=args.device,
        out_dir=args.out_dir,
        resume="auto",
    )
    seen = result.predict({"x": torch.tensor([[0.1], [0.5], [0.9]])})["log_std"].exp()
    for at, found in zip((0.1, 0.5, 0.9), seen.tolist(), strict=True):
        print(f"at {at}: noise {0.05 + 0.45 * at:.2f}, seen as {found:.2f}")


if __name__ == "__main__":
    main()
