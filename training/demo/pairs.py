"""The demo's data: emoji in two styles of drawing, split by concept."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

PAIRS = Path(__file__).parents[2] / "examples" / "data" / "emoji_pairs.parquet"


@dataclass
class Pairs:
    """The emoji: bank drawings (Noto) and query drawings (Twemoji) of the same concepts, row by row."""

    noto: datasets.Dataset
    twemoji: datasets.Dataset
    train: np.ndarray
    heldout: np.ndarray

    @property
    def labels(self) -> list[str]:
        return self.noto["label"]


def load_pairs(seed: int = 0, concepts: int | None = None) -> Pairs:
    """
    Read the emoji, or so many `concepts` of them, split by concept: a quarter is held out. Concepts that share a
    drawing, pixel for pixel, go to the same side. `train` and `heldout` are rows of both data sets.

    Raises `FileNotFoundError` outside a clone of the repository.
    """
    if not PAIRS.exists():
        raise FileNotFoundError(
            f"{PAIRS} is missing: it is in the repository, not in the package. Run `make demo` in a clone."
        )
    rows = datasets.load_dataset("parquet", data_files=str(PAIRS), split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    rows = rows.select(np.argsort(rows["concept"], kind="stable"))  # `sort` warns with pyarrow 25
    styles = np.array(rows["style"])
    noto, twemoji = (rows.select(np.flatnonzero(styles == style)) for style in ("noto", "twemoji"))
    assert list(noto["concept"]) == list(twemoji["concept"])
    rng = np.random.default_rng(seed)
    if concepts is not None:
        chosen = np.sort(rng.permutation(len(noto))[:concepts])
        noto, twemoji = noto.select(chosen), twemoji.select(chosen)
    group = np.arange(len(noto))  # union of the concepts with the same bytes: the encoding is deterministic
    for column in (noto["image"], twemoji["image"]):
        first = {}
        for row, image in enumerate(column):
            other = first.setdefault(image["bytes"], row)
            group[group == group[row]] = group[other]
    groups = rng.permutation(np.unique(group))
    is_heldout = np.isin(group, groups[: len(groups) // 4])
    return Pairs(noto, twemoji, np.flatnonzero(~is_heldout), np.flatnonzero(is_heldout))
