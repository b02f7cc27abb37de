"""
Does TinyAlign know when its bank does not know? Memory dropout, the similarity as an input, and a threshold.

Run it after the demo, whose weights, features and banks it uses:

    tinyalign demo && python benchmarks/adaptive_retrieval.py demo out --memory_dropout 0 0.6 --memory_scores

It trains TinyAlign as the demo does, once for each rate of memory dropout, and asks it about the held-out drawings:
with the bank that has their concepts, with the bank that lacks them, and with the bank off; with all neighbours, and
with those above the calibrated threshold.
"""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.bank.calibration import calibrate
from tinyalign_vlm.training.data.neighbours import find_neighbours, source_ids_of
from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.run import (
    BANKS,
    TOP_K,
    DemoConfig,
    chats,
    compose,
    compose_with_memory,
    evaluate_system,
    train_system,
    with_neighbours,
)

METRICS = ("loss_per_token", "token_accuracy", "exact_match")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of `tinyalign demo`")
    parser.add_argument("out", type=Path, help="where the variants go; a rerun goes on there")
    parser.add_argument("--memory_dropout", type=float, nargs="+", default=[0.0, 0.6], metavar="RATE")
    parser.add_argument("--memory_scores", action="store_true", help="tell the model how similar a neighbour is")
    arguments = parser.parse_args()
    kept = json.loads((arguments.demo / "config.json").read_text())
    config = DemoConfig(**{field.name: kept[field.name] for field in fields(DemoConfig) if field.name in kept})
    weights = {
        "vision": arguments.demo / "weights" / "efficientnet-lite0",
        "text": arguments.demo / "weights" / "smollm2-135m-instruct",
    }
    pairs = load_pairs(config.seed, config.concepts)
    labels = {"train": np.array(pairs.labels)[pairs.train], "heldout": np.array(pairs.labels)[pairs.heldout]}
    rows = {name: chats(column.tolist()) for name, column in labels.items()}
    (path,) = (arguments.demo / "features").glob("twemoji-*.npy")
    drawings = np.load(path, mmap_mode="r", allow_pickle=False)
    features = {"train": drawings[pairs.train], "heldout": drawings[pairs.heldout]}
    banks = {name: MemoryBank.from_pretrained(arguments.demo / f"bank_{name}_heldout") for name in BANKS}
    model, processor = compose(weights, config, memory_top_k=0)
    own = source_ids_of(pairs.twemoji.select(pairs.train)["image"])
    found = {"train": find_neighbours(banks["without"], model, features["train"], 2 * TOP_K, own)}
    found |= {name: find_neighbours(banks[name], model, features["heldout"], TOP_K) for name in BANKS}
    found["off"] = (np.full_like(found["with"][0], -np.inf), np.full_like(found["with"][1], -1))
    scores, ids = (column[:, :TOP_K] for column in found["train"])
    captions = [[row["caption"] for row in neighbours] for neighbours in banks["without"].rows(ids)]
    calibration = calibrate(scores, captions, labels["train"].tolist())
    print(calibration, flush=True)

    print(f"\n| system | bank | threshold | {' | '.join(METRICS)} |\n{'|---' * 6}|", flush=True)

    def report(system: str, bank: str, threshold: float | None, path: Path, *evaluated):
        summary = evaluate_system(path, *evaluated).summary()
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*summary[metric]) for metric in METRICS]
        print(f"| {system} | {bank} | {threshold and f'{threshold:.2f}'} | {' | '.join(cells)} |", flush=True)

    folder = arguments.out / "baseline"
    model = train_system(folder, model, processor, rows["train"], features["train"], None, config)
    report("baseline", "-", None, folder / "baseline.json", model, processor, rows["heldout"], features["heldout"])
    for rate in arguments.memory_dropout:
        variant = replace(config, memory_dropout=rate, memory_scores=arguments.memory_scores)
        name = f"dropout {rate}{', scores' if arguments.memory_scores else ''}"
        folder = arguments.out / name.replace(", ", "_").replace(" ", "_")
        model, processor = compose_with_memory(weights, variant)
        model.build_lexicon(processor.tokenizer, banks["without"])
        training = with_neighbours(rows["train"], found["train"])
        model = train_system(folder, model, processor, training, features["train"], banks["without"], variant)
        for kind in (*BANKS, "off"):
            bank = banks["with" if kind == "off" else kind]
            model.build_lexicon(processor.tokenizer, bank)
            for threshold in (None,) if kind == "off" else (None, calibration.threshold):
                model.config.retrieval_threshold = threshold
                path = folder / f"{kind}_{threshold}.json"
                asked = with_neighbours(rows["heldout"], found[kind])
                report(name, kind, threshold, path, model, processor, asked, features["heldout"], bank)


if __name__ == "__main__":
    main()
