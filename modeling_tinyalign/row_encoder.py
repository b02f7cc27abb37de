"""Images with captions, made into the rows of a memory bank: the one way in which rows are made."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .bank_arrays import require_bank_packages
from .bank_format import MAX_THUMBNAIL, broken_bank, check_columns, list_column, matrix, pa, row_schema
from .key_encoder import KeyEncoder
from .value_encoder import ValueEncoder

CAPTION_FIELDS = ("raw", "caption", "text", "answer")  # of a caption that is an object
DUPLICATE = "duplicate"
DUPLICATE_REASON = f"{DUPLICATE}: the image, pixel for pixel, is that of an earlier row"


class BadRow(ValueError):
    """A row that cannot be in a bank.

    Args:
        kind: two or three words, "broken image" say, that such rows are counted by.
        text: what was found and what was expected.
    """

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)
        self.kind = kind

    def __str__(self) -> str:
        return readable(": ".join(self.args))


def readable(text: str) -> str:
    """Return a message in one line of at most 220 characters: without what is not printed, and its middle."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= 220 else f"{text[:140]} ... {text[-75:]}"


@dataclass(frozen=True)
class LeftOutRow:
    """A row of a data set, by its number, that was left out, and why: `"kind: text"`."""

    row: int
    reason: str


@dataclass
class BankRow:
    """A row that was read and is good: its number in the data set, an RGB image, and the columns to keep, as text."""

    number: int
    image: Image.Image
    source_id: str
    caption: str
    kept: list[str | None]


@dataclass
class PairReader:
    """Read rows that are dictionaries with an image (PIL, path, bytes, `{"bytes", "path"}`) and a caption.

    Attributes:
        decode_image: returns an RGB image, or raises ValueError.
        keep_columns: other columns to keep, as text.
    """

    decode_image: Callable[[Any], Image.Image]
    image_column: str = "image"
    caption_column: str = "caption"
    keep_columns: Sequence[str] = ()

    def __call__(self, number: int, row: dict) -> BankRow:
        """Return a row; raises `BadRow` if it lacks a column, or if its image or caption cannot be used."""
        if not isinstance(row, dict):
            raise ValueError(
                f"Row {number} of the dataset is a {type(row).__name__}, expected a dict of columns. Of a "
                'DatasetDict, pass one split: dataset["train"].'
            )
        named = [("caption_column", self.caption_column), ("image_column", self.image_column)]
        for setting, column in [*named, *(("keep_columns", column) for column in self.keep_columns)]:
            if column not in row:
                text = f"no column {column!r}, the columns are {sorted(row)}: pass {setting}=..., the right name"
                raise BadRow("missing column", text)
        if row[self.image_column] is None:
            raise BadRow("missing image", "there is no image, expected a PIL image, bytes or a path")
        image = row[self.image_column]
        if isinstance(image, list):
            if len(image) != 1:
                raise BadRow(
                    "several images" if image else "missing image", f"found {len(image)} images, expected one"
                )
            image = image[0]
        try:
            image = self.decode_image(image)
        except ValueError as error:
            raise BadRow("broken image", str(error)) from error
        caption = check_caption(first_caption(row[self.caption_column]))
        kept = [None if row[column] is None else str(row[column]) for column in self.keep_columns]
        return BankRow(number, image, image_source_id(image), caption, kept)


@dataclass
class RowEncoder:
    """Encode rows of a data set, batch by batch, into record batches of a bank.

    Attributes:
        value_encoder: None for a bank without values.
        read_row: reads a row, as `PairReader` does, with the columns to keep.
        skip_bad_rows: leave bad rows out instead of raising ValueError.
        seen: 16 bytes for each image, whose rows are left out as duplicates; those of the rows are added. None keeps
            duplicates.
        vision_features: `(rows of the data set, tokens, width)`, to skip the tower where they are known.
        next_id: the id that the next row gets.
        left_out: rows that were left out so far.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    value_encoder: ValueEncoder | None
    key_encoder: KeyEncoder
    read_row: Callable[[int, Any], BankRow]
    keep_columns: Sequence[str] = ()
    batch_size: int = 32
    thumbnail_size: int | None = 64
    skip_bad_rows: bool = False
    seen: set[bytes] | None = field(default_factory=set)
    vision_features: torch.Tensor | np.ndarray | None = None
    next_id: int = 0
    left_out: list[LeftOutRow] = field(default_factory=list)

    def __post_init__(self):
        require_bank_packages()
        check_row_settings(self.keep_columns, self.batch_size, self.thumbnail_size)
        config = self.model.config
        if self.value_encoder is not None and config.reads_latents:
            found = self.value_encoder.config.num_latents, self.value_encoder.config.latent_dim
            if found != (config.memory_tokens, config.latent_dim):
                raise ValueError(
                    f"The value encoder makes latents of shape {found}, but the model expects "
                    f"{(config.memory_tokens, config.latent_dim)}: its memory_tokens and latent_dim."
                )

    @property
    def schema(self) -> pa.Schema:
        """The columns of the record batches; the keys are raw."""
        width, value_size = self.key_encoder.mean.numel(), 0
        if self.value_encoder is not None:
            value_size = self.value_encoder.config.num_latents * self.value_encoder.config.latent_dim
        return row_schema(width, value_size, self.thumbnail_size is not None, self.keep_columns)

    def batches(self, rows: Iterable[tuple[int, Any]]) -> Iterator[pa.RecordBatch]:
        """Encode numbered rows of a data set into record batches with raw keys; ValueError names a bad one."""
        good = self.good_rows(rows)
        while chunk := list(itertools.islice(good, self.batch_size)):
            yield self.encode(chunk)

    def good_rows(self, rows: Iterable[tuple[int, Any]]) -> Iterator[BankRow]:
        """Yield the rows that are to be in the bank; the others raise, or are added to `left_out`."""
        for number, stored in rows:
            try:
                row = self.read_row(number, stored)
            except BadRow as error:
                if not self.skip_bad_rows:
                    raise ValueError(
                        f"Row {number} of the dataset: {error}. Repair or remove it, or pass skip_bad_rows=True to "
                        "leave such rows out and have them listed in bank.left_out."
                    ) from error
                self.left_out.append(LeftOutRow(number, str(error)))
            else:
                if is_duplicate(row.source_id, self.seen):
                    self.left_out.append(LeftOutRow(number, DUPLICATE_REASON))
                else:
                    yield row

    @torch.no_grad()
    def encode(self, rows: list[BankRow]) -> pa.RecordBatch:
        """Encode one batch; ValueError names a row whose key or value is not finite."""
        if self.vision_features is None:
            images = [row.image for row in rows]
            pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            features = self.model.get_vision_features(pixels)
        else:
            features = torch.stack([torch.as_tensor(self.vision_features[row.number]) for row in rows])
        captions, query = [row.caption for row in rows], {}
        if self.key_encoder.token_embeddings is not None:  # keys of the language space, with the text mixed in
            query = self.processor.query_inputs(captions).to(features.device)
        numbers = {"key": self.key_encoder.to(features.device).raw_keys(features, **query)}
        if self.value_encoder is not None:
            numbers["value"] = self.value_encoder.encode(features, captions).float().half().flatten(1)
        for name, tensor in numbers.items():
            finite = tensor.isfinite().all(dim=1)
            if not finite.all():
                raise ValueError(
                    f"Row {rows[int(finite.int().argmin())].number} of the dataset gets a {name} that is NaN or "
                    "infinite in the bank's precision. Check the vision tower and the value encoder; float16 towers "
                    "overflow."
                )
        columns = {
            "id": np.arange(self.next_id, self.next_id + len(rows)),
            "source_id": [row.source_id for row in rows],
            "caption": captions,
            **{name: list_column(tensor.cpu().numpy()) for name, tensor in numbers.items()},
        }
        if self.thumbnail_size is not None:
            columns["thumbnail"] = [{"bytes": thumbnail_bytes(row.image, self.thumbnail_size)} for row in rows]
        for number, name in enumerate(self.keep_columns):
            columns[name] = [row.kept[number] for row in rows]
        self.next_id += len(rows)
        return pa.record_batch(columns, schema=self.schema)


def finished(batches: Iterable[pa.RecordBatch], key_encoder: KeyEncoder) -> Iterator[pa.RecordBatch]:
    """Yield the batches with raw keys made into keys."""
    for batch in batches:
        keys = key_encoder.finish(torch.tensor(matrix(batch, "key"), device="cpu")).numpy()
        yield batch.set_column(batch.schema.names.index("key"), "key", list_column(keys))


def stored_images(dataset: Iterable[dict], image_column: str) -> Iterable[dict]:
    """Return a Hub data set whose images are read here, so that a corrupt one can be named and left out; it has the
    names of classes in place of their numbers.
    """
    try:
        import datasets
    except ImportError:
        return dataset
    is_transformed = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"
    is_typed = isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)) and dataset.features is not None
    if is_transformed or not is_typed:
        return dataset
    dataset = dataset.with_format(None)
    if isinstance(dataset.features.get(image_column), datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    classes = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    names = {name: dict(enumerate(dataset.features[name].names)) for name in classes}
    return ({**row, **{name: names[name].get(row[name]) for name in classes}} for row in dataset)


def is_duplicate(source_id: str, seen: set[bytes] | None) -> bool:
    """Look for an image in `seen`, the names of earlier ones, and add it; with None, none is a duplicate."""
    if seen is None:
        return False
    before = len(seen)
    seen.add(bytes.fromhex(source_id))
    return len(seen) == before


def first_caption(value: Any) -> Any:
    """Return the first of several captions, of a list, as text (Flickr30k's table, pandas) or of `{"raw": ...}`."""
    if isinstance(value, str) and value.startswith(('["', "['")) and value.endswith("]"):
        value = _list_in(value)
    if isinstance(value, list):
        return first_caption(next((item for item in value if item), None))
    if isinstance(value, dict):
        return next((value[name] for name in CAPTION_FIELDS if value.get(name)), value)
    return value


def _list_in(text: str) -> list:
    with suppress(ValueError):
        return json.loads(text)
    try:  # as Python writes it
        if re.search(r"""['"]\s+['"]""", text):  # of numpy, which Python would read as one text
            raise ValueError("no commas in it")
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise BadRow("no caption", f"the caption is {text[:80]!r} ({error}), expected text or a JSON list") from error


def check_caption(caption: object) -> str:
    """Return a caption; raises `BadRow` unless it is text, can be stored, and has more than blanks in it."""
    if not isinstance(caption, str) or not caption.strip():
        raise BadRow("no caption", f"the caption is {caption!r}, expected text")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise BadRow("no caption", f"the caption has half a surrogate pair ({error})") from error
    return caption


def check_many(rows: Any, name: str) -> None:
    """Raise TypeError, with the argument's name, for rows that are not many."""
    try:
        iter(rows)
    except TypeError:
        raise TypeError(f"{name} is a {type(rows).__name__}, expected a data set or a list of rows.") from None


def check_as_many(name: str, values: Sequence | None, rows: Any) -> None:
    """Raise ValueError where `values`, named so, are not as many as the rows."""
    if values is not None and isinstance(rows, Sized) and len(values) != len(rows):
        raise ValueError(f"{name} has {len(values)} rows, but there are {len(rows)} images: pass one for each.")


def check_row_settings(keep_columns: Sequence[str], batch_size: int, thumbnail_size: int | None) -> None:
    """Raise ValueError for what no bank can be built with."""
    check_columns(keep_columns)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more.")
    if thumbnail_size is not None and not 1 <= thumbnail_size <= MAX_THUMBNAIL:
        raise ValueError(f"thumbnail_size is {thumbnail_size}, expected 1 to {MAX_THUMBNAIL} pixels, or none.")


def image_source_id(image: Image.Image) -> str:
    """Return the name of an RGB image, the same in every lossless format: 32 hex digits of a sha256 of its pixels."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()[:32]


def thumbnail_bytes(image: Image.Image, size: int) -> bytes:
    """Return a JPEG of an RGB image that fits in `size` x `size` pixels."""
    small, buffer = image.copy(), BytesIO()
    small.thumbnail((size, size))
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def read_thumbnail(content: bytes | None) -> Image.Image:
    """Return the picture that a bank keeps of a row; ValueError if it is missing, broken or huge."""
    try:
        image = Image.open(BytesIO(content or b""), formats=("JPEG", "PNG"))  # `datasets` makes PNG of some
        if max(image.size) > MAX_THUMBNAIL:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        return image.convert("RGB")
    # PIL and its codecs raise OSError, SyntaxError, struct.error and others on broken files
    except Exception as error:
        expected = f"a JPEG or PNG of at most {MAX_THUMBNAIL} x {MAX_THUMBNAIL} pixels"
        raise broken_bank(
            f"A thumbnail of the memory bank cannot be read ({type(error).__name__}: {error}), expected {expected}"
        ) from error
