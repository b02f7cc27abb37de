"""The values of a memory bank on disk: float16 as they are, or 8 bits a number in a large bank."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .bank_keys import BLOCK_ROWS, map_array, power_of_two_from, write_array_head

MAX_CODE = 127
TINY_STEP = np.float32(2.0**-24)  # of float16
MAX_FLOAT16 = 65504
GATHER_ROWS = 256  # at a time: they stay in the processor's cache


class PlainValues:
    """Memory-mapped float16 values: `values[rows]` is `(..., num_latents, latent_dim)`.

    Args:
        folder: of files written by this package on this machine.
        shape: `(num_rows, num_latents, latent_dim)`, what they must hold.

    Raises:
        ValueError: they hold something else.
    """

    FILES = ("values.npy",)

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self.shape = shape
        self._array = map_array(folder / self.FILES[0], np.float16, shape)
        self._tensor = read_only_tensor(self._array)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self._array[rows]

    def gather(self, rows: np.ndarray, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """Values of `rows`, of any shape, as a tensor."""
        values = empty_tensor((rows.size, *self.shape[1:]), self._tensor.dtype, "cpu")
        torch.index_select(self._tensor, 0, torch.from_numpy(rows.reshape(-1)), out=values)
        values = values.view(*rows.shape, *self.shape[1:]).to(device)
        return values if dtype == values.dtype else empty_tensor(values.shape, dtype, device).copy_(values)


class PackedValues:
    """8-bit values, memory-mapped. Arguments as of `PlainValues`; `values[rows]` is float16 as well.

    A number is a multiple, from -127 to 127, of its latent's step, a power of two: rounded values are float16 numbers
    and stay what they are when they are rounded again.
    """

    FILES = ("codes.npy", "exponents.npy")

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self.shape = shape
        self._codes, self._exponents = (
            read_only_tensor(map_array(folder / name, np.int8, size))
            for name, size in zip(self.FILES, (shape, shape[:2]), strict=True)
        )

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self.gather(rows, "cpu", torch.float32).half().numpy()

    def gather(self, rows: np.ndarray | slice, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """As of `PlainValues`; the 8-bit numbers are moved to the device."""
        rows = np.arange(self.shape[0])[rows] if isinstance(rows, slice) else rows
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

    @classmethod
    def pack(cls, values: PlainValues, folder: Path) -> str:
        """Round plain values, write them to `folder`, and return the sha256 of the rounded float16 values."""
        num_rows, num_latents, _ = values.shape
        digest = hashlib.sha256()
        with open(folder / cls.FILES[0], "wb") as all_codes, open(folder / cls.FILES[1], "wb") as all_exponents:
            write_array_head(all_codes, np.int8, values.shape)
            write_array_head(all_exponents, np.int8, (num_rows, num_latents))
            for start in range(0, num_rows, BLOCK_ROWS):
                numbers = values[start : start + BLOCK_ROWS].astype(np.float32)
                steps = power_of_two_from(np.abs(numbers).max(axis=2, keepdims=True) / np.float32(MAX_CODE))
                steps = np.maximum(steps, TINY_STEP)
                largest = MAX_FLOAT16 // steps
                codes = np.clip(np.rint(numbers / steps), -largest, largest)
                digest.update((codes * steps + np.float32(0)).astype(np.float16).tobytes())
                all_codes.write(codes.astype(np.int8).tobytes())
                all_exponents.write(np.log2(steps[..., 0]).astype(np.int8).tobytes())
        return digest.hexdigest()


def empty_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """As `torch.empty`. On a CPU through numpy, which asks for huge pages: small ones take longer than the rest."""
    if torch.device(device).type != "cpu" or 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def read_only_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same memory, to be read only: torch has none that refuse writing, and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)
