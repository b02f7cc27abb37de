"""Large banks: packed keys and values, exact and fast indexes, processes that share them."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from isolation import set_hf_home

from tinyalign_vlm import MemoryBank, ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.modeling_tinyalign import bank_fast_index, bank_rows, bank_storage
from tinyalign_vlm.modeling_tinyalign.bank_fast_index import default_factories, recorded
from tinyalign_vlm.modeling_tinyalign.bank_index import faiss, faiss_threads
from tinyalign_vlm.modeling_tinyalign.bank_keys import PackedKeys, PlainKeys, index_header
from tinyalign_vlm.modeling_tinyalign.bank_shards import list_column, row_schema
from tinyalign_vlm.modeling_tinyalign.bank_storage import write_local_files
from tinyalign_vlm.modeling_tinyalign.bank_values import PackedValues, PlainValues
from tinyalign_vlm.modeling_tinyalign.key_encoder import KeyEncoder
from tinyalign_vlm.training.bank.verify import bank_problems

VALUE_SHAPE = (3, 5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    set_hf_home(monkeypatch, tmp_path / "hf_home")


@pytest.fixture
def small_limits(monkeypatch):
    """Banks of more than 500 rows are packed, and searched through a fast index."""
    monkeypatch.setattr(bank_storage, "PACKED_ROWS", 500)
    monkeypatch.setattr(bank_fast_index, "EXACT_ROWS", 500)


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def random_keys(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((rows, width)))


def clustered_keys(rows: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((200, width))
    return unit(centres[rng.integers(200, size=rows)] + 0.7 * rng.standard_normal((rows, width)))


def random_values(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, *VALUE_SHAPE)).astype(np.float16)


def bank_of(keys: np.ndarray, packed: bool | None = None, source_ids: list[str] | None = None) -> MemoryBank:
    rows, width = keys.shape
    schema = row_schema(width, 15, False, ())
    columns = [
        pa.array(range(rows), pa.int64()),
        pa.array(source_ids or [f"{row:032x}" for row in range(rows)]),
        pa.array([f"caption {row}" for row in range(rows)]),
        list_column(keys),
        list_column(random_values(rows).reshape(rows, -1)),
    ]
    files = write_local_files([pa.record_batch(columns, schema=schema)], schema, VALUE_SHAPE, "test", packed)
    heads = {"num_self_attention_heads": 1, "num_cross_attention_heads": 1, "num_self_attends_per_block": 1}
    sizes = {"d_model": 16, "bytes_per_patch": 4, "qk_channels": 5, "v_channels": 5, "vision_feature_size": width}
    encoder = ValueEncoder(ValueEncoderConfig(num_latents=3, latent_dim=5, num_vision_tokens=4, **heads, **sizes))
    config = {
        "format_version": 1,
        "num_rows": rows,
        "key_dim": width,
        "num_latents": 3,
        "latent_dim": 5,
        "tower": {"name": "test", "revision": None, "image_shape": [3, 8, 8]},
        "preprocessing": {},
        "key_encoder": {
            "key_space": "vision",
            "connector_act": "gelu",
            "vision_pool_size": None,
            "alpha": 0.4,
            "grid": 1,
        },
        "value_encoder": encoder.config.settings,
        "columns": [],
        "packed": files.packed,
        "thumbnail_size": None,
        "skipped_rows": [],
        "sha256": files.sha256,
        "versions": {},
    }
    return MemoryBank(config, KeyEncoder(torch.zeros(width)), torch.zeros(4, width), files, encoder)


def plain_keys(folder: Path, keys: np.ndarray) -> PlainKeys:
    header = index_header(faiss.IndexFlatIP(keys.shape[1]), len(keys), keys.size)
    (folder / "plain.faiss").write_bytes(header + keys.tobytes())
    return PlainKeys(folder / "plain.faiss", *keys.shape)


def plain_values(folder: Path, values: np.ndarray) -> PlainValues:
    np.save(folder / "values.npy", values)
    return PlainValues(folder, values.shape)


# ---------------------------------------------------------------------- packing


@pytest.mark.parametrize("width", [1, 7, 48])
def test_keys_of_12_bits(width, tmp_path):
    keys = random_keys(5000, width) * np.linspace(0.01, 1, width, dtype=np.float32)
    keys[:, 0] *= 1e-3
    keys[:, -1] = 0 if width > 1 else keys[:, -1]
    sha256 = PackedKeys.pack(plain_keys(tmp_path, keys), tmp_path)
    packed = PackedKeys(tmp_path, *keys.shape)
    steps = np.abs(keys).max(axis=0) / 1023  # at most: a step is a power of two
    assert (np.abs(packed[:] - keys) <= steps / 2).all() and packed[:].dtype == np.float32
    assert np.array_equal(packed[[4999, 3, 3]], packed[:][[4999, 3, 3]])
    queries = random_keys(20, width, seed=1)
    scores, rows = packed.index.search(queries, 50)
    exact = np.einsum("nkd,nd->nk", packed[rows], queries)
    assert (np.abs(scores - exact) <= packed.error(queries)[:, None] + 1e-6).all()
    again = tmp_path / "again"
    again.mkdir()
    assert PackedKeys.pack(plain_keys(again, packed[:]), again) == sha256, "rounding what is rounded changed it"
    assert np.array_equal(PackedKeys(again, *keys.shape)[:], packed[:])
    size = sum((tmp_path / name).stat().st_size for name in PackedKeys.FILES)
    assert size <= keys.nbytes * 3 / 8 + 5000 * (width % 2) + 8 * width + 1000


def test_values_of_8_bits(tmp_path):
    values = random_values(6000)
    values[1], values[2], values[3, 0] = 0, 65504, [65504, -65504, 1, 0, 300]
    values[4] = 6e-8  # the smallest float16
    sha256 = PackedValues.pack(plain_values(tmp_path, values), tmp_path)
    packed = PackedValues(tmp_path, values.shape)
    rounded = packed[:]
    assert rounded.dtype == np.float16 and np.isfinite(rounded).all() and (rounded[[1, 4]] == values[[1, 4]]).all()
    largest = np.abs(values).max(axis=2, keepdims=True).astype(np.float32)
    assert (np.abs(rounded.astype(np.float32) - values) <= largest / 64).all()
    for dtype in (torch.float32, torch.bfloat16):
        assert packed.gather(np.array([[5, 7], [5, 0]]), "cpu", dtype).float().numpy().tolist() == (
            rounded[[[5, 7], [5, 0]]].astype(np.float32).tolist()
        )
    again = tmp_path / "again"
    again.mkdir()
    assert PackedValues.pack(plain_values(again, rounded), again) == sha256
    assert np.array_equal(PackedValues(again, values.shape)[:], rounded)


def test_a_large_bank_is_packed(small_limits, tmp_path):
    keys = clustered_keys(600, 32)
    bank, plain = bank_of(keys), bank_of(keys, packed=False)
    assert bank.config["packed"] and not plain.config["packed"] and not bank_of(keys[:500]).config["packed"]
    ids = np.arange(600)
    assert not bank.gather(ids).equal(plain.gather(ids))
    torch.testing.assert_close(bank.gather(ids), plain.gather(ids), atol=0.05, rtol=0)
    for other in (bank, plain):
        other.save_pretrained(tmp_path / "bank")
        loaded = MemoryBank.from_pretrained(tmp_path / "bank")
        assert loaded.config["packed"] == other.config["packed"]
        assert loaded.config["sha256"]["keys"] == other.config["sha256"]["keys"]
        assert loaded.gather(ids).equal(other.gather(ids)) and np.array_equal(loaded._keys[:], other._keys[:])
        before = {path.name: path.read_bytes() for path in (tmp_path / "bank" / "data").iterdir()}
        loaded.save_pretrained(tmp_path / "bank")
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "bank" / "data").iterdir()}
    sizes = [sum(path.stat().st_size for path in other._files.paths[:-1]) for other in (bank, plain)]
    assert sizes[0] < 0.6 * sizes[1]


def test_packed_keys_only(tmp_path):
    keys = clustered_keys(600, 32)
    both, plain, bank = (bank_of(keys, packed=packed) for packed in (True, False, "keys"))
    bank.save_pretrained(tmp_path / "bank")
    loaded, ids = MemoryBank.from_pretrained(tmp_path / "bank"), np.arange(600)
    for other in (bank, loaded, bank.remove([5]).shuffled()):
        assert other.config["packed"] == "keys"
    assert np.array_equal(loaded._keys[:], both._keys[:]) and loaded.gather(ids).equal(plain.gather(ids))
    assert both._files.values_folder != bank._files.values_folder == plain._files.values_folder
    for packed in ("values", 1, "true"):
        with pytest.raises(ValueError, match=f'packed is {packed!r}, expected True, False, "keys", or None'):
            bank_of(keys, packed=packed)
        config = json.loads((tmp_path / "bank/bank_config.json").read_text())
        (tmp_path / "bank/bank_config.json").write_text(json.dumps({**config, "packed": packed}))
        with pytest.raises(ValueError, match='packed.* expected true, false or "keys"'):
            MemoryBank.from_pretrained(tmp_path / "bank")


def test_parquet_of_a_packed_bank(small_limits, tmp_path):
    for packed in (True, False):
        bank_of(clustered_keys(2000, 64), packed).save_pretrained(tmp_path / str(packed))
    sizes = [next((tmp_path / name / "data").iterdir()).stat().st_size for name in ("True", "False")]
    assert sizes[0] < 0.75 * sizes[1]
    rows = datasets.load_dataset(str(tmp_path / "True"), split="train", cache_dir=str(tmp_path / "datasets"))
    bank = MemoryBank.from_pretrained(tmp_path / "True")
    assert rows.features["key"] == datasets.List(datasets.Value("float32"), length=64)
    assert np.array_equal(np.array(rows[:5]["key"], np.float32), bank._keys[:5])
    half = MemoryBank.from_dataset(rows.select(range(1000)), like=bank)
    assert half.config["packed"] and np.array_equal(half._keys[:], bank._keys[:1000])


def test_packed_stays_packed(small_limits):
    bank = bank_of(clustered_keys(600, 32))
    smaller = bank.remove(list(range(200)))
    assert smaller.config["packed"] and np.array_equal(smaller._keys[:], bank._keys[200:])
    assert smaller.gather(np.arange(400)).equal(bank.gather(np.arange(200, 600)))
    assert not bank_of(clustered_keys(600, 32), packed=False).shuffled().config["packed"]


# ---------------------------------------------------------------------- searching


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_exact_search(packed, queries):
    bank, asked = bank_of(random_keys(6000, 24), packed), random_keys(queries, 24, seed=1)
    scores, ids = bank.search(asked, 7)
    products = asked.astype(np.float64) @ bank._keys[:].astype(np.float64).T
    assert (ids == np.argsort(-products, axis=1)[:, :7]).all()
    np.testing.assert_allclose(scores, np.take_along_axis(products, ids, 1), rtol=1e-6)
    exclude = [row[[0, 2]].tolist() for row in ids]
    assert (bank.search(asked, 5, exclude=exclude)[1] == ids[:, [1, 3, 4, 5, 6]]).all()


@pytest.mark.parametrize("packed", [False, True])
def test_no_row(packed):
    """Exclusion leaves none, or none is asked for."""
    bank = bank_of(random_keys(3, 7), packed)
    scores, ids = bank.search(bank.keys([0]), 2, exclude=[[0, 1, 2]])
    assert ids.tolist() == [[-1, -1]] and np.isneginf(scores).all()
    assert bank.keys([]).shape == (0, 7) and bank.gather(np.zeros((2, 0), int)).shape == (2, 0, 3, 5)
    assert bank.rows(np.zeros((2, 0), int)) == [[], []] and bank.rows([]) == []


@pytest.mark.parametrize("index", ["exact", None])
@pytest.mark.parametrize("copies", [3, 40, 700])
def test_ties_in_a_large_bank(index, copies, small_limits):
    keys = clustered_keys(1500, 32)
    keys[300 : 300 + copies] = keys[300]
    bank = bank_of(keys)
    bank.index = index
    expected = list(range(300, 300 + min(copies, 5)))
    for queries in (keys[300:301], np.repeat(keys[300:301], 20, axis=0)):
        assert (bank.search(queries, 5)[1][:, : len(expected)] == expected).all()
    assert bank.search(keys[300:301], 2, exclude=[list(range(300, 300 + copies - 1))])[1][0, 0] == 299 + copies


def test_a_fast_index_is_made_once(small_limits, monkeypatch, tmp_path):
    keys = clustered_keys(4000, 48)
    bank, queries = bank_of(keys), clustered_keys(50, 48, seed=0)
    facts = bank.index_facts
    assert facts["index"] == "IVF1,PQ12x4fs" and facts["recall_at_5"] >= 0.99
    assert facts["milliseconds"] > 0 and facts["k_factor"] in bank_fast_index.DEFAULTS[4]
    _, found = bank.search(queries, 5)
    bank.save_pretrained(tmp_path / "bank")
    recorded_facts = json.loads((tmp_path / "bank" / "bank_config.json").read_text())["index"]
    assert recorded_facts == recorded(facts) and str(recorded_facts["milliseconds"])[0] in "125"
    monkeypatch.setattr(bank_fast_index, "train_index", None)
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    assert loaded.index_facts == facts and (loaded.search(queries, 5)[1] == found).all()
    exact = MemoryBank.from_pretrained(tmp_path / "bank", index="exact")
    assert exact.index_facts["index"] == "exact" and exact.index_facts["recall_at_5"] == 1
    _, truth = exact.search(queries, 5)
    assert (found == truth).mean() >= 0.99


@pytest.mark.parametrize("width", [30, 31, 2])
def test_widths_that_four_does_not_divide(width, small_limits):
    bank, queries = bank_of(clustered_keys(3000, width)), clustered_keys(30, width, seed=0)
    truth = np.argsort(-(queries @ bank._keys[:].T), axis=1)[:, :5]
    assert bank.index_facts["recall_at_5"] >= 0.99
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(bank.search(queries, 5)[1], truth, strict=True)]) > 0.97


def test_batches_and_exclusion_with_a_fast_index(small_limits):
    sources = [f"{row // 4:032x}" for row in range(4000)]
    keys = clustered_keys(4000, 48)
    bank = bank_of(keys, source_ids=sources)
    scores, ids = bank.search(keys[:300], 5)
    for row in range(0, 300, 7):
        one_scores, one_ids = bank.search(keys[row : row + 1], 5)
        assert (one_ids == ids[row]).all() and (one_scores == scores[row]).all()
    assert (ids[:, 0] == np.arange(300)).all()
    _, others = bank.search(keys[:300], 5, exclude=sources[:300])
    assert (others >= 0).all() and (others // 4 != np.arange(300)[:, None] // 4).all()
    everything = bank.search(keys[:2], 4000)[1]
    assert (np.sort(everything) == np.arange(4000)).all()
    most = [list(range(3998)), None]
    assert sorted(bank.search(keys[:2], 3, exclude=most)[1][0].tolist()) == [-1, 3998, 3999]


def test_all_rows_of_a_small_bank_with_an_inverted_file(small_limits):
    """Its lists that are not looked into hold rows as well."""
    keys = clustered_keys(600, 16)
    bank = bank_of(keys)
    bank.index = "IVF32,Flat"
    _, ids = bank.search(keys[:3], 590, exclude=[list(range(100, 110)), None, None])
    assert (ids >= 0).all() and bank.index_facts["index"] == "IVF32,Flat"


def test_recall_is_what_new_queries_get(small_limits, monkeypatch):
    """The bank's own keys, each of which is in its own way, are not compared with more candidates."""
    compared, search = [], bank_fast_index.KeyIndex._candidates

    def candidates(self, queries, fetch, wanted):
        compared.append(round(self.k_factor * wanted) if self.fast else None)
        return search(self, queries, fetch, wanted)

    monkeypatch.setattr(bank_fast_index.KeyIndex, "_candidates", candidates)
    bank = bank_of(clustered_keys(4000, 48))
    k_factor = bank.index_facts["k_factor"]
    assert 5 * k_factor in compared
    bank.search(random_keys(1, 48), 5)
    assert compared[-1] == 5 * k_factor


def test_a_finer_index_for_keys_that_need_it(small_limits, monkeypatch):
    monkeypatch.setattr(bank_fast_index, "DEFAULTS", {4: (32,), 2: (32,)})
    facts = bank_of(random_keys(6000, 48)).index_facts
    assert facts["index"] == list(default_factories(48))[1] == "IVF1,PQ24x4fs" and facts["recall_at_5"] >= 0.99


def test_keys_that_no_fast_index_is_good_at_are_searched_exactly(small_limits, monkeypatch, caplog):
    monkeypatch.setattr(bank_fast_index, "DEFAULTS", {4: (1,), 2: (1,)})
    bank = bank_of(random_keys(4000, 64))
    with caplog.at_level(logging.WARNING, bank_fast_index.__name__):
        assert bank.index_facts["index"] == "exact" and bank.index_facts["recall_at_5"] == 1
    assert "it will be searched exactly" in caplog.text
    truth = np.argsort(-(bank._keys[:20] @ bank._keys[:].T), axis=1)[:, :5]
    assert (bank.search(bank._keys[:20], 5)[1] == truth).all()


@pytest.mark.parametrize("factory", ["IVF16,PQ12x4fs", "SQfp16", "PQ12x4fs,Refine(SQfp16)", "HNSW16"])
def test_other_indexes(factory, small_limits, tmp_path):
    keys = clustered_keys(3000, 48)
    bank_of(keys).save_pretrained(tmp_path / "bank")
    bank = MemoryBank.from_pretrained(tmp_path / "bank", index=factory)
    assert bank.index_facts["index"] == factory and bank.index_facts["recall_at_5"] > 0.9
    assert (bank.search(keys[:9], 1)[1][:, 0] == np.arange(9)).all()
    assert bank.remove([0]).index == factory


def test_lists_that_are_damaged(small_limits):
    bank = bank_of(clustered_keys(3000, 48))
    assert bank.index_facts["index"] == "IVF1,PQ12x4fs"
    (lists,) = bank._files.keys_folder.glob("auto*.lists")
    whole = lists.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-8] + (3001).to_bytes(8, "little"), whole + whole[-8:]):
        lists.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.lists is damaged. Delete .* and load the bank again"):
            bank.without_encoders().search(np.ones((1, 48)), 5)
    lists.write_bytes(whole)
    (record,) = bank._files.keys_folder.glob("auto*.json")
    record.write_text(record.read_text()[:40])
    with pytest.raises(ValueError, match=r"\.json is damaged .*Delete .* and load the bank again"):
        bank.without_encoders().search(np.ones((1, 48)), 5)


def test_a_bank_that_is_saved_again_says_what_was_measured_first(tmp_path, monkeypatch):
    keys, measure = random_keys(50, 8), bank_rows.describe
    for name, milliseconds in (("first", 3.0), ("again", 30.0)):
        monkeypatch.setattr(bank_rows, "describe", lambda index, t=milliseconds: measure(index) | {"milliseconds": t})
        bank_of(keys).save_pretrained(tmp_path / name)
    first, again = (json.loads((tmp_path / name / "bank_config.json").read_text()) for name in ("first", "again"))
    assert first["index"] == again["index"] and first["index"]["milliseconds"] == 5
    assert [*bank_problems(tmp_path / "again")] == []


def test_verify_reads_the_index(small_limits, tmp_path):
    """A code or two that changed would not be noticed in what is found."""
    bank = bank_of(clustered_keys(3000, 48))
    bank.save_pretrained(tmp_path / "bank")
    bank.search(np.ones((1, 48)), 5)
    assert [*bank_problems(tmp_path / "bank")] == []
    for suffix in (".lists", ".faiss"):
        (path,) = bank._files.keys_folder.glob(f"auto*{suffix}")
        whole = path.read_bytes()
        for changed in (whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], whole[:-8], None):
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            found = [*bank_problems(tmp_path / "bank")]
            assert len(found) == 1 and f"{path} is not the index that was made of" in found[0] and "Delete" in found[0]
        path.write_bytes(whole)
    (record,) = bank._files.keys_folder.glob("auto*.json")
    record.write_text(record.read_text()[:-9])
    (found,) = bank_problems(tmp_path / "bank")
    assert f"{record} does not say what the index" in found
    shutil.rmtree(record.parent)
    assert [*bank_problems(tmp_path / "bank")] == []


def test_indexes_that_cannot_be_made(tmp_path):
    bank_of(random_keys(100, 8)).save_pretrained(tmp_path / "bank")
    for factory in ("no index", "PQ3x4fs", "IVF4096,Flat"):
        with pytest.raises(ValueError, match=f"can't make the index '{factory}' for 100 keys of 8 numbers"):
            MemoryBank.from_pretrained(tmp_path / "bank", index=factory)


def test_an_index_that_is_half_written(small_limits, monkeypatch):
    bank, replace = bank_of(clustered_keys(1000, 16)), os.replace

    def full(source, target):
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left.*HF_HOME"):
        bank.search(np.ones((1, 16)), 1)
    monkeypatch.undo()


def test_threads():
    torch.set_num_threads(2)
    before = faiss.omp_get_max_threads()
    try:
        with faiss_threads():
            assert faiss.omp_get_max_threads() == 2
        assert faiss.omp_get_max_threads() == before
    finally:
        torch.set_num_threads(1)


def test_a_gpu_is_used_if_faiss_has_one(monkeypatch):
    """No GPU here: faiss's GPU classes are stood in for, with float16 scores as theirs are."""

    class Index:
        def __init__(self, resources, width, settings):
            assert settings.useFloat16 and settings.device == 0
            self.index = faiss.index_factory(width, "SQfp16", faiss.METRIC_INNER_PRODUCT)

        def add(self, keys):
            self.index.add(keys)

        def search(self, queries, k):
            assert k <= 2048
            return self.index.search(queries, k)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "GpuIndexFlatConfig", type("Settings", (), {}), raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", Index, raising=False)
    bank, queries = bank_of(random_keys(5000, 24)), random_keys(30, 24, seed=1)
    assert bank.index_facts["index"] == "gpu" and bank._searcher[0].gpu.index.ntotal == 5000
    truth = np.argsort(-(queries.astype(np.float64) @ bank._keys[:].T.astype(np.float64)), axis=1)
    assert (bank.search(queries, 5)[1] == truth[:, :5]).all()
    assert (bank.search(queries[:1], 3000)[1] == truth[:1, :3000]).all()


# ---------------------------------------------------------------------- many processes

BUILD = """
import sys
import numpy as np
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_fast_index, bank_storage
bank_fast_index.EXACT_ROWS = 500
train = bank_fast_index.train_index
bank_fast_index.train_index = lambda *arguments: print("trained") or train(*arguments)
bank = MemoryBank.from_pretrained(sys.argv[1])
print(bank.search(bank._keys[:50], 5)[1].tolist())
"""


def test_processes_that_need_the_index_at_once_build_it_once(small_limits, tmp_path):
    bank_of(clustered_keys(3000, 48)).save_pretrained(tmp_path / "bank")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "other home")}
    command = [sys.executable, "-c", BUILD, str(tmp_path / "bank")]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum("trained" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    names = [path.name for path in (tmp_path / "other home" / "tinyalign").iterdir()]
    assert len(names) == 3 and not any(name.startswith(".") for name in names)


READERS = """
import json, multiprocessing, sys
from pathlib import Path
import numpy as np
from tinyalign_vlm import MemoryBank
folder, cache, readers = sys.argv[1], sys.argv[2], 8

def memory(kind, of=""):
    size, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counted = of in line
        elif counted and line.startswith(kind + ":"):
            size += 1024 * int(line.split()[1])
    return size

def read(barrier, results):
    before = memory("Anonymous")
    bank = MemoryBank.from_pretrained(folder)
    bank.search(bank._keys[:50], 5)
    for start in range(0, len(bank), 1000):
        rows = np.arange(start, start + 1000)
        bank._keys[rows], bank.gather(rows)
    barrier.wait(600)  # until everybody has read everything
    found = {"anonymous": memory("Anonymous") - before, "mapped": memory("Rss", cache), "share": memory("Pss", cache)}
    barrier.wait(600)
    results.put(found)

context = multiprocessing.get_context("fork")
barrier, results = context.Barrier(readers), context.Queue()
processes = [context.Process(target=read, args=(barrier, results)) for _ in range(readers)]
for process in processes:
    process.start()
print(json.dumps([results.get(timeout=1200) for _ in processes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_eight_readers_share_one_copy(tmp_path):
    bank = bank_of(clustered_keys(40_000, 128))
    bank.save_pretrained(tmp_path / "bank")
    index_facts = bank.index_facts
    files = [*bank._files.paths[:-1], *bank._files.keys_folder.glob("auto*s")]  # the index and its lists
    size = sum(path.stat().st_size for path in files)
    assert index_facts["index"] == "IVF1,PQ32x4fs" and len(files) == 6 and size > 8e6
    command = [sys.executable, "-c", READERS, str(tmp_path / "bank"), os.environ["HF_HOME"]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    readers = json.loads(done.stdout.splitlines()[-1])
    assert len(readers) == 8
    for reader in readers:
        assert reader["mapped"] > 0.9 * size, "not mapped, but read"
        assert reader["share"] < reader["mapped"] / 7, "every process has a copy of its own"
        assert reader["anonymous"] < 8e6
