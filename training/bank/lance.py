"""A memory bank in a LanceDB database: on a local disk or in an object store, and larger than memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers.utils import logging

from ...modeling_tinyalign.bank_config import CONFIG_NAME
from ...modeling_tinyalign.bank_fast_index import (
    EXACT,
    EXACT_ROWS,
    GOOD_RECALL,
    MIN_RECALL,
    TOP_K,
    describe,
    recorded,
    sample_queries,
)
from ...modeling_tinyalign.bank_folders import replace_folder
from ...modeling_tinyalign.bank_images import load_image
from ...modeling_tinyalign.bank_index import MAX_CANDIDATES, TIE, KeyIndex
from ...modeling_tinyalign.bank_rows import BankRows
from ...modeling_tinyalign.bank_shards import BATCH_ROWS, check_schema, config_schema, list_column, matrix
from ...modeling_tinyalign.bank_storage import cache_root
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.saved_bank import KEY_ENCODER_NAME, VALUE_ENCODER_NAME
from .log import LOCAL

try:
    import lancedb
    from lancedb.index import BTree, IvfRq, IvfSq

    INDEXES = {"IVF_RQ": IvfRq, "IVF_SQ": IvfSq}
except ImportError:
    lancedb = None

logger = logging.get_logger(__name__)

# The tables of a bank: its rows, and bank_config.json with the encoders' files. The second comes last: without it
# there is no bank.
ROWS, FILES = "rows", "bank"
SEARCH_NAME = "search.json"
KINDS = (EXACT, "IVF_RQ", "IVF_SQ")
# Candidates compared for every neighbour, to try.
K_FACTORS = (8, 16, 32, 64, 128)
SAMPLE = 200
# float32 products of unit vectors are this exact, and 1 - product, which Lance returns.
ROUNDING = 2e-6
# How many keys are read at once to be compared.
COMPARED_ROWS = 16_384
CACHE_BYTES = 2**29
# The process that imported this. LanceDB's threads do not survive a fork.
PROCESS = os.getpid()


@dataclass(frozen=True)
class LanceDatabase:
    """Where the tables are.

    Attributes:
        uri: a folder, or `s3://bucket/path`, `gs://...`, `az://...`.
        storage_options: of LanceDB, for an object store: its region, endpoint, credentials.
        cache_bytes: how much of an index a process keeps in memory.
    """

    uri: str
    storage_options: dict[str, str] | None = None
    cache_bytes: int = CACHE_BYTES

    def connect(self) -> lancedb.DBConnection:
        """Raises `ImportError` without LanceDB."""
        if lancedb is None:
            raise ImportError("A memory bank in a LanceDB database needs lancedb: pip install tinyalign-vlm[lance].")
        session = lancedb.Session(index_cache_size_bytes=self.cache_bytes)
        return lancedb.connect(self.uri, storage_options=self.storage_options, session=session)

    def open(self) -> tuple[lancedb.table.Table, lancedb.table.Table]:
        """The rows and the files of a bank. Raises `ValueError` if there is none."""
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

    def __init__(self, table: lancedb.table.Table, num_rows: int):
        self._table = table
        self.num_rows = num_rows

    @property
    def table(self) -> lancedb.table.Table:
        """Raises `RuntimeError` in a forked process, which LanceDB may crash."""
        if os.getpid() != PROCESS:
            raise RuntimeError(
                "This process was forked from one that uses LanceDB, which may crash it. Let the workers be spawned: "
                "dataloader_multiprocessing_context: spawn, or DataLoader(..., multiprocessing_context='spawn'); or "
                "do without them (dataloader_num_workers: 0)."
            )
        return self._table

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
        """Each of `rows` once, by id, and where in there they are, in the shape of `rows`."""
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
        super().__init__(table, shape[0])
        self.column = column
        self.shape = shape
        self.dtype = table.schema.field(column).type.value_type.to_pandas_dtype()

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        rows = np.arange(*rows.indices(self.num_rows)) if isinstance(rows, slice) else np.asarray(rows)
        if rows.size == 0:
            return np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        table, places = self.take(rows, [self.column])
        numbers = table[self.column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return numbers.reshape(-1, *self.shape[1:])[places]

    def gather(self, rows: np.ndarray, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """Values of `rows`, of any shape, as a tensor."""
        return torch.from_numpy(self[rows]).to(device).to(dtype)


@dataclass
class LanceIndex(KeyIndex):
    """Candidates come from LanceDB; as of `KeyIndex`, their float64 products with the keys order them.

    Attributes:
        nprobes: how many lists of the index are looked into.
    """

    nprobes: int = 1

    def _candidates(
        self, queries: np.ndarray, fetch: int, wanted: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        compared = max(fetch, round(self.k_factor * wanted))
        error = ROUNDING * np.linalg.norm(queries, axis=1)
        if self.name == EXACT or compared > MAX_CANDIDATES or compared >= len(self.keys):
            return *self._found(queries, fetch, None), error, True
        scores, rows = self._found(queries, compared, self.nprobes)
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

    def _found(self, queries: np.ndarray, number: int, nprobes: int | None) -> tuple[np.ndarray, np.ndarray]:
        """LanceDB's scores and rows `(n, number)`, best first: of an index's lists, or exact, by reading every key."""
        search = self.keys.table.search(list(queries), vector_column_name=self.keys.column).distance_type("dot")
        search = search.limit(number).select(["id", "_distance"])
        found = (search.nprobes(nprobes) if nprobes else search.bypass_vector_index()).to_arrow()
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


class LanceRows(BankRows):
    """`BankRows` whose rows stay in the database.

    Attributes:
        database: where they are.
        search_settings: what `write_lance` found to be good.
    """

    database: LanceDatabase
    search_settings: dict

    def __getstate__(self) -> dict:
        return {name: value for name, value in super().__getstate__().items() if name != "_columns"}

    def without_encoders(self) -> LanceRows:
        """As of `BankRows`."""
        rows = LanceRows(self.config, self._files, self.index)
        rows.database, rows.search_settings = self.database, self.search_settings
        return rows

    @cached_property
    def captions(self) -> list[str]:
        """All of them: read into memory."""
        return [caption for table in self._tables(["caption"]) for caption in table["caption"].to_pylist()]

    def thumbnail(self, row_id: int) -> Image.Image | None:
        """As of `BankRows`."""
        ids = self._checked_ids([row_id])
        if self.config["thumbnail_size"] is None or row_id == -1:
            return None
        picture = self._columns.take(ids, ["thumbnail"])[0]["thumbnail"][0].as_py()
        return load_image(picture and picture["bytes"])

    def ids_of(self, source_id: str) -> np.ndarray:
        """As of `BankRows`."""
        quoted = source_id.replace("'", "''")
        found = self._columns.table.search().where(f"source_id = '{quoted}'").select(["id"]).limit(len(self))
        return np.sort(found.to_arrow()["id"].to_numpy())

    def _text_of(self, ids: np.ndarray) -> list[dict]:
        if ids.size == 0:
            return []
        table, places = self._columns.take(ids, ["source_id", "caption", *self.config["columns"]])
        found = table.to_pylist()
        return [found[place] for place in places]

    @cached_property
    def _columns(self) -> LanceColumns:
        return LanceColumns(self.database.open()[0], len(self))

    @cached_property
    def _keys(self) -> LanceMatrix:
        return LanceMatrix(self._columns.table, "key", (len(self), self.key_dim))

    @cached_property
    def _values(self) -> LanceMatrix:
        return LanceMatrix(self._columns.table, "value", (len(self), self.num_latents, self.latent_dim))

    @cached_property
    def _searcher(self) -> tuple[LanceIndex, dict | None]:
        facts = self.search_settings["facts"]
        if self.index == EXACT or facts["index"] == EXACT:
            return LanceIndex(self._keys), None
        return LanceIndex(
            self._keys, facts["index"], k_factor=facts["k_factor"], nprobes=self.search_settings["nprobes"]
        ), facts

    @cached_property
    def _table(self) -> pa.Table:
        """Read into memory: only what makes a bank of this machine of it needs all rows."""
        names = [name for name in config_schema(self.config).names if name not in ("key", "value")]
        return pa.concat_tables(self._tables(names))

    def _tables(self, names: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, len(self), BATCH_ROWS):
            rows = np.arange(start, min(start + BATCH_ROWS, len(self)))
            yield self._columns.take(rows, names)[0].select(names)


class LanceBank(LanceRows, MemoryBank):
    """A `MemoryBank` that is searched and read in a LanceDB database; `write_lance` makes one.

    It is used as any other: `model.attach_memory_bank(LanceBank.from_pretrained(uri))`. Nothing is copied to this
    machine but the encoders. `add`, `remove`, `shuffled` and `save_pretrained` make banks of this machine.
    """

    @classmethod
    def from_pretrained(
        cls,
        uri: str | Path,
        storage_options: dict[str, str] | None = None,
        index: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> LanceBank:
        """Open a bank.

        Args:
            uri: a folder, or `s3://bucket/path`, `gs://...`, `az://...`.
            storage_options: of LanceDB, for an object store: its region, endpoint, credentials.
            index: "exact" reads every key for each search. By default what was found to be good when it was written.
            cache_bytes: how much of the index a process keeps in memory.

        Raises:
            ImportError: lancedb is missing.
            ValueError: there is no bank, it was not written to its end, or its rows are not those its config says.
        """
        if index not in (None, EXACT):
            raise ValueError(
                f"index is {index!r}, expected {EXACT!r} or None: the index of a bank in LanceDB is made when it is "
                "written."
            )
        database = LanceDatabase(str(uri), storage_options, cache_bytes)
        try:
            rows, files = database.open()
            small = files.search().where(f"name in ('{CONFIG_NAME}', '{SEARCH_NAME}')").to_arrow().to_pylist()
        except RuntimeError as error:  # LanceDB's
            raise ValueError(
                f"{uri} cannot be read ({error}). If nothing is wrong with the way there, write the bank again."
            ) from error
        contents = {row["name"]: row["content"] for row in small}
        if len(contents) < 2:
            raise ValueError(f"{uri}: the table {FILES!r} lacks {CONFIG_NAME} or {SEARCH_NAME}: write the bank again.")
        folder = cache_root() / f"{hashlib.sha256(contents[CONFIG_NAME]).hexdigest()}-lance"
        if not folder.is_dir():
            replace_folder(folder, lambda fresh: _read_files(files, fresh))
        bank = cls._open(folder)
        bank.database, bank.search_settings, bank.index = database, json.loads(contents[SEARCH_NAME]), index
        check_schema(rows.schema, config_schema(bank.config), f"{uri}, table {ROWS!r}")
        if rows.count_rows() != len(bank):
            raise ValueError(
                f"{uri}: the table {ROWS!r} has {rows.count_rows()} rows, expected {len(bank)}. It was changed after "
                "the bank was written: write the bank again."
            )
        bank._columns = LanceColumns(rows, len(bank))
        return bank


def _read_files(files: lancedb.table.Table, folder: Path) -> None:
    (folder / VALUE_ENCODER_NAME).parent.mkdir()
    for row in files.to_arrow().to_pylist():
        if row["name"] in (CONFIG_NAME, KEY_ENCODER_NAME, VALUE_ENCODER_NAME):
            (folder / row["name"]).write_bytes(row["content"])


def write_lance(
    bank: MemoryBank,
    uri: str | Path,
    storage_options: dict[str, str] | None = None,
    index: str | None = None,
) -> LanceBank:
    """Write a bank as a LanceDB database of two tables: its rows, and bank_config.json with the encoders.

    Above 20,000 rows an IVF_RQ index is made (RaBitQ: a bit for each number of a key; IVF_SQ, 8 bits, where keys
    are of a width that 8 does not divide), and searched in as many lists, with as many candidates compared, as find
    99.5% of the five nearest of 200 of the bank's own keys. A write that was killed leaves no bank: the same call
    starts anew. If the bank is there already, it is returned as it is.

    Args:
        uri, storage_options: as of `LanceBank.from_pretrained`.
        index: "exact" makes none; "IVF_RQ" or "IVF_SQ" makes one in a small bank, too.

    Returns:
        the bank in the database.

    Raises:
        ImportError: lancedb is missing.
        ValueError: there is another bank already, or `index` is none of these.
        OSError: LanceDB could not write all rows.
    """
    if index not in (None, *KINDS):
        raise ValueError(f"index is {index!r}, expected one of {list(KINDS)}, or None.")
    connection = LanceDatabase(str(uri), storage_options).connect()
    if index is None:
        index = EXACT if len(bank) <= EXACT_ROWS else "IVF_SQ" if bank.key_dim % 8 else "IVF_RQ"
    found = connection.list_tables().tables
    if FILES in found and _is_whole(connection):
        there = LanceBank.from_pretrained(uri, storage_options)
        if all(there.config["sha256"][part] == bank.config["sha256"][part] for part in LOCAL):
            return there  # killed at the very end
        raise ValueError(f"{uri} holds another memory bank already: delete it, or choose another place.")
    for name in {FILES, ROWS}.intersection(found):  # of a process that was killed
        connection.drop_table(name)
    try:
        _write_tables(bank, connection, index)
    except RuntimeError as error:  # LanceDB's
        raise OSError(
            f"LanceDB could not write the bank to {uri}: {error}. There is none as yet. Free some space, or see what "
            "else is wrong there, and run the same again: it starts anew."
        ) from error
    return LanceBank.from_pretrained(uri, storage_options)


def _is_whole(connection: lancedb.DBConnection) -> bool:
    """Whether the table that is written last is there; killed meanwhile, LanceDB leaves a name and nothing to open."""
    try:
        connection.open_table(FILES)
    except ValueError:
        return False
    return True


def _write_tables(bank: MemoryBank, connection: lancedb.DBConnection, index: str) -> None:
    """See `write_lance`."""
    schema = config_schema(bank.config).remove_metadata()
    reader = pa.RecordBatchReader.from_batches(schema, _aligned(bank, schema))
    rows = connection.create_table(ROWS, reader)
    if rows.count_rows() != len(bank):
        raise OSError(f"LanceDB wrote {rows.count_rows()} of {len(bank)} rows: its own message is above.")
    rows.create_index("source_id", config=BTree())
    keys = LanceMatrix(rows, "key", (len(bank), bank.key_dim))
    searched, recall = LanceIndex(keys), 1.0
    if index != EXACT:
        rows.create_index("key", config=INDEXES[index](distance_type="dot", num_partitions=num_lists(len(bank))))
        rows.checkout_latest()
        searched, recall = tuned(LanceIndex(keys, index))
    facts = describe(searched, recall)
    contents = {SEARCH_NAME: json.dumps({"facts": facts, "nprobes": searched.nprobes}).encode()}
    folder = Path(tempfile.mkdtemp())
    try:
        bank._write_encoders(folder, num_shards=1, index=recorded(facts))
        for name in (CONFIG_NAME, KEY_ENCODER_NAME, VALUE_ENCODER_NAME):
            contents[name] = (folder / name).read_bytes()
    finally:
        shutil.rmtree(folder)
    columns = {"name": list(contents), "content": pa.array(list(contents.values()), pa.large_binary())}
    connection.create_table(FILES, pa.table(columns))


def _aligned(bank: MemoryBank, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """A bank's rows, with keys that begin where Lance wants numbers to: in a mapped faiss index they do not."""
    for batch in bank._batches():
        columns = {name: batch.column(name) for name in schema.names}
        columns["key"] = list_column(np.array(matrix(batch, "key")))
        yield pa.record_batch(list(columns.values()), schema=schema)


def num_lists(num_rows: int) -> int:
    """Of an index: one for every 4,096 rows, or, from 16 million rows on, as many as each of them holds."""
    return max(1, round(min(num_rows / 4096, num_rows**0.5)))


def tuned(index: LanceIndex) -> tuple[LanceIndex, float]:
    """The index, looking into as few lists and comparing as few candidates as its recall allows, and its recall@5.

    If no setting is good enough, the exact search, with a warning.
    """
    queries, own = (sample[:SAMPLE] for sample in sample_queries(index.keys))
    truth, _ = LanceIndex(index.keys).search(queries, TOP_K, own)
    lists = num_lists(len(index.keys))

    def recall(k_factor: int) -> float:
        index.k_factor = k_factor * TOP_K / (TOP_K + 1)  # no more candidates than for a query that excludes nothing
        scores, _ = index.search(queries, TOP_K, own)
        index.k_factor = k_factor
        return float((scores >= truth[:, -1:] - TIE).mean())

    while recall(K_FACTORS[-1]) < GOOD_RECALL and index.nprobes < lists:
        index.nprobes = min(2 * index.nprobes, lists)
    for k_factor in K_FACTORS:
        if (found := recall(k_factor)) >= GOOD_RECALL:
            break
    if found >= MIN_RECALL:
        return index, found
    logger.warning(
        f"The index {index.name} finds {found:.1%} of the nearest neighbours in this bank, expected {MIN_RECALL:.0%}: "
        "it will be searched exactly."
    )
    return LanceIndex(index.keys), 1.0
