"""Images with a caption each, out of a data set of any format: the rows of a memory bank, as they are stored."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.table import CastError

from ...modeling_tinyalign.row_encoder import BankRow, PairReader, check_caption, first_caption, image_source_id
from ...processing.images import decode_image
from ..arguments.stage import StageArguments
from .chats import BadRow
from .check import row_reader
from .files import is_leftover, open_rows, undecoded, with_class_names
from .rows import columns_of, open_image

CAPTION_COLUMNS = ("caption", "txt")


class StoredImages:
    """Numbered rows of a data set, read as they are needed: once more each time they are asked for.

    A subclass iterates over `(number, row as it is stored)`, and has the method `read(number, row)`, which returns a
    `BankRow` and raises `BadRow` for a row that cannot be in a bank.
    """

    def rows(self, numbers: np.ndarray | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Iterate over the rows with these ascending numbers, or all."""
        if numbers is None:
            return iter(self)
        wanted = set(numbers.tolist())
        chosen = (numbered for numbered in self if numbered[0] in wanted)
        return islice(chosen, len(wanted))  # nothing is read behind the last one


class DatasetImages(StoredImages):
    """Rows of an object in Python: a data set of the Hub, a list of dictionaries. Arguments as of `build_bank`."""

    def __init__(self, dataset: Iterable[dict], image_column: str, caption_column: str, keep_columns: Sequence[str]):
        self.dataset = dataset
        is_transformed = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"
        is_typed = isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)) and dataset.features is not None
        if is_typed and not is_transformed:
            self.dataset = with_class_names(undecoded(dataset))
        self.total = len(dataset) if isinstance(dataset, Sized) else None
        self.reader = PairReader(decode_image, image_column, caption_column, keep_columns)

    def check_can_be_read_twice(self) -> None:
        """Raise `ValueError` for an iterator."""
        if iter(self.dataset) is self.dataset:
            raise ValueError(
                "The dataset is an iterator, which can be read only once, but a new value encoder is trained on it "
                "first: pass a list or a datasets.Dataset, or a value_encoder."
            )

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate(self.dataset)

    def read(self, number: int, row: dict[str, Any]) -> BankRow:
        return self.reader(number, row)


@dataclass
class CaptionedImages(StoredImages):
    """Rows of `config.dataset`: files, a folder or a repository.

    The caption is in `caption_column`, by default `caption` or `txt`; without, it is the first answer of a chat.
    """

    config: StageArguments
    caption_column: str | None
    keep_columns: Sequence[str]  # to keep as text
    constants: dict[str, str]  # columns that are the same in all rows, by name

    def __post_init__(self):
        self.config.streaming = True  # or `datasets` would write a copy of all rows first
        self.reader = row_reader(self.config, None)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield numbered rows as they are stored; raises `ValueError` when the data set cannot be read."""
        try:
            yield from enumerate(open_rows(self.config))
        except CastError as error:
            raise ValueError(
                f"{self.config.dataset} has files of different columns: the first has not all that another one has. "
                f"Expected the same in all ({error})."
            ) from error

    def read(self, number: int, row: dict[str, Any]) -> BankRow:
        """Return a row with its image decoded; raises `BadRow` if it lacks a column, a caption or one whole image."""
        row = {**self.reader.fields(row), **self.constants}
        for name in (self.caption_column, *self.keep_columns):
            if name is not None and name not in row:
                raise BadRow("missing column", f"no column {name!r}, the columns are {columns_of(row)}")
        column, images = self._caption_column(row), self.reader.stored_images(row)
        if len(images) != 1:
            kind = "several images" if images else "missing image"
            raise BadRow(kind, f"found {len(images)} images in the columns {columns_of(row)}, expected one")
        if column is not None:
            caption = check_caption(first_caption(row[column]))
        else:
            _, messages = self.reader.read(row)
            answer = next(message for message in messages if message["role"] == "assistant")
            caption = "".join(part["text"] for part in answer["content"])
        image = open_image(images[0])
        for name in self.keep_columns:
            if isinstance(row[name], bytes | dict):
                raise ValueError(f"The column {name} holds a {type(row[name]).__name__}, expected text to keep.")
        kept = [None if row[name] is None else str(row[name]) for name in self.keep_columns]
        return BankRow(number, image, image_source_id(image), caption, kept)

    def _caption_column(self, row: dict[str, Any]) -> str | None:
        """Return the column of a row's caption, None if it is a chat; raises `BadRow` if it is neither."""
        if self.caption_column is not None:
            return self.caption_column
        for name in CAPTION_COLUMNS:
            if row.get(name) is not None:
                return name
        chats = ("messages", "conversations", "texts", "prompt", self.reader.messages_column)
        if all(row.get(name) is None for name in chats) and self.reader.images(row):
            raise BadRow(
                "no caption",
                f"the columns are {columns_of(row)}, expected text in caption or txt (or in the one that "
                "--caption_column names), or a chat",
            )
        return None


def fingerprint_files(dataset: str) -> str | None:
    """Return a hash of the names, sizes and times of change of a data set's files; None for a repository."""
    path = Path(dataset)
    if path.is_dir():
        found = (file for file in path.rglob("*") if not is_leftover(str(file.relative_to(path))))
        files = [str(file) for file in found if file.is_file()]
    else:
        files = glob(escape(dataset) if path.exists() else dataset, recursive=True)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in sorted(files):
        stat = os.stat(file)
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
