"""Exact nearest-neighbour search over the keys of a memory bank."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

try:
    import faiss
except ImportError:
    faiss = None
try:
    from faiss import get_deserialization_lattice_r2_limit, set_deserialization_lattice_r2_limit
except ImportError:  # faiss before 1.14.3 lacks this limit or all three
    get_deserialization_lattice_r2_limit = set_deserialization_lattice_r2_limit = None

# Candidates looked at beyond top_k, so that ties and rounding at the edge can't change which rows are returned.
SPARE = 8
# How faiss marks the file of an IndexFlatIP.
FLAT_INNER_PRODUCT = b"IxFI"
CHUNK = 256
# The process that searched last: faiss's threads do not survive a fork.
_searching_process: int | None = None


@contextlib.contextmanager
def _limited(num_bytes: int) -> Iterator[None]:
    """Let faiss read at most so many bytes of vectors and build nothing else, if it knows limits."""
    if set_deserialization_lattice_r2_limit is None:
        yield
        return
    before = (
        faiss.get_deserialization_vector_byte_limit(),
        faiss.get_deserialization_loop_limit(),
        get_deserialization_lattice_r2_limit(),
    )
    try:
        faiss.set_deserialization_vector_byte_limit(num_bytes)
        faiss.set_deserialization_loop_limit(1)
        set_deserialization_lattice_r2_limit(1)
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])
        set_deserialization_lattice_r2_limit(before[2])


def check_foreign_index(path: Path, num_rows: int, key_dim: int, sha256: str) -> None:
    """Refuse an index file that this package did not write, unless it is a flat index of just these keys.

    Its first bytes are looked at before faiss is: of faiss's many formats nothing but the simplest is parsed.

    Args:
        sha256: of the keys, float32.

    Raises:
        ValueError: it is missing or something else (the file is named), or this faiss cannot limit what it reads.
    """
    if set_deserialization_lattice_r2_limit is None:
        raise ValueError(
            f"trust_index=True needs a faiss that limits what an index file may make it do, 1.14.3 or newer; found "
            f"{faiss.__version__}. Update faiss-cpu, or leave trust_index out: the index is then built from the keys."
        )
    kind = None
    if path.is_file() and path.stat().st_size < 4 * num_rows * key_dim + 1024:
        with open(path, "rb") as file:
            kind = file.read(len(FLAT_INNER_PRODUCT))
    if kind != FLAT_INNER_PRODUCT:
        raise ValueError(
            f"{path} is missing or no flat inner-product index of {num_rows} keys of {key_dim} numbers. Leave "
            "trust_index out: the index is then built from the keys."
        )
    found = hashlib.sha256(KeyIndex(path, num_rows, key_dim).keys).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: the sha256 of its keys is {found}, expected {sha256}: it is not the index of this bank. Leave "
            "trust_index out: the index is then built from the keys."
        )


class _MappedKeys:
    """The array in a flat index; whoever has the array keeps the index, and with it the memory, alive."""

    def __init__(self, index: faiss.IndexFlat):
        keys = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
        self.__array_interface__ = keys.__array_interface__
        self._index = index


class KeyIndex:
    """A flat inner-product faiss index, memory-mapped.

    Args:
        path: an index file written by this package on this machine, or passed by `check_foreign_index`.
        num_rows, key_dim: what it must hold.

    Raises:
        ValueError: it holds something else.
    """

    def __init__(self, path: Path, num_rows: int, key_dim: int):
        try:
            with _limited(4 * num_rows * key_dim + 4):
                self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be read ({error}). Delete it and load the bank again.") from error
        found = (type(self._index), self._index.metric_type, self._index.ntotal, self._index.d)
        if found != (faiss.IndexFlatIP, faiss.METRIC_INNER_PRODUCT, num_rows, key_dim):
            raise ValueError(
                f"{path} is damaged: it holds {found[2]} keys of {found[3]}, expected {num_rows} of {key_dim}. Delete "
                "it and load the bank again."
            )
        # the mapped keys `(rows, key_dim)`, inside the index
        self.keys = np.asarray(_MappedKeys(self._index))

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
