"""The local files of a memory bank: laid out once under HF_HOME, then memory-mapped by all that use it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from huggingface_hub import constants

from .bank_config import CONFIG_NAME
from .bank_folders import locked, scratch_folder, sync
from .bank_foreign_index import open_foreign_keys
from .bank_keys import PackedKeys, PlainKeys, index_header, write_array_head
from .bank_shards import check_batch, check_schema, matrix
from .bank_values import PackedValues, PlainValues

try:
    import faiss
    import pyarrow as pa
except ImportError:
    faiss = pa = None

# A bank of more rows is packed: its keys are rounded to 12 bits, its values to 8; see docs/bank_speed.md for the cost.
PACKED_ROWS = 20_000
Packed = bool | Literal["keys"]  # "keys": and the values are left as they are

SCRATCH_PREFIX = ".tmp-"


def require_bank_packages() -> None:
    """Raise ImportError, naming what to install, unless faiss and pyarrow are there."""
    if faiss is None:
        raise ImportError(
            "A memory bank needs faiss and pyarrow: pip install faiss-cpu pyarrow. Without them the model still runs "
            'with memory="off".'
        )


def check_packed(packed: Packed | None):
    """Raise ValueError unless it is a way to pack a bank, or None."""
    if packed is not None and type(packed) is not bool and packed != "keys":
        raise ValueError(f'packed is {packed!r}, expected True, False, "keys", or None to decide by the size.')


@dataclass
class BankFiles:
    """A bank's local files, each in a folder of its own sha256, and what was counted while they were written."""

    sha256: dict[str, str]
    num_rows: int
    key_dim: int
    value_shape: tuple[int, int]
    packed: Packed
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
        keys = PackedKeys if self.packed else PlainKeys
        return [
            *(self.keys_folder / name for name in keys.FILES),
            *(self.values_folder / name for name in self._values_kind.FILES),
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

    @property
    def _values_kind(self) -> type[PlainValues | PackedValues]:
        return PackedValues if self.packed is True else PlainValues

    def open_values(self) -> PlainValues | PackedValues:
        return self._values_kind(self.values_folder, (self.num_rows, *self.value_shape))


def cache_root() -> Path:
    return Path(constants.HF_HOME) / "tinyalign"


def write_local_files(
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    value_shape: tuple[int, int],
    name: str,
    packed: Packed | None = None,
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
        packed: whether to round keys and values and pack them, or the keys only; by default both in banks of more than
            `PACKED_ROWS` rows.
        expected: the sha256 of keys, values and rows, where they are known.

    Raises:
        ValueError: a row, a type, a sha256 or `packed` is refused, or there is no row.
        OSError: the cache could not be written.
    """
    check_packed(packed)
    key_dim = schema.field("key").type.list_size
    try:
        with scratch_folder(cache_root(), SCRATCH_PREFIX) as scratch:
            num_rows, sha256 = _lay_out(batches, scratch, schema, value_shape, name)
            if packed is None:
                packed = num_rows > PACKED_ROWS
            if packed:
                sha256["keys"] = PackedKeys.pack(PlainKeys(scratch / PlainKeys.FILES[0], num_rows, key_dim), scratch)
            if packed is True:
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
            write_array_head(values_file, np.float16, (num_rows, *value_shape))

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
                hashes["rows"].update(row_bytes(row))
            num_rows += len(batch)
        if num_rows == 0:
            raise ValueError(f"{name} has no rows: a memory bank needs at least one.")
        writer.close()
        keys_file.seek(0)
        values_file.seek(0)
        write_heads()
    return num_rows, {part: digest.hexdigest() for part, digest in hashes.items()}


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


def row_bytes(row: dict) -> bytes:
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
