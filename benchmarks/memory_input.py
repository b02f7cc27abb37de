"""
What a model should read of its neighbours and meet in training: the demo's job, on validation concepts.

    tinyalign demo && python benchmarks/memory_input.py demo out --seeds 3

Each seed trains, in the demo's steps, the baseline and TinyAlign with captions, with captions and latents, with
latents alone (the paper's way), and with captions from a bank that knows every training concept, without memory
dropout and with the default. Every number is of concepts that were never trained on, with a bank that has them, one
that lacks them, and none ("off"): the mean of the seeds, and from their lowest to their highest. Training goes on
where it was interrupted; docs/method.md has the table.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
from transformers.utils import logging

from tinyalign_vlm.training.bank.value_encoder_training import ValueEncoderTrainingConfig
from tinyalign_vlm.training.data.neighbours import find_neighbours, source_ids_of
from tinyalign_vlm.training.demo import run, systems
from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.state import TOP_K, Clock, Demo, DemoConfig

METRICS = ("choice", "keyword_loss", "exact_match", "name_loss")
DROPOUT = 0.3  # the default of `tinyalign train`
SYSTEMS = ("baseline", "captions", "known", "known_dropout", "both", "latents")


def prepare(folder: Path, weights: dict[str, Path], config: DemoConfig) -> Demo:
    """Make features, banks and neighbours of one seed."""
    pairs = load_pairs(config.seed, config.concepts, config.split)
    demo = Demo(folder, False, config, pairs, weights, Clock(folder / "clock.json"))
    run.prepare(demo)
    scores, ids = demo.found["without"]
    demo.found["off"], demo.banks["off"] = (
        (np.full_like(scores, -np.inf), np.full_like(ids, -1)),
        demo.banks["without"],
    )
    return demo


def add_banks(demo: Demo, values: bool) -> None:
    """Make a bank of all training concepts, and with `values` banks of the same rows that have them."""
    memory = {"memory_input": "latents"} if values else {}
    model, processor = systems.compose(demo.weights, demo.config, memory_top_k=TOP_K, **memory)
    parts = model, processor, demo.pairs.noto, demo.features["noto"]
    if values:
        training = ValueEncoderTrainingConfig(steps=demo.config.value_encoder_steps, seed=demo.config.seed)
        settings = {**run.key_settings(demo.pairs.known), "value_encoder_training": training}
        for name in ("without", "with"):
            path, begun = demo.out / f"bank_values_{name}", demo.banks.get("values_without")
            demo.banks[f"values_{name}"] = run.make_bank(path, *parts, demo.concepts[name], begun, **settings)
            demo.found[f"values_{name}"] = demo.found[name]  # the keys are the same
        return
    rows = np.concatenate([demo.pairs.known, np.setdiff1d(demo.pairs.train, demo.pairs.known)])
    demo.banks["known"] = run.make_bank(demo.out / "bank_known", *parts, rows, demo.banks["without"])
    own = source_ids_of(demo.pairs.twemoji.select(demo.pairs.train)["image"])
    demo.found["train_known"] = find_neighbours(demo.banks["known"], model, demo.features["train"], 2 * TOP_K, own)


def run_one(demo: Demo, name: str) -> None:
    """Train a system, and evaluate it."""
    if name == "baseline":
        model = systems.train_system(demo, name, memory_top_k=0)
        demo.results[name] = {"off": systems.evaluate_system(demo, name, *model)}
        return
    memory, banks = {}, {"with": "with", "without": "without", "off": "off"}
    if name in ("both", "latents"):
        memory["memory_input"] = name
        banks = {"with": "values_with", "without": "values_without"}
    bank, config, train = banks["without"], demo.config, demo.found["train"]
    if name.startswith("known"):
        bank, demo.found["train"] = "known", demo.found["train_known"]
        demo.config = replace(config, memory_dropout=DROPOUT if name == "known_dropout" else 0.0)
    model = systems.train_system(demo, name, bank, **memory)
    demo.config, demo.found["train"] = config, train
    demo.results[name] = {
        key: systems.evaluate_system(demo, f"{name}_{key}", *model, bank=bank) for key, bank in banks.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of `tinyalign demo`, whose weights are used")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    weights = {
        "vision": arguments.demo / "weights" / "efficientnet-lite0",
        "text": arguments.demo / "weights" / "smollm2-135m-instruct",
    }
    found = {}
    for seed in range(arguments.seeds):
        config = DemoConfig(split="validation", seed=seed, every_row=False)
        demo = prepare(arguments.out / f"seed{seed}", weights, config)
        add_banks(demo, values=False)
        if {"both", "latents"} & set(arguments.systems):
            add_banks(demo, values=True)
        for name in arguments.systems:
            run_one(demo, name)
            for bank in demo.results[name]:
                scores = {metric: demo.score(name, bank, metric).value for metric in METRICS}
                found.setdefault((name, bank), []).append(scores)
        print(f"\nseeds 0 to {seed}, {asdict(config)}")
        print("| system | bank | " + " | ".join(METRICS) + " |\n" + "|---" * (2 + len(METRICS)) + "|")
        for (name, bank), scores in found.items():
            row = [f"{np.mean([one[metric] for one in scores]):.3f}" for metric in METRICS]
            span = [f"{np.ptp([one[metric] for one in scores]):.3f}" for metric in METRICS]
            cells = " | ".join(f"{mean} ± {spread}" for mean, spread in zip(row, span, strict=True))
            print(f"| {name} | {bank} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
