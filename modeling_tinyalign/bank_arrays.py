"""A memory bank's local files: laid out once under HF_HOME/tinyalign, then memory-mapped by all that use them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from huggingface_hub import constants

from .bank_format import CONFIG_NAME, BankConfig, BankHashes, check_batch, check_schema, config_schema, matrix
from .files import locked, scratch_folder, sync

try:
    import faiss
    import pyarrow as pa
except ImportError:
    faiss = pa = None

# A larger bank is quantized unless it is said otherwise; docs/bank_speed.md says what that costs.
QUANTIZED_ROWS = 20_000
SCRATCH_PREFIX = ".tmp-"
MAX_CODE = 127
MAX_FLOAT16 = 65504
TINY_STEP = np.float32(2.0**-24)  # of float16
GATHER_ROWS = 256  # at a time: they stay in the processor's cache

KEYS, VALUES, CODES, EXPONENTS, ROWS = "keys.npy", "values.npy", "codes.npy", "exponents.npy", "rows.arrow"


def require_bank_packages() -> None:
    """Raise ImportError, naming what to install, unless faiss and pyarrow are there."""
    if faiss is None:
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


@dataclass(frozen=True)
class BankFiles:
    """The folder of one bank's local files, named after what is in them."""

    config: BankConfig

    @property
    def folder(self) -> Path:
        config = self.config
        shape = [config.num_rows, config.key_dim, *config.value_shape, config.quantized]  # the hashes don't cover it
        parts = [config.sha256.keys, config.sha256.values, config.sha256.rows, *shape]
        return cache_root() / f"bank-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"

    def exist(self) -> bool:
        return self.folder.is_dir()

    @contextlib.contextmanager
    def laid_out_once(self) -> Iterator[None]:
        """Wait while another process lays the same bank out; a killed one keeps nobody waiting.

        Where nothing can be locked, on Windows and some network file systems, each does so: more work, but no harm.

        Raises:
            OSError: the cache can't be written.
        """
        folder = cache_root() / f".layout-{self.folder.name}"
        with cache_errors():
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder):
                yield
        finally:
            with contextlib.suppress(OSError):  # the next one has removed it
                folder.rmdir()

    def open_keys(self) -> np.ndarray:
        """Return the keys `(num_rows, key_dim)`, memory-mapped: float32, or float16 in a quantized bank."""
        dtype = np.float16 if self.config.quantized else np.float32
        return map_array(self.folder / KEYS, dtype, (self.config.num_rows, self.config.key_dim))

    def open_values(self) -> Values | QuantizedValues:
        kind = QuantizedValues if self.config.quantized else Values
        return kind(self.folder, (self.config.num_rows, *self.config.value_shape))

    def open_table(self) -> pa.Table:
        """Return every column but key and value."""
        path = self.folder / ROWS
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"The local file {path} is damaged ({error}). Delete {path.parent} and load the bank again."
            ) from error


def lay_out(
    batches: Iterable[pa.RecordBatch], config: BankConfig, name: str, expected: BankHashes | None = None
) -> BankConfig:
    """Check the rows of a bank and write its local files.

    They are written under a temporary name and put in place by one rename, so that a killed or failed run leaves
    nothing behind that could be taken for a bank, and processes that do the same work at once do no harm.

    Args:
        batches: the rows, in order, with the columns of `config_schema(config)`.
        config: sizes, columns and `quantized`; its number of rows and sha256 are not read.
        name: the source of the rows, for errors.
        expected: sha256 that keys, values and rows must have.

    Returns:
        `config` with the number of rows and the sha256 found.

    Raises:
        ValueError: a row, a type or a sha256 is refused, or there is no row.
        OSError: the cache could not be written.
    """
    with contextlib.ExitStack() as stack:
        with cache_errors():
            scratch = stack.enter_context(scratch_folder(cache_root(), SCRATCH_PREFIX))
            folder = scratch / "bank"
            folder.mkdir()
            writer = stack.enter_context(RowWriter(folder, config, name))
        for batch in batches:  # an OSError of the data set's own is left as it is
            with cache_errors():
                writer.write(batch)
        with cache_errors():
            config = writer.finish()
            for part in ("keys", "values", "rows"):
                found, wanted = vars(config.sha256)[part], vars(expected or config.sha256)[part]
                if found != wanted:
                    raise ValueError(
                        f"{name}: the sha256 of the {part} is {found}, but {CONFIG_NAME} says {wanted}. The bank was "
                        "damaged or changed by hand: save or download it again."
                    )
            for path in folder.iterdir():
                sync(path)
            target = BankFiles(config).folder
            try:
                os.rename(folder, target)
            except OSError:
                if not target.is_dir():  # else another process was first
                    raise
    return config


@dataclass
class RowWriter:
    """Write the rows of a bank to the local files in `folder`, and hash them. Arguments as of `lay_out`."""

    folder: Path
    config: BankConfig
    name: str
    num_rows: int = 0
    rows: pa.RecordBatchFileWriter | None = None
    files: dict[str, BinaryIO] = field(default_factory=dict)

    def __post_init__(self):
        self.schema = config_schema(self.config)
        self.hashes = {part: hashlib.sha256() for part in ("keys", "values", "rows")}

    def __enter__(self) -> RowWriter:
        names = (KEYS, CODES, EXPONENTS) if self.config.quantized else (KEYS, VALUES)
        self.files = {name: open(self.folder / name, "wb") for name in (*names, ROWS)}
        self._write_heads()
        return self

    def __exit__(self, *exception) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # of a full disk, which was reported before
                file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Check and write a batch."""
        check_schema(batch.schema, self.schema, self.name)
        batch = pa.record_batch([batch.column(column) for column in self.schema.names], schema=self.schema)
        check_batch(batch, self.num_rows, self.name)
        keys, values = matrix(batch, "key"), matrix(batch, "value")
        if self.config.quantized:
            keys = keys.astype(np.float16)
            codes, exponents, values = quantize(values.reshape(len(batch), *self.config.value_shape))
            self.files[CODES].write(codes.tobytes())
            self.files[EXPONENTS].write(exponents.tobytes())
        else:
            self.files[VALUES].write(values.tobytes())
        self.files[KEYS].write(keys.tobytes())
        self.hashes["keys"].update(keys.astype(np.float32, copy=False).tobytes())
        self.hashes["values"].update(values.tobytes())
        rows = batch.drop_columns(["key", "value"])
        self.rows = self.rows or pa.ipc.new_file(self.files[ROWS], rows.schema)
        self.rows.write_batch(rows)
        for row in rows.to_pylist():
            self.hashes["rows"].update(row_bytes(row))
        self.num_rows += len(batch)

    def finish(self) -> BankConfig:
        """Complete the files; see `lay_out`."""
        if self.num_rows == 0:
            raise ValueError(f"{self.name} has no rows: a memory bank needs at least one.")
        self.rows.close()
        self._write_heads()
        for file in self.files.values():
            file.close()
        digests = {part: digest.hexdigest() for part, digest in self.hashes.items()}
        return replace(self.config, num_rows=self.num_rows, num_shards=0, sha256=BankHashes(**digests))

    def _write_heads(self) -> None:
        """Write what a .npy file begins with; it is as long whatever the number of rows.

        Writing the arrays to a memory map instead would end in a signal, and not in an error, when the disk is full.
        """
        key_dtype = np.float16 if self.config.quantized else np.float32
        shape = self.num_rows, *self.config.value_shape
        heads = {
            KEYS: (key_dtype, (self.num_rows, self.config.key_dim)),
            VALUES: (np.float16, shape),
            CODES: (np.int8, shape),
            EXPONENTS: (np.int8, shape[:2]),
        }
        for name in heads.keys() & self.files.keys():
            dtype, shape = heads[name]
            self.files[name].seek(0)
            head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self.files[name], head)


def row_bytes(row: dict) -> bytes:
    """Return what the sha256 of the rows is made of: everything in a row but its number, key and value."""
    row = {name: value for name, value in row.items() if name != "id"}
    if row.get("thumbnail") is not None:
        row["thumbnail"] = hashlib.sha256(row["thumbnail"]["bytes"] or b"").hexdigest()
    return json.dumps(row, sort_keys=True, default=str).encode()


def map_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Return a memory-mapped .npy file; ValueError, naming it, unless it holds this."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found = None if (array.dtype, array.shape) == (dtype, shape) else f"{array.dtype} of shape {array.shape}"
    except (ValueError, OSError, EOFError) as error:
        found = error
    if found is not None:
        raise ValueError(
            f"The local file {path} is damaged (found {found}, expected {np.dtype(dtype)} of {shape}). Delete "
            f"{path.parent} and load the bank again."
        )
    return np.asarray(array)


class Values:
    """Memory-mapped float16 values: `values[rows]` is `(..., num_latents, latent_dim)`.

    Args:
        folder: of files written by this package on this machine.
        shape: `(num_rows, num_latents, latent_dim)`, what they must hold.

    Raises:
        ValueError: they hold something else.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self.shape = shape
        self._array = map_array(folder / VALUES, np.float16, shape)
        self._tensor = read_only_tensor(self._array)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self._array[rows]

    def gather(self, rows: np.ndarray, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of `rows`, of any shape, as a tensor."""
        values = empty_tensor((rows.size, *self.shape[1:]), self._tensor.dtype, "cpu")
        torch.index_select(self._tensor, 0, torch.from_numpy(rows.reshape(-1)), out=values)
        values = values.view(*rows.shape, *self.shape[1:]).to(device)
        return values if dtype == values.dtype else empty_tensor(values.shape, dtype, device).copy_(values)


class QuantizedValues:
    """Memory-mapped 8-bit values (`quantize`). Arguments as of `Values`; `values[rows]` is float16 as well."""

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self.shape = shape
        self._codes = read_only_tensor(map_array(folder / CODES, np.int8, shape))
        self._exponents = read_only_tensor(map_array(folder / EXPONENTS, np.int8, shape[:2]))

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        rows = np.arange(self.shape[0])[rows] if isinstance(rows, slice) else rows
        return self.gather(rows, "cpu", torch.float32).half().numpy()

    def gather(self, rows: np.ndarray, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of `rows`, of any shape, as a tensor; the 8-bit numbers are moved to the device."""
        flat = torch.from_numpy(rows.reshape(-1))
        steps = self._exponents.index_select(0, flat).to(device).float().exp2().unsqueeze(-1)
        values = empty_tensor((len(flat), *self.shape[1:]), dtype, device)
        # processors have a fast way from 8 bits to float32, and from there to half precision, but none around it
        scratch = None if dtype == torch.float32 else torch.empty((GATHER_ROWS, *self.shape[1:]), device=device)
        for start in range(0, len(flat), GATHER_ROWS):
            block = slice(start, start + GATHER_ROWS)
            codes = self._codes.index_select(0, flat[block]).to(device)
            numbers = values[block] if scratch is None else scratch[: len(codes)]
            numbers.copy_(codes).mul_(steps[block])
            if scratch is not None:
                values[block] = numbers
        return values.view(*rows.shape, *self.shape[1:])


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
    largest = MAX_FLOAT16 // steps
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
