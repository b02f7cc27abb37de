"""An index out of a download is ignored unless the user trusts it, and then it must be a flat index of the keys."""

import hashlib
import struct

import faiss
import numpy as np
import pytest
from security.attacks import little_memory

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_foreign_index

needs_limits = pytest.mark.skipif(
    bank_foreign_index.set_deserialization_lattice_r2_limit is None, reason="this faiss has no limits: it is refused"
)


def own_index(bank: MemoryBank) -> bytes:
    """The index that was built here."""
    return (bank._files.keys_folder / "index.faiss").read_bytes()


def limits() -> tuple[int, int, int]:
    return (
        faiss.get_deserialization_vector_byte_limit(),
        faiss.get_deserialization_loop_limit(),
        faiss.get_deserialization_lattice_r2_limit(),
    )


def test_ignored_by_default(bank_folder):
    for garbage in (b"IxFI", b"\0" * 1000, faiss_bytes(faiss.IndexFlatL2(3))):
        (bank_folder / "index.faiss").write_bytes(garbage)
        bank = MemoryBank.from_pretrained(bank_folder)
        assert bank._files.keys_folder.parent.name == "tinyalign", "the index is that of the local cache"
        assert bank.search(bank._keys[:], 1)[1].ravel().tolist() == list(range(12))


def test_a_faiss_without_limits_is_refused(bank_folder, monkeypatch):
    monkeypatch.setattr(bank_foreign_index, "set_deserialization_lattice_r2_limit", None)
    with pytest.raises(
        ValueError, match=r"needs a faiss that limits .* 1.14.3 or newer; found 1\..* leave trust_index"
    ):
        MemoryBank.from_pretrained(bank_folder, trust_index=True)


@needs_limits
def test_trusted(bank_folder):
    before, bank = limits(), MemoryBank.from_pretrained(bank_folder)
    with pytest.raises(ValueError, match="index.faiss is missing or no flat"):
        MemoryBank.from_pretrained(bank_folder, trust_index=True)
    (bank_folder / "index.faiss").write_bytes(own_index(bank))
    trusting = MemoryBank.from_pretrained(bank_folder, trust_index=True)
    assert trusting._files.trusted_index == bank_folder / "index.faiss"
    queries = np.random.default_rng(0).standard_normal((5, bank.key_dim)).astype(np.float32)
    for ours, theirs in zip(bank.search(queries, 4), trusting.search(queries, 4), strict=True):
        assert (ours == theirs).all()
    assert limits() == before, "faiss was left with other limits"


def faiss_bytes(index: faiss.Index) -> bytes:
    return faiss.serialize_index(index).tobytes()


def other_indexes(keys: np.ndarray) -> dict[str, faiss.Index]:
    rows, width = keys.shape
    indexes = {
        "L2": faiss.IndexFlatL2(width),
        "HNSW": faiss.IndexHNSWFlat(width, 4, faiss.METRIC_INNER_PRODUCT),
        "IDs": faiss.IndexIDMap(faiss.IndexFlatIP(width)),
        "half precision": faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16),
        "narrower": faiss.IndexFlatIP(width - 1),
        "shorter": faiss.IndexFlatIP(width),
        "other keys": faiss.IndexFlatIP(width),
    }
    for name, index in indexes.items():
        vectors = {"narrower": keys[:, 1:], "shorter": keys[1:], "other keys": keys[::-1]}.get(name, keys)
        vectors = np.ascontiguousarray(vectors)
        index.add_with_ids(vectors, np.arange(rows)) if name == "IDs" else index.add(vectors)
    return indexes


@needs_limits
def test_other_indexes_are_refused(bank_folder):
    bank = MemoryBank.from_pretrained(bank_folder)
    path = bank_folder / "index.faiss"
    for name, index in other_indexes(bank._keys[:].copy()).items():
        path.write_bytes(faiss_bytes(index))
        with pytest.raises(ValueError, match=f"{path}"):
            MemoryBank.from_pretrained(bank_folder, trust_index=True)
        assert name and len(MemoryBank.from_pretrained(bank_folder)) == 12


@needs_limits
def test_damaged_indexes_are_refused(bank_folder):
    """Every header byte wrong in turn, huge declared sizes, truncated files: without much memory or time."""
    bank = MemoryBank.from_pretrained(bank_folder)
    data, path = own_index(bank), bank_folder / "index.faiss"
    damaged = [data[:n] for n in (0, 3, 4, 20, 44, 45, len(data) - 1)] + [data + b"\0" * 2000]
    damaged += [data[:8] + struct.pack("<q", n) + data[16:] for n in (-1, 2**40, 2**62)]
    damaged += [data[:37] + struct.pack("<Q", n) + data[45:] for n in (0, 2**40, 2**63)]
    for place in range(45):
        damaged += [data[:place] + bytes([data[place] ^ change]) + data[place + 1 :] for change in (1, 128, 255)]
    damaged.append(data[:45] + data[49:] + data[45:49])
    refused = 0
    with little_memory():
        for content in damaged:
            path.write_bytes(content)
            try:
                keys = MemoryBank.from_pretrained(bank_folder, trust_index=True)._keys[:]
                assert hashlib.sha256(keys.tobytes()).hexdigest() == bank.config["sha256"]["keys"]
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > len(damaged) / 2
