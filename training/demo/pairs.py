"""The demo's data: emoji in two styles of drawing, split by concept, and what is asked about them."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAIRS = Path(__file__).parents[2] / "examples" / "data" / "emoji_pairs.parquet"
NUM_KEYWORDS = 4  # of an answer, at most
NUM_OPTIONS = 4
VALIDATION, TEST = 0.15, 0.25  # shares of the concepts
KNOWN = 0.7  # share of the training concepts whose drawings are in the bank
SHORTEST = 3  # letters of a keyword, and of the beginning of a word
ENDINGS = re.compile(r"(ing|ed|es|er|s|e|y)$")
# Arrows, operators, boxes and geometric shapes; Greek and Cyrillic letters.
CHARACTERS = (range(0x2190, 0x2300), range(0x2500, 0x2600), range(0x391, 0x500))


@dataclass
class Pairs:
    """The emoji: bank drawings (Noto) and query drawings (Twemoji) of the same concepts, row by row.

    Attributes:
        keywords: words that go with each concept and share no word with its label; some have none.
        group: `(concepts,)`, the same number for concepts that share a drawing, pixel for pixel.
        train, validation, heldout: rows to train on, to fit probabilities on, and to evaluate on.
        known: those of `train` whose Noto drawings are in the bank.
    """

    noto: datasets.Dataset
    twemoji: datasets.Dataset
    keywords: list[list[str]]
    group: np.ndarray
    train: np.ndarray
    known: np.ndarray
    validation: np.ndarray
    heldout: np.ndarray

    @property
    def labels(self) -> list[str]:
        return self.noto["label"]


def load_pairs(seed: int = 0, concepts: int | None = None, split: str = "test") -> Pairs:
    """Read the emoji, or so many `concepts` of them, split by concept: 60% to train on, 15% to choose settings with
    and 25% to test. Concepts that share a drawing, pixel for pixel, go to the same side.

    Args:
        split: which concepts are held out, `"validation"` or `"test"`; without "test", none are left for `validation`.

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
    group = equal_drawings(noto["image"], twemoji["image"])
    order = rng.permutation(np.unique(group))[::-1]  # the first ones are known from choosing the settings of keys
    first, second = round(len(order) * TEST), round(len(order) * (TEST + VALIDATION))
    validation, train = order[first:second], order[second:]
    validation, heldout = {"test": (validation, order[:first]), "validation": ([], validation)}[split]
    kept = np.flatnonzero(np.isin(group, [*train, *validation, *heldout]))
    noto, twemoji, group = noto.select(kept), twemoji.select(kept), group[kept]
    parts = train, train[: round(len(train) * KNOWN)], validation, heldout
    keywords = [keywords_of(*row) for row in zip(noto["label"], noto["tags"], strict=True)]
    return Pairs(noto, twemoji, keywords, group, *(np.flatnonzero(np.isin(group, part)) for part in parts))


def equal_drawings(*columns: Sequence[dict]) -> np.ndarray:
    """Return a number for each row, the same for rows with equal bytes in one of the columns."""
    group = np.arange(len(columns[0]))
    for column in columns:
        first = {}
        for row, image in enumerate(column):
            other = first.setdefault(image["bytes"], row)
            group[group == group[row]] = group[other]
    return group


def stems(text: str) -> set[str]:
    """Return the words of a text in lower case, without their endings."""
    return {ENDINGS.sub("", word) or word for word in re.findall(r"\w+", text.lower())}


def share_a_word(first: str, second: str) -> bool:
    """Tell whether a word of one text, or of three letters its beginning, is one of the other."""
    for one in stems(first):
        for other in stems(second):
            short, long = sorted((one, other), key=len)
            if one == other or (len(short) >= SHORTEST and long.startswith(short)):
                return True
    return False


def keywords_of(label: str, tags: Sequence[str]) -> list[str]:
    """Return the tags that share no word with the label, without codes of countries and the like."""
    return [tag for tag in tags if len(tag) >= SHORTEST and not share_a_word(tag, label)]


def options_of(pairs: Pairs, row: int, near: Sequence[int], rng: np.random.Generator) -> list[str] | None:
    """Return keywords to choose from: one of this concept, then three of concepts that look like it; None if there are
    too few.

    Args:
        near: Rows of concepts, the most similar first. Each gives at most one keyword, which is none of the right
            concept's, and shares no word with its name.
    """
    if not pairs.keywords[row]:
        return None
    label, own = pairs.labels[row], set(pairs.noto["tags"][row])
    options = [rng.choice(pairs.keywords[row][:NUM_KEYWORDS]).item()]
    for other in near:
        left = [
            word
            for word in pairs.keywords[other]
            if word not in own and word not in options and not share_a_word(word, label)
        ]
        if left:
            options.append(rng.choice(left).item())
        if len(options) == NUM_OPTIONS:
            return options
    return None


def character_pictures(count: int, seed: int = 0) -> datasets.Dataset:
    """Return pictures of another kind: characters of the font that matplotlib brings, with their Unicode names."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = ImageFont.truetype(str(path), 40)
    named = [code for codes in CHARACTERS for code in codes if unicodedata.name(chr(code), "")]
    chosen = np.sort(np.random.default_rng(seed).permutation(named)[:count])
    images = []
    for code in chosen:
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).text((32, 32), chr(code), fill="black", font=font, anchor="mm")
        images.append(image)
    return datasets.Dataset.from_dict(
        {"image": images, "label": [unicodedata.name(chr(code)).lower() for code in chosen]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
