"""`tinyalign bank verify`: finds out if a memory bank is what its bank_config.json says."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from ...modeling_tinyalign import KeyEncoder, MemoryBank, ValueEncoder
from ...modeling_tinyalign.bank_arrays import NO_VALUES, update_hashes
from ...modeling_tinyalign.bank_folder import read_shards, shard_names
from ...modeling_tinyalign.bank_format import (
    CONFIG_NAME,
    KEY_ENCODER_NAME,
    VALUE_ENCODER_NAME,
    BankConfig,
    arrays_of,
    check_batch,
    check_file,
    config_schema,
    file_sha256,
    matrix,
    read_json,
)
from .folders import folder_of_bank

NUM_TESTED = 32  # rows that must find themselves


def bank_problems(name: str | os.PathLike, model: PreTrainedModel | None = None) -> Iterator[str]:
    """Name what is wrong with a bank, a folder or a repository; nothing if it is what its bank_config.json says.

    Read are the number of rows, each number and name in them, the sha256 of all that is in the bank, the encoders, and
    this machine's copy, which is what is searched. A `model` must have the vision tower of the bank's keys.
    """
    try:
        folder = folder_of_bank(name)
        config = BankConfig.from_json(folder / CONFIG_NAME)
        paths, problem = [folder / name for name in shard_names(config.num_shards)], None
        for problem in itertools.chain(encoder_problems(folder, config), shard_problems(paths, config)):
            yield problem
        if problem is None:
            bank = MemoryBank.from_pretrained(folder)
            yield from copy_problems(bank, paths)
            if model is not None:
                bank.check_probes(model)
    except ValueError as error:
        yield str(error)


def encoder_problems(folder: Path, config: BankConfig) -> Iterator[str]:
    """Name what is wrong with the encoders of a bank."""
    key_path, value_path = folder / KEY_ENCODER_NAME, folder / VALUE_ENCODER_NAME
    try:
        check_file(key_path, config.sha256.key_encoder)
        KeyEncoder.load(key_path, config.key_encoder, config.key_dim)
    except ValueError as error:
        yield str(error)
    if config.value_encoder is None:
        return
    try:
        check_file(value_path, config.sha256.value_encoder)
        ValueEncoder.of_bank(value_path, config.value_encoder)
        path = value_path.with_name("config.json")
        settings = {"architectures": ["ValueEncoder"], **config.value_encoder}
        if not settings.items() <= read_json(path).items():
            yield f"{path} is not what {CONFIG_NAME} says, {settings}. Save or download the bank again."
    except ValueError as error:
        yield str(error)


class RowHashes:
    """The sha256 of keys, values and rows, made as those of bank_config.json are."""

    def __init__(self):
        self.hashes = {part: hashlib.sha256() for part in ("keys", "values", "rows")}

    def update(self, batch: pa.RecordBatch) -> None:
        arrays = arrays_of(batch.schema)
        values = matrix(batch, "value") if "value" in arrays else NO_VALUES
        update_hashes(self.hashes, matrix(batch, "key"), values, batch.drop_columns(arrays))

    def differences(self, config: BankConfig, place: str) -> Iterator[str]:
        """Name the parts whose sha256 is not that of the config."""
        for part, digest in self.hashes.items():
            expected = vars(config.sha256)[part]
            if digest.hexdigest() != expected:
                yield (
                    f"The sha256 of the {part} in {place} is {digest.hexdigest()}, but {CONFIG_NAME} says {expected}."
                )


def shard_problems(paths: Sequence[Path], config: BankConfig) -> Iterator[str]:
    """Name what is wrong with the Parquet files of a bank, read whatever is wrong with some of them."""
    hashes, count = RowHashes(), 0
    first = 0  # the number that the next row must have; None behind a shard that could not be read
    for path in paths:
        try:
            for batch in read_shard(path, config):
                first = batch["id"][0].as_py() or 0 if first is None else first
                try:
                    check_batch(batch, first, str(path))
                except ValueError as error:
                    yield str(error)
                count, first = count + len(batch), first + len(batch)
                hashes.update(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            first = None
            yield str(error) if str(path) in str(error) else f"{path} cannot be read ({error})."
    for path in sorted(set(paths[0].parent.glob("*")) - set(paths)):
        yield f"{path} is none of the bank's {len(paths)} shards, but `datasets` would read it: delete it."
    if count != config.num_rows:
        yield f"The shards hold {count} rows, but {CONFIG_NAME} says {config.num_rows}."
    yield from hashes.differences(config, "the shards")


def read_shard(path: Path, config: BankConfig) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a shard; raises `ValueError` as `read_shards`, or if some are missing."""
    schema, rest = config_schema(config), pq.read_metadata(path).num_rows
    for batch in read_shards([path], replace(config, num_rows=rest)) if rest else ():
        rest -= len(batch)
        yield batch.select(schema.names).cast(schema)
    if rest:
        raise ValueError(f"{path} is damaged: {rest} of its rows cannot be read.")


def copy_problems(bank: MemoryBank, paths: Sequence[Path]) -> Iterator[str]:
    """Name what is wrong with this machine's copy: its files, its index, and rows that do not find themselves."""
    folder = bank.folder
    advice = f"Delete {folder} and load the bank again."
    hashes = RowHashes()
    try:
        for batch in bank.batches():
            hashes.update(batch)
    except UnicodeDecodeError as error:
        yield f"This machine's copy of the rows is damaged ({error}). {advice}"
        return
    for problem in hashes.differences(bank.config, "this machine's copy"):
        yield f"{problem} {advice}"
    for path in folder.glob("*.faiss"):
        record = path.with_suffix(".json")
        expected = read_json(record).get("sha256") if record.is_file() else "that of a record beside it"
        if file_sha256(path) != expected:
            yield f"The index {path} is damaged: its sha256 is {file_sha256(path)}, expected {expected}. {advice}"
            return
    chosen = np.sort(np.random.default_rng(0).permutation(len(bank))[:NUM_TESTED])
    batches = (batch for path in paths for batch in read_shard(path, bank.config))
    keys = np.concatenate([matrix(batch, "key")[np.isin(batch["id"].to_numpy(), chosen)] for batch in batches])
    scores, found = bank.search(keys, 1)
    own = np.square(keys, dtype=np.float64).sum(axis=1)
    for row, score, neighbour, expected in zip(chosen, scores[:, 0], found[:, 0], own, strict=True):
        if score < expected - 1e-5:
            yield (
                f"The index does not find row {row} by its own key: it returns row {neighbour} with {score:.4f}, "
                f"expected {expected:.4f}. {advice}"
            )
