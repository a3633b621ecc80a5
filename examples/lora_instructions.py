"""A small GPT that copies words is taught to shout them, by adapters: 4 % of its numbers, and what PEFT can read.

First all of the model learns "word>word.". Then it is frozen, and low-rank adapters beside its linear layers learn from
instructions, "word!WORD.", of which the prompt ("word!") is not learnt. Words are made up, so nothing is downloaded.

    python examples/lora_instructions.py --steps 300 --out-dir runs/lora
"""

import argparse
import random
import shutil
import string
from pathlib import Path

import torch
from torch import Tensor, nn

import trainfn
from trainfn import lora
from trainfn.data import ByteTokenizer

LETTERS, WIDTH = 5, 64
LENGTH = 2 * LETTERS + 2


class GPT(nn.Module):
    """Bytes in, logits for the next byte out: PyTorch's own layers, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=input_ids.device)
        x = self.tokens(input_ids) + self.places.weight[:length]  # (B, T, d)
        return self.head(self.layers(x, mask=mask.to(x.dtype), is_causal=True))  # (B, T, 128)


def examples(count: int, sign: str, seed: int) -> list[dict[str, object]]:
    """Return prompts with their answers, as tokens: ``word>word.``, or ``word!WORD.``."""
    draw, tokenizer = random.Random(seed), ByteTokenizer()
    words = ["".join(draw.choices(string.ascii_lowercase, k=LETTERS)) for _ in range(count)]
    answers = [word.upper() if sign == "!" else word for word in words]
    return [
        {"input_ids": tokenizer.encode(f"{word}{sign}{answer}."), "prompt_length": LETTERS + 1}
        for word, answer in zip(words, answers, strict=True)
    ]


def main() -> None:
    """Train the model, then adapters; write these, read them again, and answer with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the model, and as many of the adapters")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out-dir", default="runs/lora")
    args = parser.parse_args()
    common = {"task": "language_modeling", "batch_size": 64, "device": args.device, "resume": "auto"}

    torch.manual_seed(0)
    base = GPT()
    copying = trainfn.fit(
        base,
        examples(20_000, ">", seed=0),
        lr=3e-3,
        max_steps=args.steps,
        out_dir=Path(args.out_dir) / "base",
        **common,
    )
    model = lora.add(copying.model(), "layers.*.linear?", rank=4, alpha=8.0)
    shouting = trainfn.fit(
        model,
        examples(20_000, "!", seed=1),
        val_data=examples(200, "!", seed=2),
        loss="peft_aware(language_modeling)",
        lr=1e-2,
        max_steps=args.steps,
        out_dir=Path(args.out_dir) / "adapters",
        **common,
    )
    folder = Path(args.out_dir) / "peft"
    shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {lora.save(shouting.model(), folder)}: peft.PeftModel.from_pretrained(GPT(), folder) reads it")

    prompts, options = ["apple!", "train!", "apple>"], {"max_new_tokens": LETTERS + 1, "temperature": 0}
    for text in shouting.generate(prompts, tokenizer=ByteTokenizer(), stop=ord("."), **options):
        print(text)
    print(f"held out: {shouting.history[-1]['val_accuracy']:.0%} of the letters are right")


if __name__ == "__main__":
    main()
