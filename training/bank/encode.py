"""Encoded rows on their way into a memory bank: kept in parts, so that a killed run goes on where it stopped."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...modeling_tinyalign.row_encoder import LeftOutRow, RowEncoder
from ..data.check import DataCheck, count_kinds
from ..data.images import StoredImages
from ..data.progress import Progress
from ..disk import save_file

PART_ROWS = 512  # of the data set: what a killed run loses at most


@dataclass
class EncodedParts:
    """Arrow files in `folder`, one for each part of the data set, each there whole or not at all.

    Part i depends on the data set and the parts before it and on nothing else: whoever makes it, and whenever, it is
    the same. `num_rows` are encoded so far, and `left_out` are rows that were left out.

    All rows are encoded, or as many as are `wanted`, chosen by `seed` of the `total`, if that is known. For a chosen
    row that has to be left out another one is chosen.
    """

    folder: Path
    wanted: int | None = None
    seed: int = 0
    total: int | None = None
    num_rows: int = 0
    left_out: list[LeftOutRow] = field(default_factory=list)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.arrow"

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows of all parts, in order, with raw keys."""
        for path in sorted(self.folder.glob("[0-9]*.arrow")):
            yield from read_part(path)[0].to_batches()

    def count_done(self) -> int:
        """Count the data set's rows that are in parts, encoded or left out."""
        parts = map(read_part, self.folder.glob("[0-9]*.arrow"))
        return sum(len(rows) + len(left_out) for rows, left_out in parts)

    def encode(self, encoder: RowEncoder, source: StoredImages) -> None:
        """Encode the data set, but for the parts that are there.

        Raises `ValueError` if a row is bad and not to be left out, or gets a key or value that is not finite, and
        `OSError` if the disk is full; the parts so far are kept.
        """
        first_id = encoder.next_id
        with Progress(total=self.wanted or self.total, desc="Encoding the bank", unit="row") as bar:
            for number, chunk in enumerate(chunks(source, self.rounds(), PART_ROWS)):
                if not self.path(number).exists():
                    encoder.left_out = []
                    batches = []
                    for batch in encoder.batches(chunk):
                        batches.append(batch)
                        bar.update(len(batch))
                    save_file(self.path(number), part_content(batches, encoder.schema, encoder.left_out))
                self.count_part(number, encoder.seen)
                encoder.next_id = first_id + self.num_rows
                # parts that were there already count, too
                bar.n = self.num_rows + (0 if self.wanted else len(self.left_out))
                bar.refresh()
                bar.say(f"{self.num_rows + len(self.left_out):,} rows are done")

    def rounds(self) -> Iterator[np.ndarray | None]:
        """Yield the numbers of rows to encode, ascending, None for all; again while chosen rows are left out."""
        if self.wanted is None:
            yield None
            return
        order = np.random.default_rng(self.seed).permutation(self.total)
        done = 0
        while done < len(order) and self.num_rows < self.wanted:
            numbers = order[done : done + self.wanted - self.num_rows]
            done += len(numbers)
            yield np.sort(numbers)

    def count_part(self, number: int, seen: set[bytes] | None) -> None:
        """Count what a part holds, and add the names of its images to `seen`."""
        rows, left_out = read_part(self.path(number))
        self.num_rows += len(rows)
        self.left_out += left_out
        if seen is not None:
            seen.update(map(bytes.fromhex, rows["source_id"].to_pylist()))


def read_part(path: Path) -> tuple[pa.Table, list[LeftOutRow]]:
    """Return the rows of a part, which stay in its file, and those that were left out."""
    with pa.memory_map(str(path)) as file:
        rows = pa.ipc.open_file(file).read_all()
    return rows, [LeftOutRow(**row) for row in json.loads(rows.schema.metadata[b"left_out"])]


def chunks(
    source: StoredImages, rounds: Iterable[np.ndarray | None], size: int
) -> Iterator[Iterator[tuple[int, dict[str, Any]]]]:
    """Yield the rows of each round of `EncodedParts.rounds`, as they are stored, `size` to a part, read one by one."""
    for numbers in rounds:
        rows = iter(source.rows(numbers))
        for first in rows:
            yield (chunk := chain([first], islice(rows, size - 1)))
            deque(chunk, maxlen=0)  # of a part that is there already nothing was read


def part_content(batches: Sequence[pa.RecordBatch], schema: pa.Schema, left_out: Sequence[LeftOutRow]) -> pa.Buffer:
    """Return the Arrow file of one part as bytes."""
    schema = schema.with_metadata({"left_out": json.dumps([asdict(row) for row in left_out])})
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    return content.getvalue()


def describe_left_out(left_out: Sequence[LeftOutRow]) -> str:
    """Return `3 left out (2 broken image, 1 duplicate)`."""
    kinds = count_kinds(row.reason for row in left_out)
    return f"{len(left_out)} left out ({kinds})" if left_out else "0 left out"


def no_usable_row(name: str, left_out: Sequence[LeftOutRow]) -> ValueError:
    """Return the error of a data set none of whose rows can be in a bank, with the first reason of each kind."""
    reasons = DataCheck(len(left_out), {row.row: row.reason for row in left_out}).lines()
    text = "\n  ".join([f"{describe_left_out(left_out)}:", *islice(reasons, 5)])
    return ValueError(f"{name} has no usable row, a memory bank needs at least one image with a caption. {text}")
