"""
Samples a second of stage 1 with SmolLM2-135M: the plain way of doing it, and what each part of ours adds.

Run it after the demo, whose weights, bank and value encoder it uses:

    tinyalign demo && OMP_NUM_THREADS=1 python benchmarks/plain_training.py demo

The plain way reads the images, looks their neighbours up in every forward pass, in a flat float32 FAISS index, and
computes logits at every position, in float32. Then, one after the other: logits where there is a label, neighbours
looked up beforehand, the language model in bfloat16 (where the CPU computes in it), features of the frozen tower from
their cache. The last row is the demo's stage 1. All take the same steps, in turn, over the same rows, with the demo's
four neighbours of eight latents and batches of 10; the medians count. Seconds are those of the processor, so that what
else the machine does is left out. Goal: 3 times the plain way.

--bank_rows 558128 is a bank of LLaVA's pre-training set: random keys beside those of the demo.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import logging

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.checkpoints import connectors_of
from tinyalign_vlm.training.data import TrainingCollator
from tinyalign_vlm.training.demo import TOP_K, DemoConfig, chats, compose_with_memory, load_pairs, with_neighbours
from tinyalign_vlm.training.features import cache_vision_features
from tinyalign_vlm.training.neighbours import find_neighbours, source_ids_of
from tinyalign_vlm.training.precision import bfloat16_is_fast, bfloat16_language_model

# what is ours of each row: logits where there is a label, neighbours given, bfloat16, cached features
ROWS = {
    "the plain way": (False, False, False, False),
    "+ logits where there is a label": (True, False, False, False),
    "+ neighbours looked up beforehand": (True, True, False, False),
    "+ the language model in bfloat16": (True, True, True, False),
    "+ cached features (stage 1 of the demo)": (True, True, True, True),
}


class PlainBank:
    """A flat float32 index in memory, searched in every step. An image's own rows are passed over."""

    def __init__(self, bank: MemoryBank, num_rows: int):
        self.bank = bank
        keys = bank.keys(np.arange(len(bank)))
        self.index = faiss.IndexFlatIP(keys.shape[1])
        self.index.add(keys)
        rng = np.random.default_rng(0)
        while self.index.ntotal < num_rows:
            more = rng.standard_normal((min(10000, num_rows - self.index.ntotal), keys.shape[1]), dtype=np.float32)
            self.index.add(more / np.linalg.norm(more, axis=1, keepdims=True))

    def __call__(self, features: torch.Tensor, source_ids: list[str]) -> torch.Tensor:
        """`(n, top_k)` rows of the bank."""
        keys = self.bank.encode_queries(features)
        _, found = self.index.search(np.asarray(keys, np.float32), TOP_K + 8)
        own = [set(self.bank.ids_of(source_id).tolist()) for source_id in source_ids]
        kept = [[i for i in row if i not in mine][:TOP_K] for row, mine in zip(found.tolist(), own, strict=True)]
        return torch.tensor(kept).clamp(max=len(self.bank) - 1)  # a random key has no value: that of the last row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of `tinyalign demo`")
    parser.add_argument("--steps", type=int, default=8, help="of each, timed (default: %(default)s)")
    parser.add_argument("--bank_rows", type=int, default=0, help="add random keys up to so many rows")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    demo, config = arguments.demo, DemoConfig()
    weights = {"vision": demo / "weights/efficientnet-lite0", "text": demo / "weights/smollm2-135m-instruct"}
    model, processor = compose_with_memory(weights, config)
    bank = MemoryBank.from_pretrained(demo / "bank_without_heldout")
    model.build_lexicon(processor.tokenizer, bank)
    pairs = load_pairs(config)
    images = pairs.twemoji.select(pairs.train[: 10 * config.batch_size])
    features = cache_vision_features(model, processor, images["image"], demo / "features" / "benchmark")
    names = source_ids_of(images["image"])
    rows = chats(images["label"]).add_column("image", list(images["image"]))
    rows = with_neighbours(rows, find_neighbours(bank, model, features, TOP_K, names))
    rows = rows.add_column("feature_index", list(range(len(rows)))).add_column("name", names)
    from_images, from_cache = TrainingCollator(processor, None, bank), TrainingCollator(processor, features, bank)
    search = PlainBank(bank, arguments.bank_rows)
    model.requires_grad_(False)
    connectors = [parameter for part in connectors_of(model).values() for parameter in part.parameters()]
    for parameter in connectors:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(connectors, lr=1e-5, fused=True)

    def step(batch: list[dict], supervised: bool, given: bool, cached: bool) -> float:
        started = time.process_time()
        inputs = (from_cache if cached else from_images)(batch)
        if not given:  # the tower runs once, here, and not again in the model
            inputs["vision_features"] = model.get_vision_features(inputs.pop("pixel_values"))
            inputs["memory_ids"] = search(inputs["vision_features"], [row["name"] for row in batch])
            inputs["memory_values"] = bank.gather(inputs["memory_ids"], torch.float16)
        if supervised:
            loss = model(**inputs, supervised_logits_only=True, use_cache=False).loss
        else:
            logits = model(**{**inputs, "labels": None}, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - started

    model.train()
    model.model.language_model.eval()
    seconds = {name: [] for name in ROWS}
    for number in range(arguments.steps + 1):
        start = number * config.batch_size % len(rows)
        batch = [rows[index] for index in range(start, start + config.batch_size)]
        for name, (supervised, given, half, cached) in ROWS.items():
            with bfloat16_language_model(model) if half and bfloat16_is_fast(use_cpu=True) else nullcontext():
                seconds[name].append(step(batch, supervised, given, cached))
    print(f"{max(len(bank), arguments.bank_rows):,} rows in the bank, {torch.get_num_threads()} threads\n")
    print("| | samples a CPU second | times the plain way |\n|---|---|---|")
    plain = median(seconds["the plain way"][1:])
    for name, taken in seconds.items():
        taken = median(taken[1:])
        print(f"| {name} | {config.batch_size / taken:.2f} | {plain / taken:.2f} |", flush=True)


if __name__ == "__main__":
    main()
