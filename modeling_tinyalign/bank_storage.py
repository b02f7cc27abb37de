"""How a memory bank lies on disk: checked Parquet shards to share, memory-mapped local files to work with."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from .bank_config import CONFIG_NAME
from .bank_folders import locked, scratch_folder, sync
from .bank_foreign_index import open_foreign_keys
from .bank_keys import PackedKeys, PlainKeys, index_header
from .bank_values import PackedValues, PlainValues

try:
    import faiss
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:
    faiss = pa = pc = pq = None

# A bank of more rows is packed: its keys are rounded to 12 bits, its values to 8; see docs/bank_speed.md for the cost.
PACKED_ROWS = 20_000

SHARD_BYTES = 450_000_000
BATCH_ROWS = 1024
# Rows are read in batches of about this size; no column of one may be larger.
BATCH_BYTES = 2**26
MAX_COLUMN_BYTES = 2**29
# Of one shard, unpacked.
MAX_SHARD_BYTES = 2**30
# Keys are of length 1, as far as float32 can tell.
MAX_KEY_NORM = 1.001
SCRATCH_PREFIX = ".tmp-"
# keys and values are never filtered on
STATISTICS = ["id", "source_id", "caption"]
SPLIT_COLUMNS = ["key.list.element", "value.list.element"]


def require_bank_packages() -> None:
    """Raise ImportError, naming what to install, unless faiss and pyarrow are there."""
    if faiss is None:
        raise ImportError(
            "A memory bank needs faiss and pyarrow: pip install faiss-cpu pyarrow. Without them the model still runs "
            'with memory="off".'
        )


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


@dataclass
class BankFiles:
    """A bank's local files, each in a folder of its own sha256, and what was counted while they were written."""

    sha256: dict[str, str]
    num_rows: int
    key_dim: int
    value_shape: tuple[int, int]
    packed: bool
    trusted_index: Path | None = None  # a flat index of the same keys, elsewhere

    # The hashes of keys and values don't cover their shapes.
    @property
    def keys_folder(self) -> Path:
        return cache_root() / f"{self.sha256['keys']}-{self.num_rows}x{self.key_dim}"

    @property
    def values_folder(self) -> Path:
        return cache_root() / f"{self.sha256['values']}-{self.num_rows}x{self.value_shape[0]}x{self.value_shape[1]}"

    @property
    def rows(self) -> Path:
        return cache_root() / f"{self.sha256['rows']}-{self.num_rows}" / "rows.arrow"

    @property
    def paths(self) -> list[Path]:
        keys, values = (PackedKeys, PackedValues) if self.packed else (PlainKeys, PlainValues)
        return [
            *(self.keys_folder / name for name in keys.FILES),
            *(self.values_folder / name for name in values.FILES),
            self.rows,
        ]

    def exist(self) -> bool:
        return all(path.is_file() for path in self.paths)

    @contextlib.contextmanager
    def laid_out_once(self) -> Iterator[None]:
        """Wait while another process lays the same bank out; a killed one keeps nobody waiting.

        Where nothing can be locked, on Windows and some network file systems, each does so: more work, but no harm.

        Raises:
            OSError: the cache can't be written.
        """
        folder = cache_root() / f".layout-{self.keys_folder.name}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cache_error(error) from error
        try:
            with locked(folder):
                yield
        finally:
            with contextlib.suppress(OSError):  # the next one has removed it
                folder.rmdir()

    def open_keys(self) -> PlainKeys | PackedKeys:
        if self.trusted_index is None and self.packed:
            return PackedKeys(self.keys_folder, self.num_rows, self.key_dim)
        if self.trusted_index is not None:
            return open_foreign_keys(self.trusted_index, self.num_rows, self.key_dim)
        return PlainKeys(self.keys_folder / PlainKeys.FILES[0], self.num_rows, self.key_dim)

    def open_values(self) -> PlainValues | PackedValues:
        kind = PackedValues if self.packed else PlainValues
        return kind(self.values_folder, (self.num_rows, *self.value_shape))


def cache_root() -> Path:
    return Path(constants.HF_HOME) / "tinyalign"


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


def write_local_files(
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    value_shape: tuple[int, int],
    name: str,
    packed: bool | None = None,
    expected: dict[str, str] | None = None,
) -> BankFiles:
    """Check the rows of a bank and lay them out for use: keys, values and rows, to be memory-mapped.

    Every file is written under a temporary name and renamed to its content's sha256, so that a killed or failed run
    leaves nothing behind that could be taken for a bank, and processes that do the same work at once do no harm.

    Args:
        batches: record batches of this schema, in the order of the bank.
        schema: of `row_schema`.
        value_shape: what a value is.
        name: what the errors call the source of the rows.
        packed: whether to round keys and values and pack them; by default in banks of more than `PACKED_ROWS` rows.
        expected: the sha256 of keys, values and rows, where they are known.

    Raises:
        ValueError: a row, a type or a sha256 is refused, or there is no row.
        OSError: the cache could not be written.
    """
    key_dim = schema.field("key").type.list_size
    try:
        with scratch_folder(cache_root(), SCRATCH_PREFIX) as scratch:
            num_rows, sha256 = _lay_out(batches, scratch, schema, value_shape, name)
            if packed is None:
                packed = num_rows > PACKED_ROWS
            if packed:
                sha256["keys"] = PackedKeys.pack(PlainKeys(scratch / PlainKeys.FILES[0], num_rows, key_dim), scratch)
                sha256["values"] = PackedValues.pack(PlainValues(scratch, (num_rows, *value_shape)), scratch)
            for part, digest in sha256.items():
                if expected is not None and digest != expected[part]:
                    raise ValueError(
                        f"{name}: the sha256 of the {part} is {digest}, but {CONFIG_NAME} says {expected[part]}. The "
                        "bank was damaged or changed by hand: save or download it again."
                    )
            files = BankFiles(sha256, num_rows, key_dim, value_shape, packed)
            for path in files.paths:
                path.parent.mkdir(exist_ok=True)
                sync(scratch / path.name)
                os.replace(scratch / path.name, path)
            return files
    except OSError as error:
        raise cache_error(error) from error


def _lay_out(
    batches: Iterable[pa.RecordBatch], folder: Path, schema: pa.Schema, value_shape: tuple[int, int], name: str
) -> tuple[int, dict[str, str]]:
    """See `write_local_files`; returns the number of rows, and the sha256 of keys, values and rows."""
    hashes = {part: hashlib.sha256() for part in ("keys", "values", "rows")}
    key_dim = schema.field("key").type.list_size
    num_rows, writer = 0, None
    with contextlib.ExitStack() as stack:
        keys_file, values_file, rows_file = (
            stack.enter_context(open(folder / file, "wb"))
            for file in (*PlainKeys.FILES, *PlainValues.FILES, "rows.arrow")
        )

        def write_heads() -> None:  # they are as long whatever the number of rows
            keys_file.write(index_header(faiss.IndexFlatIP(key_dim), num_rows, num_rows * key_dim))
            head = {"descr": "<f2", "fortran_order": False, "shape": (num_rows, *value_shape)}
            np.lib.format.write_array_header_1_0(values_file, head)

        write_heads()
        for batch in batches:
            check_schema(batch.schema, schema, name)
            batch = pa.record_batch([batch.column(column) for column in schema.names], schema=schema)
            check_batch(batch, num_rows, name)
            for part, file in (("key", keys_file), ("value", values_file)):
                content = matrix(batch, part).tobytes()
                file.write(content)
                hashes[f"{part}s"].update(content)
            rows = batch.drop_columns(["key", "value"])
            writer = writer or pa.ipc.new_file(rows_file, rows.schema)
            writer.write_batch(rows)
            for row in rows.to_pylist():
                hashes["rows"].update(_row_bytes(row))
            num_rows += len(batch)
        if num_rows == 0:
            raise ValueError(f"{name} has no rows: a memory bank needs at least one.")
        writer.close()
        keys_file.seek(0)
        values_file.seek(0)
        write_heads()
    return num_rows, {part: digest.hexdigest() for part, digest in hashes.items()}


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


class Spool:
    """Record batches put aside in a temporary file, until what is needed to finish them is known."""

    def __init__(self, batches: Iterable[pa.RecordBatch]):
        self._incoming = batches
        self._folder = scratch_folder(cache_root(), SCRATCH_PREFIX)

    def __enter__(self) -> Spool:
        try:
            self._path = self._folder.__enter__() / "spool.arrow"
        except OSError as error:
            raise cache_error(error) from error
        try:
            self._write()
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # others may be of the dataset's own files
                raise cache_error(error) from error
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


def cache_error(error: OSError) -> OSError:
    """The same error, saying what to do about it."""
    return OSError(
        error.errno,
        f"Writing the memory bank's local files to {cache_root()} failed: {error}. Free some space there, or set "
        "HF_HOME to a folder that can be written, on a larger disk.",
    )
