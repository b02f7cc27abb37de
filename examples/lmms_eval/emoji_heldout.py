"""The rows of emoji_heldout.yaml: what `tinyalign demo` asks about the concepts that it never trained on."""

import datasets
import numpy as np
from PIL import Image

from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.state import DemoConfig


def heldout(rows: datasets.Dataset) -> datasets.Dataset:
    """Return the drawings that the demo asks about; it draws them from the same file as `rows`."""
    pairs, config = load_pairs(), DemoConfig()
    asked = np.sort(np.random.default_rng(config.seed).permutation(pairs.heldout)[: config.queries])
    return pairs.twemoji.select(asked).cast_column("image", datasets.Image())


def pictures(row: dict) -> list[Image.Image]:
    """Return the picture of a row."""
    return [row["image"].convert("RGB")]
