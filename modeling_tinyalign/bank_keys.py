"""The keys of a memory bank on disk: float32 as they are, or packed in 12 bits a number in a large bank."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

try:
    import faiss
except ImportError:
    faiss = None

BLOCK_ROWS = 4096
MAX_CODE = 2047  # 12 bits, signed
# What 12 bits are more than the coarse 8.
FINE = 16
TINY_STEP = np.float32(2.0**-100)
# float32 products of unit vectors are this exact.
ROUNDING = 1e-6


class _InIndex:
    """An array in a faiss index; whoever has the array keeps the index, and with it the memory, alive."""

    def __init__(self, index: faiss.Index, pointer: object):
        array = faiss.rev_swig_ptr(pointer, index.ntotal * index.d).reshape(index.ntotal, index.d)
        self.__array_interface__ = array.__array_interface__
        self._index = index


class PlainKeys:
    """float32 keys inside a flat inner-product faiss index, memory-mapped: `keys[rows]` is `(..., key_dim)`.

    Args:
        path: a file written by this package on this machine, or passed by `check_foreign_index`.
        num_rows, key_dim: what it must hold.

    Attributes:
        index: finds candidates; its scores are within `error(queries)` of the keys' products.

    Raises:
        ValueError: it holds something else.
    """

    FILES = ("index.faiss",)

    def __init__(self, path: Path, num_rows: int, key_dim: int):
        self.shape = (num_rows, key_dim)
        self.index = read_mapped(path, self.shape, faiss.IndexFlatIP)
        self._keys = np.asarray(_InIndex(self.index, self.index.get_xb()))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self._keys[rows]

    def error(self, queries: np.ndarray) -> np.ndarray:
        """`(n,)`, by how much the scores of `index` may be off."""
        return ROUNDING * np.linalg.norm(queries, axis=1)


class PackedKeys:
    """12-bit keys, memory-mapped: as `PlainKeys`, but of a folder of two files. `keys[rows]` is float32 as well.

    A key is a multiple, from -2047 to 2047, of its dimension's step. The upper 8 bits of these numbers are an 8-bit
    scalar-quantised faiss index, which finds candidates; the lower 4 are in a file beside it.
    """

    FILES = ("coarse.faiss", "fine.npy")

    def __init__(self, folder: Path, num_rows: int, key_dim: int):
        self.shape = (num_rows, key_dim)
        self.index = read_mapped(folder / self.FILES[0], self.shape, faiss.IndexScalarQuantizer)
        self._coarse = np.asarray(_InIndex(self.index, self.index.codes.data()))
        self._fine = map_array(folder / self.FILES[1], np.uint8, (num_rows, -(-key_dim // 2)))
        self._steps = faiss.vector_to_array(self.index.sq.trained)[key_dim:] / np.float32(255 * FINE)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        fine = self._fine[rows]
        fine = np.stack([fine & 15, fine >> 4], axis=-1).reshape(*fine.shape[:-1], 2 * fine.shape[-1])
        fine = fine[..., : self.shape[1]]
        codes = self._coarse[rows].astype(np.float32) * FINE + (fine.astype(np.float32) - (MAX_CODE + 1))
        return codes * self._steps

    def error(self, queries: np.ndarray) -> np.ndarray:
        """As of `PlainKeys`: six standard deviations of what the missing 4 bits add up to."""
        return 6 * np.linalg.norm(queries * self._steps, axis=1) * FINE / 12**0.5

    @classmethod
    def pack(cls, keys: PlainKeys, folder: Path) -> str:
        """Round plain keys, write them to `folder`, and return the sha256 of the rounded float32 keys."""
        num_rows, key_dim = keys.shape
        steps = key_steps(keys)
        index = faiss.IndexScalarQuantizer(key_dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        # faiss decodes c as low + (c + 0.5) / 255 * width: the middle of the 16 numbers that share their upper bits
        low, width = -(MAX_CODE + 1) * steps, 255 * FINE * steps
        faiss.copy_array_to_vector(np.concatenate([low, width]), index.sq.trained)
        index.is_trained = True
        digest = hashlib.sha256()
        with open(folder / cls.FILES[0], "wb") as coarse, open(folder / cls.FILES[1], "wb") as fine:
            write_array_head(fine, np.uint8, (num_rows, -(-key_dim // 2)))
            coarse.write(index_header(index, num_rows, num_rows * key_dim))
            for start in range(0, num_rows, BLOCK_ROWS):
                rounded = np.rint(keys[start : start + BLOCK_ROWS] / steps)
                digest.update((rounded * steps + np.float32(0)).tobytes())  # no negative zeros
                codes = rounded.astype(np.int16) + (MAX_CODE + 1)
                coarse.write((codes // FINE).astype(np.uint8).tobytes())
                rest = np.pad((codes % FINE).astype(np.uint8), ((0, 0), (0, key_dim % 2)))
                fine.write((rest[:, ::2] | rest[:, 1::2] << 4).tobytes())
        return digest.hexdigest()


def key_steps(keys: PlainKeys) -> np.ndarray:
    """The step of each dimension `(key_dim,)`: the smallest power of two with which 12 bits reach the largest number.

    A power of two, so that rounded keys are float32 numbers and stay what they are when they are rounded again.
    """
    blocks = range(0, len(keys), BLOCK_ROWS)
    largest = np.max([np.abs(keys[start : start + BLOCK_ROWS]).max(axis=0) for start in blocks], axis=0)
    return np.maximum(power_of_two_from(largest / np.float32(MAX_CODE)), TINY_STEP)


def power_of_two_from(numbers: np.ndarray) -> np.ndarray:
    """The smallest powers of two that are not smaller, float32; 1 for 0."""
    mantissas, exponents = np.frexp(numbers)
    return np.ldexp(np.float32(1), exponents - (mantissas == 0.5))


def index_header(index: faiss.Index, num_rows: int, size: int) -> bytes:
    """How the file of an empty faiss index begins once it holds rows: their codes, `size` numbers, come next.

    The codes are written as they come; through faiss, all of them would have to be in memory.
    """
    header = faiss.serialize_index(index)
    header[8:16] = np.frombuffer(np.int64(num_rows).tobytes(), np.uint8)
    header[-8:] = np.frombuffer(np.int64(size).tobytes(), np.uint8)
    return header.tobytes()


def write_array_head(file: BinaryIO, dtype: type, shape: tuple[int, ...]) -> None:
    """Begin a .npy file; as long whatever the shape. The array is written behind it.

    Writing to a memory map instead would end in a signal, and not in an error, when the disk is full.
    """
    head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)


def map_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped .npy file, which must hold this."""
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


def read_mapped(path: Path, shape: tuple[int, int], kind: type | None = None) -> faiss.Index:
    """A memory-mapped inner-product faiss index, which must be of this kind and hold this many rows of this width."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read ({error}). Delete it and load the bank again.") from error
    found = (index.ntotal, index.d)
    if type(index) is not (kind or type(index)) or index.metric_type != faiss.METRIC_INNER_PRODUCT or found != shape:
        raise ValueError(
            f"{path} is damaged: it is a {type(index).__name__} of {found[0]} keys of {found[1]}, expected {shape[0]} "
            f"of {shape[1]}. Delete it and load the bank again."
        )
    return index
