"""A memory bank's folder, to share: how it is written and read, and what is checked of other people's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from .bank_arrays import laid_out_once, lay_out, local_folder, require_bank_packages
from .bank_format import (
    BATCH_ROWS,
    CONFIG_NAME,
    KEY_ENCODER_NAME,
    VALUE_ENCODER_NAME,
    BankConfig,
    arrays_of,
    broken_bank,
    check_file,
    check_schema,
    config_schema,
)
from .files import evict_on_error, fetch, put_back
from .key_encoder import KeyEncoder
from .value_encoder import ValueEncoder

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:
    pa = pc = pq = None

SHARD_BYTES = 450_000_000  # `datasets` makes shards of up to 500 MB
BATCH_BYTES = 2**26  # rows are read in batches of about this size
# Limits for the shards of strangers: of one column of one batch, and of one shard, unpacked.
MAX_COLUMN_BYTES = 2**29
MAX_SHARD_BYTES = 2**30
STATISTICS = ["id", "source_id", "caption"]  # keys and values are never filtered on


def open_folder(
    name_or_path: str | Path, revision: str | None, token: str | bool | None
) -> tuple[BankConfig, KeyEncoder, torch.Tensor, Path, str | None, str | None]:
    """Read a bank's config, key encoder and probe keys, as `MemoryBank.from_pretrained` does. Return them, the folder,
    and repository and commit, None if it is none of the Hub's.
    """
    require_bank_packages()
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"The bank's name is a {type(name_or_path).__name__}, expected a folder or a repository.")
    folder, repo_id = Path(name_or_path), None
    if revision is None:
        put_back(folder)
    if revision is not None or not folder.is_dir():
        repo_id = str(name_or_path)
        folder = fetch(repo_id, CONFIG_NAME, revision, token).parent
        revision = folder.name
    config_path, encoder_path = folder / CONFIG_NAME, folder / KEY_ENCODER_NAME
    with evict_on_error([config_path] if repo_id else []):
        config = BankConfig.from_json(config_path)
    if repo_id is not None:
        for name in (KEY_ENCODER_NAME, *([VALUE_ENCODER_NAME] if config.value_encoder else [])):
            fetch(repo_id, name, revision, token)
    with evict_on_error([config_path, encoder_path] if repo_id else []):
        check_file(encoder_path, config.sha256.key_encoder)
        key_encoder, probe_keys = KeyEncoder.load(encoder_path, config.key_encoder, config.key_dim)
    return config, key_encoder, probe_keys, folder.absolute(), repo_id, revision  # more of it is read later


def read_value_encoder(folder: Path, config: BankConfig, is_download: bool) -> ValueEncoder:
    """Read the value encoder; ValueError, naming its file, if it is not the one of the bank."""
    path = folder / VALUE_ENCODER_NAME
    with evict_on_error([path] if is_download else []):
        check_file(path, config.sha256.value_encoder)
    return ValueEncoder.of_bank(path, config.value_encoder)


def lay_out_folder(
    config: BankConfig, name_or_path: str | Path, repo_id: str | None, revision: str | None, token: str | bool | None
) -> None:
    """Make a bank's local files of its shards, downloaded if they are on the Hub, unless they are there."""
    names, folder = shard_names(config.num_shards), local_folder(config)
    if repo_id is None:
        paths = [Path(name_or_path) / name for name in names]
        for path in paths:
            if not path.is_file():
                raise broken_bank(f"{path} is missing")
    if folder.is_dir():
        return
    with laid_out_once(folder):
        if folder.is_dir():  # another process was first
            return
        fetched = []
        if repo_id is not None:
            fetched = [fetch(repo_id, name, revision, token) for name in (*names, CONFIG_NAME)]
            paths = fetched[:-1]
        with evict_on_error(fetched):
            lay_out(read_shards(paths, config), config, str(paths[0].parent), config.sha256)


def read_shards(paths: Sequence[Path], config: BankConfig) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a saved bank; ValueError if a shard is broken, a bomb, or not as bank_config.json declares."""
    schema = config_schema(config)
    count = size = 0
    for path in paths:
        with _readable_shard(path), pq.ParquetFile(path) as shard:
            check_schema(shard.schema_arrow, schema, str(path))
            size += unpacked_size(shard.metadata, schema, path)
            count += shard.metadata.num_rows
    if count != config.num_rows:
        config_path = paths[0].parents[1] / CONFIG_NAME
        raise broken_bank(f"{config_path} declares {config.num_rows} rows, but the shards hold {count}")
    thumbnails = ["thumbnail.bytes", "thumbnail.path"] if "thumbnail" in schema.names else []
    text = [*config.columns, "source_id", "caption", *thumbnails]
    row_bytes = size // count + 4 * (config.key_dim + config.value_size)
    batch_size = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
    for path in paths:
        with _readable_shard(path), pq.ParquetFile(path, read_dictionary=text) as shard:
            for batch in shard.iter_batches(batch_size=batch_size):
                yield pa.record_batch([_plain(column, path) for column in batch.columns], names=batch.schema.names)


@contextlib.contextmanager
def _readable_shard(path: Path) -> Iterator[None]:
    try:
        yield
    # pyarrow raises the last three on footers that were tampered with
    except (pa.ArrowException, OSError, UnicodeError, OverflowError, MemoryError) as error:
        raise broken_bank(f"{path} cannot be read as Parquet ({error})") from error


def unpacked_size(footer: pq.FileMetaData, schema: pa.Schema, path: Path) -> int:
    """Return the bytes of a shard's columns in memory; ValueError, naming it, if that is more than a shard holds."""
    size = 0
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            expected = group.num_rows * (schema.field(name).type.list_size if name in ("key", "value") else 1)
            if not 0 <= column.num_values <= expected:
                found = f"{column.num_values} values for {group.num_rows} rows"
                raise broken_bank(f"{path}: column {name!r} declares {found}, expected {expected}")
            size += max(0, column.total_uncompressed_size)
    if size > MAX_SHARD_BYTES:
        raise broken_bank(f"{path} unpacks to {size} bytes, expected at most {MAX_SHARD_BYTES}")
    return size


def _plain(column: pa.Array, path: Path) -> pa.Array:
    """Return a column without its dictionary, which makes a thousand copies of a long text in a few bytes."""
    if pa.types.is_struct(column.type):
        parts = [_plain(part, path) for part in column.flatten()]
        return pa.StructArray.from_arrays(parts, names=[field.name for field in column.type], mask=column.is_null())
    if not pa.types.is_dictionary(column.type):
        return column
    size = pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    if size > MAX_COLUMN_BYTES:
        found = f"{len(column)} rows hold {size} bytes of text or pictures"
        raise broken_bank(f"{path}: {found}, expected at most {MAX_COLUMN_BYTES}")
    return column.dictionary_decode()


def shard_names(num_shards: int) -> list[str]:
    """Return the names of a bank's Parquet shards, as the Hub and `load_dataset` expect them."""
    return [f"data/train-{i:05d}-of-{num_shards:05d}.parquet" for i in range(num_shards)]


def write_shards(folder: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema, quantized: bool) -> int:
    """Write batches as `data/train-*.parquet` under `folder`, and return the number of shards."""
    options = {"use_dictionary": False, "write_statistics": STATISTICS}
    if quantized:  # rounded numbers are small once their like bytes are next to each other
        split = [f"{column}.list.element" for column in arrays_of(schema)]
        options |= {"compression": "zstd", "use_byte_stream_split": split}
    (folder / "data").mkdir()
    paths, size = [], 0
    steps = ((batch, max(1, len(batch) * BATCH_BYTES // max(1, batch.nbytes))) for batch in batches)
    parts = (batch.slice(start, step) for batch, step in steps for start in range(0, len(batch), step))
    with contextlib.ExitStack() as stack:
        for batch in parts:
            if not paths or (size and size + batch.nbytes > SHARD_BYTES):
                stack.close()  # the shard before
                paths.append(folder / "data" / f"{len(paths)}.parquet")
                writer, size = stack.enter_context(pq.ParquetWriter(paths[-1], schema, **options)), 0
            writer.write_batch(batch)
            size += batch.nbytes
    for path, name in zip(paths, shard_names(len(paths)), strict=True):
        os.rename(path, folder / name)
    return len(paths)
