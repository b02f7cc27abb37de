"""`tinyalign bank remove`: a new bank; the old one and its readers are not disturbed."""

import multiprocessing
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from banks import content_of
from huggingface_hub import constants

from tinyalign_vlm import MemoryBank


def test_remove_by_picture_name_and_columns(folder, kept, images, captions, tmp_path, capsys, problems, tinyalign):
    before = content_of(folder)
    names = [row["source_id"] for row in kept.rows(range(12))]
    images[2].save(tmp_path / "two.bmp")
    which = ["--source-id", names[0], names[1], "--image", tmp_path / "two.bmp"]
    tinyalign("remove", folder, *which, "--out", tmp_path / "9")
    bank = MemoryBank.from_pretrained(tmp_path / "9")
    assert bank.captions == captions[3:] and [row["id"] for row in bank.rows(range(9))] == list(range(9))
    torch.testing.assert_close(bank.gather(np.arange(9)), kept.gather(np.arange(3, 12)))
    assert f"{tmp_path / '9'}: 9 rows, 3 removed." in capsys.readouterr().out
    tinyalign("remove", tmp_path / "9", "--where", "license=", "--where", "source=b", "--out", tmp_path / "5")
    assert MemoryBank.from_pretrained(tmp_path / "5").captions == [captions[i] for i in (3, 4, 5, 8, 9)]
    tinyalign("remove", tmp_path / "5", "--where", "caption~red", "source=b", "--out", tmp_path / "4")
    assert MemoryBank.from_pretrained(tmp_path / "4").captions == [captions[i] for i in (3, 4, 5, 9)]
    assert problems(tmp_path / "4") == [] and content_of(folder) == before
    with pytest.raises(SystemExit, match="5 is there already: choose another folder"):
        tinyalign("remove", folder, "--where", "source=b", "--out", tmp_path / "5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --source-id, --image or --where"),
        (["--source-id", "0" * 32], "has no row of the image 00000000.*32 hex digits.*Nothing is removed"),
        (["--where", "license=gpl"], "No row of .* has license=gpl: nothing is removed"),
        (["--where", "licence=cc0"], "no column 'licence', expected column=value.*id, source_id, caption, license"),
        (["--where", "__import__('os')"], "no condition, expected column=value"),
        (["--where", "license>cc0"], "no condition"),
        (["--where", "source~"], "All 12 rows would be removed, but a memory bank needs at least one"),
        (["--image", "missing.png"], "'missing.png' is no file"),
    ],
)
def test_nothing_is_removed_by_a_mistake(options, message, folder, tmp_path, tinyalign):
    before = content_of(folder)
    with pytest.raises(SystemExit, match=message):
        tinyalign("remove", folder, "--out", tmp_path / "smaller", *options)
    assert content_of(folder) == before and set(os.listdir(tmp_path)) <= {"bank", "home"}


@pytest.mark.parametrize("command", ["remove", "verify", "info", "view", "merge", "add"])
def test_folders_that_are_no_banks(command, tmp_path, capsys, tinyalign, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the Hub is not asked
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "out"]
    options = {
        "remove": ["--where", "a=b", *out],
        "merge": [tmp_path / "empty", *out],
        "add": ["--model", tmp_path / "empty", "--dataset", "d", *out],
        "view": ["-o", tmp_path / "page.html"],
    }
    for name in ("missing", "empty"):
        with pytest.raises(SystemExit) as done:
            tinyalign(command, tmp_path / name, *options.get(command, []))
        found = f"{done.value.code}{capsys.readouterr().out}"
        assert str(tmp_path / name) in found
        assert "bank_config.json is missing" in found or "a repository of the Hub would be called" in found
    assert os.listdir(tmp_path) == ["empty"]


def test_a_full_disk_leaves_nothing(folder, small_disk, tinyalign):
    before, space = content_of(folder), os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - 8_000))
    with pytest.raises(SystemExit, match="Saving the memory bank to .*smaller failed: .*No space left"):
        tinyalign("remove", folder, "--where", "source=a", "--out", small_disk / "smaller")
    assert os.listdir(small_disk) == ["filler"] and content_of(folder) == before


def read_on(folder: str, ready, changed, answers):
    """Open a bank, and read it again after it has been changed."""
    bank = MemoryBank.from_pretrained(folder)
    keys = bank.keys(np.arange(len(bank)))
    before = (bank.search(keys, 2)[1].tolist(), bank.gather(np.arange(len(bank))).sum().item())
    assert bank.rows([0])
    maps = Path("/proc/self/maps").read_text().splitlines()
    ready.put(sorted({line.split()[4] for line in maps if str(bank.folder) in line}))
    changed.wait()
    again = (bank.search(keys, 2)[1].tolist(), bank.gather(np.arange(len(bank))).sum().item())
    answers.put((len(bank), again == before, len(MemoryBank.from_pretrained(folder))))


def read_elsewhere(home: str, *arguments):
    """Do so in a process of its own, which finds the local files of this one."""
    constants.HF_HOME = home
    read_on(*arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_readers_share_a_copy_and_are_not_disturbed(folder, tmp_path, tinyalign):
    context = multiprocessing.get_context("spawn")
    MemoryBank.from_pretrained(folder)  # the first one lays it out
    arguments = (str(folder), context.Queue(), context.Event(), context.Queue())
    reader = context.Process(target=read_elsewhere, args=(str(tmp_path / "home"), *arguments), daemon=True)
    reader.start()
    thread = threading.Thread(target=read_on, args=arguments, daemon=True)
    thread.start()
    _, ready, changed, answers = arguments
    mapped = [ready.get(timeout=1200) for _ in range(2)]
    # the same inodes: keys, values and rows, mapped and not read
    assert len(mapped[0]) >= 3 and mapped[0] == mapped[1]
    tinyalign("remove", folder, "--where", "source=a", "--out", tmp_path / "smaller")
    shutil.rmtree(folder)
    (tmp_path / "smaller").rename(folder)
    changed.set()
    assert [answers.get(timeout=1200) for _ in range(2)] == [(12, True, 6)] * 2
    thread.join(600)
    reader.join(600)
    assert reader.exitcode == 0
