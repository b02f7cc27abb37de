"""Images with a caption each, out of a data set of any format that can be trained on: the rows of a memory bank."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import escape, glob
from pathlib import Path
from typing import Any

import numpy as np
from datasets.table import CastError

from ...modeling_tinyalign.row_encoder import BankRow, image_source_id
from ...processing.images import decode_image
from ..arguments.run_arguments import RunArguments
from .chats import BadRow
from .check import row_reader
from .files import open_rows

CAPTION_COLUMNS = ("caption", "txt")


@dataclass
class CaptionedImages:
    """
    The rows of `config.dataset`, read as they are needed.

    Args:
        caption_column: The captions. Defaults to `caption` or `txt`; a row with neither must be a chat, and its first
            answer is the caption.
        keep_columns: Columns to keep as text.
        constants: Columns that are the same in all rows, by name.
    """

    config: RunArguments
    caption_column: str | None
    keep_columns: Sequence[str]
    constants: dict[str, str]

    def __post_init__(self):
        self.config.streaming = True
        self.reader = row_reader(self.config, None)
        self.reader.prompt = "caption"  # a row with an answer column need not be a chat

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbered rows as they are stored. Raises `ValueError` when the data set cannot be read."""
        try:
            yield from enumerate(open_rows(self.config))
        except CastError as error:
            raise ValueError(
                f"{self.config.dataset} has files of different columns: the first has not all that another one has. "
                f"Expected the same in all ({error})."
            ) from error

    def rows(self, numbers: np.ndarray | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Those with these ascending numbers, or all."""
        if numbers is None:
            yield from self
        elif len(numbers):
            wanted = iter(numbers.tolist())
            following = next(wanted)
            for number, row in self:
                if number == following:
                    yield number, row
                    following = next(wanted, None)
                    if following is None:
                        return

    def count(self) -> int:
        return sum(1 for _ in self)

    def describe(self, row: dict[str, Any]) -> dict[str, Any]:
        """
        `image` as it is stored, `caption` and `kept`, the values of `keep_columns`.

        Raises `BadRow` for a row without a caption or a column, or with more or fewer than one image.
        """
        row = {**self.reader.fields(row), **self.constants}
        column = self.caption_column
        if column is None:
            column = next((name for name in CAPTION_COLUMNS if row.get(name) is not None), None)
        for name in (self.caption_column, *self.keep_columns):
            if name is not None and name not in row:
                raise BadRow("missing column", f"no column {name!r}, the columns are {sorted(row)}")
        images = self.reader.images(row)
        if len(images) != 1:
            raise BadRow(
                "missing image" if not images else "several images", f"found {len(images)} images, expected one"
            )
        chats = ("messages", "conversations", "prompt", self.reader.messages_column)
        if column is None and all(row.get(name) is None for name in chats):
            raise BadRow(
                "no caption",
                f"the columns are {sorted(row)}, expected text in caption or txt (or in the one that --caption_column "
                "names), or a chat",
            )
        images, messages = replace(self.reader, answer_column=column).read(row)
        answer = next(message for message in messages if message["role"] == "assistant")
        caption = "".join(part["text"] for part in answer["content"])
        kept = [None if row[name] is None else str(row[name]) for name in self.keep_columns]
        return {"image": images[0], "caption": caption, "kept": kept}

    def read(self, number: int, row: dict[str, Any]) -> BankRow:
        """Return a row as `RowEncoder` takes it; raises `BadRow` as [`describe`], and for a broken image."""
        described = self.describe(row)
        try:
            image = decode_image(described["image"])
        except ValueError:
            self.reader.check_image(described["image"])  # says why
            raise
        return BankRow(number, image, image_source_id(image), described["caption"], described["kept"])


def fingerprint_files(dataset: str) -> str | None:
    """Of the names, sizes and times of change of a data set's files, None for a repository: is it still the same?"""
    path = Path(dataset)
    if path.is_dir():
        files = [str(file) for file in path.rglob("*") if file.is_file()]
    else:
        files = glob(escape(dataset) if path.exists() else dataset)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in sorted(files):
        stat = os.stat(file)
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
