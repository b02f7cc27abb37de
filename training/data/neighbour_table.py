"""The neighbours of every image of a data set, computed once, by as many processes as one likes, kept as Parquet."""

import hashlib
import itertools
import json
import os
import shutil
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign.bank_arrays import cache_root
from ...modeling_tinyalign.bank_format import list_column
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.row_encoder import image_source_id
from ..disk import save_file
from .features import fingerprint_images, from_main_process, one_run_at_a_time, read_image, undecoded_images
from .progress import ImageProgress

PART_ROWS = 512  # what a killed process loses at most


def neighbour_table(
    bank: MemoryBank,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Any],
    depth: int,
    *,
    rows: Sequence[int] | None = None,
    queries: Sequence[str] | None = None,
    vision_features: np.ndarray | None = None,
    folder: str | os.PathLike | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
) -> Path:
    """Look up the neighbours of each image in the bank, unless an earlier run has.

    An image's own rows of the bank (those with its `source_id`) are left out, and those of the other images in its
    row: it would retrieve its own answer. The table is a Parquet file named by the fingerprints of the data (images,
    questions, tower, preprocessing) and of the bank (keys, sources, captions), so another run finds it and another
    bank does not. It is computed in parts, each written whole or not at all: a killed run goes on where it stopped,
    and ends with the same bytes. Under `accelerate launch` or `torchrun` each process computes a share, on its device.

    Args:
        model: its vision tower runs where it is; the bank is checked against it.
        images: a column of a `datasets.Dataset`, or PIL images, bytes or paths.
        depth: neighbours to keep of each image; a bank with fewer rows gives fewer.
        rows: the row that each image is of, in ascending order. By default each is of its own.
        queries: the question asked about each image; only for a bank with keys in the language space.
        vision_features: `(n, T, C)`, as `cache_vision_features` returns, to skip the tower.
        folder: of the tables, by default `HF_HOME/tinyalign/neighbours`.
        num_workers: workers of each process that read and prepare images.

    Returns:
        the file. One row an image: `source_id`, `own_rows` (how many rows of the bank are of this image),
        `memory_ids` `(depth,)` int64, best first, and `memory_scores` `(depth,)` float32, their inner products with
        the query; -1 and -inf where too few rows are left.

    Raises:
        ValueError: the bank is of another tower, an image cannot be read (its number is named), there is none, or the
            lengths differ.
    """
    images, depth = undecoded_images(images), min(depth, len(bank))
    rows = range(len(images)) if rows is None else rows
    settings = (queries, vision_features, depth, batch_size, num_workers)
    search = NeighbourSearch(bank, model.base_model, processor, images, rows, *settings)
    folder = cache_root() / "neighbours" if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = from_main_process(search.fingerprint)
    with one_run_at_a_time(folder / f".{name}.lock") as state:
        path = _deep_enough(folder, name, depth)
        if path is None:
            path = folder / f"{name}-{depth}.parquet"
            search.write_table(path)
        elif state.is_main_process:  # killed when the table was complete
            shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)
    return path


def read_neighbours(path: str | os.PathLike) -> datasets.Dataset:
    """Open what `neighbour_table` wrote, memory-mapped."""
    return datasets.Dataset.from_parquet(str(path))


def summary(table: datasets.Dataset, top_k: int) -> str:
    """Sum a table up in a line."""
    scores = np.array(table["memory_scores"][:])[:, :top_k]
    found = np.isfinite(scores)
    own = np.array(table["own_rows"][:]) > 0
    images = f"{len(table)} images, {own.mean():.1%} of them in the bank themselves and kept from their own rows"
    if not found.any():
        return f"{images}: none has a neighbour, all rows of the bank are its own"
    return (
        f"{images}; mean similarity of the nearest neighbour {scores[:, 0][found[:, 0]].mean():.3f}, of all {top_k} "
        f"{scores[found].mean():.3f}"
    )


@dataclass
class NeighbourSearch:
    """All that a search takes; fields as of `neighbour_table`."""

    bank: MemoryBank
    model: PreTrainedModel
    processor: ProcessorMixin
    images: Sequence[Any]
    rows: Sequence[int]
    queries: Sequence[str] | None
    vision_features: np.ndarray | None
    depth: int
    batch_size: int
    num_workers: int

    def __post_init__(self):
        if len(self.images) == 0:
            raise ValueError("There are no images, expected at least one.")
        for name in ("rows", "queries", "vision_features"):
            column = vars(self)[name]
            if column is not None and len(column) != len(self.images):
                raise ValueError(f"Found {len(column)} {name} for {len(self.images)} images, expected one for each.")
        if not self.bank.any_tower:
            self.bank.check_probes(self.model)

    def fingerprint(self) -> str:
        """Return fingerprints of the data and of the bank, 32 hex digits each."""
        data = hashlib.sha256(fingerprint_images(self.model, self.processor, self.images).encode())
        data.update(json.dumps(None if self.queries is None else list(self.queries)).encode())
        if len(set(self.rows)) < len(self.rows):
            data.update(json.dumps(list(self.rows)).encode())
        of_bank = hashlib.sha256((self.bank.config.sha256.keys + self.bank.config.sha256.rows).encode())
        return f"{data.hexdigest()[:32]}-{of_bank.hexdigest()[:32]}"

    def write_table(self, path: Path):
        """Write what is missing of the parts, with all processes of this run, and join them to `path`."""
        state, parts = PartialState(), path.with_suffix(".parts")
        parts.mkdir(exist_ok=True)
        every = [parts / f"{part:06d}.parquet" for part in range(-(-len(self.images) // PART_ROWS))]
        todo = [part for part, file in enumerate(every) if not file.is_file()]
        state.wait_for_everyone()  # all know what is to do before one of them starts to do it
        self.write_parts({part: every[part] for part in todo[state.process_index :: state.num_processes]})
        state.wait_for_everyone()
        if state.is_main_process:
            write_parquet(pa.concat_tables(map(pq.read_table, every)), path)
            shutil.rmtree(parts)

    @torch.no_grad()
    def write_parts(self, files: dict[int, Path]):
        """Write parts: part i holds the images from `i * PART_ROWS` on, in the same batches whoever does it."""
        spans = {part: self._batches_of(part) for part in files}
        batches = list(itertools.chain(*spans.values()))
        prepared = iter(DataLoader(PreparedImages(self, batches), batch_size=None, num_workers=self.num_workers))
        position = PartialState().process_index
        with ImageProgress(sum(map(len, batches)), "Neighbours", position) as bar:
            for part, file in files.items():
                tables = []
                for batch in spans[part]:
                    tables.append(self._search(batch, *next(prepared)))
                    bar.update(len(batch))
                write_parquet(pa.concat_tables(tables), file)

    def _batches_of(self, part: int) -> list[range]:
        span = range(len(self.images))[part * PART_ROWS : (part + 1) * PART_ROWS]
        return [span[start : start + self.batch_size] for start in range(0, len(span), self.batch_size)]

    def _search(
        self, batch: range, source_ids: list[str], excluded: list[list[str]], pixel_values: torch.Tensor | None
    ) -> pa.Table:
        rows = slice(batch.start, batch.stop)
        if pixel_values is None:
            features = torch.from_numpy(np.array(self.vision_features[rows])).to(self.model.vision_tower.device)
        else:
            features = self.model.get_vision_features(pixel_values)
        query = {} if self.queries is None else self.processor.query_inputs(list(self.queries[rows]))
        query = {name: tensor.to(features.device) for name, tensor in query.items()}
        scores, ids = self.bank.search(self.bank.encode_queries(features, **query), self.depth, exclude=excluded)
        own_rows = [len(self.bank.ids_of(source_id)) for source_id in source_ids]
        columns = {"source_id": source_ids, "own_rows": pa.array(own_rows, pa.int32())}
        columns |= {"memory_ids": list_column(ids.cpu().numpy()), "memory_scores": list_column(scores.cpu().numpy())}
        return pa.table(columns)


class PreparedImages(Dataset):
    """Item i is batch i: `source_id`s, for each those of all images in its row, and `pixel_values` if needed."""

    def __init__(self, search: NeighbourSearch, batches: list[range]):
        self.images, self.rows, self.batches = search.images, search.rows, batches
        self.image_processor = search.processor.image_processor if search.vision_features is None else None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[str], list[list[str]], torch.Tensor | None]:
        batch = self.batches[number]
        start = bisect_left(self.rows, self.rows[batch.start])  # the first and last row may go on in other batches
        stop = bisect_right(self.rows, self.rows[batch.stop - 1])
        images = [read_image(self.images, index) for index in range(start, stop)]
        source_ids = [image_source_id(image) for image in images]
        of_row = defaultdict(list)
        for row, source_id in zip(self.rows[start:stop], source_ids, strict=True):
            of_row[row].append(source_id)
        excluded = [of_row[self.rows[index]] for index in batch]
        own = slice(batch.start - start, batch.stop - start)
        if self.image_processor is None:
            return source_ids[own], excluded, None
        pixel_values = self.image_processor(images=images[own], return_tensors="pt")["pixel_values"]
        return source_ids[own], excluded, pixel_values


def _deep_enough(folder: Path, name: str, depth: int) -> Path | None:
    """Return a table with this many neighbours or more, if there is one."""
    depths = [int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{name}-*.parquet")]
    enough = [found for found in depths if found >= depth]
    return folder / f"{name}-{min(enough)}.parquet" if enough else None


def write_parquet(table: pa.Table, path: Path):
    """Write a table whole or not at all."""
    content = pa.BufferOutputStream()
    pq.write_table(table, content)
    save_file(path, content.getvalue())
