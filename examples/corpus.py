"""A language model on a file of tokens that is never read into memory: the way for a corpus that does not fit.

The corpus here is small, Python's language reference, which ships inside every interpreter; the file could as well be
a hundred gigabytes: what is read of it are the windows of each batch.

python examples/corpus.py --steps 300 --out-dir runs/corpus
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch.nn.functional as F
from torch import Tensor, nn

import trainfn
from trainfn.data import ByteTokenizer, TokenFile, write_tokens

CONTEXT, WIDTH = 64, 64


class Convolutions(nn.Module):
    """Token ids in, logits for the next token out, by two convolutions over the tokens before."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, vocabulary)
        self.near, self.far = nn.Conv1d(WIDTH, WIDTH, 4), nn.Conv1d(WIDTH, WIDTH, 4, dilation=4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids).transpose(1, 2)  # (B, d, T)
        x = x + F.gelu(self.near(F.pad(x, (3, 0))))
        x = x + F.gelu(self.far(F.pad(x, (12, 0))))
        return self.head(x.transpose(1, 2))  # (B, T, vocabulary)


def main() -> None:
    """Write the corpus, unless it is there, and train on nine tenths of its windows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out-dir", default="runs/corpus")
    args = parser.parse_args()

    tokenizer = ByteTokenizer()  # or trainfn.data.train_bpe(texts, vocab_size=4096), with dtype="uint16" below
    path = Path(args.out_dir) / "tokens.bin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        count = write_tokens(path, (tokenizer.encode(topics[name]) for name in sorted(topics)), dtype="uint8")
        print(f"wrote {count:,} tokens to {path}")
    windows = TokenFile(path, length=CONTEXT, dtype="uint8")
    train, held_out = trainfn.split(windows, 0.1, seed=0)
    result = trainfn.fit(
        Convolutions(tokenizer.vocab_size),
        train,
        val_data=held_out,
        task="language_modeling",
        lr=1e-2,
        batch_size=16,
        max_steps=args.steps,
        device=args.device,
        out_dir=Path(args.out_dir) / "run",
        resume="auto",
    )
    last = result.history[-1]
    print(f"held out: {last['val_loss']:.2f} nats per byte, {last['val_accuracy']:.0%} of the next bytes are right")


if __name__ == "__main__":
    main()
