"""What is noticed of files that tests write outside their own folders; and where the suite's processes write."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from isolation import Place, complaint, set_hf_home

PATHS = """
import os, tempfile
import huggingface_hub.constants, matplotlib, torch.hub
print(os.path.expanduser("~"), matplotlib.get_cachedir(), torch.hub.get_dir(), huggingface_hub.constants.HF_HOME,
      huggingface_hub.constants.HF_HUB_CACHE, tempfile.gettempdir(), sep="\\n")
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "old").write_text("old")
    return tmp_path


def test_new_and_changed_files(folder):
    place = Place(folder, depth=3, files=True, ignored=("__pycache__", "*.egg-info"))
    assert place.changes() == []
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("")
    os.utime(folder / "a" / "old", (0, 0))
    (folder / "a" / "b" / "new").write_text("new")
    (folder / "link").symlink_to(folder / "a")
    assert place.changes() == [str(folder / name) for name in ("a/b/new", "a/old", "link")]


def test_only_new_names_where_other_programs_write(folder):
    place = Place(folder, depth=2, names=("a", "ray*"))
    os.utime(folder / "a" / "old", (0, 0))
    (folder / "a" / "b" / "too deep").write_text("")
    (folder / "of another program").write_text("")
    assert place.changes() == []
    (folder / "ray").mkdir()
    (folder / "a" / "new").mkdir()
    assert place.changes() == [str(folder / name) for name in ("a/new", "ray")]


def test_a_folder_that_was_missing(tmp_path):
    place = Place(tmp_path / "missing")
    assert place.changes() == []
    (tmp_path / "missing" / "new").mkdir(parents=True)
    assert place.changes() == [str(tmp_path / "missing" / "new")]


def test_complaint_names_some_of_many():
    lines = complaint([f"/home/file {number}" for number in range(5)], most=2).splitlines()
    assert "5 new or changed, expected none" in lines[0]
    assert lines[1:] == ["  /home/file 0", "  /home/file 1", "  and 3 more"]


def test_processes_write_into_the_suites_folders(monkeypatch, tmp_path):
    set_hf_home(monkeypatch, tmp_path)
    done = subprocess.run([sys.executable, "-c", PATHS], capture_output=True, text=True, check=True)
    *homes, hf_home, hub_cache, temporary = done.stdout.splitlines()
    suite = Path(os.environ["HOME"]).parent
    assert all(Path(path).is_relative_to(suite) for path in (*homes, temporary))
    assert hf_home == str(tmp_path) and hub_cache == str(tmp_path / "hub")


def test_the_users_environment_comes_back_after_a_map_in_several_processes(tmp_path):
    before = os.environ["HF_HOME"]
    with pytest.MonkeyPatch.context() as patch:
        set_hf_home(patch, tmp_path)
        datasets.Dataset.from_dict({"number": [1, 2]}).map(lambda row: row, num_proc=2)
        assert os.environ["HF_HOME"] == str(tmp_path)
    assert os.environ["HF_HOME"] == before
