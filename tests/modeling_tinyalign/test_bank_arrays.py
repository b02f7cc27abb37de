"""Local files: quantized or not, laid out once by one of many processes, on disks that are full."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from banks import NUM_ROWS, bank_of, clustered_keys, content_of, random_values, unit
from isolation import set_hf_home

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign.bank_arrays import cache_root, quantize


def test_values_of_8_bits():
    values = random_values(6000)
    values[1], values[2], values[3, 0] = 0, 65504, [65504, -65504, 1, 0, 300]
    values[4] = 6e-8  # the smallest float16
    codes, exponents, rounded = quantize(values)
    assert codes.dtype == exponents.dtype == np.int8 and exponents.shape == (6000, 3)
    assert rounded.dtype == np.float16 and np.isfinite(rounded).all() and (rounded[[1, 4]] == values[[1, 4]]).all()
    largest = np.abs(values).max(axis=2, keepdims=True).astype(np.float32)
    assert (np.abs(rounded.astype(np.float32) - values) <= largest / 64).all()
    assert np.array_equal(quantize(rounded)[2], rounded), "rounding what is rounded changed it"
    bank = bank_of(unit(6000, 4), quantized=True, values=values)
    stored = bank.values.gather(np.arange(6000), "cpu", torch.float16).numpy()
    assert np.array_equal(stored, rounded) and not np.signbit(stored[1]).any()
    for dtype in (torch.float32, torch.bfloat16):
        found = bank.gather(np.array([[5, 7], [5, 0]]), dtype)
        expected = torch.tensor(rounded[[[5, 7], [5, 0]]].astype(np.float32))
        assert found.dtype == dtype and found.equal(expected.to(dtype))


def test_a_quantized_bank(tmp_path):
    keys, ids = clustered_keys(600, 32), np.arange(600)
    bank, plain = bank_of(keys, quantized=True), bank_of(keys)
    assert bank.key_array.dtype == np.float16 and np.array_equal(plain.key_array, keys)
    assert np.array_equal(bank.key_array, keys.astype(np.float16))
    assert not bank.gather(ids).equal(plain.gather(ids))
    torch.testing.assert_close(bank.gather(ids), plain.gather(ids), atol=0.05, rtol=0)
    for other in (bank, plain):
        other.save_pretrained(tmp_path / "bank")
        loaded = MemoryBank.from_pretrained(tmp_path / "bank")
        assert loaded.config.quantized == other.config.quantized
        assert loaded.config.sha256.keys == other.config.sha256.keys
        assert loaded.gather(ids).equal(other.gather(ids)) and np.array_equal(loaded.keys(ids), other.keys(ids))
        smaller = other.remove(list(range(200)))
        assert smaller.config.quantized == other.config.quantized
        assert np.array_equal(smaller.keys(ids[:400]), other.keys(ids[200:]))
        assert smaller.gather(ids[:400]).equal(other.gather(ids[200:]))
        before = content_of(tmp_path / "bank")
        loaded.save_pretrained(tmp_path / "bank")
        assert before == content_of(tmp_path / "bank")
    arrays = [sum(path.stat().st_size for path in other.folder.glob("*.bin")) for other in (bank, plain)]
    assert arrays[0] < 0.6 * arrays[1]


def test_building_decides_by_the_number_of_rows(dataset, model, processor, value_encoder, monkeypatch):
    monkeypatch.setattr("tinyalign_vlm.training.bank.build.QUANTIZED_ROWS", 9)
    assert MemoryBank.build(dataset, model, processor, value_encoder).config.quantized
    assert not MemoryBank.build(dataset[:9], model, processor, value_encoder).config.quantized
    assert not MemoryBank.build(dataset, model, processor, value_encoder, quantized=False).config.quantized


def test_full_cache(dataset, model, processor, value_encoder, empty_cache, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="local files .*No space left.*HF_HOME"):
        MemoryBank.build(dataset, model, processor, value_encoder)
    assert list(cache_root().rglob("*.*")) == []


@pytest.fixture
def small_disk(make_disk):
    return make_disk("256k")


def test_really_full_disk(bank, saved, small_disk, monkeypatch, dataset, model, processor, value_encoder):
    folder = small_disk / "bank"
    bank.save_pretrained(folder)
    before = content_of(small_disk)
    for free in (120_000, 60_000, 20_000, 5_000, 0):
        used = os.statvfs(small_disk)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(max(used.f_bavail * used.f_frsize - free, 0)))
        try:
            bank.shuffled().save_pretrained(folder)
        except OSError as error:
            assert "unchanged" in str(error)
            filler.unlink()
            assert content_of(small_disk) == before
        else:
            filler.unlink()
            bank.save_pretrained(folder)
    assert len(MemoryBank.from_pretrained(folder)) == NUM_ROWS
    set_hf_home(monkeypatch, small_disk / "home")
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    with pytest.raises(OSError, match="HF_HOME|No space left"):
        MemoryBank.build(dataset, model, processor, value_encoder)
    with pytest.raises(OSError, match="HF_HOME"):
        MemoryBank.from_pretrained(saved)
    # wherever it is full; a memory map that is written to would end the process
    failed = 0
    for free in range(4096, 80_000, 4096):
        filler.unlink()
        filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - free))
        try:
            MemoryBank.build(dataset, model, processor, value_encoder, quantized=True)
            break
        except OSError as error:
            assert "No space left" in str(error)
            failed += 1
    assert failed > 3


FIRST_LOADS = """
import json, multiprocessing, os, signal, sys, time
import numpy as np
from huggingface_hub import constants
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_arrays, bank_folder

folder, home = sys.argv[1:]
context = multiprocessing.get_context("fork")
write, locked = bank_folder.lay_out, bank_arrays.locked

def load(barrier, layouts, waiting, results, kill):
    def counted(*arguments):
        with layouts.get_lock():
            layouts.value += 1
            first = layouts.value == 1
        if first and kill:
            for _ in range(4):
                waiting.acquire()
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    def counted_lock(folder, *arguments):
        if folder.name.startswith(".layout"):
            waiting.release()
        return locked(folder, *arguments)

    bank_folder.lay_out, bank_arrays.locked = counted, counted_lock
    barrier.wait(600)
    bank = MemoryBank.from_pretrained(folder)
    inodes = sorted(path.stat().st_ino for path in bank.folder.iterdir())
    scores, ids = bank.search(bank.keys(np.arange(len(bank))), 3)
    results.put([inodes, scores.tolist(), ids.tolist(), bank.gather(ids).sum().item(), bank.captions])

for kill in (False, True):
    constants.HF_HOME = f"{home}/{kill}"
    layouts, results = context.Value("i", 0), context.Queue()
    shared = (context.Barrier(4), layouts, context.Semaphore(0), results, kill)
    processes = [context.Process(target=load, args=shared) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=600) for _ in range(3 if kill else 4)]
    for process in processes:
        process.join(600)
    print(json.dumps([layouts.value, answers, sorted(process.exitcode for process in processes)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and locks")
def test_four_first_loads_lay_a_bank_out_once(bank, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    command = [sys.executable, "-c", FIRST_LOADS, str(tmp_path / "bank"), str(tmp_path / "home")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1200)
    for kill, line in zip((False, True), done.stdout.splitlines(), strict=True):
        layouts, answers, statuses = json.loads(line)
        assert layouts == (2 if kill else 1) and statuses == ([-9] if kill else [0]) + [0] * 3
        assert all(answer == answers[0] for answer in answers), "the same files, and what is in them"
        assert answers[0][-1] == bank.captions and [ids[0] for ids in answers[0][2]] == list(range(NUM_ROWS))
        names = [path.name for path in (tmp_path / "home" / str(kill) / "tinyalign").iterdir()]
        assert len(names) == 1 and not any(name.startswith(".") for name in names)


def test_first_load_where_nothing_can_be_locked(bank, tmp_path, monkeypatch):
    """Each process lays it out, and puts whole files in the place of the same files."""
    bank.save_pretrained(tmp_path / "bank")
    set_hf_home(monkeypatch, tmp_path / "home")
    flock = "tinyalign_vlm.modeling_tinyalign.files.fcntl.flock"
    monkeypatch.setattr(flock, lambda *arguments: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    assert MemoryBank.from_pretrained(tmp_path / "bank").captions == bank.captions


def test_a_damaged_bank_keeps_nobody_waiting(bank, tmp_path, monkeypatch):
    bank.save_pretrained(tmp_path / "bank")
    set_hf_home(monkeypatch, tmp_path / "home")
    (shard,) = (tmp_path / "bank" / "data").iterdir()
    content = shard.read_bytes()
    shard.write_bytes(content[:-20])
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be read as Parquet"):
            MemoryBank.from_pretrained(tmp_path / "bank")
    shard.write_bytes(content)
    assert MemoryBank.from_pretrained(tmp_path / "bank").captions == bank.captions


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a file system of a folder and mounts it read-only."""
    mounted = []

    def mount(folder: Path):
        folder.mkdir(exist_ok=True)
        for options in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
            if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
                pytest.skip("a read-only file system needs Linux and root")
            mounted[:] = [folder]

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_home_that_cannot_be_written(bank, tmp_path, monkeypatch, read_only):
    """Banks that are laid out there can be used; of others an error says what to do."""
    bank.save_pretrained(tmp_path / "bank")
    bank.shuffled().save_pretrained(tmp_path / "other")
    set_hf_home(monkeypatch, tmp_path / "home")
    MemoryBank.from_pretrained(tmp_path / "bank")
    read_only(tmp_path / "home")
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    assert loaded.search(loaded.keys([4]), 1)[1].tolist() == [[4]]
    with pytest.raises(
        OSError, match="local files to .*home.tinyalign failed: .*Read-only.*set HF_HOME to a folder that"
    ):
        MemoryBank.from_pretrained(tmp_path / "other")
    set_hf_home(monkeypatch, tmp_path / "bank" / "bank_config.json")  # for those without root
    with pytest.raises(OSError, match="bank_config.json.tinyalign failed: .*set HF_HOME to a folder that can be"):
        MemoryBank.from_pretrained(tmp_path / "other")
