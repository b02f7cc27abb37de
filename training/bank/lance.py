"""A memory bank in a LanceDB database: on a local disk or in an object store, and larger than memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from transformers.utils import logging

from ...modeling_tinyalign.bank_arrays import SCRATCH_PREFIX, cache_root
from ...modeling_tinyalign.bank_format import (
    BATCH_ROWS,
    CONFIG_NAME,
    KEY_ENCODER_NAME,
    VALUE_ENCODER_NAME,
    arrays_of,
    check_schema,
    config_schema,
)
from ...modeling_tinyalign.bank_index import EXACT, EXACT_ROWS, GOOD_RECALL, MIN_RECALL, recall_of
from ...modeling_tinyalign.bank_rows import BankRows
from ...modeling_tinyalign.files import replace_folder, scratch_folder
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.row_encoder import read_thumbnail
from .lance_tables import CACHE_BYTES, FILES, ROWS, LanceColumns, LanceDatabase, LanceIndex, LanceMatrix

try:
    import lancedb
    from lancedb.index import BTree, IvfRq, IvfSq
except ImportError:
    lancedb = None

logger = logging.get_logger(__name__)

SEARCH_NAME = "search.json"
KINDS = (EXACT, "IVF_RQ", "IVF_SQ")
K_FACTORS = (8, 16, 32, 64, 128)  # candidates compared for every neighbour, to try
SAMPLE = 200


class LanceRows(BankRows):
    """`BankRows` whose rows stay in the database."""

    database: LanceDatabase
    search_settings: dict  # fields of `LanceIndex` that `write_lance` found to be good

    def rows_only(self) -> LanceRows:
        """Return the rows without encoders; see `BankRows.rows_only`."""
        rows = LanceRows(self.config, self.index)
        rows.database, rows.search_settings = self.database, self.search_settings
        return rows

    def __getstate__(self) -> dict:
        return {name: value for name, value in super().__getstate__().items() if name != "columns"}

    @cached_property
    def columns(self) -> LanceColumns:
        """The rows table."""
        return LanceColumns(self.database.open()[0])

    @cached_property
    def key_array(self) -> LanceMatrix:
        return LanceMatrix(self.columns.table, "key", (len(self), self.config.key_dim))

    @cached_property
    def values(self) -> LanceMatrix:
        if self.config.value_size == 0:
            return super().values
        return LanceMatrix(self.columns.table, "value", (len(self), *self.config.value_shape))

    @cached_property
    def key_index(self) -> LanceIndex:
        settings = {} if self.index == EXACT else self.search_settings
        return LanceIndex(self.key_array, **settings)

    @cached_property
    def table(self) -> pa.Table:
        """Every column but key and value, read into memory: only what makes a bank of this machine needs it."""
        schema = config_schema(self.config)
        arrays = arrays_of(schema)
        return self._read([name for name in schema.names if name not in arrays])

    @cached_property
    def captions(self) -> list[str]:
        return self._read(["caption"])["caption"].to_pylist()

    def _read(self, names: Sequence[str]) -> pa.Table:
        blocks = np.split(np.arange(len(self)), range(BATCH_ROWS, len(self), BATCH_ROWS))
        return pa.concat_tables(self.columns.take(rows, names)[0].select(names) for rows in blocks)

    def thumbnail(self, row_id: int) -> Image.Image | None:
        """Return the small picture of a row; see `BankRows.thumbnail`."""
        ids = self.checked_ids([row_id])
        if self.config.thumbnail_size is None or row_id == -1:
            return None
        picture = self.columns.take(ids, ["thumbnail"])[0]["thumbnail"][0].as_py()
        return read_thumbnail(picture and picture["bytes"])

    def ids_of(self, source_id: str) -> np.ndarray:
        """Return the ids of an image's rows, found through an index of LanceDB; see `BankRows.ids_of`."""
        quoted = source_id.replace("'", "''")
        found = self.columns.table.search().where(f"source_id = '{quoted}'").select(["id"]).limit(len(self))
        return np.sort(found.to_arrow()["id"].to_numpy())

    def texts(self, ids: np.ndarray) -> list[dict]:
        """Return what stands in the rows; see `BankRows.texts`."""
        if ids.size == 0:
            return []
        table, places = self.columns.take(ids, ["source_id", "caption", *self.config.columns])
        found = table.to_pylist()
        return [found[place] for place in places]


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
            uri, storage_options, cache_bytes: as of `LanceDatabase`.
            index: "exact" reads every key for each search. By default what was found to be good when it was written.

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
            raise ValueError(f"{uri} cannot be read ({error}). If it can be reached, write the bank again.") from error
        contents = {row["name"]: row["content"] for row in small}
        if len(contents) < 2:
            raise ValueError(f"{uri}: the table {FILES!r} lacks {CONFIG_NAME} or {SEARCH_NAME}: write the bank again.")
        folder = cache_root() / f"{hashlib.sha256(contents[CONFIG_NAME]).hexdigest()}-lance"
        if not folder.is_dir():
            replace_folder(folder, lambda fresh: _read_files(files, fresh))
        bank = cls.open_encoders(folder)
        bank.index, bank.database, bank.search_settings = index, database, json.loads(contents[SEARCH_NAME])
        check_schema(rows.schema, config_schema(bank.config), f"{uri}, table {ROWS!r}")
        if rows.count_rows() != len(bank):
            raise ValueError(
                f"{uri}: the table {ROWS!r} has {rows.count_rows()} rows, expected {len(bank)}. It was changed after "
                "the bank was written: write the bank again."
            )
        return bank


def _read_files(files: lancedb.table.Table, folder: Path) -> None:
    (folder / VALUE_ENCODER_NAME).parent.mkdir()
    for row in files.to_arrow().to_pylist():
        if row["name"] in (CONFIG_NAME, KEY_ENCODER_NAME, VALUE_ENCODER_NAME):
            (folder / row["name"]).write_bytes(row["content"])


def write_lance(
    bank: MemoryBank, uri: str | Path, storage_options: dict[str, str] | None = None, index: str | None = None
) -> LanceBank:
    """Write a bank as a LanceDB database of two tables: its rows, and bank_config.json with the encoders.

    Above 20,000 rows an IVF_RQ index is made (RaBitQ: a bit for each number of a key; IVF_SQ, 8 bits, where keys
    are of a width that 8 does not divide), and searched in as many lists, with as many candidates compared, as find
    99.5% of the five nearest of 200 of the bank's own keys. A write that was killed leaves no bank: the same call
    starts anew. If the bank is there already, it is returned as it is.

    Args:
        uri, storage_options: as of `LanceDatabase`.
        index: "exact" makes none; "IVF_RQ" or "IVF_SQ" makes one in a small bank, too.

    Raises:
        ImportError: lancedb is missing.
        ValueError: there is another bank already, or `index` is none of these.
        OSError: LanceDB could not write all rows.
    """
    if index not in (None, *KINDS):
        raise ValueError(f"index is {index!r}, expected one of {list(KINDS)}, or None.")
    connection = LanceDatabase(str(uri), storage_options).connect()
    if index is None:
        large = "IVF_SQ" if bank.config.key_dim % 8 else "IVF_RQ"
        index = EXACT if len(bank) <= EXACT_ROWS else large
    found = connection.list_tables().tables
    if FILES in found and _is_whole(connection):
        there = LanceBank.from_pretrained(uri, storage_options)
        # a folder is named after the sha256 of its rows
        if (there.folder, there.config.calibration) == (bank.folder, bank.config.calibration):
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
    """Look for the table that is written last; killed meanwhile, LanceDB leaves a name and nothing to open."""
    try:
        connection.open_table(FILES)
    except ValueError:
        return False
    return True


def _write_tables(bank: MemoryBank, connection: lancedb.DBConnection, index: str) -> None:
    schema = config_schema(bank.config).remove_metadata()
    batches = (batch.replace_schema_metadata() for batch in bank.batches())
    rows = connection.create_table(ROWS, pa.RecordBatchReader.from_batches(schema, batches))
    if rows.count_rows() != len(bank):
        raise OSError(f"LanceDB wrote {rows.count_rows()} of {len(bank)} rows: its own message is above.")
    rows.create_index("source_id", config=BTree())
    searched = LanceIndex(LanceMatrix(rows, "key", (len(bank), bank.config.key_dim)))
    if index != EXACT:
        kind = {"IVF_RQ": IvfRq, "IVF_SQ": IvfSq}[index]
        rows.create_index("key", config=kind(distance_type="dot", num_partitions=num_lists(len(bank))))
        rows.checkout_latest()
        searched = tuned(LanceIndex(searched.keys, index))
    settings = {name: vars(searched)[name] for name in ("name", "k_factor", "recall", "nprobes")}
    contents = {SEARCH_NAME: json.dumps(settings).encode()}
    with scratch_folder(cache_root(), SCRATCH_PREFIX) as folder:
        bank.write_encoders(folder, 1)
        for name in (CONFIG_NAME, KEY_ENCODER_NAME, VALUE_ENCODER_NAME):
            if (folder / name).is_file():
                contents[name] = (folder / name).read_bytes()
    columns = {"name": list(contents), "content": pa.array(list(contents.values()), pa.large_binary())}
    connection.create_table(FILES, pa.table(columns))


def num_lists(num_rows: int) -> int:
    """Return the lists of an index: one for every 4,096 rows; from 16 million on, as many as each of them holds."""
    return max(1, round(min(num_rows / 4096, num_rows**0.5)))


def tuned(index: LanceIndex) -> LanceIndex:
    """Return the index, looking into as few lists and comparing as few candidates as its recall@5 allows.

    If no setting is good enough, return the exact search, with a warning.
    """
    recall, lists = recall_of(index, SAMPLE), num_lists(len(index.keys))
    while recall(K_FACTORS[-1]) < GOOD_RECALL and index.nprobes < lists:
        index.nprobes = min(2 * index.nprobes, lists)
    for k_factor in K_FACTORS:
        index.recall = recall(k_factor)
        if index.recall >= GOOD_RECALL:
            break
    if index.recall >= MIN_RECALL:
        return index
    logger.warning(
        f"The index {index.name} finds {index.recall:.1%} of the nearest neighbours in this bank, expected "
        f"{MIN_RECALL:.0%}: it will be searched exactly."
    )
    return LanceIndex(index.keys)
