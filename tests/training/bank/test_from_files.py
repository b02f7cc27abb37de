"""`tinyalign bank build` and `add`: any data set, killed at any moment, the same bank."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from banks import content_of, noise
from huggingface_hub import constants
from PIL import Image

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.hub_cards.facts import read_facts
from tinyalign_vlm.modeling_tinyalign.row_encoder import image_source_id
from tinyalign_vlm.training.bank import encode
from tinyalign_vlm.training.bank.folders import work_folder

ROWS = 40
# In forked processes, so that imports, which take longer than the work, are done once. The n-th is killed before its
# n-th step at which names of files and folders change, until one is through.
KILLS = """
import json, os, signal, sys
from itertools import count
from pathlib import Path
from tinyalign_vlm.training.bank import encode
from tinyalign_cli.main import main

encode.PART_ROWS = 8
root, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
import tinyalign_vlm.training.bank.from_files
from tinyalign_vlm import TinyAlignForConditionalGeneration, TinyAlignProcessor
TinyAlignForConditionalGeneration.from_pretrained(sys.argv[3])
TinyAlignProcessor.from_pretrained(sys.argv[3])

def forked(command, out, step=None):
    pid = os.fork()
    if pid:
        return pid
    steps = count()
    def hook(event, arguments):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        ours = changes and ("/tinyalign/" in str(arguments[0]) or str(root) in str(arguments[0]))
        if ours and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        sys.addaudithook(hook)
        main(["bank", *command, "--out", str(out)])
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

for command in commands:
    folder = root / command[0]
    folder.mkdir(exist_ok=True)
    assert os.waitpid(forked(command, folder / "undisturbed"), 0)[1] == 0
    for step in count():
        status = os.waitpid(forked(command, folder / "out", step), 0)[1]
        if not os.WIFSIGNALED(status):
            break
    print(command[0], step)

# the lock goes with a process that is killed, not before: one that stops at its first part
import tinyalign_vlm.training.bank.encode as parts
save_file, parts.save_file = parts.save_file, lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
pid = forked(commands[0], root / "two" / "out")
parts.save_file = save_file
assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]) and (root / "two" / ".out.build").exists()
assert os.waitpid(forked(commands[0], root / "two" / "out"), 0)[1] == 256, "a second builder was let in"
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
assert os.waitpid(forked(commands[0], root / "two" / "out"), 0)[1] == 0
"""


LEFT_OUT = {3: "broken image", 5: "no caption", 9: "duplicate", 20: "duplicate"}


def listed(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "left_out.jsonl").read_text().splitlines()]


def kinds(folder: Path) -> list[str]:
    return [row["reason"].partition(":")[0] for row in listed(folder)]


def test_the_same_as_in_python(build, rows, model, processor, value_encoder, tmp_path, capsys):
    bank = build("--keep", "license", "--batch_size", "8")
    options = {"keep_columns": ["license"], "batch_size": 8, "skip_bad_rows": True}
    same = MemoryBank.build(rows, model, processor, value_encoder, **options)
    assert bank.captions == same.captions and len(bank) == ROWS - 4
    assert vars(bank.config.sha256)["rows"] == same.config.sha256.rows
    assert [row["row"] for row in listed(tmp_path / "out")] == [row.row for row in same.left_out] == list(LEFT_OUT)
    assert kinds(tmp_path / "out") == list(LEFT_OUT.values())
    assert [row.reason.partition(":")[0] for row in same.left_out] == list(LEFT_OUT.values())
    every = np.arange(len(bank))
    np.testing.assert_array_equal(bank.gather(every), same.gather(every))
    np.testing.assert_array_equal(bank.keys(every), same.keys(every))
    assert bank.rows([0])[0]["license"] == "cc-0"
    printed = capsys.readouterr().out
    assert "36 rows; 4 left out (2 duplicate, 1 broken image, 1 no caption), listed in" in printed
    assert os.listdir(tmp_path) == ["out"]
    # again: what is there is not touched
    before = content_of(tmp_path / "out")
    with pytest.raises(SystemExit, match="out is there already: choose another folder"):
        build("--keep", "license", "--batch_size", "8")
    assert content_of(tmp_path / "out") == before and os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no umask")
def test_files_have_the_rights_that_the_user_wants(build, tmp_path):
    mask = os.umask(0o027)
    try:
        build("--rows", "4")
    finally:
        os.umask(mask)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_what_the_card_says_is_recorded(build, tmp_path):
    build("--keep", "license")
    text = (tmp_path / "out" / "card_facts.json").read_text()
    facts = json.loads(text)
    assert str(tmp_path) not in text and facts["summary"] is None
    assert facts["license"] == ["cc-0", "cc-1"]  # of the rows
    assert re.match(r"tinyalign bank build --dataset \S+ .*--keep license .*--out bank$", facts["command"])
    assert [part["role"] for part in facts["parts"]] == ["vision tower", "images and captions"]


def test_duplicates_can_be_kept(build):
    assert len(build("--keep_duplicates")) == ROWS - 2


def test_rows_are_chosen_by_seed(build):
    first, again, other = (build("--rows", "12", "--seed", seed, out=f"{i}") for i, seed in enumerate("778"))
    assert len(first) == len(other) == 12 and first.captions == again.captions != other.captions
    assert len(set(first.captions)) == 12
    # of all rows but one, bad ones are replaced by others as long as there are any
    assert len(build("--rows", str(ROWS - 1), out="most")) >= ROWS - 5
    with pytest.raises(SystemExit, match=f"--rows is 41, but .*data.parquet has {ROWS} rows, expected 1 to {ROWS}"):
        build("--rows", "41", out="many")


def test_a_value_encoder_is_trained_once(place, tmp_path, monkeypatch, tinyalign, capsys):
    command = ["build", "--model", place / "model", "--dataset", place / "data.parquet", "--value_encoder_steps", "3"]
    tinyalign(*command, "--out", tmp_path / "a")
    assert "Training a value encoder on 38 images" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        stop_after(0, patch)
        tinyalign(*command, "--out", tmp_path / "b")
    capsys.readouterr()
    tinyalign(*command, "--out", tmp_path / "b")
    assert "Training" not in capsys.readouterr().out
    a, b = (content_of(tmp_path / name) for name in "ab")
    assert a == b
    tinyalign(*command, "--value_encoder_steps", "0", "--out", tmp_path / "c")
    encoder = Path("value_encoder/model.safetensors")
    assert content_of(tmp_path / "c")[encoder] != a[encoder]


def test_a_bank_without_values_has_no_value_encoder(place, make_model, make_processor, tmp_path, tinyalign):
    reader = make_model(memory_input="captions")
    rows = [{"image": noise(number), "caption": "a cat"} for number in range(2)]
    MemoryBank.build(rows, reader, make_processor(reader)).save_pretrained(tmp_path / "names")
    command = ["build", "--model", place / "model", "--dataset", place / "data.parquet", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match="names, a bank without values, expected one for a model that reads latents"):
        tinyalign(*command, "--value_encoder", tmp_path / "names")


def test_quantized_or_not(build, place, tmp_path, monkeypatch, capsys, tinyalign):
    """As asked for, whatever the size; and what is made of a bank later is as it is."""
    monkeypatch.setattr("tinyalign_vlm.training.bank.build.QUANTIZED_ROWS", 20)
    more = ["--model", place / "model", "--dataset", place / "data.parquet"]
    for quantized, bits in ((True, (16, 8)), (False, (32, 16))):
        first = tmp_path / str(quantized).lower()
        bank = build("--rows", "12", "--quantized", first.name, out=first.name)
        assert bank.config.quantized == quantized
        tinyalign("info", first)
        printed = capsys.readouterr().out
        assert f"numbers of {bits[0]} bits" in printed and f"numbers of {bits[1]} bits" in printed
        tinyalign("add", first, *more, "--out", tmp_path / f"{first.name} added")
        bank = MemoryBank.from_pretrained(tmp_path / f"{first.name} added")
        assert len(bank) == 36 and bank.config.quantized == quantized
        tinyalign("merge", first, first, "--out", tmp_path / f"{first.name} merged")
        assert MemoryBank.from_pretrained(tmp_path / f"{first.name} merged").config.quantized == quantized
        tinyalign("build", *more, "--like", first, "--out", tmp_path / f"{first.name} like")
        assert MemoryBank.from_pretrained(tmp_path / f"{first.name} like").config.quantized == quantized
    tinyalign("build", *more, "--like", first, "--quantized", "TRUE", "--out", tmp_path / "other")
    assert MemoryBank.from_pretrained(tmp_path / "other").config.quantized
    assert build(out="large").config.quantized and not build("--rows", "12", out="small").config.quantized


def test_formats(build, place, pictures, tmp_path):
    for number, picture in enumerate(pictures[:6]):
        picture.save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(6)]
    chat = [
        {
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"},
                {"from": "gpt", "value": f"the {name}"},
                {"from": "human", "value": "sure?"},
                {"from": "gpt", "value": "yes"},
            ],
            "license": "cc0",
        }
        for name in names
    ]
    chat[1]["image"] = ["1.png", "2.png"]
    chat[1]["conversations"][0]["value"] = "<image><image> what?"
    chat[2]["image"] = None
    chat[2]["conversations"][0]["value"] = "who?"
    chat[3]["image"] = "missing.png"
    chat[4].pop("license")
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    bank = build("--keep", "license", out="chat", dataset=tmp_path / "chat.json")
    assert bank.captions == ["the 0.png", "the 5.png"]
    assert kinds(tmp_path / "chat") == ["several images", "missing image", "missing image", "missing column"]
    odd = [{"image": "0.png"}, {"image": ["0.png", "1.png"], "caption": "two"}, {"caption": "none"}]
    odd += [{"image": "1.png", "caption": "half a smile \ud83d"}, {"image": "2.png", "caption": "a smile \U0001f600"}]
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    assert build(out="odd", dataset=tmp_path / "odd.json").captions == ["a smile \U0001f600"]
    # "no text" is said of any text in a row of JSON
    assert kinds(tmp_path / "odd") == ["no caption", "several images", "missing image", "no text"]
    labelled = [{"image": name, "label": name} for name in names]
    (tmp_path / "labels.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in labelled))
    options = ["--caption_column", "label", "--set", "license=cc0"]
    bank = build(*options, out="labels", dataset=tmp_path / "labels.jsonl")
    assert bank.captions == names and bank.rows([5])[0]["license"] == "cc0"
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in names:
            for part, data in ((name, (tmp_path / name).read_bytes()), (name.replace("png", "txt"), b"in a tar")):
                info = tarfile.TarInfo(part)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    bank = build(out="tar", dataset=f"{tmp_path}/*.tar")
    assert bank.captions == ["in a tar"] * 6
    assert [row["source_id"] for row in bank.rows(range(6))] == [image_source_id(picture) for picture in pictures[:6]]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_killed_at_any_moment_and_the_same_bank(place, tmp_path):
    options = ["--model", place / "model", "--dataset", place / "data.parquet", "--batch_size", "2"]
    commands = [["build", "--value_encoder", place / "bank", *options], ["add", place / "bank", *options]]
    commands = json.dumps([[str(word) for word in command] for command in commands])
    environment = {**os.environ, "HF_HOME": constants.HF_HOME, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLS, tmp_path, commands, place / "model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    steps = dict(line.split() for line in done.stdout.splitlines() if re.fullmatch(r"\w+ \d+", line))
    assert min(int(steps[name]) for name in ("build", "add")) > 10
    for name in ("build", "add"):
        expected = content_of(tmp_path / name / "undisturbed")
        assert content_of(tmp_path / name / "out") == expected and len(expected) == 7
        assert sorted(os.listdir(tmp_path / name)) == ["out", "undisturbed"]
    assert content_of(tmp_path / "two" / "out") == content_of(tmp_path / "build" / "undisturbed")
    assert "Another process is building" in done.stderr


def test_two_builders_are_refused(build, tmp_path):
    with work_folder(tmp_path / "out"), pytest.raises(SystemExit, match="Another process is building .*out"):
        build()
    assert len(build()) == ROWS - 4


def stop_after(parts: int, monkeypatch) -> None:
    """Let a build be interrupted when so many parts are there."""
    save_file, saved = encode.save_file, []

    def save(path, content):
        if len(saved) == parts:
            raise KeyboardInterrupt
        save_file(path, content)
        saved.append(path)

    monkeypatch.setattr(encode, "save_file", save)


def test_another_command_does_not_go_on_with_its_work(build, tmp_path, monkeypatch):
    for parts in (0, 1):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
            stop_after(parts, patch)
            build("--rows", "12")
        assert len(os.listdir(tmp_path)) == parts, "nothing was encoded, and something is left"
    (tmp_path / ".out.build" / "000001.new").write_bytes(b"cut off")
    with pytest.raises(SystemExit, match="unfinished work of other settings .rows: 12 then, 13 now"):
        build("--rows", "13")
    settings = tmp_path / ".out.build" / "settings.json"
    kept = settings.read_text()
    settings.write_text(kept[:20])
    with pytest.raises(SystemExit, match="settings.json is damaged .*: delete .*out.build to begin anew"):
        build("--rows", "12")
    settings.write_text(kept)
    # what follows the encoding may be another
    bank = build("--rows", "12", "--whiten_dim", "3")
    assert len(bank) == 12 and bank.config.key_dim == 3 and os.listdir(tmp_path) == ["out"]


def test_add(build, place, tmp_path, capsys, tinyalign):
    first = build("--rows", "12", "--keep", "license")
    before = content_of(tmp_path / "out")
    model = ["--model", place / "model"]
    tinyalign("add", tmp_path / "out", *model, "--dataset", place / "data.parquet", "--out", tmp_path / "more")
    bank = MemoryBank.from_pretrained(tmp_path / "more")
    assert bank.captions[:12] == first.captions and len(bank) == len(set(bank.captions)) == ROWS - 4
    assert bank.config.sha256.key_encoder == first.config.sha256.key_encoder
    assert "more: 36 rows, 24 of them new; 16 left out (14 duplicate" in capsys.readouterr().out
    assert kinds(tmp_path / "more").count("duplicate") == 14
    assert content_of(tmp_path / "out") == before and sorted(os.listdir(tmp_path)) == ["more", "out"]
    tinyalign("add", tmp_path / "more", *model, "--dataset", place / "data.parquet", "--out", tmp_path / "same")
    assert "same: 36 rows, 0 of them new" in capsys.readouterr().out
    # a data set without the columns of the bank
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    (tmp_path / "red.json").write_text(json.dumps([{"image": "red.png", "caption": "red"}]))
    red = ["add", tmp_path / "more", *model, "--dataset", tmp_path / "red.json", "--out", tmp_path / "red"]
    with pytest.raises(SystemExit, match="(?s)red.json has no usable row.*1 left out .1 missing column.*'license'"):
        tinyalign(*red)
    with pytest.raises(SystemExit, match="--set is 'license', expected COLUMN=VALUE"):
        tinyalign(*red, "--set", "license")
    with pytest.raises(
        SystemExit, match=r"--set names \['source'\], but the bank keeps \['license'\]: leave them out"
    ):
        tinyalign(*red, "--set", "license=mine", "source=mine")
    assert not (tmp_path / "red").exists() and not (tmp_path / ".red.build").exists()
    tinyalign(*red, "--set", "license=mine")
    assert MemoryBank.from_pretrained(tmp_path / "red").rows([36])[0]["license"] == "mine"
    facts = read_facts(tmp_path / "red")
    assert [part.source for part in facts.parts][-2:] == ["data.parquet", "red.json"]
    assert facts.license == ["cc-0", "cc-1", "mine"] and str(tmp_path) not in facts.command
    assert re.match("tinyalign bank add more --dataset red.json .*--set license=mine --out bank", facts.command)


def test_banks_of_the_same_encoders_can_be_merged(build, place, tmp_path, tinyalign):
    first = build("--rows", "12")
    data = ["--model", place / "model", "--dataset", place / "data.parquet"]
    tinyalign("build", *data, "--like", tmp_path / "out", "--out", tmp_path / "like")
    like = MemoryBank.from_pretrained(tmp_path / "like")
    tinyalign("merge", tmp_path / "out", tmp_path / "like", "--out", tmp_path / "all")
    merged = MemoryBank.from_pretrained(tmp_path / "all")
    assert len(like) == len(merged) == ROWS - 4 and sorted(merged.captions) == sorted(like.captions)
    assert merged.captions[:12] == first.captions


def test_a_full_disk(build, small_disk, tmp_path):
    expected = build(out="elsewhere")
    filler = small_disk / "filler"
    for free in (6_000, 40_000, 65_000):
        filler.write_bytes(b"")
        space = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - free)))
        kept = len(list(small_disk.glob(".out.build/*.arrow")))
        with pytest.raises(
            SystemExit, match="tinyalign: .*(No space left|Saving the memory bank|local files).*Nothing is lost"
        ):
            build(out="disk/out")
        assert len(list(small_disk.glob(".out.build/*.arrow"))) >= kept and not (small_disk / "out").exists()
    assert kept > 0
    filler.unlink()
    bank = build(out="disk/out")
    assert bank.config.sha256.keys == expected.config.sha256.keys
    assert os.listdir(small_disk) == ["out"]


def test_bad_inputs(build, place, tmp_path, monkeypatch):
    def fails(message: str, *options, **more):
        with pytest.raises(SystemExit, match=f"(?s)tinyalign: .*{message}"):
            build(*options, out="bad", **more)
        assert not (tmp_path / "bad").exists()

    fails("missing.json does not exist, expected a file", dataset=tmp_path / "missing.json")
    fails("/ is there already: choose another folder", "--out", "/")
    missing = "has no usable row, .*40 left out .40 missing column"
    fails(f"{missing}.*no column 'title', the columns are", "--caption_column", "title")
    fails(missing, "--keep", "source")
    fails("the columns to keep are .*caption", "--keep", "caption")
    fails("the columns to keep are .*each once", "--keep", "license", "license")
    fails("batch_size is -2, expected 1 or more", "--batch_size", "-2")
    fails("batch_size is 0, expected 1 or more", "--batch_size", "0")
    fails("thumbnail_size is 5000, expected 1 to 4096", "--thumbnail_size", "5000")
    fails("value_encoder_steps is -1, expected 0 or more", "--value_encoder_steps", "-1")
    assert not (tmp_path / ".bad.build").exists()
    like = ["--like", str(place / "bank"), "--keep", "license", "--whiten_dim", "3"]
    fails(r"keeps \[\] and has encoders.*leave --keep, --value_encoder, --whiten_dim out", *like)
    for name, content in {"rows.json": b'[{"image":', "latin.jsonl": b'{"caption": "\xe9"}', "cut.tar": b""}.items():
        (tmp_path / name).write_bytes(content)
        fails(f"{name} cannot be read", dataset=tmp_path / name)
    (tmp_path / "none.json").write_text("[]")
    fails("none.json has no rows", dataset=tmp_path / "none.json")
    shards = datasets.Dataset.from_parquet(str(place / "data.parquet"))
    shards.remove_columns("license").to_parquet(tmp_path / "shard 0.parquet")
    shards.to_parquet(tmp_path / "shard 1.parquet")
    fails("has files of different columns: the first has not all", dataset=tmp_path / "shard ?.parquet")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the Hub is not asked
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as nowhere:
        build(out="bad", dataset=tmp_path / "no such folder")
    assert "no such folder" in nowhere.value.code and "Free some space" not in nowhere.value.code
    fails("whiten_dim is 99, but 36 rows .* at most 16", "--whiten_dim", "99")
    written = {"rows.json", "latin.jsonl", "cut.tar", "none.json", "shard 0.parquet", "shard 1.parquet"}
    assert set(os.listdir(tmp_path)) <= {*written, ".bad.build"}
