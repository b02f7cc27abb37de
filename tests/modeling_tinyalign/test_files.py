"""Folders that are there whole or not at all, whatever kills the process or fills the disk."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from banks import NUM_ROWS, content_of
from huggingface_hub import DatasetCard, ModelCard
from isolation import set_hf_home

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_folder, files
from tinyalign_vlm.modeling_tinyalign.files import replace_folder, scratch_folder


def test_saving_keeps_other_files(bank, saved):
    (saved / "README.md").write_text("A card.")
    (saved / "data" / "train-00000-of-00009.parquet").write_text("of an older version")
    bank.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "A card."
    assert [path.name for path in (saved / "data").iterdir()] == ["train-00000-of-00001.parquet"]


def test_saving_over_something_else_is_refused(bank, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no memory bank"):
        bank.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        bank.save_pretrained(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("place", ["write_batch", "save_file", "fsync", "rename"])
def test_full_disk_leaves_the_old_bank(place, bank, saved, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = content_of(tmp_path)
    other = bank.shuffled()
    if place == "write_batch":
        monkeypatch.setattr(bank_folder.pq.ParquetWriter, "write_batch", full)
    elif place == "save_file":
        monkeypatch.setattr("tinyalign_vlm.modeling_tinyalign.key_encoder.save_file", full)
    else:
        monkeypatch.setattr(os, place, full)
    with pytest.raises(OSError, match="Saving the memory bank .* No space left .* unchanged") as error:
        other.save_pretrained(saved)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert content_of(tmp_path) == before, "the old bank changed, or something was left beside it"


def test_full_disk_at_the_last_rename(bank, saved, tmp_path, monkeypatch):
    before, rename = content_of(tmp_path), os.rename

    def full_for_the_new(source, target):
        if ".new-" in str(source):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", full_for_the_new)
    with pytest.raises(OSError, match="unchanged"):
        bank.save_pretrained(saved)
    assert content_of(tmp_path) == before


# Each moment gets a process of its own, which kills itself there; then one is killed twenty times from outside.
KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_arrays, bank_folder, key_encoder

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

def killed_laying_out():
    bank_arrays.RowWriter.finish = die
    other.shuffled(seed=9)

def save_again_and_again():
    while True:
        bank.save_pretrained(root / "often" / "bank")
        other.save_pretrained(root / "often" / "bank")

root = Path(sys.argv[1])
bank = MemoryBank.from_pretrained(root / "bank")
other = bank.shuffled()
killed_saving(root / "rows" / "bank", lambda: setattr(bank_folder.pq.ParquetWriter, "write_batch", die))
killed_saving(root / "encoders" / "bank", lambda: setattr(key_encoder, "save_file", die))
killed_saving(root / "sync" / "bank", lambda: setattr(os, "fsync", die))
for number in range(3):  # of the shard, of the earlier bank, of the new one
    killed_saving(root / f"rename {number}" / "bank", lambda: die_at_rename(number))
killed_saving(root / "removal" / "bank", lambda: setattr(shutil, "rmtree", die))
often = root / "often"
for number in range(20):
    pid = os.fork()
    if pid == 0:
        save_again_and_again()
    time.sleep(random.Random(number).uniform(0.02, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found = MemoryBank.from_pretrained(often / "bank").config.sha256.keys
    assert found in (bank.config.sha256.keys, other.config.sha256.keys)
killed(killed_laying_out)
"""
MOMENTS = ("rows", "encoders", "sync", "rename 0", "rename 1", "rename 2", "removal")


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
    assert folder.exists() == (moment != "rename 2")
    keys = MemoryBank.from_pretrained(folder).config.sha256.keys  # puts the earlier bank back, if it has to
    assert (keys == bank.config.sha256.keys) == (moment != "removal")
    assert (folder / "README.md").read_text() == "A card."
    bank.save_pretrained(folder.parent / "bank")
    assert MemoryBank.from_pretrained(folder.parent / "bank").config.sha256.keys == bank.config.sha256.keys
    assert os.listdir(folder.parent) == ["bank"], "saving did not clear up"


def test_saving_puts_the_earlier_bank_back(bank, saved):
    """Killed between the two renames: its card is kept. What was half deleted is never taken for a bank."""
    (saved / "README.md").write_text("A card.")
    old = saved.with_name(".bank.old")
    saved.rename(old)
    bank.shuffled().save_pretrained(saved)
    assert (saved / "README.md").read_text() == "A card." and not old.exists()
    saved.rename(old)
    (old / "bank_config.json").unlink()
    with pytest.raises(OSError, match="could not be downloaded"):
        MemoryBank.from_pretrained(saved)
    bank.save_pretrained(saved)
    assert os.listdir(saved.parent) == ["bank"]


def test_scratch_of_killed_processes_is_removed(killed, bank, monkeypatch):
    home = killed / "home" / "tinyalign"
    assert [path.name for path in home.glob(".tmp-*/*.arrow")] == ["rows.arrow"]
    set_hf_home(monkeypatch, killed / "home")
    bank.shuffled(seed=3)
    assert not list(home.glob(".tmp-*"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and locks")
def test_scratch_in_use_is_left_alone(tmp_path):
    context = multiprocessing.get_context("fork")  # its lock is its own: it opens the folder itself
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
        MemoryBank.from_pretrained(folder)
        assert fresh.is_dir()

    replace_folder(folder, write)
    assert (folder / "bank_config.json").read_text() == "{}" and os.listdir(tmp_path) == ["bank"]


def test_without_locks(bank, tmp_path, monkeypatch):
    """On Windows and on file systems that have none, saving works and what was left stays."""
    monkeypatch.setattr("tinyalign_vlm.modeling_tinyalign.files.fcntl", None)
    (tmp_path / ".bank.new-00000001").mkdir()
    bank.save_pretrained(tmp_path / "bank")
    assert len(MemoryBank.from_pretrained(tmp_path / "bank")) == NUM_ROWS
    assert sorted(os.listdir(tmp_path)) == [".bank.new-00000001", "bank"]


class FakeHub:
    """What `push_files` asks of the Hub, written down."""

    def __init__(self, present: list[str]):
        self.present, self.asked = present, []

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id, **kwargs):
        self.asked.append(("branch", kwargs["branch"]))

    def list_repo_files(self, repo_id, **kwargs):
        return self.present

    def create_commit(self, repo_id, operations, **kwargs):
        self.asked.append(kwargs["commit_message"])
        self.asked += [(type(operation).__name__, operation.path_in_repo) for operation in operations]
        return "commit"


def test_one_commit_brings_new_files_and_deletes_old_shards(monkeypatch):
    shards = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    hub = FakeHub(["README.md", "bank_config.json", *shards, "notes.txt"])
    monkeypatch.setattr(files, "HfApi", lambda token: hub)
    new = {"data/train-00000-of-00001.parquet": b"rows", "bank_config.json": b"{}"}
    found = files.push_files(
        new, "bank", "dataset", replaced=files.SHARDS, make_card=str, revision="v2", commit_message="Rows"
    )
    assert found == ("me/bank", "commit")
    assert hub.asked == [
        ("branch", "v2"),
        "Rows",
        ("CommitOperationAdd", "bank_config.json"),
        ("CommitOperationAdd", "data/train-00000-of-00001.parquet"),
        ("CommitOperationDelete", "data/train-00000-of-00002.parquet"),
        ("CommitOperationDelete", "data/train-00001-of-00002.parquet"),
    ]


def test_cards_without_the_package(bank, model, monkeypatch):
    """The metadata alone: without `configs` the Hub's viewer would have to guess."""
    monkeypatch.setitem(sys.modules, "tinyalign_vlm.hub_cards.cards", None)
    card = DatasetCard(files.make_bank_card("me/bank", bank.config))
    assert card.data.configs == [{"config_name": "default", "data_files": [{"split": "train", "path": files.SHARDS}]}]
    card = ModelCard(files.make_model_card("me/model", model.config, ["birds"]))
    assert card.data.tags == ["tinyalign", "custom_code", "birds"] and card.data.library_name == "transformers"
