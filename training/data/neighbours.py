"""The nearest rows of a memory bank to images: of features at hand, or of a whole data set, kept as Parquet."""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign.bank_format import list_column
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.row_encoder import image_source_id
from ..disk import save_file
from .features import fingerprint_images, read_image, undecoded_images
from .shared_array import fill_array, from_main_process, one_run_at_a_time


@torch.no_grad()
def find_neighbours(
    bank: MemoryBank,
    model: PreTrainedModel,
    vision_features: np.ndarray,
    top_k: int,
    source_ids: Sequence[str] | None = None,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `top_k` rows of the bank nearest to each image, best first.

    Args:
        vision_features: `(n, T, C)`, as `cache_vision_features` returns.
        source_ids: of each image (`source_ids_of`); its own rows of the bank are left out. Training without it lets
            an image retrieve itself, its answer included.

    Returns:
        similarities `(n, top_k)` float32 and row ids `(n, top_k)` int64, -inf and -1 where exclusion left too few.

    Raises `ValueError` if the bank is of another tower, `top_k` is larger than it, or the lengths differ.
    """
    n = len(vision_features)
    if source_ids is not None and len(source_ids) != n:
        raise ValueError(f"Found {len(source_ids)} source_ids for {n} vision_features, expected one for each.")
    if not bank.any_tower:
        bank.check_probes(model)
    scores, ids = np.empty((n, top_k), np.float32), np.empty((n, top_k), np.int64)
    for start in tqdm(range(0, n, batch_size), "Neighbours", unit="batch"):
        rows = slice(start, start + batch_size)
        keys = bank.encode_queries(torch.from_numpy(np.array(vision_features[rows])).to(model.device))
        exclude = None if source_ids is None else list(source_ids[rows])
        scores[rows], ids[rows] = (found.cpu().numpy() for found in bank.search(keys, top_k, exclude=exclude))
    return scores, ids


def source_ids_of(images: Sequence[Any], desc: str = "Naming images") -> list[str]:
    """Return the `source_id` of each image: a hash of its decoded pixels, as in the bank."""
    images = undecoded_images(images)
    return [image_source_id(read_image(images, index)) for index in tqdm(range(len(images)), desc, unit="image")]


@dataclass
class NeighbourSearch:
    """The neighbours of each image of a data set, for training.

    An image's own rows of the bank (those with its `source_id`) are left out, and those of the other images in its
    row: it would retrieve its own answer.

    Attributes:
        model: its vision tower runs where it is; the bank is checked against it.
        images: a column of a `datasets.Dataset`, or PIL images, bytes or paths.
        depth: neighbours to keep of each image; a bank with fewer rows gives fewer.
        rows: the row that each image is of, in ascending order. By default each is of its own.
        queries: the question asked about each image; only for a bank with keys in the language space.
        vision_features: `(n, T, C)`, as `cache_vision_features` returns, to skip the tower.
        num_workers: workers of each process that read and prepare images.

    Raises `ValueError` if the bank is of another tower, there is no image, or the lengths differ.
    """

    bank: MemoryBank
    model: PreTrainedModel
    processor: ProcessorMixin
    images: Sequence[Any]
    depth: int
    rows: Sequence[int] | None = None
    queries: Sequence[str] | None = None
    vision_features: np.ndarray | None = None
    batch_size: int = 8
    num_workers: int = 0

    def __post_init__(self):
        self.images, self.depth = undecoded_images(self.images), min(self.depth, len(self.bank))
        if self.rows is None:
            self.rows = range(len(self.images))
        if len(self.images) == 0:
            raise ValueError("There are no images, expected at least one.")
        for name in ("rows", "queries", "vision_features"):
            column = vars(self)[name]
            if column is not None and len(column) != len(self.images):
                raise ValueError(f"Found {len(column)} {name} for {len(self.images)} images, expected one for each.")
        if not self.bank.any_tower:
            self.bank.check_probes(self.model)

    def table(self, folder: Path) -> Path:
        """Look the neighbours up, unless an earlier run has.

        The table is a Parquet file named by the fingerprints of the data (images, questions, tower, preprocessing)
        and of the bank (keys, sources, captions), so another run finds it and another bank does not. A killed run
        goes on where it stopped, and ends with the same bytes. Under `accelerate launch` or `torchrun` each process
        computes a share, on its device.

        Returns:
            the file. One row an image: `source_id`, `own_rows` (how many rows of the bank are of this image),
            `memory_ids` `(depth,)` int64, best first, and `memory_scores` `(depth,)` float32, their inner products
            with the query; -1 and -inf where too few rows are left.

        Raises `ValueError`, naming its number, if an image cannot be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = from_main_process(self.fingerprint)
        with one_run_at_a_time(folder / f".{name}.lock") as state:
            path = _deep_enough(folder, name, self.depth)
            if path is None:
                path = folder / f"{name}-{self.depth}.parquet"
                self.write_table(path)
            if state.is_main_process:
                path.with_suffix(".partial").unlink(missing_ok=True)
        return path

    def fingerprint(self) -> str:
        """Return fingerprints of the data and of the bank, 32 hex digits each."""
        data = hashlib.sha256(fingerprint_images(self.model, self.processor, self.images).encode())
        data.update(json.dumps(None if self.queries is None else list(self.queries)).encode())
        if len(set(self.rows)) < len(self.rows):
            data.update(json.dumps(list(self.rows)).encode())
        of_bank = hashlib.sha256((self.bank.config.sha256.keys + self.bank.config.sha256.rows).encode())
        return f"{data.hexdigest()[:32]}-{of_bank.hexdigest()[:32]}"

    @torch.no_grad()
    def write_table(self, path: Path):
        """Compute the table with all processes of this run, and write it."""
        partial = path.with_suffix(".partial")
        fill_array(partial, self.dtype, (len(self.images),), self.batches, "Neighbours")
        if PartialState().is_main_process:
            rows = np.load(partial, mmap_mode="r", allow_pickle=False)
            columns = {"source_id": rows["source_id"].astype(str), "own_rows": rows["own_rows"]}
            columns |= {name: list_column(rows[name]) for name in ("memory_ids", "memory_scores")}
            write_parquet(pa.table(columns), path)

    @property
    def dtype(self) -> np.dtype:
        """The columns of the table, as fields."""
        of_image = [("source_id", "S32"), ("own_rows", "<i4")]
        return np.dtype([*of_image, ("memory_ids", "<i8", self.depth), ("memory_scores", "<f4", self.depth)])

    def batches(self, spans: list[range]) -> Iterator[np.ndarray]:
        """Yield the rows of the images in these spans, in batches that are the same whoever computes them."""
        batches = []
        for span in spans:
            batches += [span[start : start + self.batch_size] for start in range(0, len(span), self.batch_size)]
        prepared = DataLoader(PreparedImages(self, batches), batch_size=None, num_workers=self.num_workers)
        for batch, (source_ids, excluded, pixel_values) in zip(batches, prepared, strict=True):
            numbers = slice(batch.start, batch.stop)
            if pixel_values is None:
                features = torch.from_numpy(np.array(self.vision_features[numbers])).to(self.model.device)
            else:
                features = self.model.get_vision_features(pixel_values)
            query = {} if self.queries is None else self.processor.query_inputs(list(self.queries[numbers]))
            query = {name: tensor.to(features.device) for name, tensor in query.items()}
            scores, ids = self.bank.search(self.bank.encode_queries(features, **query), self.depth, exclude=excluded)
            rows = np.empty(len(batch), self.dtype)
            rows["source_id"], rows["memory_ids"], rows["memory_scores"] = source_ids, ids.cpu(), scores.cpu()
            rows["own_rows"] = [len(self.bank.ids_of(source_id)) for source_id in source_ids]
            yield rows


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
