"""The Parquet shards of a memory bank, to share: what is in them, and what is checked of downloaded ones."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .bank_config import CONFIG_NAME
from .bank_keys import PackedKeys, PlainKeys
from .bank_values import PackedValues, PlainValues

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:
    pa = pc = pq = None

SHARD_BYTES = 450_000_000
BATCH_ROWS = 1024
# Rows are read in batches of about this size; no column of one may be larger.
BATCH_BYTES = 2**26
MAX_COLUMN_BYTES = 2**29
# Of one shard, unpacked.
MAX_SHARD_BYTES = 2**30
# Keys are of length 1, as far as float32 can tell.
MAX_KEY_NORM = 1.001
# keys and values are never filtered on
STATISTICS = ["id", "source_id", "caption"]
SPLIT_COLUMNS = ["key.list.element", "value.list.element"]


def row_schema(key_dim: int, value_size: int, thumbnails: bool, kept: Iterable[str]) -> pa.Schema:
    """Columns of a bank: the fixed ones, typed, then what was `kept` of the source, as text.

    `load_dataset` reads it as it is.
    """
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
    return pa.schema([*fields, *(pa.field(name, pa.string()) for name in kept)], metadata=metadata)


def config_schema(config: dict) -> pa.Schema:
    """The columns that bank_config.json declares."""
    value_size = config["num_latents"] * config["latent_dim"]
    return row_schema(config["key_dim"], value_size, config["thumbnail_size"] is not None, config["columns"])


def matrix(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """A fixed-size-list column as a `(rows, width)` array, without a copy where Arrow allows it."""
    values = batch.column(column)
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), values.type.list_size)


def list_column(array: np.ndarray) -> pa.FixedSizeListArray:
    """`(rows, width)` to a fixed-size-list column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def check_schema(found: pa.Schema, expected: pa.Schema, name: str) -> None:
    """Refuse columns other than the expected ones (ValueError naming `name` and the column)."""
    for column in [*expected.names, *found.names]:
        types = [
            schema.field(column).type if schema.names.count(column) == 1 else "missing or there twice"
            for schema in (found, expected)
        ]
        if types[0] != types[1]:
            raise ValueError(
                f"{name}: column {column!r} is {types[0]}, expected {types[1]}. Save or download the bank again."
            )


def check_batch(batch: pa.RecordBatch, start: int, name: str) -> None:
    """Refuse nulls, numbers that are not finite, long keys and malformed ids in the rows `start, start + 1, ...`."""

    def refuse(wrong: Sequence[bool], column: str, found: object, expected: str) -> None:
        if np.any(wrong):
            raise ValueError(
                f"{name}: row {start + int(np.argmax(wrong))} has {column} {found}, expected {expected}. Save or "
                "download the bank again."
            )

    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"{name}: the rows from {start} on are malformed ({error}).") from error
    for column in ("id", "source_id", "caption", "key", "value"):
        refuse(batch.column(column).is_null().to_numpy(False), column, "null", "a value")
    for column in ("key", "value"):
        if batch.column(column).flatten().null_count:
            raise ValueError(f"{name}: {column} has nulls from row {start} on, expected numbers. Save the bank again.")
        refuse(~np.isfinite(matrix(batch, column)).all(axis=1), column, "'NaN or infinity'", "finite numbers")
    norms = np.linalg.norm(matrix(batch, "key").astype(np.float64), axis=1)
    refuse(norms > MAX_KEY_NORM, "key", f"of length {norms.max():.3g}", "at most 1, or it would win every search")
    ids = batch.column("id").to_numpy()
    wrong = ids != np.arange(start, start + len(batch))
    refuse(wrong, "id", ids[wrong.argmax()], "the row's number")
    names = batch.column("source_id").to_pylist()
    wrong = [not re.fullmatch("[0-9a-f]{32}", source_id) for source_id in names]
    refuse(wrong, "source_id", repr(names[np.argmax(wrong)][:80]), "32 hex digits")
    if "thumbnail" in batch.schema.names:
        paths = batch.column("thumbnail").field("path")
        refuse(paths.is_valid().to_numpy(False), "thumbnail", "with a path", "pictures inside the bank")


def read_shards(folder: Path, config: dict) -> Iterator[pa.RecordBatch]:
    """The rows of a saved bank, shard by shard.

    Raises:
        ValueError: a shard is missing, is not Parquet, has other columns or more data than declared, or is a bomb.
    """
    schema = config_schema(config)
    paths = shard_paths(folder, config["num_shards"])
    count = size = 0
    for path in paths:
        with _readable(path), pq.ParquetFile(path) as shard:
            check_schema(shard.schema_arrow, schema, str(path))
            size += unpacked_size(shard.metadata, schema, path)
            count += shard.metadata.num_rows
    if count != config["num_rows"]:
        raise ValueError(
            f"{folder / CONFIG_NAME} declares {config['num_rows']} rows, but the shards hold {count}. "
            "Save or download the bank again."
        )
    thumbnails = ["thumbnail.bytes", "thumbnail.path"] if "thumbnail" in schema.names else []
    text = [*config["columns"], "source_id", "caption", *thumbnails]
    row_bytes = size // count + 4 * sum(schema.field(name).type.list_size for name in ("key", "value"))
    batch_size = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
    for path in paths:
        with _readable(path), pq.ParquetFile(path, read_dictionary=text) as shard:
            for batch in shard.iter_batches(batch_size=batch_size):
                yield pa.record_batch([_plain(column, path) for column in batch.columns], names=batch.schema.names)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    # pyarrow raises the last three on footers that were tampered with
    except (pa.ArrowException, OSError, UnicodeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}). Save or download the bank again.") from error


def unpacked_size(footer: pq.FileMetaData, schema: pa.Schema, path: Path) -> int:
    """Bytes of a shard's columns in memory; ValueError, naming it, if that is more than a shard holds."""
    size = 0
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            expected = group.num_rows * (schema.field(name).type.list_size if name in ("key", "value") else 1)
            if not 0 <= column.num_values <= expected:
                raise ValueError(
                    f"{path}: column {name!r} declares {column.num_values} values for {group.num_rows} rows, expected "
                    f"{expected}. Save or download the bank again."
                )
            size += max(0, column.total_uncompressed_size)
    if size > MAX_SHARD_BYTES:
        raise ValueError(f"{path} unpacks to {size} bytes, expected at most {MAX_SHARD_BYTES}. Save the bank again.")
    return size


def _plain(column: pa.Array, path: Path) -> pa.Array:
    """A column without its dictionary. Of one long text, a dictionary makes a thousand in a few bytes."""
    if pa.types.is_struct(column.type):
        parts = [_plain(part, path) for part in column.flatten()]
        return pa.StructArray.from_arrays(parts, names=[field.name for field in column.type], mask=column.is_null())
    if not pa.types.is_dictionary(column.type):
        return column
    size = pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    if size > MAX_COLUMN_BYTES:
        raise ValueError(
            f"{path}: {len(column)} rows hold {size} bytes of text or pictures, expected at most {MAX_COLUMN_BYTES}. "
            "Save or download the bank again."
        )
    return column.dictionary_decode()


def shard_names(num_shards: int) -> list[str]:
    """The Parquet shards of a bank's folder, as the Hub and `load_dataset` expect them."""
    return [f"data/train-{i:05d}-of-{num_shards:05d}.parquet" for i in range(num_shards)]


def shard_paths(folder: Path, num_shards: int) -> list[Path]:
    """The Parquet shards, or ValueError naming the first that is missing."""
    paths = [folder / name for name in shard_names(num_shards)]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing. Save or download the bank again.")
    return paths


def write_shards(
    folder: Path, table: pa.Table, keys: PlainKeys | PackedKeys, values: PlainValues | PackedValues
) -> int:
    """Write `data/train-*.parquet` under `folder`; `table` holds every column but `key` and `value`.

    Returns:
        the number of shards, none of which exceeds `SHARD_BYTES` (unless `BATCH_ROWS` rows do).
    """
    key_dim, value_size = keys.shape[1], math.prod(values.shape[1:])
    (folder / "data").mkdir()
    fixed = ("id", "source_id", "caption", "thumbnail")
    kept = [name for name in table.column_names if name not in fixed]
    schema = row_schema(key_dim, value_size, "thumbnail" in table.column_names, kept)
    # rounded numbers are small once their like bytes are next to each other
    packed = {"compression": "zstd", "use_byte_stream_split": SPLIT_COLUMNS} if isinstance(keys, PackedKeys) else {}
    bounds = _shard_bounds(table, 4 * key_dim + 2 * value_size)
    names = shard_names(len(bounds) - 1)
    for name, (start, stop) in zip(names, itertools.pairwise(bounds), strict=True):
        options = {"use_dictionary": False, "write_statistics": STATISTICS, **packed}
        with pq.ParquetWriter(folder / name, schema, **options) as writer:
            for begin in range(start, stop, BATCH_ROWS):
                end = min(begin + BATCH_ROWS, stop)
                columns = {column: table[column][begin:end] for column in table.column_names}
                columns["key"] = list_column(keys[begin:end])
                columns["value"] = list_column(values[begin:end].reshape(end - begin, -1))
                writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
    return len(names)


def _shard_bounds(table: pa.Table, row_bytes: int) -> list[int]:
    """First rows of the shards and the end; `row_bytes` is what every row has beside its part of the table."""
    bounds, size = [0], 0
    for start in range(0, len(table), BATCH_ROWS):
        batch = table[start : start + BATCH_ROWS]
        added = batch.nbytes + row_bytes * len(batch)
        if size and size + added > SHARD_BYTES:
            bounds.append(start)
            size = 0
        size += added
    return [*bounds, len(table)]
