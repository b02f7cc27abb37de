"""`tinyalign bank info` and `verify`: what is in a memory bank, and whether it is what it says."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from ...modeling_tinyalign import KeyEncoder, MemoryBank, ValueEncoder
from ...modeling_tinyalign.bank_config import CONFIG_NAME, check_config, check_file, read_json
from ...modeling_tinyalign.bank_fast_index import index_problems
from ...modeling_tinyalign.bank_shards import BATCH_ROWS, check_batch, check_schema, config_schema, matrix, shard_names
from ...modeling_tinyalign.bank_storage import cache_root, row_bytes
from ...modeling_tinyalign.saved_bank import KEY_ENCODER_NAME, VALUE_ENCODER_NAME
from .changes import size_of
from .log import open_bank, read_log

COMMON, WIDTH = 8, 80  # values of a column that are shown, and their characters
SEARCHED = 32  # rows that must find themselves


def bank_info(folder: Path) -> str:
    """What is in a bank, in lines."""
    folder, bank = Path(folder), open_bank(folder)
    config, tower, key_encoder = bank.config, bank.config["tower"], bank.config["key_encoder"]
    encoders = size_of(folder / "value_encoder") + (folder / KEY_ENCODER_NAME).stat().st_size
    packed = config.get("packed")
    keys = [f"{bank.key_dim} numbers of {12 if packed else 32} bits, {bank.key_space} space"]
    if key_encoder["grid"] > 1:
        keys.append(f"{key_encoder['grid']} x {key_encoder['grid']} cells")
    if bank.key_encoder.projection is not None:
        keys.append(f"whitened from {bank.key_encoder.mean.numel()}")
    index = config.get("index") or {"index": "exact"}
    on_disk = f"{_mib(size_of(folder / 'data'))} rows in {config['num_shards']} shards, {_mib(encoders)} encoders"
    revision = f" at {tower['revision']}" if tower["revision"] else ""
    lines = [  # pairs: a column may be named like one of these
        ("rows", f"{len(bank):,} of {len(np.unique(bank._source_order[0])):,} images"),
        ("on disk", on_disk),
        ("keys", ", ".join(keys)),
        ("values", f"{bank.num_latents} x {bank.latent_dim} numbers of {8 if packed is True else 16} bits"),
        ("thumbnails", f"{config['thumbnail_size']} pixels" if config["thumbnail_size"] else "none"),
        ("tower", f"{tower['name']}{revision}, images of {' x '.join(map(str, tower['image_shape']))}"),
        ("index", ", ".join(f"{value}" if name == "index" else f"{name} {value}" for name, value in index.items())),
        *((column, _common_values(bank._table[column])) for column in config["columns"]),
    ]
    for number, change in enumerate(read_log(folder), 1):
        lines.append((f"change {number}", f"{_describe(change)}: {change['rows']:,} rows"))
    lines += [(f"sha256 {name}", digest) for name, digest in config["sha256"].items() if name != "config"]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in lines)


def _describe(change: dict) -> str:
    """`build of pairs.parquet`, from a line of the log."""
    if "settings" in change:
        settings = change["settings"]
        revision = f" at {settings['dataset_revision']}" if settings["dataset_revision"] else ""
        return f"{change['change']} of {settings['dataset']}{revision}"
    of = ", ".join(change["banks"]) if "banks" in change else change.get("removed")
    return change["change"] + (f" of {of}" if of else "")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _common_values(column: pa.ChunkedArray) -> str:
    """`cc0 12, cc-by 3, (none) 1`, the most frequent first."""
    counts = Counter(column.to_pylist()).most_common()
    names = {None: "(none)", "": "(empty)"}
    shown = [f"{names.get(value) or ' '.join(value.split())[:WIDTH]} {count:,}" for value, count in counts[:COMMON]]
    more = len(counts) - COMMON
    return ", ".join(shown + ([f"and {more} other values"] if more > 0 else []))


def bank_problems(folder: Path, model: PreTrainedModel | None = None) -> Iterator[str]:
    """
    What is wrong with a bank, nothing if it is what its bank_config.json says: the number of rows, each number and
    name in them, the sha256 of all that is in it, the encoders, and this machine's copy, which is what is searched.

    Args:
        model: Must have the vision tower of the bank's keys.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    try:
        config = read_json(path)
        check_config(config, path)
    except ValueError as error:
        yield str(error)
        return
    encoders_are_right = True
    for name, part in ((KEY_ENCODER_NAME, "key_encoder"), (VALUE_ENCODER_NAME, "value_encoder")):
        try:
            check_file(folder / name, config["sha256"][part])
            if part == "key_encoder":
                KeyEncoder.load(folder / name, config[part], config["key_dim"])
            else:
                ValueEncoder.of_bank(folder / name, config[part])
        except ValueError as error:
            encoders_are_right = False
            yield str(error)
    try:
        path = folder / "value_encoder" / "config.json"
        settings = {"architectures": ["ValueEncoder"], **config["value_encoder"]}
        if not settings.items() <= read_json(path).items():
            yield f"{path} is not what {CONFIG_NAME} says, {settings}. Save or download the bank again."
        read_log(folder)
    except ValueError as error:
        yield str(error)
    shards = Shards(folder, config)
    yield from shards.problems()
    if not shards.are_right or not encoders_are_right:
        return
    try:
        bank = MemoryBank.from_pretrained(folder)
        wrong_index = list(index_problems(bank._files.keys_folder))
        yield from wrong_index
        yield from _problems_of_copy(bank, shards, searched=not wrong_index)
        if model is not None:
            bank.check_probes(model)
    except ValueError as error:
        yield str(error)


class Shards:
    """The Parquet files of a bank, read whatever is wrong with some of them."""

    def __init__(self, folder: Path, config: dict):
        self.config, self.schema = config, config_schema(config)
        self.paths = [folder / name for name in shard_names(config["num_shards"])]
        self.are_right = True

    def problems(self) -> Iterator[str]:
        hashes, count = {part: hashlib.sha256() for part in ("keys", "values", "rows")}, 0
        first = 0  # the number that the next row must have; None behind a shard that could not be read
        for path in self.paths:
            try:
                for batch in self.read(path):
                    first = batch["id"][0].as_py() or 0 if first is None else first
                    try:
                        check_batch(batch, first, str(path))
                    except ValueError as error:
                        self.are_right = False
                        yield str(error)
                    count, first = count + len(batch), first + len(batch)
                    _update(hashes, batch)
            except (pa.ArrowException, OSError, ValueError) as error:
                self.are_right, first = False, None
                yield str(error) if str(path) in str(error) else f"{path} cannot be read ({error})."
        for path in sorted(set(self.paths[0].parent.glob("*")) - set(self.paths)):
            self.are_right = False
            yield f"{path} is none of the bank's {len(self.paths)} shards, but `datasets` would read it: delete it."
        if count != self.config["num_rows"]:
            self.are_right = False
            yield f"The shards hold {count} rows, but {CONFIG_NAME} says {self.config['num_rows']}."
        for part, digest in hashes.items():
            if digest.hexdigest() != self.config["sha256"][part]:
                self.are_right = False
                yield (
                    f"The sha256 of the {part} in the shards is {digest.hexdigest()}, but {CONFIG_NAME} says "
                    f"{self.config['sha256'][part]}."
                )

    def read(self, path: Path) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as shard:
            check_schema(shard.schema_arrow, self.schema, str(path))
            rest = shard.metadata.num_rows
            for batch in shard.iter_batches(BATCH_ROWS):
                rest -= len(batch)
                yield pa.record_batch([batch.column(name) for name in self.schema.names], schema=self.schema)
        if rest:
            raise ValueError(f"{path} is damaged: {rest} of its rows cannot be read.")


def _update(hashes: dict, batch: pa.RecordBatch):
    """As the hashes of bank_config.json are made."""
    for part in ("key", "value"):
        hashes[f"{part}s"].update(matrix(batch, part).tobytes())
    for row in batch.drop_columns(["key", "value"]).to_pylist():
        hashes["rows"].update(row_bytes(row))


def _problems_of_copy(bank: MemoryBank, shards: Shards, searched: bool) -> Iterator[str]:
    """What is memory-mapped here is what is in the shards, and, if it is `searched`, a row's key finds that row."""
    hashes = {part: hashlib.sha256() for part in ("keys", "values", "rows")}
    try:
        for batch in bank._batches():
            _update(hashes, batch)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"This machine's copy of the rows is damaged ({error}). Delete {copy_of(bank, 'rows')} and load the bank "
            "again."
        ) from error
    for part, digest in hashes.items():
        if digest.hexdigest() != bank.config["sha256"][part]:
            yield (
                f"This machine's copy of the {part} is not what is in the bank: its sha256 is {digest.hexdigest()}, "
                f"expected {bank.config['sha256'][part]}. Delete {copy_of(bank, part)} and load the bank again."
            )
    if not searched:
        return
    chosen = np.sort(np.random.default_rng(0).permutation(len(bank))[:SEARCHED])
    batches = (batch for path in shards.paths for batch in shards.read(path))
    keys = np.concatenate([matrix(batch, "key")[np.isin(batch["id"].to_numpy(), chosen)] for batch in batches])
    scores, found = bank.search(keys, 1)
    own = np.einsum("nd,nd->n", keys.astype(np.float64), keys.astype(np.float64))
    for row, score, neighbour, expected in zip(chosen, scores[:, 0], found[:, 0], own, strict=True):
        if score < expected - 1e-5:
            yield (
                f"The index does not find row {row} by its own key: it returns row {neighbour} with {score:.4f}, "
                f"expected {expected:.4f}. Delete {copy_of(bank, 'keys')} and load the bank again."
            )


def copy_of(bank: MemoryBank, part: str) -> Path:
    """The folder of this machine's copy of a bank's keys, values or rows."""
    (folder,) = cache_root().glob(f"{bank.config['sha256'][part]}-*")
    return folder
