"""A small GPT that learns the Python language reference, byte by byte.

The text is the one behind Python's ``help()``: it ships inside every interpreter, so nothing is downloaded.

    python examples/char_gpt.py --steps 2000 --out-dir runs/char_gpt

Run it again and it says that the run is complete; with a larger --steps it goes on from where it stopped.
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainfn

CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 4, 2


class Block(nn.Module):
    """Attention, then a two-layer network, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, d // HEADS)  # (B, T, 3, nh, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, logits for the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.tokens.weight  # tied
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # GPT-2's: the layers that add to the stream start smaller
                last = name.endswith(("mix.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * LAYERS) ** 0.5 if last else 0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]  # (B, T, d)
        return self.head(self.norm(self.blocks(x)))  # (B, T, 256)


def main() -> None:
    """Train, and show what was learnt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
    parser.add_argument("--out-dir", default="runs/char_gpt")
    args = parser.parse_args()

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    held_out = len(text) // 10
    torch.manual_seed(1)
    result = trainfn.fit(
        GPT(),
        trainfn.data.ByteText(text[:-held_out], length=CONTEXT, stride=1),
        val_data=trainfn.data.ByteText(text[-held_out:], length=CONTEXT),
        loss="language_modeling",
        metrics=["accuracy", "perplexity"],
        lr=3e-3,
        batch_size=12,
        max_steps=args.steps,
        eval_every=500,
        device=args.device,
        precision=args.precision,
        out_dir=args.out_dir,
        resume="auto",
    )
    tokenizer = trainfn.data.ByteTokenizer()
    print(result.generate("The ", max_new_tokens=200, temperature=0.8, context=CONTEXT, tokenizer=tokenizer), "\n")
    if result.best is not None:
        print(f"best validation loss: {result.best['val_loss']:.3f} nats per byte, at step {result.best['step']}")


if __name__ == "__main__":
    main()
