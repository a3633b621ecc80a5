"""A BERT of transformers, made from a configuration, tells prose from code, after a look at texts without labels.

The texts are lines of Python's language reference and of its library, which ship inside every interpreter. First the
encoder learns to fill in masked bytes; then it learns the kind of a line from the few that have a label. The others
have the label -100, which no loss counts. It needs the extra "hf": pip install trainfn[hf]

    python examples/bert_classification.py --steps 200 --out-dir runs/bert
"""

import argparse
import inspect
import random
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import trainfn
from trainfn.data import ByteTokenizer

MASK, PAD, LENGTH = 256, 257, 48  # a byte is a token, and two tokens are none
LABELLED = 0.1


def lines() -> list[tuple[list[int], int]]:
    """Return lines as tokens, in an order of their own, with what they are: 0 for prose, 1 for code."""
    prose = [line for text in topics.values() for line in text.splitlines() if line[:1].isalpha()]
    modules = (argparse, inspect, random, textwrap)
    code = [line.strip() for module in modules for line in inspect.getsource(module).splitlines()]
    code = [line for line in code if line and line[0] not in "#'\""]
    found = [(ByteTokenizer().encode(line)[:LENGTH], kind) for kind, of in enumerate((prose, code)) for line in of]
    found = [(ids, kind) for ids, kind in found if len(ids) > 8]
    random.Random(0).shuffle(found)
    return found[:4000]


def main() -> None:
    """Learn the texts, then their kinds, and measure on lines that were held out of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out-dir", default="runs/bert")
    args = parser.parse_args()

    train, held_out = trainfn.split(lines(), 0.2, seed=0)
    config = BertConfig(
        vocab_size=258, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=LENGTH, pad_token_id=PAD, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    common = {"lr": 2e-3, "batch_size": 32, "device": args.device, "resume": "auto"}
    filled = trainfn.fit(
        BertForMaskedLM(config),
        [ids for ids, _ in train],
        task=trainfn.TaskSpec(
            kind="masked_language_modeling",
            special_tokens={"mask": MASK, "pad": PAD},
            collate_options={"vocab_size": config.vocab_size},
        ),
        max_steps=args.steps,
        out_dir=Path(args.out_dir) / "masked",
        **common,
    )
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(filled.model().bert.state_dict(), strict=False)  # all but the pooler, which is new

    draw = random.Random(1)
    few = [(ids, kind if draw.random() < LABELLED else -100) for ids, kind in train]
    print(f"{sum(kind >= 0 for _, kind in few)} of {len(few)} lines have a label")
    result = trainfn.fit(
        model,
        few,
        val_data=held_out,
        task=trainfn.TaskSpec(kind="text_classification", special_tokens={"pad": PAD}),
        max_steps=args.steps,
        out_dir=Path(args.out_dir) / "kinds",
        **common,
    )
    print(f"held out: {result.history[-1]['val_accuracy']:.1%} of the lines are told apart")
    asked = [ByteTokenizer().encode(text) for text in ("The value is then returned.", "return [x for x in values]")]
    said = result.predict(trainfn.data.collator("text", pad_id=PAD)(asked))["logits"].softmax(1)
    print("code, with probability " + ", ".join(f"{each:.2f}" for each in said[:, 1].tolist()))


if __name__ == "__main__":
    main()
