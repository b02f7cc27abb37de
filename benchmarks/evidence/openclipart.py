"""Clip art with captions that people wrote, title, description and keywords: Debian's openclipart packages."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageOps
from study import Study, tag

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.processing.images import decode_image
from tinyalign_vlm.training.data.features import cache_vision_features
from tinyalign_vlm.training.demo import run, systems
from tinyalign_vlm.training.demo.state import TOP_K, Demo, DemoConfig

NUM_PICTURES = 2500  # a minute and a half of the vision tower
NUM_DISTRACTORS = 2000
FEWEST_WORDS = 10  # of a caption that is called a long one
MOST_SHARED = 5  # pictures with one title or description; above, it names a collection, not a picture
SIDE = 224  # pixels, what the vision tower sees
SEED = 0
MISSING = (
    "\n\nWithout openclipart, since {folder} has none. `apt-get install openclipart-png openclipart-svg` puts it into "
    "/usr/share/openclipart; `--openclipart FOLDER` is another folder with their png/ and svg/."
)
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
LIST_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
# Left by the scripts that wrote the packages' metadata, and the numbers of files.
NO_WORD = re.compile(r"hash|(hash)?\(?0x[0-9a-f]+\)?|\d*", re.IGNORECASE)
ARTIST = re.compile(r"^Clipart by [^-]+ - ")
# Nearly all metadata says that it is English. These words say that it is not.
FOREIGN = set(
    "il della dello delle degli del di per con una un nel sono uma seus para pour une des du les avec sur und der das "
    "ein eine mit von los las y".split()
)


@dataclass
class Picture:
    """A picture's file, and what people wrote about it."""

    path: Path
    title: str
    description: str
    keywords: list[str]
    language: str = ""

    @property
    def caption(self) -> str:
        """The title, the description where it says something else, and the keywords."""
        says_more = self.description and self.description.lower() != self.title.lower()
        parts = [self.title, self.description if says_more else "", ", ".join(self.keywords)]
        return ". ".join(part for part in parts if part) + "."

    @property
    def is_english(self) -> bool:
        """False where the language is named or shows."""
        text = " ".join([self.title, self.description, *self.keywords])
        named = self.language.lower()[:2] in ("en", "al", "")  # "all", too
        return named and text.isascii() and not FOREIGN & set(re.findall(r"[a-z]+", text.lower()))

    @property
    def group(self) -> str:
        """The same text for near copies: titles with other numbers, or other words in brackets."""
        return re.sub(r"\(.*?\)|[^a-z]", "", self.title.lower()) or self.title.lower()


@dataclass
class ClipArt:
    """
    Attributes:
        rows: `image`, `label` (the title), `caption` and `group` of each picture.
        features: `(pictures, tokens, width)`, of the demo's vision tower.
    """

    rows: datasets.Dataset
    features: np.ndarray

    @property
    def long(self) -> np.ndarray:
        """Rows whose caption has ten words or more."""
        return np.flatnonzero([len(caption.split()) >= FEWEST_WORDS for caption in self.rows["caption"]])

    @property
    def distractors(self) -> np.ndarray:
        """Rows drawn at random."""
        return np.sort(np.random.default_rng(SEED).permutation(len(self.rows))[:NUM_DISTRACTORS])


def art_tag(study: Study) -> str:
    """Return the name of what the clip art is made of and with."""
    return tag(study.openclipart, NUM_PICTURES, FEWEST_WORDS, MOST_SHARED, SIDE, SEED)


def clip_art(study: Study) -> ClipArt | None:
    """Return the clip art with its features, kept in the study's folder, or None where there is none."""
    if not all((study.openclipart / kind).is_dir() for kind in ("svg", "png")):
        return None
    path = study.out / f"openclipart_{art_tag(study)}.parquet"
    if not path.exists():
        partial = path.with_suffix(".partial")
        load_pictures(study.openclipart).to_parquet(partial)
        partial.replace(path)
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(study.out / "datasets"))
    rows = rows.cast_column("image", datasets.Image(decode=False))
    parts = systems.compose_demo(study.weights, DemoConfig(), memory_top_k=TOP_K)
    features = cache_vision_features(*parts, rows["image"], study.out / "features" / "openclipart", desc="clip art")
    return ClipArt(rows, features)


def note(study: Study, art: ClipArt | None) -> str:
    """Return what to do where there is no clip art, for the end of a section."""
    return MISSING.format(folder=study.openclipart) if art is None else ""


def load_pictures(folder: Path, count: int = NUM_PICTURES) -> datasets.Dataset:
    """Return all pictures with long captions and others drawn at random, `count` at most, in the order of the files.

    Pictures with the same pixels or the same caption are there once.
    """
    found = described(read_metadata(path, folder) for path in sorted((folder / "svg").rglob("*.svg")))
    is_long = np.array([len(picture.caption.split()) >= FEWEST_WORDS for picture in found], bool)
    others = np.random.default_rng(SEED).permutation(np.flatnonzero(~is_long))
    chosen: dict[bytes, int] = {}
    for index in [*np.flatnonzero(is_long), *others]:
        content = small_picture(found[index].path)
        if content is not None and len(chosen) < count:
            chosen.setdefault(content, int(index))
    return as_dataset([(found[index], content) for content, index in sorted(chosen.items(), key=lambda row: row[1])])


def as_dataset(pictures: Sequence[tuple[Picture, bytes]]) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": content, "path": None} for _, content in pictures],
        "label": [picture.title for picture, _ in pictures],
        "caption": [picture.caption for picture, _ in pictures],
        "group": [picture.group for picture, _ in pictures],
    }
    text = datasets.Value("string")
    features = {"image": datasets.Image(decode=False), "label": text, "caption": text, "group": text}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def read_metadata(path: Path, folder: Path) -> Picture | None:
    """Return what an SVG file says about the PNG of the same name; None where there is none or it cannot be read."""
    png = folder / "png" / path.relative_to(folder / "svg").with_suffix(".png")
    if not png.exists():
        return None
    try:
        work = next((part for _, part in ElementTree.iterparse(path) if part.tag.endswith("}Work")), None)
    except ElementTree.ParseError:
        return None
    if work is None:
        return None
    title, description, language = (work.findtext(DUBLIN_CORE + name) for name in ("title", "description", "language"))
    subject = work.find(DUBLIN_CORE + "subject")
    items = [] if subject is None else [cleaned(item.text) for item in subject.iter(LIST_ITEM)]
    keywords: dict[str, str] = {}
    for item in items:
        if not NO_WORD.fullmatch(item):
            keywords.setdefault(item.lower(), item)
    title = ARTIST.sub("", cleaned(title))
    return Picture(png, title, cleaned(description), list(keywords.values()), language or "")


def cleaned(text: str | None) -> str:
    """Return a text without line breaks, underscores and the point at its end."""
    return " ".join((text or "").replace("_", " ").split()).strip(" .")


def described(pictures: Iterable[Picture | None]) -> list[Picture]:
    """Return the English pictures that have a title of their own, without descriptions of whole collections."""
    english = [picture for picture in pictures if picture is not None and picture.is_english]
    titles = Counter(picture.title.lower() for picture in english)
    descriptions = Counter(picture.description.lower() for picture in english)
    return list(once_by_caption(english, titles, descriptions))


def once_by_caption(pictures: Iterable[Picture], titles: Counter, descriptions: Counter) -> Iterator[Picture]:
    seen = set()
    for picture in pictures:
        if not picture.title or titles[picture.title.lower()] > MOST_SHARED:
            continue
        if NO_WORD.fullmatch(picture.description) or descriptions[picture.description.lower()] > MOST_SHARED:
            picture.description = ""
        if picture.caption.lower() not in seen:
            seen.add(picture.caption.lower())
            yield picture


def small_picture(path: Path) -> bytes | None:
    """Return a picture on white as a square PNG, or None where it cannot be read."""
    try:
        image = decode_image(path)
    except ValueError:
        return None
    content = BytesIO()
    ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.BILINEAR, "white").save(content, "PNG", compress_level=1)
    return content.getvalue()


def bank_with_clip_art(demo: Demo, art: ClipArt) -> tuple[MemoryBank, np.ndarray]:
    """Return a demo's bank with clip art added, which no query asks for, and its rows' concepts."""
    parts, rows = systems.compose_demo(demo.weights, demo.config, memory_top_k=TOP_K), art.distractors
    settings = {"caption_column": "label", "keep_duplicates": True, "vision_features": art.features[rows]}
    bank = demo.banks["with"].add(art.rows.select(rows), *parts, **settings)
    return bank, np.concatenate([demo.concepts["with"], np.full(len(rows), -1)])


def bank_of_clip_art(study: Study, art: ClipArt) -> MemoryBank:
    """Return a bank of clip art alone, its titles as captions, kept in the study's folder."""
    path = study.out / f"bank_openclipart_{art_tag(study)}"
    if not path.exists():
        parts, rows = systems.compose_demo(study.weights, DemoConfig(), memory_top_k=TOP_K), np.arange(len(art.rows))
        run.make_bank(*parts, art.rows, art.features, rows, **run.key_settings(rows)).save_pretrained(path)
    return MemoryBank.from_pretrained(path)
