"""Nearest-neighbour search over the keys of a memory bank: exact, or through a fast index whose recall is measured."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from transformers.utils import logging

from .bank_arrays import SCRATCH_PREFIX, cache_errors, cache_root, faiss, read_only_tensor
from .bank_format import file_sha256
from .files import locked, scratch_folder, sync

logger = logging.get_logger(__name__)

EXACT, GPU = "exact", "gpu"
# Up to here exact search takes a few milliseconds (docs/bank_speed.md has the table).
EXACT_ROWS = 20_000
# A fast index is used from this recall on; its settings are raised until it is a little better.
MIN_RECALL, GOOD_RECALL = 0.99, 0.995
# How many numbers of a key share 4 bits of the default index, and how many of its candidates are compared for every
# neighbour: a coarse index for most banks, a finer one for those whose keys are close to each other.
DEFAULTS = {4: (16, 32, 64), 2: (16, 32, 64, 128, 256)}
# Queries, and their neighbours, that recall is measured with.
SAMPLE, TOP_K = 500, 5
# The second for each cell of an inverted file.
TRAINING_ROWS, TRAINING_ROWS_A_CELL, TRAINING_ROUNDS = 4096, 64, 10

# Candidates looked at beyond top_k, so that ties and rounding at the edge can't change which rows are returned.
SPARE = 27
CHUNK = 256
BLOCK_ROWS = 4096
# From so many queries on, products with whole blocks of keys are faster than faiss's scan.
MATRIX_QUERIES = 8
# A fast index is asked for so many candidates at most; beyond, the exact search is not slower.
MAX_CANDIDATES = 4096
# What faiss finds on a GPU, and how exact float16 is.
MAX_GPU_CANDIDATES, GPU_ROUNDING = 2048, 2.0**-11
# float32 products of unit vectors are this exact; closer ones are equal until float64 has told them apart.
ROUNDING = 1e-6
# The process that searched last: faiss's threads do not survive a fork.
_searching_process: int | None = None


@contextlib.contextmanager
def faiss_threads() -> Iterator[None]:
    """Let faiss use torch's number of threads; RuntimeError in a DataLoader worker or another forked process."""
    global _searching_process
    in_worker = torch.utils.data.get_worker_info() is not None
    if in_worker or _searching_process not in (None, os.getpid()):
        place = "a DataLoader worker" if in_worker else "a forked process"
        raise RuntimeError(
            f"The memory bank is searched in {place}, where faiss hangs. Look the neighbours up beforehand, in "
            "the main process, and pass their ids; gather() is safe here."
        )
    _searching_process = os.getpid()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@dataclass
class KeyIndex:
    """Search keys exactly, or compare only the candidates of a fast index with the query.

    Attributes:
        keys: `(num_rows, key_dim)`, float32 or float16, memory-mapped.
        name: "exact", "gpu", or the faiss factory string of the fast index.
        fast: an approximate faiss index of the same rows.
        k_factor: how many of its candidates are compared, for every neighbour asked for.
        recall: recall@5 against exact search, measured when the index was made.
        gpu: an exact float16 index of the same rows on a GPU.
    """

    keys: np.ndarray
    name: str = EXACT
    fast: faiss.Index | None = None
    k_factor: int = 1
    recall: float = 1.0
    gpu: faiss.Index | None = None

    @property
    def facts(self) -> dict:
        """`{"index": its name, "k_factor", "recall_at_5"}`"""
        return {"index": self.name, "k_factor": self.k_factor, "recall_at_5": self.recall}

    def search(self, queries: np.ndarray, top_k: int, excluded: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Find the best rows that are not excluded: scores `(n, top_k)`, float32, and rows `(n, top_k)`, int64, filled
        up with -inf and -1; equal scores are ordered by row.

        Args:
            queries: `(n, key_dim)` float32, C-contiguous.
            excluded: for each query the rows, int64, that must not be returned.
        """
        scores = np.empty((len(queries), top_k), np.float32)
        rows = np.empty((len(queries), top_k), np.int64)
        with faiss_threads():
            for start in range(0, len(queries), CHUNK):
                chunk = slice(start, start + CHUNK)
                scores[chunk], rows[chunk] = self._search(queries[chunk], top_k, excluded[chunk], SPARE)
        return scores, rows

    def _search(
        self, queries: np.ndarray, top_k: int, excluded: list[np.ndarray], spare: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Order candidates by float64 scores, so that a batch of n equals n single searches."""
        fetch = min(len(self.keys), top_k + spare + max(map(len, excluded)))
        rough, rows, error, complete = self.candidates(queries, fetch, fetch - spare)
        for query, unwanted in enumerate(excluded):
            if len(unwanted):
                rows[query, np.isin(rows[query], unwanted)] = -1
        rough[rows < 0] = -np.inf
        order = np.argsort(-rough, axis=1, kind="stable")[:, : top_k + spare]
        rough, rows = np.take_along_axis(rough, order, axis=1), np.take_along_axis(rows, order, axis=1)
        # those that may be among the best
        last = rough[:, [top_k - 1]]
        query, place = np.nonzero((rough >= last - 2 * error[:, None]) & (rows >= 0))
        keys = self.keys[rows[query, place]].astype(np.float64)
        scores = np.full(rows.shape, -np.inf, np.float32)
        scores[query, place] = np.einsum("nd,nd->n", keys, queries[query].astype(np.float64))
        order = np.lexsort((rows, -scores), axis=1)[:, :top_k]
        scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
        if fetch < len(self.keys):
            # rows behind the last candidate may be as good
            doubt = 2 * error if complete else ROUNDING * np.linalg.norm(queries, axis=1)
            for query in np.flatnonzero((last[:, 0] - rough[:, -1] <= doubt) | (rows[:, -1] < 0)):
                one = slice(query, query + 1)
                scores[one], rows[one] = self._search(queries[one], top_k, excluded[one], 8 * spare)
        return scores, rows

    def candidates(
        self, queries: np.ndarray, fetch: int, wanted: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Find at least the best `fetch` rows, roughly; `wanted` of them are really asked for.

        Returns:
            rough scores and rows, both `(n, fetch or more)`, by how much the scores may be off `(n,)`, and whether no
            row was left out whose rough score is better.
        """
        error = ROUNDING * np.linalg.norm(queries, axis=1)
        compared = max(fetch, round(self.k_factor * wanted))
        if self.fast is not None and compared <= MAX_CANDIDATES and compared < len(self.keys):
            _, rows = self.fast.search(queries, compared)
            products = np.empty(rows.shape, np.float32)
            # torch is not faster here, and its threads would wait in the way of faiss's
            for query, found in enumerate(np.maximum(rows, 0)):  # -1 where the index found too few
                products[query] = self.keys[found].astype(np.float32) @ queries[query]
            return products, rows, error, False
        if self.gpu is not None and fetch <= MAX_GPU_CANDIDATES:
            error = error + GPU_ROUNDING * np.linalg.norm(queries, axis=1)
            return *self.gpu.search(queries, fetch), error, True
        if len(queries) < MATRIX_QUERIES and self.keys.dtype == np.float32:
            return *faiss.knn(queries, self.keys, fetch, metric=faiss.METRIC_INNER_PRODUCT), error, True
        return *self._best_of_blocks(queries, fetch), error, True

    def _best_of_blocks(self, queries: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows `(n, fetch)`, best first, from products with all keys."""
        vectors = torch.from_numpy(queries)
        scores, rows = vectors.new_empty(len(queries), 0), vectors.new_empty(len(queries), 0, dtype=torch.long)
        for start in range(0, len(self.keys), BLOCK_ROWS):
            block = read_only_tensor(self.keys[start : start + BLOCK_ROWS]).float()
            with torch.autocast("cpu", enabled=False):
                products = vectors @ block.T
            numbers = torch.arange(start, start + len(block), device="cpu").expand(products.shape)
            scores, rows = torch.cat([scores, products], dim=1), torch.cat([rows, numbers], dim=1)
            scores, best = scores.topk(min(fetch, scores.shape[1]), dim=1)
            rows = rows.gather(1, best)
        return scores.numpy(), rows.numpy()


def open_index(keys: np.ndarray, folder: Path, wanted: str | None) -> KeyIndex:
    """Return the index that a bank is searched with. A fast one is made by the first process that asks, and kept.

    Args:
        folder: of the bank's local files.
        wanted: as of `MemoryBank.from_pretrained`.

    Raises:
        ValueError: faiss can't make such an index, or its file is damaged.
        OSError: it can't be written.
    """
    if wanted is None and faiss.get_num_gpus() > 0:
        return KeyIndex(keys, GPU, gpu=gpu_index(keys))
    if wanted == EXACT or (wanted is None and len(keys) <= EXACT_ROWS):
        return KeyIndex(keys)
    path = folder / f"{quote(wanted or 'auto', safe='')}-faiss{faiss.__version__}.faiss"
    record = path.with_suffix(".json")
    if not record.exists():
        with locked(folder):
            if not record.exists():
                index = make_fast_index(keys, wanted)
                if not os.access(folder, os.W_OK):  # somebody else's: each process makes its own
                    return index
                write_index(index, path)
    try:
        facts = json.loads(record.read_text())
        if facts["index"] == EXACT:
            return KeyIndex(keys)
        fast = faiss.read_index(str(path))
        if (fast.ntotal, fast.d) != keys.shape:
            raise ValueError(f"it has {fast.ntotal} keys of {fast.d} numbers, expected {keys.shape}")
        return KeyIndex(keys, facts["index"], fast, facts["k_factor"], facts["recall_at_5"])
    except (ValueError, LookupError, TypeError, OSError, RuntimeError) as error:
        raise ValueError(
            f"The index {path}, or {record.name} beside it, is damaged ({error}). Delete both; they are made again."
        ) from error


def make_fast_index(keys: np.ndarray, wanted: str | None) -> KeyIndex:
    """Return a fast index, or an exact one where none of the default ones is good enough."""
    factories = {wanted: DEFAULTS[2]} if wanted else default_factories(keys.shape[1])
    for factory, k_factors in factories.items():
        with faiss_threads():
            index = KeyIndex(keys, factory, train_index(keys, factory))
        tune(index, k_factors)
        if index.recall >= MIN_RECALL:
            return index
    logger.warning(
        f"The index {factory} finds {index.recall:.1%} of the nearest neighbours in this bank, expected "
        f"{MIN_RECALL:.0%}{'' if wanted else ': it will be searched exactly'}."
    )
    return index if wanted else KeyIndex(keys)


def write_index(index: KeyIndex, path: Path) -> None:
    """Write a fast index, and its facts with the file's sha256 to a .json file beside it."""
    facts, record = index.facts, path.with_suffix(".json")
    with cache_errors(), scratch_folder(cache_root(), SCRATCH_PREFIX) as scratch:
        try:
            if index.fast is not None:
                faiss.write_index(index.fast, str(scratch / path.name))
                facts["sha256"] = file_sha256(scratch / path.name)
            (scratch / record.name).write_text(json.dumps(facts) + "\n")
        except RuntimeError as error:  # faiss's
            raise OSError(errno.EIO, str(error)) from error
        for file in (path, record):  # the record comes last: without it there is no index
            if (scratch / file.name).exists():
                sync(scratch / file.name)
                os.replace(scratch / file.name, file)


def default_factories(key_dim: int) -> dict[str, tuple[int, ...]]:
    """Return faiss factory strings of 4-bit codes, which are looked up in registers, and the k_factors to try."""
    pad = -key_dim % 4
    factory = f"{f'Pad{key_dim + pad},' if pad else ''}IVF1,PQ{{}}x4fs"
    return {factory.format((key_dim + pad) // width): k_factors for width, k_factors in DEFAULTS.items()}


def train_index(keys: np.ndarray, factory: str) -> faiss.Index:
    """Return a faiss index of the keys, without its "Refine" part: candidates are compared with the keys anyway."""
    try:
        index = faiss.index_factory(keys.shape[1], factory.split(",Refine")[0], faiss.METRIC_INNER_PRODUCT)
        cells = faiss.try_extract_index_ivf(index)
        sample = max(TRAINING_ROWS, TRAINING_ROWS_A_CELL * cells.nlist if cells else 0)
        rows = np.sort(np.random.default_rng(0).permutation(len(keys))[:sample])
        if cells is not None and isinstance(part := faiss.downcast_index(cells), faiss.IndexIVFPQFastScan):
            part.pq.cp.niter = TRAINING_ROUNDS
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1 if cells is None or cells.nlist == 1 else threads)  # its parts are too small
        index.train(keys[rows].astype(np.float32))
        faiss.omp_set_num_threads(threads)
        for start in range(0, len(keys), BLOCK_ROWS):
            index.add(keys[start : start + BLOCK_ROWS].astype(np.float32))
    except RuntimeError as error:
        raise ValueError(
            f"faiss {faiss.__version__} can't make the index {factory!r} for {len(keys)} keys of {keys.shape[1]} "
            f"numbers ({error}). Pass index='exact', or another factory string of faiss."
        ) from error
    return index


def recall_of(index: KeyIndex, sample: int = SAMPLE) -> Callable[[int], float]:
    """Return a function that sets `k_factor` and measures recall@5 against exact search.

    The queries are a sample of the keys, none of which is its own neighbour.
    """
    rows = np.sort(np.random.default_rng(1).permutation(len(index.keys))[:sample])
    queries, own = index.keys[rows].astype(np.float32), list(rows[:, None])
    truth, _ = type(index)(index.keys).search(queries, TOP_K, own)

    def recall(k_factor: int) -> float:
        index.k_factor = k_factor * TOP_K / (TOP_K + 1)  # no more candidates than for a query that excludes nothing
        scores, _ = index.search(queries, TOP_K, own)
        index.k_factor = k_factor
        return float((scores >= truth[:, -1:] - ROUNDING).mean())

    return recall


def tune(index: KeyIndex, k_factors: Sequence[int]) -> None:
    """Raise the settings of an index until its recall is good: the cells it looks into, the candidates compared."""
    recall = recall_of(index)
    cells = faiss.try_extract_index_ivf(index.fast)
    if cells and cells.nlist > 1:
        for power in range(cells.nlist.bit_length()):
            cells.nprobe = 2**power
            if recall(k_factors[-1]) >= GOOD_RECALL:
                break
    for k_factor in k_factors:
        index.recall = recall(k_factor)
        if index.recall >= GOOD_RECALL:
            break


def gpu_index(keys: np.ndarray) -> faiss.Index:
    """Return the keys as float16 on the current GPU, searched exactly."""
    settings = faiss.GpuIndexFlatConfig()
    settings.useFloat16 = True
    settings.device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), keys.shape[1], settings)
    for start in range(0, len(keys), BLOCK_ROWS):
        index.add(keys[start : start + BLOCK_ROWS].astype(np.float32))
    return index
