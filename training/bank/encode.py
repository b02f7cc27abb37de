"""Encoded rows on their way into a memory bank: kept in parts, so that a killed run goes on where it stopped."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ...modeling_tinyalign.bank_builder import RowEncoder
from ..data.chats import BadRow
from ..data.images import CaptionedImages
from ..disk import save_file

PART_ROWS = 512  # of the data set: what a killed run loses at most
# As BadRow takes it.
DUPLICATE = "duplicate", "the image, pixel for pixel, is that of an earlier row"
Chunk = list[tuple[int, dict[str, Any]]]


@dataclass
class Parts:
    """
    Arrow files in `folder`, each there whole or not at all. Part i depends on the data set and the parts before it and
    on nothing else: whoever makes it, and whenever, it is the same.

    Attributes:
        rows: Rows encoded so far.
        left_out: `{"row": number, "reason": text}` of each row of the data set that was left out so far.
    """

    folder: Path
    rows: int = 0
    left_out: list[dict] = field(default_factory=list)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.arrow"

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Of all parts, in order, with raw keys."""
        for path in sorted(self.folder.glob("[0-9]*.arrow")):
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file)
                yield from map(reader.get_batch, range(reader.num_record_batches))

    def encode(
        self,
        encoder: RowEncoder,
        source: CaptionedImages,
        seen: set[bytes] | None = None,
        wanted: int | None = None,
        seed: int = 0,
        total: int | None = None,
    ):
        """
        Encodes the data set, but for the parts that are there.

        Args:
            seen: Names of images that are left out; those of the rows are added. None: images may come again.
            wanted: How many rows to choose, by `seed`, among the `total` of the data set. For each that has to be left
                out another one is chosen.

        Raises:
            ValueError: A row gets a key or value that is not finite.
            OSError: The disk is full; the parts so far are kept.
        """
        first_id = encoder.num_rows
        every = (chunk for numbers in self.rounds(wanted, seed, total) for chunk in chunks(source, numbers, PART_ROWS))
        with tqdm(total=wanted or total, desc="Encoding the bank", unit="row") as bar:
            for number, chunk in enumerate(every):
                if not self.path(number).exists():
                    self._make(number, chunk, encoder, source, seen, bar)
                self.take(number, seen)
                encoder.num_rows = first_id + self.rows
                bar.n = self.rows + (0 if wanted else len(self.left_out))
                bar.refresh()

    def rounds(self, wanted: int | None, seed: int, total: int | None) -> Iterator[np.ndarray | None]:
        """Which rows to encode, ascending, None for all; again and again while chosen rows are left out."""
        order = np.arange(0) if wanted is None else np.random.default_rng(seed).permutation(total)
        done = 0
        while True:
            numbers = None if wanted is None else np.sort(order[done : done + wanted - self.rows])
            yield numbers
            done += 0 if numbers is None else len(numbers)
            if done == len(order) or self.rows == wanted:
                return

    def take(self, number: int, seen: set[bytes] | None):
        """Counts what a part holds."""
        with pa.memory_map(str(self.path(number))) as file:
            part = pa.ipc.open_file(file).read_all()
        self.rows += len(part)
        self.left_out += json.loads(part.schema.metadata[b"left_out"])
        if seen is not None:
            seen.update(map(bytes.fromhex, part["source_id"].to_pylist()))

    def _make(
        self,
        number: int,
        chunk: Chunk,
        encoder: RowEncoder,
        source: CaptionedImages,
        seen: set[bytes] | None,
        bar: tqdm,
    ):
        batches, left_out = [], []
        for batch in encode_chunk(chunk, encoder, source, seen, left_out):
            batches.append(batch)
            bar.update(len(batch))
        save_file(self.path(number), part_content(batches, encoder.schema, left_out))


def chunks(source: CaptionedImages, numbers: np.ndarray | None, size: int) -> Iterator[Chunk]:
    """The rows with these numbers, or all, as they are stored, `size` to a part."""
    rows = source.rows(numbers)
    while chunk := list(islice(rows, size)):
        yield chunk


def encode_chunk(
    chunk: Chunk, encoder: RowEncoder, source: CaptionedImages, seen: set[bytes] | None, left_out: list[dict]
) -> Iterator[pa.RecordBatch]:
    """Batches of the usable rows of a part; the others are added to `left_out`. See [`Parts.encode`]."""
    rows, new = [], set()
    for number, stored in chunk:
        try:
            row = source.read(number, stored)
            name = bytes.fromhex(row["source_id"])
            if seen is not None and (name in seen or name in new):
                raise BadRow(*DUPLICATE)
        except BadRow as error:
            left_out.append({"row": number, "reason": str(error)})
            continue
        new.add(name)
        rows.append(row)
        if len(rows) == encoder.batch_size:
            yield encoder.encode(rows)
            rows = []
    if rows:
        yield encoder.encode(rows)


def part_content(batches: list[pa.RecordBatch], schema: pa.Schema, left_out: list[dict]) -> pa.Buffer:
    """Of the file of a part."""
    schema = schema.with_metadata({"left_out": json.dumps(left_out)})
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    return content.getvalue()
