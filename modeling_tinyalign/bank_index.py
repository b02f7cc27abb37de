"""Nearest-neighbour search over the keys of a memory bank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .bank_keys import BLOCK_ROWS, PackedKeys, PlainKeys

try:
    import faiss
except ImportError:
    faiss = None

# Candidates looked at beyond top_k, so that ties and rounding at the edge can't change which rows are returned.
SPARE = 27
CHUNK = 256
# From so many queries on, products with whole blocks of keys are faster than faiss's scan.
MATRIX_QUERIES = 8
# A fast index is asked for so many candidates at most; beyond, the exact search is not slower.
MAX_CANDIDATES = 4096
# What faiss finds on a GPU, and how exact float16 is.
MAX_GPU_CANDIDATES, GPU_ROUNDING = 2048, 2.0**-11
# Scores closer than this are taken for equal until float64 has told them apart.
TIE = 1e-6
# The process that searched last: faiss's threads do not survive a fork.
_searching_process: int | None = None


@contextlib.contextmanager
def faiss_threads() -> Iterator[None]:
    """Let faiss use `torch.get_num_threads()` threads.

    Raises:
        RuntimeError: in a DataLoader worker or another forked process, where faiss would hang.
    """
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
    """Searches keys exactly, or compares only the candidates of a fast index with the query.

    Attributes:
        keys: what is searched.
        name: "exact", "gpu", or the faiss factory string of the fast index.
        fast: an approximate faiss index of the same rows.
        k_factor: how many of its candidates are compared, for every neighbour asked for.
        gpu: an exact float16 index of the same rows on a GPU.
    """

    keys: PlainKeys | PackedKeys
    name: str = "exact"
    fast: faiss.Index | None = None
    k_factor: int = 1
    gpu: faiss.Index | None = None

    def search(self, queries: np.ndarray, top_k: int, excluded: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The best rows that are not excluded; equal scores are ordered by row.

        Args:
            queries: `(n, key_dim)` float32, C-contiguous.
            excluded: for each query the rows, int64, that must not be returned.

        Returns:
            scores `(n, top_k)` float32 and rows `(n, top_k)` int64, filled up with -inf and -1.

        Raises:
            RuntimeError: in a DataLoader worker or another forked process, where faiss would hang.
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
        """faiss finds candidates; float64 scores order them, so that a batch of n equals n single searches."""
        fetch = min(len(self.keys), top_k + spare + max(map(len, excluded)))
        rough, rows, error, complete = self._candidates(queries, fetch, fetch - spare)
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
            doubt = 2 * error if complete else TIE * np.linalg.norm(queries, axis=1)
            for query in np.flatnonzero((last[:, 0] - rough[:, -1] <= doubt) | (rows[:, -1] < 0)):
                one = slice(query, query + 1)
                scores[one], rows[one] = self._search(queries[one], top_k, excluded[one], 8 * spare)
        return scores, rows

    def _candidates(
        self, queries: np.ndarray, fetch: int, wanted: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """The best `fetch` rows, roughly.

        Args:
            wanted: of them, how many are really asked for.

        Returns:
            rough scores `(n, fetch)`, rows `(n, fetch)`, by how much the scores may be off `(n,)`, and whether no row
            was left out whose rough score is better.
        """
        error = self.keys.error(queries)
        compared = max(fetch, round(self.k_factor * wanted))
        if self.fast is not None and compared <= MAX_CANDIDATES and compared < len(self.keys):
            refined = faiss.IndexRefine(self.fast, self.keys.index)
            refined.k_factor = compared / fetch
            return *refined.search(queries, fetch), error, False
        if self.gpu is not None and fetch <= MAX_GPU_CANDIDATES:
            error = error + GPU_ROUNDING * np.linalg.norm(queries, axis=1)
            return *self.gpu.search(queries, fetch), error, True
        if len(queries) < MATRIX_QUERIES:
            return *self.keys.index.search(queries, fetch), error, True
        vectors = torch.from_numpy(queries)
        scores, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        for start in range(0, len(self.keys), BLOCK_ROWS):
            block = self.keys.index.reconstruct_n(start, min(BLOCK_ROWS, len(self.keys) - start))
            products = vectors @ torch.from_numpy(block).T
            numbers = torch.arange(start, start + len(block)).expand(products.shape)
            scores, rows = torch.cat([scores, products], dim=1), torch.cat([rows, numbers], dim=1)
            scores, best = scores.topk(min(fetch, scores.shape[1]), dim=1)
            rows = rows.gather(1, best)
        return scores.numpy(), rows.numpy(), error, True
