"""The neighbours of every image of a data set, computed once, by as many processes as one likes, kept as Parquet."""

import hashlib
import json
import os
import pickle
import shutil
import uuid
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign.bank_arrays import cache_root
from ...modeling_tinyalign.bank_format import list_column
from ...modeling_tinyalign.files import sync
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.row_encoder import image_source_id
from .chats import query_inputs
from .features import fingerprint_images, read_image, undecoded

PART_IMAGES = 512  # what a killed process loses at most


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
    num_proc: int = 1,
) -> Path:
    """
    Looks up the neighbours of each image in the bank, unless an earlier run has. An image's own rows of the bank
    (those with its `source_id`) are left out, and those of the other images in its row: it would retrieve its own
    answer.

    The table is a Parquet file named by the fingerprints of the data (images, questions, tower, preprocessing) and of
    the bank (keys, sources, captions), so another run finds it and another bank does not. It is computed in parts,
    each written whole or not at all: a killed run goes on where it stopped, and ends with the same bytes. Under
    `accelerate launch` or `torchrun` each process computes a share, on its own device.

    Args:
        model: Its vision tower runs where it is; the bank is checked against it.
        images: A column of a `datasets.Dataset`, or PIL images, bytes or paths.
        depth: Neighbours to keep of each image; a bank with fewer rows gives fewer.
        rows: The row that each image is of, in ascending order. By default each is of its own.
        queries: The question asked about each image; only for a bank with keys in the language space.
        vision_features: `(n, T, C)`, as [`cache_vision_features`] returns, to skip the tower.
        folder: Where the tables are. Defaults to `HF_HOME/tinyalign/neighbours`.
        batch_size: Images per forward pass.
        num_workers: Workers of each process that read and prepare images.
        num_proc: Processes to start on this machine, if this is the only one and needs the tower.

    Returns:
        The file. One row an image: `source_id`, `own_rows` (how many rows of the bank are of this image),
        `memory_ids` `(depth,)` int64, best first, and `memory_scores` `(depth,)` float32, their inner products with
        the query; -1 and -inf where too few rows are left.

    Raises:
        ValueError: The bank is of another tower, an image cannot be read (its number is named), there is none, or the
            lengths differ.
    """
    images = undecoded(images)
    if len(images) == 0:
        raise ValueError("There are no images, expected at least one.")
    for name, column in (("rows", rows), ("queries", queries), ("vision_features", vision_features)):
        if column is not None and len(column) != len(images):
            raise ValueError(f"Found {len(column)} {name} for {len(images)} images, expected one for each.")
    if not bank.any_tower:
        bank.check_probes(model)
    depth = min(depth, len(bank))
    state = PartialState()
    names = [_name(bank, model, processor, images, rows, queries) if state.is_main_process else None]
    (name,) = broadcast_object_list(names)
    folder = cache_root() / "neighbours" if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # another run of the same table waits for this one, and then finds it
    with FileLock(folder / f".{name}.lock") if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        path = _deep_enough(folder, name, depth)
        if path is not None:
            if state.is_main_process:  # killed when the table was complete
                shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)
            return path
        path, parts = folder / f"{name}-{depth}.parquet", folder / f"{name}-{depth}.parts"
        parts.mkdir(exist_ok=True)
        todo = [part for part in range(-(-len(images) // PART_IMAGES)) if not _part_path(parts, part).is_file()]
        state.wait_for_everyone()  # all know what is to do before one of them starts to do it
        search = NeighbourSearch(
            bank,
            model.base_model,
            processor,
            images,
            range(len(images)) if rows is None else rows,
            queries,
            vision_features,
            depth,
            batch_size,
            num_workers,
            PART_IMAGES,
        )
        if state.num_processes > 1 or vision_features is not None or min(num_proc, len(todo)) < 2:
            search.write_parts(todo[state.process_index :: state.num_processes], parts, state.process_index)
        else:
            _in_processes(search, todo, parts, min(num_proc, len(todo)))
        state.wait_for_everyone()
        if state.is_main_process:
            _join(parts, path)
        state.wait_for_everyone()
    return path


def read_neighbours(path: str | os.PathLike) -> datasets.Dataset:
    """Open what [`neighbour_table`] wrote, memory-mapped."""
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
    """All that a search takes, in one object that can be sent to another process; of the model, the vision tower."""

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
    part_images: int

    def __getstate__(self) -> dict:
        weights = {name: tensor.cpu() for name, tensor in self.model.vision_tower.state_dict().items()}
        return {**vars(self), "model": (type(self.model), self.model.config, self.model.vision_tower.device, weights)}

    def __setstate__(self, state: dict):
        model_class, config, device, weights = state["model"]
        with torch.device("meta"):
            model = model_class(config)
        model.vision_tower = AutoModel.from_config(config.vision_config)
        model.vision_tower.load_state_dict(weights, assign=True)
        model.vision_tower.to(device).eval()
        vars(self).update(state, model=model)

    @torch.no_grad()
    def write_parts(self, todo: Sequence[int], parts: Path, position: int = 0):
        """Part i holds the images from `i * part_images` on. Whoever computes it, its batches are the same."""
        spans = [self._batches_of(part) for part in todo]
        batches = [batch for batches in spans for batch in batches]
        prepared = iter(DataLoader(PreparedImages(self, batches), batch_size=None, num_workers=self.num_workers))
        total = sum(len(batch) for batches in spans for batch in batches)
        with tqdm(total=total, desc="Neighbours", unit="image", position=position) as bar:
            for part, batches in zip(todo, spans, strict=True):
                tables = []
                for batch in batches:
                    tables.append(self._search(batch, *next(prepared)))
                    bar.update(len(batch))
                _write(_part_path(parts, part), pa.concat_tables(tables), parts)

    def _batches_of(self, part: int) -> list[range]:
        stop = min((part + 1) * self.part_images, len(self.images))
        starts = range(part * self.part_images, stop, self.batch_size)
        return [range(start, min(start + self.batch_size, stop)) for start in starts]

    def _search(
        self, batch: range, source_ids: list[str], excluded: list[list[str]], pixel_values: torch.Tensor | None
    ) -> pa.Table:
        rows = slice(batch.start, batch.stop)
        if pixel_values is None:
            features = torch.from_numpy(np.array(self.vision_features[rows])).to(self.model.vision_tower.device)
        else:
            features = self.model.get_vision_features(pixel_values)
        query = {} if self.queries is None else query_inputs(self.processor, list(self.queries[rows]))
        keys = self.bank.encode_queries(
            features, **{name: tensor.to(features.device) for name, tensor in query.items()}
        )
        scores, ids = self.bank.search(keys, self.depth, exclude=excluded)
        return pa.table(
            {
                "source_id": source_ids,
                "own_rows": pa.array([len(self.bank.ids_of(source_id)) for source_id in source_ids], pa.int32()),
                "memory_ids": list_column(ids.cpu().numpy()),
                "memory_scores": list_column(scores.cpu().numpy()),
            }
        )


class PreparedImages(Dataset):
    """
    Item i is batch i, ready for the tower: the images' `source_id`s, for each of them those of all images in its row,
    and, if they are needed, `pixel_values`.
    """

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


def _in_processes(search: NeighbourSearch, todo: list[int], parts: Path, num_proc: int):
    """Spawned, not forked: torch and faiss have threads. They end when this process is killed."""
    try:
        # pickled by value: tensors would go through /dev/shm, which is small in a container
        torch.multiprocessing.spawn(_process, (num_proc, pickle.dumps(search), todo, parts), num_proc)
    except ProcessRaisedException as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _process(number: int, num_proc: int, search: bytes, todo: list[int], parts: Path):
    torch.set_num_threads(max(1, torch.get_num_threads() // num_proc))  # of those that OMP_NUM_THREADS allows
    pickle.loads(search).write_parts(todo[number::num_proc], parts, number)


def _name(
    bank: MemoryBank,
    model,
    processor: ProcessorMixin,
    images,
    rows: Sequence[int] | None,
    queries: Sequence[str] | None,
) -> str:
    """Fingerprints of the data and of the bank, 32 hex digits each."""
    data = hashlib.sha256(fingerprint_images(model, processor, images).encode())
    data.update(json.dumps(None if queries is None else list(queries)).encode())
    if rows is not None and len(set(rows)) < len(rows):
        data.update(json.dumps(list(rows)).encode())
    of_bank = hashlib.sha256((bank.config.sha256.keys + bank.config.sha256.rows).encode())
    return f"{data.hexdigest()[:32]}-{of_bank.hexdigest()[:32]}"


def _deep_enough(folder: Path, name: str, depth: int) -> Path | None:
    """A table with this many neighbours or more."""
    depths = sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{name}-*.parquet"))
    return next((folder / f"{name}-{found}.parquet" for found in depths if found >= depth), None)


def _part_path(parts: Path, part: int) -> Path:
    return parts / f"{part:06d}.parquet"


def _write(path: Path, table: pa.Table, parts: Path):
    """Whole or not at all: what a killed process leaves is in `parts`."""
    fresh = parts / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        pq.write_table(table, fresh)
        sync(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _join(parts: Path, path: Path):
    """The parts, in order, as one file."""
    _write(path, pa.concat_tables(pq.read_table(part) for part in sorted(parts.glob("[0-9]*.parquet"))), parts)
    shutil.rmtree(parts)
