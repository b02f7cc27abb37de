"""Encoded rows on their way into a memory bank: kept in parts, so that a killed run goes on where it stopped."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..modeling_tinyalign.bank_builder import RowEncoder
from ..modeling_tinyalign.bank_folders import sync
from .captioned_images import CaptionedImages
from .data import BadRow

PART_ROWS = 512  # of the data set: what a killed run loses at most
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
        with tqdm(total=wanted or total, desc="Encoding the bank", unit="row") as bar:
            for number, chunk in enumerate(self._chunks(source, wanted, seed, total)):
                path = self.folder / f"{number:06d}.arrow"
                if not path.exists():
                    self._make(path, chunk, encoder, source, seen, bar)
                with pa.memory_map(str(path)) as file:
                    part = pa.ipc.open_file(file).read_all()
                self.rows += len(part)
                self.left_out += json.loads(part.schema.metadata[b"left_out"])
                if seen is not None:
                    seen.update(map(bytes.fromhex, part["source_id"].to_pylist()))
                encoder.num_rows = first_id + self.rows
                bar.n = self.rows + (0 if wanted else len(self.left_out))
                bar.refresh()

    def _chunks(self, source: CaptionedImages, wanted: int | None, seed: int, total: int | None) -> Iterator[Chunk]:
        """The rows to encode, as they are stored, part by part; read more than once if chosen rows are left out."""
        order = np.arange(0) if wanted is None else np.random.default_rng(seed).permutation(total)
        done = 0
        while True:
            numbers = None if wanted is None else np.sort(order[done : done + wanted - self.rows])
            rows = source.rows(numbers)
            while chunk := list(islice(rows, PART_ROWS)):
                yield chunk
            done += 0 if numbers is None else len(numbers)
            if done == len(order) or self.rows == wanted:
                return

    def _make(
        self,
        path: Path,
        chunk: Chunk,
        encoder: RowEncoder,
        source: CaptionedImages,
        seen: set[bytes] | None,
        bar: tqdm,
    ):
        batches, rows, left_out, new = [], [], [], set()
        for number, stored in chunk:
            try:
                row = source.read(number, stored)
                name = bytes.fromhex(row["source_id"])
                if seen is not None and (name in seen or name in new):
                    raise BadRow("duplicate", "the image, pixel for pixel, is that of an earlier row")
            except BadRow as error:
                left_out.append({"row": number, "reason": str(error)})
                continue
            new.add(name)
            rows.append(row)
            if len(rows) == encoder.batch_size:
                batches.append(encoder.encode(rows))
                bar.update(len(rows))
                rows = []
        if rows:
            batches.append(encoder.encode(rows))
        schema = encoder.schema.with_metadata({"left_out": json.dumps(left_out)})
        fresh = path.with_suffix(".new")
        try:
            with open(fresh, "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(pa.record_batch(batch.columns, schema=schema))
            sync(fresh)
            os.replace(fresh, path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise OSError(error.errno, f"{fresh} cannot be written ({error.strerror})") from error
