"""Exact and fast search, and processes that share an index."""

import copy
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from banks import bank_of, clustered_keys, unit
from isolation import set_hf_home

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_index
from tinyalign_vlm.modeling_tinyalign.bank_index import KeyIndex, default_factories, faiss, faiss_threads


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No index is there before a test."""
    set_hf_home(monkeypatch, tmp_path / "hf_home")


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_exact_search(quantized, queries):
    bank, asked = bank_of(unit(6000, 24), quantized), unit(queries, 24, seed=1)
    scores, ids = bank.search(asked, 7)
    products = asked.astype(np.float64) @ bank.key_array[:].astype(np.float64).T
    assert (ids == np.argsort(-products, axis=1)[:, :7]).all()
    np.testing.assert_allclose(scores, np.take_along_axis(products, ids, 1), rtol=1e-6)
    exclude = [row[[0, 2]].tolist() for row in ids]
    assert (bank.search(asked, 5, exclude=exclude)[1] == ids[:, [1, 3, 4, 5, 6]]).all()


@pytest.mark.parametrize("quantized, queries", [(True, 1), (False, 40)])
def test_settings_of_torch_change_no_neighbour(quantized, queries):
    bank, asked = bank_of(unit(6000, 24), quantized), unit(queries, 24, seed=1)
    expected = bank.search(asked, 7)
    for setting in (torch.autocast("cpu", torch.bfloat16), torch.device("meta")):  # as set_default_device("cuda")
        with setting:
            found = bank.search(asked, 7)
        assert (found[1] == expected[1]).all() and (found[0] == expected[0]).all()


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
    bank, queries = bank_of(keys, quantized=True), clustered_keys(50, 48, seed=0)
    facts = bank.index_facts
    assert facts["index"] == "IVF1,PQ12x4fs" and facts["recall_at_5"] >= 0.99
    assert facts["k_factor"] in bank_index.DEFAULTS[4]
    _, found = bank.search(queries, 5)
    bank.save_pretrained(tmp_path / "bank")
    monkeypatch.setattr(bank_index, "train_index", None)
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    assert loaded.index_facts == facts and (loaded.search(queries, 5)[1] == found).all()
    exact = MemoryBank.from_pretrained(tmp_path / "bank", index="exact")
    assert exact.index_facts == {"index": "exact", "k_factor": 1, "recall_at_5": 1.0}
    _, truth = exact.search(queries, 5)
    assert (found == truth).mean() >= 0.99


@pytest.mark.parametrize("width", [30, 31, 2])
def test_widths_that_four_does_not_divide(width, small_limits):
    bank, queries = bank_of(clustered_keys(3000, width)), clustered_keys(30, width, seed=0)
    truth = np.argsort(-(queries @ bank.key_array.T), axis=1)[:, :5]
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
    compared, search = [], KeyIndex.candidates

    def candidates(self, queries, fetch, wanted):
        compared.append(round(self.k_factor * wanted) if self.fast else None)
        return search(self, queries, fetch, wanted)

    monkeypatch.setattr(KeyIndex, "candidates", candidates)
    bank = bank_of(clustered_keys(4000, 48))
    k_factor = bank.index_facts["k_factor"]
    assert 5 * k_factor in compared
    bank.search(unit(1, 48), 5)
    assert compared[-1] == 5 * k_factor


def test_a_finer_index_for_keys_that_need_it(small_limits, monkeypatch):
    monkeypatch.setattr(bank_index, "DEFAULTS", {4: (32,), 2: (32,)})
    facts = bank_of(unit(6000, 48)).index_facts
    assert facts["index"] == list(default_factories(48))[1] == "IVF1,PQ24x4fs" and facts["recall_at_5"] >= 0.99


def test_keys_that_no_fast_index_is_good_at_are_searched_exactly(small_limits, monkeypatch, caplog):
    monkeypatch.setattr(bank_index, "DEFAULTS", {4: (1,), 2: (1,)})
    bank = bank_of(unit(4000, 64))
    with caplog.at_level(logging.WARNING, bank_index.__name__):
        assert bank.index_facts["index"] == "exact" and bank.index_facts["recall_at_5"] == 1
    assert "it will be searched exactly" in caplog.text
    truth = np.argsort(-(bank.key_array[:20] @ bank.key_array.T), axis=1)[:, :5]
    assert (bank.search(bank.key_array[:20], 5)[1] == truth).all()


@pytest.mark.parametrize("factory", ["IVF16,PQ12x4fs", "SQfp16", "PQ12x4fs,Refine(SQfp16)", "HNSW16"])
def test_other_indexes(factory, small_limits, tmp_path):
    keys = clustered_keys(3000, 48)
    bank_of(keys).save_pretrained(tmp_path / "bank")
    bank = MemoryBank.from_pretrained(tmp_path / "bank", index=factory)
    assert bank.index_facts["index"] == factory and bank.index_facts["recall_at_5"] > 0.9
    assert (bank.search(keys[:9], 1)[1][:, 0] == np.arange(9)).all()
    assert bank.remove([0]).index == factory


def test_an_index_that_is_damaged(small_limits):
    bank = bank_of(clustered_keys(3000, 48))
    assert bank.index_facts["index"] == "IVF1,PQ12x4fs"
    other = bank_of(clustered_keys(2000, 48))
    for path in bank.folder.glob("auto*"):
        whole = path.read_bytes()
        (others,) = other.folder.glob(path.name) if other.index_facts else ()
        for damaged in (b"", whole[:-20], others.read_bytes() if path.suffix == ".faiss" else b"[]"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"\.faiss, or .*\.json beside it, is damaged .* Delete both"):
                copy.deepcopy(bank).search(np.ones((1, 48)), 5)
        path.write_bytes(whole)
    assert copy.deepcopy(bank).search(np.ones((1, 48)), 5)[1].shape == (1, 5)


def test_indexes_that_cannot_be_made(tmp_path):
    bank_of(unit(100, 8)).save_pretrained(tmp_path / "bank")
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
    bank, queries = bank_of(unit(5000, 24)), unit(30, 24, seed=1)
    assert bank.index_facts["index"] == "gpu" and bank.key_index.gpu.index.ntotal == 5000
    truth = np.argsort(-(queries.astype(np.float64) @ bank.key_array.T.astype(np.float64)), axis=1)
    assert (bank.search(queries, 5)[1] == truth[:, :5]).all()
    assert (bank.search(queries[:1], 3000)[1] == truth[:1, :3000]).all()


BUILD = """
import json, multiprocessing, sys
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_index
bank_index.EXACT_ROWS = 500
train = bank_index.train_index

def search(trained, barrier, results):
    def counted(*arguments):
        with trained.get_lock():
            trained.value += 1
        return train(*arguments)

    bank_index.train_index = counted
    barrier.wait(600)
    bank = MemoryBank.from_pretrained(sys.argv[1])
    results.put(bank.search(bank.keys(range(50)), 5)[1].tolist())

context = multiprocessing.get_context("fork")
trained, barrier, results = context.Value("i", 0), context.Barrier(3), context.Queue()
processes = [context.Process(target=search, args=(trained, barrier, results)) for _ in range(3)]
for process in processes:
    process.start()
print(json.dumps([[results.get(timeout=600) for _ in processes], trained.value]))
"""


def test_processes_that_need_the_index_at_once_build_it_once(small_limits, tmp_path):
    bank_of(clustered_keys(3000, 48)).save_pretrained(tmp_path / "bank")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "other home")}
    command = [sys.executable, "-c", BUILD, str(tmp_path / "bank")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    answers, trained = json.loads(done.stdout)
    assert trained == 1 and answers[0] == answers[1] == answers[2]
    names = [path.name for path in (tmp_path / "other home" / "tinyalign").iterdir()]
    assert len(names) == 1 and not any(name.startswith(".") for name in names)


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
    bank.search(bank.keys(range(50)), 5)
    for start in range(0, len(bank), 1000):
        rows = np.arange(start, start + 1000)
        bank.keys(rows), bank.gather(rows)
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
    size = sum(path.stat().st_size for path in bank.folder.glob("*.bin"))
    assert index_facts["index"] == "IVF1,PQ32x4fs" and size > 8e6
    command = [sys.executable, "-c", READERS, str(tmp_path / "bank"), os.environ["HF_HOME"]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    readers = json.loads(done.stdout.splitlines()[-1])
    assert len(readers) == 8
    for reader in readers:
        assert reader["mapped"] > 0.9 * size, "not mapped, but read"
        assert reader["share"] < reader["mapped"] / 7, "every process has a copy of its own"
        assert reader["anonymous"] < 8e6


def test_local_files_that_somebody_else_has_made(small_limits, monkeypatch):
    """They can be read alone: the index is made in memory."""
    bank = bank_of(clustered_keys(4000, 48), quantized=True)
    monkeypatch.setattr(bank_index.os, "access", lambda path, mode: False)
    monkeypatch.setattr(bank_index, "write_index", None)
    assert bank.search(bank.keys([4]), 1)[1].tolist() == [[4]]
    assert bank.index_facts["index"] != "exact"
