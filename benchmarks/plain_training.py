"""
Samples a second of stage 1 with SmolLM2-135M: the plain way of doing it, and what each part of ours adds.

    tinyalign demo                                                      # its weights, images and bank are used
    OMP_NUM_THREADS=2 python benchmarks/plain_training.py demo          # the recipe: SigLIP-so400m, 729 visual tokens
    OMP_NUM_THREADS=2 python benchmarks/plain_training.py demo --demo   # the demo: EfficientNet-Lite0, 62 tokens a row

The plain way reads the images, looks their neighbours up in every forward pass, in a flat float32 FAISS index, and
computes logits at every position, in float32. Then, one after the other: logits where there is a label, neighbours
looked up beforehand, the language model in bfloat16 (where the CPU computes in it), features of the frozen tower from
their cache. The last row is what `tinyalign train` does with `cache_features: true`. All take the same steps, in turn,
over the same rows; the medians of the steps' wall times count, so the machine should have nothing else to do.
Goal: 3 times the plain way.

Both models of the recipe have all their layers, the tower's weights are random; its bank has 100,000 random rows of
32 x 96 values and 1,152-d keys, 5 neighbours are fused along channels, batches have 2 rows. The demo has its own
bank, four neighbours of eight latents and batches of 10.
"""

import argparse
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from bank import make_bank, synthetic_keys
from cached_features import make_parts
from transformers.utils import logging

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor
from tinyalign_vlm.training.arguments.stage import bfloat16_is_fast
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.data.features import cache_vision_features
from tinyalign_vlm.training.data.neighbours import find_neighbours, source_ids_of
from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.state import TOP_K, DemoConfig
from tinyalign_vlm.training.demo.systems import add_neighbours, chats, compose_demo
from tinyalign_vlm.training.stages.precision import bfloat16_language_model

# what is ours of each row: logits where there is a label, neighbours given, bfloat16, cached features
ROWS = {
    "the plain way": (False, False, False, False),
    "+ logits where there is a label": (True, False, False, False),
    "+ neighbours looked up beforehand": (True, True, False, False),
    "+ the language model in bfloat16": (True, True, True, False),
    "+ cached features": (True, True, True, True),
}


class PlainBank:
    """A flat float32 index in memory, searched in every step. An image's own rows are passed over."""

    def __init__(self, bank: MemoryBank, top_k: int):
        self.bank, self.top_k = bank, top_k
        keys = bank.keys(np.arange(len(bank)))
        self.index = faiss.IndexFlatIP(keys.shape[1])
        self.index.add(keys)

    def __call__(self, features: torch.Tensor, source_ids: list[str]) -> torch.Tensor:
        """`(n, top_k)` rows of the bank."""
        keys = self.bank.encode_queries(features)
        _, found = self.index.search(np.asarray(keys, np.float32), self.top_k + 8)
        own = [set(self.bank.ids_of(source_id).tolist()) for source_id in source_ids]
        return torch.tensor(
            [[i for i in row if i not in mine][: self.top_k] for row, mine in zip(found.tolist(), own, strict=True)]
        )


def demo_parts(demo: Path, folder: Path) -> tuple:
    """The demo's model, processor and bank."""
    weights = {"vision": demo / "weights/efficientnet-lite0", "text": demo / "weights/smollm2-135m-instruct"}
    model, processor = compose_demo(weights, DemoConfig(), memory_top_k=TOP_K)
    bank = MemoryBank.from_pretrained(demo / "bank_without_heldout")
    return model, processor, bank


def recipe_parts(demo: Path, folder: Path) -> tuple:
    """Those of smollm2-135m-siglip.yaml, with random weights, and a bank of random rows for them."""
    names = make_parts(folder, demo, share=1)
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(*names)
    processor = TinyAlignProcessor.from_vision_text_pretrained(*names, model.config)
    keys = synthetic_keys(folder / "keys.npy", "clusters", 100_000)
    return model, processor, make_bank(keys[:100_000]).for_any_tower()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="demo", help="output folder of `tinyalign demo`")
    parser.add_argument("--demo", action="store_true", help="the demo's shape, not the recipe's")
    parser.add_argument("--steps", type=int, default=4, help="of each, timed (default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        measure(*(demo_parts if arguments.demo else recipe_parts)(arguments.folder, Path(folder)), arguments, folder)


def measure(model, processor, bank, arguments, folder):
    batch_size, top_k = 10 if arguments.demo else 2, model.config.memory_top_k
    pairs = load_pairs()
    images = pairs.twemoji.select(pairs.train[: 4 * batch_size])
    features = cache_vision_features(model, processor, images["image"], Path(folder, "features"))
    names = source_ids_of(images["image"])
    rows = chats(images["label"]).add_column("image", list(images["image"]))
    rows = add_neighbours(rows, find_neighbours(bank, model, features, top_k, names))
    rows = rows.add_column("feature_index", list(range(len(rows)))).add_column("name", names)
    from_images, from_cache = TrainingCollator(processor, None, bank), TrainingCollator(processor, features, bank)
    search = PlainBank(bank, top_k)
    model.requires_grad_(False)
    parts = model.base_model.connector, model.base_model.memory_connector
    connectors = [parameter.requires_grad_(True) for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(connectors, lr=1e-5, fused=True)

    def step(batch: list[dict], supervised: bool, given: bool, cached: bool) -> float:
        started = time.perf_counter()
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
        return time.perf_counter() - started

    model.train()
    model.model.language_model.eval()
    seconds = {name: [] for name in ROWS}
    for number in range(arguments.steps + 1):
        start = number * batch_size % len(rows)
        batch = [rows[index] for index in range(start, start + batch_size)]
        for name, (supervised, given, half, cached) in ROWS.items():
            with bfloat16_language_model(model) if half and bfloat16_is_fast(use_cpu=True) else nullcontext():
                seconds[name].append(step(batch, supervised, given, cached))
    print(f"{len(bank):,} rows in the bank, batches of {batch_size}, {torch.get_num_threads()} threads\n")
    print("| | samples a second | times the plain way |\n|---|---|---|")
    plain = median(seconds["the plain way"][1:])
    for name, taken in seconds.items():
        taken = median(taken[1:])
        print(f"| {name} | {batch_size / taken:.2f} | {plain / taken:.2f} |", flush=True)


if __name__ == "__main__":
    main()
