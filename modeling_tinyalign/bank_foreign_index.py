"""An index file that came with a downloaded bank: read only when the user trusts it, and even then with care."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from .bank_keys import PlainKeys

try:
    import faiss
except ImportError:
    faiss = None
try:
    from faiss import get_deserialization_lattice_r2_limit, set_deserialization_lattice_r2_limit
except ImportError:  # faiss before 1.14.3 lacks this limit or all three
    get_deserialization_lattice_r2_limit = set_deserialization_lattice_r2_limit = None

# How faiss marks the file of an IndexFlatIP.
FLAT_INNER_PRODUCT = b"IxFI"


def check_foreign_index(path: Path, num_rows: int, key_dim: int, sha256: str) -> None:
    """Refuse an index file that this package did not write, unless it is a flat index of just these keys.

    Its first bytes are looked at before faiss is: of faiss's many formats nothing but the simplest is parsed.

    Args:
        sha256: of the keys, float32.

    Raises:
        ValueError: it is missing or something else (the file is named), or this faiss cannot limit what it reads.
    """
    if set_deserialization_lattice_r2_limit is None:
        raise ValueError(
            f"trust_index=True needs a faiss that limits what an index file may make it do, 1.14.3 or newer; found "
            f"{faiss.__version__}. Update faiss-cpu, or leave trust_index out: the index is then built from the keys."
        )
    kind = None
    if path.is_file() and path.stat().st_size < 4 * num_rows * key_dim + 1024:
        with open(path, "rb") as file:
            kind = file.read(len(FLAT_INNER_PRODUCT))
    if kind != FLAT_INNER_PRODUCT:
        raise ValueError(
            f"{path} is missing or no flat inner-product index of {num_rows} keys of {key_dim} numbers. Leave "
            "trust_index out: the index is then built from the keys."
        )
    found = hashlib.sha256(open_foreign_keys(path, num_rows, key_dim)[:]).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: the sha256 of its keys is {found}, expected {sha256}: it is not the index of this bank. Leave "
            "trust_index out: the index is then built from the keys."
        )


def open_foreign_keys(path: Path, num_rows: int, key_dim: int) -> PlainKeys:
    """The keys in a file that passed `check_foreign_index`; within faiss's limits, should it have changed since."""
    with _limited(4 * num_rows * key_dim + 4):
        return PlainKeys(path, num_rows, key_dim)


@contextlib.contextmanager
def _limited(num_bytes: int) -> Iterator[None]:
    """Let faiss read at most so many bytes of vectors and build nothing else."""
    before = (
        faiss.get_deserialization_vector_byte_limit(),
        faiss.get_deserialization_loop_limit(),
        get_deserialization_lattice_r2_limit(),
    )
    try:
        faiss.set_deserialization_vector_byte_limit(num_bytes)
        faiss.set_deserialization_loop_limit(1)
        set_deserialization_lattice_r2_limit(1)
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])
        set_deserialization_lattice_r2_limit(before[2])
