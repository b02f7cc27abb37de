"""Saving and first loading a bank, alone and beside others, and what is left when the process is killed."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from isolation import set_hf_home
from PIL import Image

from tinyalign_vlm import MemoryBank, ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.modeling_tinyalign.bank_folders import recover_folder, replace_folder, scratch_folder

# Each moment gets a process of its own, which kills itself there; then one is killed twenty times from outside.
KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_shards, bank_storage, key_encoder

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_rename(number):
    rename, count = os.rename, iter(range(10))
    os.rename = lambda *paths: die() if next(count) == number else rename(*paths)

def killed(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL

def killed_saving(folder, patch):
    def work():
        patch()
        other.save_pretrained(folder)
    killed(work)

def spool():
    rows = other._table.to_batches()[0]
    bank_storage.Spool(row if row else die() for row in (rows, None)).__enter__()

def first_load():
    bank_storage.faiss.write_index = die
    other.shuffled(seed=9)

def save_again_and_again():
    while True:
        bank.save_pretrained(root / "often" / "bank")
        other.save_pretrained(root / "often" / "bank")

root = Path(sys.argv[1])
bank = MemoryBank.from_pretrained(root / "bank")
other = bank.shuffled()
other.value_encoder
killed_saving(root / "rows" / "bank", lambda: setattr(bank_shards.pq.ParquetWriter, "write_table", die))
killed_saving(root / "encoders" / "bank", lambda: setattr(key_encoder, "save_file", die))
killed_saving(root / "sync" / "bank", lambda: setattr(os, "fsync", die))
for number in range(3):
    killed_saving(root / f"rename {number}" / "bank", lambda: die_at_rename(number))
killed_saving(root / "removal" / "bank", lambda: setattr(shutil, "rmtree", die))
for number in range(20):
    pid = os.fork()
    if pid == 0:
        save_again_and_again()
    time.sleep(random.Random(number).uniform(0.02, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found = MemoryBank.from_pretrained(root / "often" / "bank").config["sha256"]
    assert found["keys"] in (bank.config["sha256"]["keys"], other.config["sha256"]["keys"])
    assert os.listdir(root / "often") == ["bank"]
killed(spool)
killed(first_load)
"""
MOMENTS = ("rows", "encoders", "sync", "rename 0", "rename 1", "rename 2", "removal")


@pytest.fixture(scope="module")
def bank(make_model, make_processor) -> MemoryBank:
    model = make_model()
    sizes = {"num_latents": 3, "latent_dim": 5, "vision_feature_size": 16, "num_vision_tokens": 16}
    heads = {"num_self_attention_heads": 1, "num_cross_attention_heads": 1, "num_self_attends_per_block": 1}
    widths = {"d_model": 16, "bytes_per_patch": 4, "qk_channels": 5, "v_channels": 5}
    value_encoder = ValueEncoder(ValueEncoderConfig(**sizes, **heads, **widths))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(image), "caption": f"noise {i}"} for i, image in enumerate(pixels)]
    return MemoryBank.build(rows, model, make_processor(model), value_encoder)


@pytest.fixture(scope="module")
def killed(bank, tmp_path_factory) -> Path:
    """Folders named after the moments at which saving a shuffled bank over `bank` was killed."""
    if sys.platform == "win32":
        pytest.skip("needs fork and SIGKILL")
    root = tmp_path_factory.mktemp("killed")
    for name in (".", "often", *MOMENTS):
        bank.save_pretrained(root / name / "bank")
        (root / name / "bank" / "README.md").write_text("A card.")
    environment = {**os.environ, "HF_HOME": str(root / "home")}
    done = subprocess.run([sys.executable, "-c", KILLED, root], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_save_leaves_a_whole_bank(moment, killed, bank):
    folder = killed / moment / "bank"
    assert len(os.listdir(folder.parent)) > 1 and folder.exists() == (moment != "rename 1")
    keys = MemoryBank.from_pretrained(folder).config["sha256"]["keys"]
    assert (keys == bank.config["sha256"]["keys"]) == (moment not in ("rename 2", "removal"))
    assert (folder / "README.md").read_text() == "A card."
    assert os.listdir(folder.parent) == ["bank"], "loading did not clear up"
    bank.save_pretrained(folder)
    assert MemoryBank.from_pretrained(folder).config["sha256"]["keys"] == bank.config["sha256"]["keys"]


def test_the_next_save_clears_up(bank, tmp_path):
    folder = tmp_path / "bank"
    bank.save_pretrained(folder)
    folder.rename(tmp_path / ".bank.old-00000001")
    (tmp_path / ".bank.new-00000001" / "data").mkdir(parents=True)
    (tmp_path / ".bank.new-00000002").mkdir()
    (tmp_path / ".bank2.new-00000003").mkdir()
    bank.shuffled().save_pretrained(folder)
    assert sorted(os.listdir(tmp_path)) == [".bank2.new-00000003", "bank"]
    assert MemoryBank.from_pretrained(folder).config["sha256"]["keys"] != bank.config["sha256"]["keys"]


def test_scratch_of_killed_processes_is_removed(killed, bank, monkeypatch):
    home = killed / "home" / "tinyalign"
    assert [path.name for path in home.glob(".tmp-*/*.arrow")] == ["rows.arrow"], "the spool went when that began"
    set_hf_home(monkeypatch, killed / "home")
    bank.shuffled(seed=3)
    assert not list(home.glob(".tmp-*"))


def test_scratch_in_use_is_left_alone(tmp_path):
    context = multiprocessing.get_context("spawn")
    with scratch_folder(tmp_path, ".tmp-") as first, scratch_folder(tmp_path, ".tmp-") as second:
        assert first != second and first.is_dir()
        process = context.Process(target=use_scratch, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode == 0 and first.is_dir() and second.is_dir()
    assert list(tmp_path.iterdir()) == []


def use_scratch(parent: Path):
    with scratch_folder(parent, ".tmp-") as folder:
        assert len(list(parent.iterdir())) == 3 and folder.is_dir()


def test_loading_while_another_process_saves(bank, tmp_path):
    folder = tmp_path / "bank"
    bank.save_pretrained(folder)

    def write(fresh: Path):
        (fresh / "bank_config.json").write_text("{}")
        recover_folder(folder)
        MemoryBank.from_pretrained(folder)
        assert fresh.is_dir()

    replace_folder(folder, write)
    assert (folder / "bank_config.json").read_text() == "{}" and os.listdir(tmp_path) == ["bank"]


def test_without_locks(bank, tmp_path, monkeypatch):
    """On Windows and on file systems that have none, saving works and what was left stays."""
    monkeypatch.setattr("tinyalign_vlm.modeling_tinyalign.bank_folders.fcntl", None)
    (tmp_path / ".bank.new-00000001").mkdir()
    bank.save_pretrained(tmp_path / "bank")
    assert len(MemoryBank.from_pretrained(tmp_path / "bank")) == 6
    assert sorted(os.listdir(tmp_path)) == [".bank.new-00000001", "bank"]


def test_parents_that_cannot_be_listed(bank, monkeypatch, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    monkeypatch.setattr(Path, "iterdir", lambda path: (_ for _ in ()).throw(PermissionError("not yours")))
    assert len(MemoryBank.from_pretrained(tmp_path / "bank")) == 6


# ---------------------------------------------------------------------- eight processes load a bank for the first time

# The second time, the process that lays it out first is killed while it does, once the others wait for it.
FIRST_LOADS = """
import json, multiprocessing, os, signal, sys, time
import numpy as np
from huggingface_hub import constants
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_storage, saved_bank

folder, home = sys.argv[1:]
context = multiprocessing.get_context("fork")
write, locked = saved_bank.write_local_files, bank_storage.locked

def load(barrier, layouts, waiting, results, kill):
    def counted(*arguments):
        with layouts.get_lock():
            layouts.value += 1
            first = layouts.value == 1
        if first and kill:
            for _ in range(8):
                waiting.acquire()
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    def counted_lock(folder, *arguments):
        if folder.name.startswith(".layout"):
            waiting.release()
        return locked(folder, *arguments)

    saved_bank.write_local_files, bank_storage.locked = counted, counted_lock
    barrier.wait(600)
    bank = MemoryBank.from_pretrained(folder)
    inodes = sorted(path.stat().st_ino for path in bank._files.paths)
    scores, ids = bank.search(bank.keys(np.arange(len(bank))), 3)
    results.put([inodes, scores.tolist(), ids.tolist(), bank.gather(ids).sum().item(), bank.captions])

for kill in (False, True):
    constants.HF_HOME = f"{home}/{kill}"
    layouts, results = context.Value("i", 0), context.Queue()
    shared = (context.Barrier(8), layouts, context.Semaphore(0), results, kill)
    processes = [context.Process(target=load, args=shared) for _ in range(8)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=600) for _ in range(7 if kill else 8)]
    for process in processes:
        process.join(600)
    print(json.dumps([layouts.value, answers, sorted(process.exitcode for process in processes)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and locks")
def test_eight_first_loads_lay_a_bank_out_once(bank, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    command = [sys.executable, "-c", FIRST_LOADS, str(tmp_path / "bank"), str(tmp_path / "home")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1200)
    for kill, line in zip((False, True), done.stdout.splitlines(), strict=True):
        layouts, answers, statuses = json.loads(line)
        assert layouts == (2 if kill else 1) and statuses == ([-9] if kill else [0]) + [0] * 7
        assert all(answer == answers[0] for answer in answers), "the same files, and what is in them"
        assert answers[0][-1] == bank.captions and [ids[0] for ids in answers[0][2]] == [0, 1, 2, 3, 4, 5]
        names = [path.name for path in (tmp_path / "home" / str(kill) / "tinyalign").iterdir()]
        assert len(names) == 3 and not any(name.startswith(".") for name in names)


def test_first_load_where_nothing_can_be_locked(bank, tmp_path, monkeypatch):
    """Each process lays it out, and puts whole files in the place of the same files."""
    bank.save_pretrained(tmp_path / "bank")
    set_hf_home(monkeypatch, tmp_path / "home")
    flock = "tinyalign_vlm.modeling_tinyalign.bank_folders.fcntl.flock"
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
