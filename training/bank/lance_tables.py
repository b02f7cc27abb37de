"""Tables of LanceDB that a memory bank is read from and searched in, where they lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ...modeling_tinyalign.bank_index import EXACT, MAX_CANDIDATES, KeyIndex

try:
    import lancedb
except ImportError:
    lancedb = None

# The tables of a bank: its rows, and bank_config.json with the encoders' files. The second comes last: without it
# there is no bank.
ROWS, FILES = "rows", "bank"
LANCE_ROUNDING = 2e-6  # float32 products of unit vectors are this exact, and 1 - product, which Lance returns
COMPARED_ROWS = 16_384  # that are read at once to be compared
CACHE_BYTES = 2**29
PROCESS = os.getpid()  # the process that imported this: LanceDB's threads do not survive a fork


@dataclass(frozen=True)
class LanceDatabase:
    """The place of the tables."""

    uri: str  # a folder, or `s3://bucket/path`, `gs://...`, `az://...`
    storage_options: dict[str, str] | None = None  # of an object store: its region, endpoint, credentials
    cache_bytes: int = CACHE_BYTES  # how much of an index a process keeps in memory

    def connect(self) -> lancedb.DBConnection:
        """Open the database; raises `ImportError` without LanceDB."""
        if lancedb is None:
            raise ImportError("A memory bank in a LanceDB database needs lancedb: pip install tinyalign-vlm[lance].")
        session = lancedb.Session(index_cache_size_bytes=self.cache_bytes)
        return lancedb.connect(self.uri, storage_options=self.storage_options, session=session)

    def open(self) -> tuple[lancedb.table.Table, lancedb.table.Table]:
        """Return the rows and the files of a bank; raises `ValueError` if there is none."""
        place = self.uri.removeprefix("file://")
        there = "://" in place or Path(place).is_dir()  # LanceDB would make the folder
        database = self.connect() if there else None
        found = database.list_tables().tables if there else "no such folder"
        if not {ROWS, FILES} <= set(found):
            raise ValueError(
                f"{self.uri} holds no whole memory bank (found {found}, expected the tables {ROWS!r} and {FILES!r}). "
                f"Write one: tinyalign bank lance BANK {self.uri}"
            )
        return database.open_table(ROWS), database.open_table(FILES)


class LanceColumns:
    """Columns of the rows table, read where they lie: row i is at offset i, for the table is written once."""

    def __init__(self, table: lancedb.table.Table):
        self._table = table

    @property
    def table(self) -> lancedb.table.Table:
        """The table; raises `RuntimeError` in a forked process, which LanceDB may crash."""
        if os.getpid() != PROCESS:
            raise RuntimeError(
                "This process was forked from one that uses LanceDB, which may crash it. Let the workers be spawned: "
                "dataloader_multiprocessing_context: spawn, or DataLoader(..., multiprocessing_context='spawn'); or "
                "do without them (dataloader_num_workers: 0)."
            )
        return self._table

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
        """Return each of `rows` once, ordered by id, and the places of `rows` in there, in their shape."""
        ids, places = np.unique(rows, return_inverse=True)
        names = ["id", *(name for name in columns if name != "id")]
        table = self.table.take_offsets(ids.tolist()).select(names).to_arrow()
        found = table["id"].to_numpy()
        order = np.argsort(found)
        if not np.array_equal(found[order], ids):
            raise ValueError(
                f"The LanceDB table {self.table.name!r} was changed after the bank was written: it has not the rows "
                f"{ids[:5]}... where they were. Write the bank again: tinyalign bank lance BANK URI"
            )
        return table.take(pa.array(order)), places.reshape(np.shape(rows))


class LanceMatrix(LanceColumns):
    """A column of vectors: `matrix[rows]` is `(..., *shape[1:])`."""

    def __init__(self, table: lancedb.table.Table, column: str, shape: tuple[int, ...]):
        super().__init__(table)
        self.column = column
        self.shape = shape
        self.dtype = table.schema.field(column).type.value_type.to_pandas_dtype()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if rows.size == 0:
            return np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        table, places = self.take(rows, [self.column])
        numbers = table[self.column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return numbers.reshape(-1, *self.shape[1:])[places]

    def gather(self, rows: np.ndarray, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of `rows`, of any shape, as a tensor."""
        return torch.from_numpy(self[rows]).to(device).to(dtype)


@dataclass
class LanceIndex(KeyIndex):
    """Let LanceDB find the candidates; as in every `KeyIndex`, their float64 products with the keys order them."""

    nprobes: int = 1  # how many lists of the index are looked into

    def candidates(
        self, queries: np.ndarray, fetch: int, wanted: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Find at least the best `fetch` rows, roughly; see `KeyIndex.candidates`."""
        compared = max(fetch, round(self.k_factor * wanted))
        error = LANCE_ROUNDING * np.linalg.norm(queries, axis=1)
        if self.name == EXACT or compared > MAX_CANDIDATES or compared >= len(self.keys):
            return *self._nearest(queries, fetch, None), error, True
        scores, rows = self._nearest(queries, compared, self.nprobes)
        step = max(1, COMPARED_ROWS // compared)
        for start in range(0, len(queries), step):
            block = slice(start, start + step)
            known = rows[block] >= 0
            # one read for all of them: LanceDB's own refinement reads for each query
            ids, places = np.unique(rows[block][known], return_inverse=True)
            keys, query = self.keys[ids], np.nonzero(known)[0]
            products = np.full(known.shape, -np.inf, np.float32)
            products[known] = np.einsum("nd,nd->n", keys[places], queries[block][query])
            scores[block] = products
        best = np.argsort(-scores, axis=1, kind="stable")[:, :fetch]
        return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1), error, False

    def _nearest(self, queries: np.ndarray, number: int, nprobes: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return LanceDB's scores and rows `(n, number)`, best first; `nprobes` None reads every key."""
        search = self.keys.table.search(list(queries), vector_column_name=self.keys.column).distance_type("dot")
        search = search.limit(number).select(["id", "_distance"])
        search = search.nprobes(nprobes) if nprobes else search.bypass_vector_index()
        found = search.to_arrow()
        query = np.zeros(len(found), np.int64)
        if "query_index" in found.column_names:  # only where there are several
            query = found["query_index"].to_numpy()
        products = 1 - found["_distance"].to_numpy()
        order = np.lexsort((-products, query))
        starts = np.searchsorted(query[order], np.arange(len(queries)))
        places = np.arange(len(found)) - starts[query[order]]
        scores = np.full((len(queries), number), -np.inf, np.float32)
        rows = np.full((len(queries), number), -1, np.int64)
        scores[query[order], places] = products[order]
        rows[query[order], places] = found["id"].to_numpy()[order]
        return scores, rows
