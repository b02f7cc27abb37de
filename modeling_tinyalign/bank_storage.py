"""How a memory bank lies on disk: checked Parquet shards to share, memory-mapped local files to work with."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from .bank_config import CONFIG_NAME
from .bank_folders import scratch_folder, sync

try:
    import faiss
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    faiss = pa = pq = None

SHARD_BYTES = 450_000_000
BATCH_ROWS = 1024
SCRATCH_PREFIX = ".tmp-"
# keys and values are never filtered on
STATISTICS = ["id", "source_id", "caption"]


def require_bank_packages() -> None:
    """Raise ImportError, naming what to install, unless faiss and pyarrow are there."""
    if faiss is None:
        raise ImportError(
            "A memory bank needs faiss and pyarrow: pip install faiss-cpu pyarrow. Without them the model still runs "
            'with memory="off".'
        )


def row_schema(key_dim: int, value_size: int, thumbnails: bool, extra: Iterable[pa.Field]) -> pa.Schema:
    """Columns of a bank: the fixed ones, typed, then what was kept of the source. `load_dataset` reads it as it is."""
    fields = [
        pa.field("id", pa.int64()),
        pa.field("source_id", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("key", pa.list_(pa.float32(), key_dim)),
        pa.field("value", pa.list_(pa.float16(), value_size)),
    ]
    metadata = None
    if thumbnails:
        fields.append(pa.field("thumbnail", pa.struct({"bytes": pa.binary(), "path": pa.string()})))
        metadata = {"huggingface": json.dumps({"info": {"features": {"thumbnail": {"_type": "Image"}}}})}
    return pa.schema([*fields, *extra], metadata=metadata)


def matrix(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """A fixed-size-list column as a `(rows, width)` array, without a copy where Arrow allows it."""
    values = batch.column(column)
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), values.type.list_size)


def list_column(array: np.ndarray) -> pa.FixedSizeListArray:
    """`(rows, width)` to a fixed-size-list column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def check_schema(schema: pa.Schema, key_dim: int, value_size: int, name: str) -> None:
    """Refuse columns that are not those of a bank of these sizes (ValueError naming `name` and the column)."""
    for field in row_schema(key_dim, value_size, "thumbnail" in schema.names, ()):
        found = schema.field(field.name).type if schema.names.count(field.name) == 1 else None
        if found != field.type:
            raise ValueError(
                f"{name}: column {field.name!r} is {found or 'missing'}, expected {field.type}. "
                "Save or download the bank again."
            )


@dataclass
class BankFiles:
    """A bank's local files, each under its own sha256, and what was counted while they were written."""

    keys: Path
    values: Path
    rows: Path
    sha256: dict[str, str]
    num_rows: int

    @classmethod
    def cached(cls, sha256: dict[str, str], num_rows: int) -> BankFiles:
        """Where the files of these hashes are, or will be."""
        root = cache_root()
        return cls(
            keys=root / sha256["keys"] / "index.faiss",
            values=root / sha256["values"] / "values.npy",
            rows=root / sha256["rows"] / "rows.arrow",
            sha256=sha256,
            num_rows=num_rows,
        )

    def exist(self) -> bool:
        return self.keys.is_file() and self.values.is_file() and self.rows.is_file()


def cache_root() -> Path:
    return Path(constants.HF_HOME) / "tinyalign"


def check_batch(batch: pa.RecordBatch, start: int, name: str) -> None:
    """Refuse nulls, non-finite numbers and malformed ids in the rows `start, start + 1, ...` of the bank."""

    def refuse(row: int, column: str, found: object, expected: str) -> None:
        raise ValueError(
            f"{name}: row {start + row} has {column} {found!r}, expected {expected}. Save or download the bank again."
        )

    for column in ("id", "source_id", "caption", "key", "value"):
        values = batch.column(column)
        if column in ("key", "value"):
            if values.null_count or values.flatten().null_count:
                refuse(0, column, None, "no nulls from here on")
            finite = np.isfinite(matrix(batch, column)).all(axis=1)
            if not finite.all():
                refuse(int(finite.argmin()), column, "NaN or infinity", "finite numbers")
        elif values.null_count:
            refuse(values.is_null().to_pylist().index(True), column, None, "a value")
    ids = batch.column("id").to_numpy()
    wrong = ids != np.arange(start, start + len(batch))
    if wrong.any():
        refuse(int(wrong.argmax()), "id", int(ids[wrong.argmax()]), "the row's number")
    for row, source_id in enumerate(batch.column("source_id").to_pylist()):
        if not re.fullmatch("[0-9a-f]{32}", source_id):
            refuse(row, "source_id", source_id[:80], "32 hex digits")


def write_local_files(
    batches: Iterable[pa.RecordBatch],
    key_dim: int,
    value_shape: tuple[int, int],
    name: str,
    expected: dict[str, str] | None = None,
) -> BankFiles:
    """Check the rows of a bank and lay them out for use: index, memory-mapped values, memory-mapped rows.

    Every file is written under a temporary name and renamed to its content's sha256, so that a killed or failed run
    leaves nothing behind that could be taken for a bank, and processes that do the same work at once do no harm.

    Args:
        batches: record batches of `row_schema`, in the order of the bank.
        name: what the errors call the source of the rows.
        expected: the sha256 of keys, values and rows, where they are known.

    Raises:
        ValueError: a row, a type or a sha256 is refused, or there is no row.
        OSError: the cache could not be written.
    """
    try:
        with scratch_folder(cache_root(), SCRATCH_PREFIX) as scratch:
            num_rows, sha256 = _lay_out(batches, scratch, key_dim, value_shape, name)
            for part, digest in sha256.items():
                if expected is not None and digest != expected[part]:
                    raise ValueError(
                        f"{name}: the sha256 of the {part} is {digest}, but {CONFIG_NAME} says {expected[part]}. The "
                        "bank was damaged or changed by hand: save or download it again."
                    )
            files = BankFiles.cached(sha256, num_rows)
            for path in (files.keys, files.values, files.rows):
                path.parent.mkdir(exist_ok=True)
                sync(scratch / path.name)
                os.replace(scratch / path.name, path)
            return files
    except OSError as error:
        raise _cache_error(error) from error


def _lay_out(
    batches: Iterable[pa.RecordBatch], folder: Path, key_dim: int, value_shape: tuple[int, int], name: str
) -> tuple[int, dict[str, str]]:
    """See `write_local_files`; returns the number of rows, and the sha256 of keys, values and rows."""
    hashes = {part: hashlib.sha256() for part in ("keys", "values", "rows")}
    index = faiss.IndexFlatIP(key_dim)
    writer = None
    with open(folder / "values.npy", "wb") as values_file, open(folder / "rows.arrow", "wb") as rows_file:
        _write_npy_header(values_file, (0, *value_shape))
        for batch in batches:
            check_schema(batch.schema, key_dim, value_shape[0] * value_shape[1], name)
            check_batch(batch, index.ntotal, name)
            keys, values = matrix(batch, "key"), matrix(batch, "value")
            index.add(np.ascontiguousarray(keys))
            values_file.write(values.tobytes())
            rows = batch.drop_columns(["key", "value"])
            writer = writer or pa.ipc.new_file(rows_file, rows.schema)
            writer.write_batch(rows)
            hashes["keys"].update(keys.tobytes())
            hashes["values"].update(values.tobytes())
            for row in rows.to_pylist():
                hashes["rows"].update(_row_bytes(row))
        if index.ntotal == 0:
            raise ValueError(f"{name} has no rows: a memory bank needs at least one.")
        writer.close()
        values_file.seek(0)
        _write_npy_header(values_file, (index.ntotal, *value_shape))
    try:
        faiss.write_index(index, str(folder / "index.faiss"))
    except RuntimeError as error:
        raise OSError(f"faiss could not write the index: {error}") from error
    return index.ntotal, {part: digest.hexdigest() for part, digest in hashes.items()}


def read_shards(folder: Path, config: dict) -> Iterator[pa.RecordBatch]:
    """The rows of a saved bank, shard by shard.

    Raises:
        ValueError: a shard is missing, is not Parquet, has other columns or another number of rows than declared.
    """
    value_size = config["num_latents"] * config["latent_dim"]
    count = 0
    for path in shard_paths(folder, config["num_shards"]):
        try:
            with pq.ParquetFile(path) as shard:
                check_schema(shard.schema_arrow, config["key_dim"], value_size, str(path))
                for batch in shard.iter_batches(batch_size=BATCH_ROWS):
                    batch.validate(full=True)
                    count += len(batch)
                    yield batch
        # pyarrow raises the last three on footers that were tampered with
        except (pa.ArrowException, OSError, UnicodeError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"{path} cannot be read as Parquet ({error}). Save or download the bank again."
            ) from error
    if count != config["num_rows"]:
        raise ValueError(
            f"{folder / CONFIG_NAME} declares {config['num_rows']} rows, but the shards hold {count}. "
            "Save or download the bank again."
        )


def shard_paths(folder: Path, num_shards: int) -> list[Path]:
    """The Parquet shards, or ValueError naming the first that is missing."""
    paths = [folder / "data" / f"train-{i:05d}-of-{num_shards:05d}.parquet" for i in range(num_shards)]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing. Save or download the bank again.")
    return paths


def write_shards(folder: Path, table: pa.Table, keys: np.ndarray, values: np.ndarray, config: dict) -> None:
    """Write `data/train-*.parquet` under `folder`; `table` holds every column but `key` and `value`."""
    num_rows, num_shards = config["num_rows"], config["num_shards"]
    key_dim, value_size = keys.shape[1], values[0].size
    (folder / "data").mkdir()
    fixed = ("id", "source_id", "caption", "thumbnail")
    extra = [field for field in table.schema if field.name not in fixed]
    schema = row_schema(key_dim, value_size, "thumbnail" in table.column_names, extra)
    bounds = [num_rows * i // num_shards for i in range(num_shards + 1)]
    for shard, (start, stop) in enumerate(itertools.pairwise(bounds)):
        path = folder / "data" / f"train-{shard:05d}-of-{num_shards:05d}.parquet"
        with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=STATISTICS) as writer:
            for begin in range(start, stop, BATCH_ROWS):
                end = min(begin + BATCH_ROWS, stop)
                columns = {column: table[column][begin:end] for column in table.column_names}
                columns["key"] = list_column(keys[begin:end])
                columns["value"] = list_column(values[begin:end].reshape(end - begin, -1))
                writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))


class Spool:
    """Record batches put aside in a temporary file, until what is needed to finish them is known."""

    def __init__(self, batches: Iterable[pa.RecordBatch]):
        self._incoming = batches
        self._folder = scratch_folder(cache_root(), SCRATCH_PREFIX)

    def __enter__(self) -> Spool:
        try:
            self._path = self._folder.__enter__() / "spool.arrow"
        except OSError as error:
            raise _cache_error(error) from error
        try:
            self._write()
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # others may be of the dataset's own files
                raise _cache_error(error) from error
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._folder.__exit__(None, None, None)

    def _write(self) -> None:
        writer = None
        with open(self._path, "wb") as file:
            for batch in self._incoming:
                writer = writer or pa.ipc.new_file(file, batch.schema)
                writer.write_batch(batch)
            if writer is not None:
                writer.close()

    def batches(self) -> Iterator[pa.RecordBatch]:
        if self._path.stat().st_size == 0:
            return
        with pa.memory_map(str(self._path)) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


def _row_bytes(row: dict) -> bytes:
    """What the `rows` hash sees of a row: everything but its number, whatever the file format."""
    row = {name: value for name, value in row.items() if name != "id"}
    if row.get("thumbnail") is not None:
        row["thumbnail"] = hashlib.sha256(row["thumbnail"]["bytes"] or b"").hexdigest()
    return json.dumps(row, sort_keys=True, default=str).encode()


def _cache_error(error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"Writing the memory bank's local files to {cache_root()} failed: {error}. Free some space there, or set "
        "HF_HOME to a folder on a larger disk.",
    )


def _write_npy_header(file, shape: tuple[int, ...]) -> None:
    # numpy pads the header so that the first axis may grow without moving the data
    np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
