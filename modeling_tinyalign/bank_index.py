"""Exact nearest-neighbour search over the keys of a memory bank."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

try:
    import faiss
except ImportError:
    faiss = None

# Candidates looked at beyond top_k, so that ties and rounding at the edge can't change which rows are returned.
SPARE = 8
CHUNK = 256
# The process that searched last: faiss's threads do not survive a fork.
_searching_process: int | None = None


class KeyIndex:
    """A flat inner-product faiss index, memory-mapped.

    Args:
        path: an index file written by this package on this machine; never one out of a downloaded bank.
        num_rows, key_dim: what it must hold.

    Raises:
        ValueError: it holds something else.
    """

    def __init__(self, path: Path, num_rows: int, key_dim: int):
        self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if (self._index.ntotal, self._index.d) != (num_rows, key_dim):
            raise ValueError(f"The local file {path} is damaged. Delete {path.parent} and load the bank again.")
        # the mapped keys `(rows, key_dim)`, inside the index
        self.keys = faiss.rev_swig_ptr(self._index.get_xb(), num_rows * key_dim).reshape(num_rows, key_dim)

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
        global _searching_process
        in_worker = torch.utils.data.get_worker_info() is not None
        if in_worker or _searching_process not in (None, os.getpid()):
            place = "a DataLoader worker" if in_worker else "a forked process"
            raise RuntimeError(
                f"The memory bank is searched in {place}, where faiss hangs. Look the neighbours up beforehand, in "
                "the main process, and pass their ids; gather() is safe here."
            )
        _searching_process = os.getpid()
        scores = np.empty((len(queries), top_k), np.float32)
        rows = np.empty((len(queries), top_k), np.int64)
        for start in range(0, len(queries), CHUNK):
            chunk = slice(start, start + CHUNK)
            scores[chunk], rows[chunk] = self._search(queries[chunk], top_k, excluded[chunk], SPARE)
        return scores, rows

    def _search(
        self, queries: np.ndarray, top_k: int, excluded: list[np.ndarray], spare: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """faiss finds the candidates; float64 scores order them, so that a batch of n equals n single searches."""
        fetch = min(len(self.keys), top_k + spare + max(map(len, excluded)))
        _, rows = self._index.search(queries, fetch)
        for query, unwanted in enumerate(excluded):
            if len(unwanted):
                rows[query, np.isin(rows[query], unwanted)] = -1
        rows = np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1)[:, : top_k + spare]
        keys = self.keys[np.maximum(rows, 0)].astype(np.float64)
        scores = np.einsum("nkd,nd->nk", keys, queries.astype(np.float64)).astype(np.float32)
        scores[rows < 0] = -np.inf
        order = np.lexsort((rows, -scores), axis=1)
        rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
        best_scores, best_rows = scores[:, :top_k].copy(), rows[:, :top_k].copy()
        if fetch < len(self.keys):
            # a tie that reaches the last candidate may go on behind it
            margin = 1e-6 * np.linalg.norm(queries, axis=1)
            for query in np.flatnonzero(scores[:, top_k - 1] - scores[:, -1] <= margin):
                one = slice(query, query + 1)
                best_scores[one], best_rows[one] = self._search(queries[one], top_k, excluded[one], 8 * spare)
        return best_scores, best_rows
