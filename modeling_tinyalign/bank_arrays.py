"""A memory bank's local files: laid out once under HF_HOME/tinyalign, then memory-mapped by all that use them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants

from .bank_format import (
    CONFIG_NAME,
    BankConfig,
    BankHashes,
    arrays_of,
    check_batch,
    check_schema,
    config_schema,
    matrix,
    pa,
)
from .files import locked, scratch_folder, sync

try:
    import faiss
except ImportError:
    faiss = None  # bank_index.py has it from here

# A larger bank is quantized unless it is said otherwise; docs/bank_speed.md says what that costs.
QUANTIZED_ROWS = 20_000
SCRATCH_PREFIX = ".tmp-"
MAX_CODE = 127
TINY_STEP = np.float32(2.0**-24)  # of float16
NO_VALUES = np.empty(0, np.float16)
GATHER_ROWS = 256  # at a time: they stay in the processor's cache

KEYS, VALUES, CODES, EXPONENTS, ROWS = "keys.bin", "values.bin", "codes.bin", "exponents.bin", "rows.arrow"


def require_bank_packages() -> None:
    """Raise ImportError, naming what to install, unless faiss and pyarrow are there."""
    if faiss is None or pa is None:
        raise ImportError(
            "A memory bank needs faiss and pyarrow: pip install faiss-cpu pyarrow. Without them the model still runs "
            'with memory="off".'
        )


def cache_root() -> Path:
    """Return the folder of everything that this package keeps on this machine."""
    return Path(constants.HF_HOME) / "tinyalign"


@contextlib.contextmanager
def cache_errors() -> Iterator[None]:
    """Add what to do about it to an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"Writing the memory bank's local files to {cache_root()} failed: {error}. Free some space there, or set "
            "HF_HOME to a folder that can be written, on a larger disk.",
        ) from error


def local_folder(config: BankConfig) -> Path:
    """Return the folder of a bank's local files, named after what is in them."""
    shape = [config.num_rows, config.key_dim, *config.value_shape, config.quantized]  # the hashes don't cover it
    parts = [config.sha256.keys, config.sha256.values, config.sha256.rows, *shape]
    return cache_root() / f"bank-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


@contextlib.contextmanager
def laid_out_once(folder: Path) -> Iterator[None]:
    """Wait while another process lays the same bank out. Where nothing can be locked each does so, without harm."""
    lock = cache_root() / f".layout-{folder.name}"
    with cache_errors():
        lock.mkdir(parents=True, exist_ok=True)
    try:
        with locked(lock):
            yield
    finally:
        with contextlib.suppress(OSError):  # the next one has removed it
            lock.rmdir()


def lay_out(
    batches: Iterable[pa.RecordBatch], config: BankConfig, name: str, expected: BankHashes | None = None
) -> BankConfig:
    """Check the rows of a bank and write its local files: under a temporary name, put in place by one rename.

    So a killed or failed run leaves nothing behind that could be taken for a bank.

    Args:
        batches: the rows, in order, with the columns of `config_schema(config)`.
        config: sizes, columns and `quantized`; returned with the number of rows and the sha256 found.
        name: the source of the rows, for errors.
        expected: sha256 that keys, values and rows must have.

    Raises:
        ValueError: a row, a type or a sha256 is refused, or there is no row.
        OSError: the cache could not be written.
    """
    with contextlib.ExitStack() as stack:
        with cache_errors():
            folder = stack.enter_context(scratch_folder(cache_root(), SCRATCH_PREFIX))
            writer = stack.enter_context(contextlib.closing(RowWriter(folder, config, name)))
        for batch in batches:  # an OSError of the data set's own is left as it is
            with cache_errors():
                writer.write(batch)
        with cache_errors():
            config = writer.finish()
            for part, found in vars(config.sha256).items():
                wanted = found if expected is None else vars(expected)[part]
                if found not in (wanted, None):  # those of the encoders are not known here
                    raise ValueError(
                        f"{name}: the sha256 of the {part} is {found}, but {CONFIG_NAME} says {wanted}. The bank was "
                        "damaged or changed by hand: save or download it again."
                    )
            for path in folder.iterdir():
                sync(path)
            try:
                os.rename(folder, local_folder(config))
            except OSError:
                if not local_folder(config).is_dir():  # else another process was first
                    raise
    return config


class RowWriter:
    """Write the rows of a bank to the local files in `folder`, and hash them. Arguments as of `lay_out`."""

    def __init__(self, folder: Path, config: BankConfig, name: str):
        self.config, self.name, self.num_rows = config, name, 0
        self.schema = config_schema(config)
        self.hashes = {part: hashlib.sha256() for part in ("keys", "values", "rows")}
        # written as files: on a full disk a memory map ends in a signal, not in an error
        values = (CODES, EXPONENTS) if config.quantized else (VALUES,)
        names = (KEYS, ROWS, *(values if config.value_size else ()))
        self.files = {name: open(folder / name, "wb") for name in names}
        rows = self.schema.empty_table().drop_columns(arrays_of(self.schema))
        self.rows = pa.ipc.new_file(self.files[ROWS], rows.schema)

    def close(self) -> None:
        """Close the files, complete or not."""
        for file in self.files.values():
            with contextlib.suppress(OSError):  # of a full disk, which was reported before
                file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Check and write a batch."""
        check_schema(batch.schema, self.schema, self.name)
        batch = batch.select(self.schema.names).cast(self.schema)
        check_batch(batch, self.num_rows, self.name)
        keys = matrix(batch, "key").astype(np.float16 if self.config.quantized else np.float32, copy=False)
        self.files[KEYS].write(keys.tobytes())
        values = matrix(batch, "value") if self.config.value_size else NO_VALUES
        if VALUES in self.files:
            self.files[VALUES].write(values.tobytes())
        elif CODES in self.files:
            codes, exponents, values = quantize(values.reshape(len(values), *self.config.value_shape))
            self.files[CODES].write(codes.tobytes())
            self.files[EXPONENTS].write(exponents.tobytes())
        rows = batch.drop_columns(arrays_of(batch.schema))
        self.rows.write_batch(rows)
        self.num_rows += len(batch)
        # as they are in the Parquet files, not as they lie here
        update_hashes(self.hashes, keys.astype(np.float32, copy=False), values, rows)

    def finish(self) -> BankConfig:
        """Complete the files; see `lay_out`."""
        if self.num_rows == 0:
            raise ValueError(f"{self.name} has no rows: a memory bank needs at least one.")
        self.rows.close()
        for file in self.files.values():
            file.close()
        digests = {part: digest.hexdigest() for part, digest in self.hashes.items()}
        return replace(self.config, num_rows=self.num_rows, num_shards=0, sha256=BankHashes(**digests))


def update_hashes(hashes: dict, keys: np.ndarray, values: np.ndarray, rows: pa.RecordBatch) -> None:
    """Add keys, values and the other columns to the sha256 of each; a row's number says nothing about it."""
    hashes["keys"].update(keys.tobytes())
    hashes["values"].update(values.tobytes())
    for row in rows.drop_columns(["id"]).to_pylist():
        if row.get("thumbnail") is not None:
            row["thumbnail"] = hashlib.sha256(row["thumbnail"]["bytes"] or b"").hexdigest()
        hashes["rows"].update(json.dumps(row, sort_keys=True, default=str).encode())


def damaged(path: Path, found: object) -> ValueError:
    """Return the error of a local file that does not hold what was written to it."""
    return ValueError(f"The local file {path} is damaged ({found}). Delete {path.parent} and load the bank again.")


def map_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Return a memory-mapped array; ValueError, naming the file, unless it is as large."""
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else "no file"
    if found != expected:
        raise damaged(path, f"found {found}, expected {expected} bytes")
    return np.asarray(np.memmap(path, dtype, "r", shape=shape))


def map_table(path: Path) -> pa.Table:
    """Return a memory-mapped Arrow file; ValueError, naming it, if it is none."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error


class Values:
    """Memory-mapped values: `numbers` `(num_rows, num_latents, latent_dim)` are float16, or the int8 multiples of
    `quantize`, whose steps have the `exponents` `(num_rows, num_latents)`, int8.
    """

    def __init__(self, numbers: np.ndarray, exponents: np.ndarray | None = None):
        self._numbers = read_only_tensor(numbers)
        self._exponents = None if exponents is None else read_only_tensor(exponents)

    def gather(self, rows: np.ndarray, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of `rows`, of any shape, `(*rows.shape, num_latents, latent_dim)`.

        8-bit numbers are moved to the device as such.
        """
        flat, shape = torch.from_numpy(rows.reshape(-1)), self._numbers.shape[1:]
        if self._exponents is None:
            values = empty_tensor((len(flat), *shape), self._numbers.dtype, "cpu")
            torch.index_select(self._numbers, 0, flat, out=values)
            values = values.view(*rows.shape, *shape).to(device)
            return values if dtype == values.dtype else empty_tensor(values.shape, dtype, device).copy_(values)
        steps = self._exponents.index_select(0, flat).to(device).float().exp2().unsqueeze(-1)
        values = empty_tensor((len(flat), *shape), dtype, device)
        # processors have a fast way from 8 bits to float32, and from there to half precision, but none around it
        scratch = None if dtype == torch.float32 else torch.empty((GATHER_ROWS, *shape), device=device)
        for start in range(0, len(flat), GATHER_ROWS):
            block = slice(start, start + GATHER_ROWS)
            codes = self._numbers.index_select(0, flat[block]).to(device)
            numbers = values[block] if scratch is None else scratch[: len(codes)]
            numbers.copy_(codes).mul_(steps[block])
            if scratch is not None:
                values[block] = numbers
        return values.view(*rows.shape, *shape)


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round values `(n, num_latents, latent_dim)` to multiples, -127 to 127, of a step for each latent.

    Steps are powers of two: what is rounded is float16 still, and stays what it is when it is rounded again.

    Returns:
        the multiples, int8, the exponents of the steps `(n, num_latents)`, int8, and the rounded values, float16.
    """
    numbers = values.astype(np.float32)
    mantissas, exponents = np.frexp(np.abs(numbers).max(axis=2, keepdims=True) / np.float32(MAX_CODE))
    steps = np.ldexp(np.float32(1), exponents - (mantissas == 0.5))  # the next power of two; 1 for 0
    steps = np.maximum(steps, TINY_STEP)
    largest = np.finfo(np.float16).max // steps
    codes = np.clip(np.rint(numbers / steps), -largest, largest)
    rounded = (codes * steps + np.float32(0)).astype(np.float16)  # no negative zeros
    return codes.astype(np.int8), np.log2(steps[..., 0]).astype(np.int8), rounded


def empty_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Return `torch.empty`, on a CPU through numpy, which asks for huge pages: small ones take longer to fill."""
    if torch.device(device).type != "cpu" or 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def read_only_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor of the same memory, to be read only: torch has none that refuse writing, and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)
