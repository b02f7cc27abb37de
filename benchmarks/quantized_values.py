"""
What rounding a bank does to a trained model: its loss with float16 values and float32 keys, and with 8 and 16 bits.

Run it after the demo, whose model, features and banks it uses:

    tinyalign demo && python benchmarks/quantized_values.py demo

The loss is that of the held-out drawings' answers, with the neighbours that each bank finds for them.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration
from tinyalign_vlm.processing import TinyAlignProcessor
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.data.neighbours import find_neighbours
from tinyalign_vlm.training.data.training_rows import training_rows
from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.run import BANKS, TOP_K, DemoConfig, chats, with_neighbours

BATCH = 32


@torch.no_grad()
def loss_per_token(model, processor, rows, bank: MemoryBank, features: np.ndarray) -> float:
    rows, collate = training_rows(model, rows, bank, features), TrainingCollator(processor, features, bank)
    total = number = 0
    for start in range(0, len(rows), BATCH):
        inputs = collate([rows[index] for index in range(start, min(start + BATCH, len(rows)))])
        labels = inputs.pop("labels")[:, 1:]
        supervised = labels != -100
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits[supervised].double(), labels[supervised], reduction="sum").item()
        number += supervised.sum().item()
    return total / number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of `tinyalign demo`")
    parser.add_argument("--rows", type=int, help="held-out drawings (default: all)")
    arguments = parser.parse_args()
    kept = json.loads((arguments.demo / "config.json").read_text())
    config = DemoConfig(**{field.name: kept[field.name] for field in fields(DemoConfig) if field.name in kept})
    pairs = load_pairs(config.seed, config.concepts)
    heldout = pairs.heldout[: arguments.rows]
    rows = chats(np.array(pairs.labels)[heldout].tolist())
    (path,) = (arguments.demo / "features").glob("twemoji-*.npy")
    features = np.load(path, mmap_mode="r", allow_pickle=False)[heldout]
    model = TinyAlignForConditionalGeneration.from_pretrained(arguments.demo / "tinyalign" / "model").eval()
    processor = TinyAlignProcessor.from_pretrained(arguments.demo / "tinyalign" / "model")
    print(
        "| bank | loss per token | quantized | moved by | error of the values | other neighbours |\n"
        + "|---" * 6
        + "|"
    )
    for name in BANKS:
        plain = MemoryBank.from_pretrained(arguments.demo / f"bank_{name}_heldout")
        quantized = plain.with_rows(plain.batches(), quantized=True)
        losses, neighbours = [], []
        for bank in (plain, quantized):
            model.build_lexicon(processor.tokenizer, bank)
            found = find_neighbours(bank, model, features, TOP_K)
            losses.append(loss_per_token(model, processor, with_neighbours(rows, found), bank, features))
            neighbours.append(found[1])
        values, rounded = (bank.gather(np.arange(len(bank))) for bank in (plain, quantized))
        error = (rounded - values).norm() / (values - values.mean(dim=0)).norm()
        print(
            f"| {name} the concepts | {losses[0]:.5f} | {losses[1]:.5f} | {100 * (losses[1] / losses[0] - 1):+.4f}% "
            f"| {100 * error:.2f}% of their variation | {(neighbours[0] != neighbours[1]).mean():.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
