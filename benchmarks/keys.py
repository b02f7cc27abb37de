"""Measure what the keys of a bank find, and how well they know it: the numbers of docs/keys.md, on the emoji.

    python benchmarks/keys.py demo/weights out calibration   # probabilities: fitted on validation concepts
    python benchmarks/keys.py demo/weights out learned       # keys learned from pairs of drawings
    python benchmarks/keys.py demo/weights out growth        # probabilities of a bank that has grown since
    python benchmarks/keys.py demo/weights out precision     # the tower in float32, bfloat16, float16

`demo/weights` is made by `tinyalign demo`; visual features are kept in `out`. The bank has Noto drawings, the queries
are Twemoji drawings, a concept is in one split only: 60% to train on, 15% to choose with, 25% to test, three seeds.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
import torch

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor
from tinyalign_vlm.training.bank.calibration import (
    fit_calibration,
    measure,
    plot_reliability,
)
from tinyalign_vlm.training.bank.learned_keys import learn_keys
from tinyalign_vlm.training.data.features import cache_vision_features

EMOJI = Path(__file__).parents[1] / "examples" / "data" / "emoji_pairs.parquet"
SEEDS, TOP_K, DEPTH = (0, 1, 2), 4, 8


class Emoji:
    """Both drawings of every emoji, and their visual features."""

    def __init__(self, weights: Path, out: Path):
        rows = datasets.load_dataset("parquet", data_files=str(EMOJI), split="train")
        rows = rows.cast_column("image", datasets.Image(decode=False))
        rows = rows.select(np.argsort(rows["concept"], kind="stable"))
        styles = np.array(rows["style"])
        self.rows = {style: rows.select(np.flatnonzero(styles == style)) for style in ("noto", "twemoji")}
        names = [[image["bytes"] for image in column["image"]] for column in self.rows.values()]
        first = [np.array([column.index(name) == row for row, name in enumerate(column)]) for column in names]
        kept = np.flatnonzero(first[0] & first[1])  # some concepts share a drawing
        self.rows = {style: column.select(kept) for style, column in self.rows.items()}
        self.labels = np.array(self.rows["noto"]["label"])
        self.weights, self.out = weights, out
        self.model, self.processor = self.compose(torch.float32)
        self.features = {style: self.see(self.model, style, range(len(kept))) for style in self.rows}

    def compose(self, dtype: torch.dtype):
        towers = [str(self.weights / name) for name in ("efficientnet-lite0", "smollm2-135m-instruct")]
        settings = {"vision_kwargs": {"dtype": dtype}, "text_kwargs": {"dtype": torch.bfloat16}}
        model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(*towers, vision_pool_size=3, **settings)
        return model.eval(), TinyAlignProcessor.from_vision_text_pretrained(*towers, model.config)

    def see(self, model, style: str, rows) -> np.ndarray:
        images = self.rows[style].select(rows)["image"]
        return cache_vision_features(model, self.processor, images, self.out / style, desc=style)

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = np.random.default_rng(seed).permutation(len(self.labels))
        return np.split(order, [round(0.6 * len(order)), round(0.75 * len(order))])

    def build(self, rows: np.ndarray, whiten_dim: int = 512) -> MemoryBank:
        settings = {"key_grid": 3, "whiten_dim": min(whiten_dim, len(rows) - 1)} | self.of(rows)
        return MemoryBank.build(self.rows["noto"].select(rows), self.model, self.processor, **settings)

    def add(self, bank: MemoryBank, rows: np.ndarray) -> MemoryBank:
        return bank.add(self.rows["noto"].select(rows), self.model, self.processor, **self.of(rows))

    def of(self, rows: np.ndarray) -> dict:
        return {"caption_column": "label", "vision_features": self.features["noto"][rows]}

    def search(self, bank: MemoryBank, rows: np.ndarray, features: np.ndarray | None = None):
        """Return similarities and which rows are right, `(n, DEPTH)` each, and the rows found."""
        features = self.features["twemoji"][rows] if features is None else features
        scores, ids = bank.search(bank.encode_queries(torch.from_numpy(np.array(features))), DEPTH)
        return scores.numpy(), np.array(bank.captions)[ids.numpy()] == self.labels[rows][:, None], ids.numpy()


def recall(right: np.ndarray) -> tuple[float, float]:
    """Return recall@1 and recall@4."""
    return right[:, 0].mean(), right[:, :TOP_K].any(axis=1).mean()


def print_row(*cells):
    """Print the cells as a row of a Markdown table; of numbers by seed their mean and range."""
    shown = [
        f"{np.mean(cell):.3f} ({np.min(cell):.3f} to {np.max(cell):.3f})" if isinstance(cell, list) else str(cell)
        for cell in cells
    ]
    print(f"| {' | '.join(shown)} |", flush=True)


def calibration(emoji: Emoji):
    """Whitened and learned keys: fitted on the validation concepts, tested on the test concepts."""
    for name in ("whitened", "learned"):
        found, curves = [], {}
        for seed in SEEDS:
            train, validation, test = emoji.split(seed)
            bank = emoji.build(train)
            if name == "learned":
                bank = learn_keys(bank, *(emoji.features[style][train] for style in ("noto", "twemoji")))
            bank = emoji.add(bank, validation)
            scores, right, _ = emoji.search(bank, validation)
            fitted = fit_calibration(scores, right, TOP_K, len(bank))
            bank = emoji.add(bank, test)
            scores, right, _ = emoji.search(bank, test)
            numbers, curves = measure(fitted, scores, right)
            found.append({"recall@1": recall(right)[0], "recall@4": recall(right)[1], **numbers})
        for measured in found[0]:
            print_row(name, measured, [numbers[measured] for numbers in found])
        plot_reliability(emoji.out / f"reliability_{name}.png", curves)


def learned(emoji: Emoji):
    """Recall of validation and of test concepts, whose pairs no map was trained on."""
    for name, dim, share in (
        ("whitened to 512", 512, 0),
        ("whitened to 1024", 1024, 0),
        ("learned", 512, 1),
        ("learned from 30% of the pairs", 512, 0.3),
    ):
        found = {"validation": [], "test": [], "pairs of the map": [], "other training concepts": []}
        for seed in SEEDS:
            train, validation, test = emoji.split(seed)
            bank, pairs = emoji.build(train, dim), train[: round(share * len(train))]
            if share:
                bank = learn_keys(bank, *(emoji.features[style][pairs] for style in ("noto", "twemoji")))
            others = train[len(pairs) :]
            parts = {"validation": validation, "pairs of the map": pairs, "other training concepts": others}
            with_validation = emoji.add(bank, validation)
            for part, rows in parts.items():
                if len(rows):
                    found[part].append(recall(emoji.search(with_validation, rows)[1]))
            found["test"].append(recall(emoji.search(emoji.add(with_validation, test), test)[1]))
        for part, numbers in found.items():
            if numbers:
                print_row(name, part, *map(list, zip(*numbers, strict=True)))


def growth(emoji: Emoji):
    """Calibrated with a part of the training concepts in the bank, tested when all of them have been added."""
    for share in (1, 0.75, 0.5, 0.25):
        found = []
        for seed in SEEDS:
            train, validation, test = emoji.split(seed)
            part = train[: round(share * len(train))]
            bank = emoji.add(emoji.build(part), validation)
            scores, right, _ = emoji.search(bank, validation)
            fitted = fit_calibration(scores, right, TOP_K, len(bank))
            grown = emoji.add(bank, np.concatenate([train[len(part) :], test]))
            scores, right, _ = emoji.search(grown, test)
            numbers, _ = measure(fitted, scores, right)
            found.append(
                (len(grown) / len(bank), numbers["right: calibration error"], numbers["none: calibration error"])
            )
        print_row(share, *map(list, zip(*found, strict=True)))


def precision(emoji: Emoji):
    """The test queries of seed 0 through towers of other dtypes, in a bank that was built in float32."""
    train, validation, test = emoji.split(0)
    bank = emoji.build(np.concatenate([train, validation, test]))
    expected = emoji.search(bank, test)[2]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, _ = emoji.compose(dtype)
        bank.check_probes(model)
        _, right, ids = emoji.search(bank, test, emoji.see(model, "twemoji", test))
        of_four = np.mean([len({*row} & {*other}) for row, other in zip(ids[:, :4], expected[:, :4], strict=True)]) / 4
        shares = [f"{share:.3f}" for share in (*recall(right), (ids[:, 0] == expected[:, 0]).mean(), of_four)]
        print_row(str(dtype).removeprefix("torch."), *shares)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    measurements = {"calibration": calibration, "learned": learned, "growth": growth, "precision": precision}
    parser.add_argument("measurement", choices=measurements)
    arguments = parser.parse_args()
    measurements[arguments.measurement](Emoji(arguments.weights, arguments.out))


if __name__ == "__main__":
    main()
