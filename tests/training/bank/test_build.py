"""`tinyalign bank build` and `add`: any data set, killed at any moment, the same bank."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign.bank_images import image_source_id
from tinyalign_vlm.training.bank import encode
from tinyalign_vlm.training.bank.log import changing
from tinyalign_vlm.training.cli.main import main
from tinyalign_vlm.training.data.images import fingerprint_files

ROWS = 40


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Builds in forked processes, so that imports, which take longer than the work, are done once.
BUILDS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from tinyalign_vlm.training.bank import encode
from tinyalign_vlm.training.cli.main import main

encode.PART_ROWS = 4
arguments, root, seeds = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def start(out):
    pid = os.fork()
    if pid == 0:
        try:
            main(["bank", "build", *arguments, "--out", str(out)])
        except SystemExit as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

began = time.time()
assert os.waitpid(start(root / "undisturbed"), 0)[1] == 0
took = time.time() - began
print("took", took, file=sys.stderr)
for seed in range(seeds):
    generator, kills = random.Random(seed), 0
    while True:
        pid = start(root / f"{seed}" / "out")
        time.sleep(generator.uniform(0, 0.9 * max(1, kills / 5)) * took)  # ever longer: the machine may get slower
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
        elif status == 0 and kills < 2:  # it was done too soon (the first one had slow caches to fill): again, sooner
            shutil.rmtree(root / f"{seed}")
            kills, took = 0, took / 2
        else:
            assert status == 0, status
            break
    print("kills", kills)

# the lock goes with a process that is killed, not before: one that stops at its first part
save_file, encode.save_file = encode.save_file, lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
pid = start(root / "two" / "out")
encode.save_file = save_file
assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]) and (root / "two" / ".out.build").exists()
assert os.waitpid(start(root / "two" / "out"), 0)[1] == 256, "a second builder was let in"
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
assert os.waitpid(start(root / "two" / "out"), 0)[1] == 0
"""
SEEDS = 3


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (7, 6, 3), dtype=np.uint8)) for _ in range(ROWS)]


@pytest.fixture(scope="module")
def rows(pictures) -> list[dict]:
    """Good ones, and 3 broken, 5 without a caption, 9 and 20 the picture of 2 again (20 in another format)."""
    bmp = io.BytesIO()
    pictures[2].save(bmp, "BMP")
    rows = [
        {"image": {"bytes": png(picture), "path": None}, "caption": f"picture {number}", "license": f"cc-{number % 2}"}
        for number, picture in enumerate(pictures)
    ]
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:60]
    rows[5]["caption"] = " "
    rows[9]["image"] = rows[2]["image"]
    rows[20]["image"] = {"bytes": bmp.getvalue(), "path": None}
    return rows


LEFT_OUT = {3: "broken image", 5: "empty answer", 9: "duplicate", 20: "duplicate"}


@pytest.fixture(scope="module")
def place(rows, tmp_path_factory, make_model, make_processor, bank) -> Path:
    """model, data.parquet, and bank, which has the value encoder."""
    root = tmp_path_factory.mktemp("place")
    model = make_model()
    model.save_pretrained(root / "model")
    make_processor(model).save_pretrained(root / "model")
    bank.save_pretrained(root / "bank")
    features = {
        "image": datasets.Image(decode=False),
        **dict.fromkeys(("caption", "license"), datasets.Value("string")),
    }
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(root / "data.parquet")
    return root


@pytest.fixture
def build(place, tmp_path, monkeypatch):
    """`build("--option", ..., out=name)` -> the bank."""
    monkeypatch.setattr(encode, "PART_ROWS", 8)

    def run(*options: str, out: str = "out", dataset: Path | str = place / "data.parquet") -> MemoryBank:
        command = ["--model", str(place / "model"), "--value_encoder", str(place / "bank"), "--dataset", str(dataset)]
        main(["bank", "build", *command, "--out", str(tmp_path / out), *options])
        return MemoryBank.from_pretrained(tmp_path / out)

    return run


def test_the_same_as_in_python(build, rows, model, processor, value_encoder, tmp_path, capsys):
    bank = build("--keep", "license", "--batch_size", "8")
    good = [row for number, row in enumerate(rows) if number not in LEFT_OUT]
    same = MemoryBank.build(good, model, processor, value_encoder, keep_columns=["license"])
    assert bank.captions == same.captions and len(bank) == ROWS - 4
    assert bank.config["sha256"]["rows"] == same.config["sha256"]["rows"]
    every = list(range(len(bank)))
    np.testing.assert_allclose(bank.gather(np.array(every)), same.gather(np.array(every)), atol=2e-3)
    np.testing.assert_allclose(bank.key_encoder.mean, same.key_encoder.mean, atol=1e-5)
    assert bank.rows([0])[0]["license"] == "cc-0"
    listed = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert {row["row"]: row["reason"].partition(":")[0] for row in listed} == LEFT_OUT
    printed = capsys.readouterr().out
    assert "36 rows; 4 left out (2 duplicate, 1 broken image, 1 empty answer), listed in" in printed
    assert sorted(os.listdir(tmp_path)) == [".out.lock", "out"]
    # again: nothing is left to do
    before = content(tmp_path / "out")
    build("--keep", "license", "--batch_size", "8")
    assert "is complete: there is nothing to do" in capsys.readouterr().out and content(tmp_path / "out") == before


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


def test_a_value_encoder_is_trained(build, place, tmp_path):
    command = ["bank", "build", "--model", str(place / "model"), "--dataset", str(place / "data.parquet")]
    for name in "ab":
        main([*command, "--out", str(tmp_path / name), "--value_encoder_steps", "3"])
    a, b = (content(tmp_path / name) for name in "ab")
    assert a == b
    untrained = [*command, "--out", str(tmp_path / "c"), "--value_encoder_steps", "0"]
    main(untrained)
    encoder = "value_encoder/model.safetensors"
    assert content(tmp_path / "c")[encoder] != a[encoder]
    saved = tmp_path / "a" / "value_encoder"
    assert content(tmp_path / "a")[encoder] == (saved / "model.safetensors").read_bytes()


def test_packed_or_not(build, place, tmp_path, monkeypatch, capsys):
    """As asked for, whatever the size; and what is made of a bank later is as it is."""
    monkeypatch.setattr("tinyalign_vlm.modeling_tinyalign.bank_storage.PACKED_ROWS", 20)
    more = ["--model", str(place / "model"), "--dataset", str(place / "data.parquet")]
    for packed, bits in ((True, (12, 8)), ("keys", (12, 16)), (False, (32, 16))):
        name = str(packed).lower()
        bank = build("--rows", "12", "--packed", name, out=name)
        assert bank.config["packed"] == packed
        main(["bank", "info", str(tmp_path / name)])
        printed = capsys.readouterr().out
        assert f"numbers of {bits[0]} bits" in printed and f"numbers of {bits[1]} bits" in printed
        kept, ids = bank.gather(np.arange(12)), np.arange(12)
        main(["bank", "add", str(tmp_path / name), *more])
        bank = MemoryBank.from_pretrained(tmp_path / name)
        assert len(bank) == 36 and bank.config["packed"] == packed
        if packed is not True:
            assert bank.gather(ids).equal(kept)
        main(["bank", "merge", *[str(tmp_path / name)] * 2, "--out", str(tmp_path / f"{name} merged")])
        assert MemoryBank.from_pretrained(tmp_path / f"{name} merged").config["packed"] == packed
        like = ["--like", str(tmp_path / name)]
        main(["bank", "build", *more, *like, "--out", str(tmp_path / f"{name} like")])
        assert MemoryBank.from_pretrained(tmp_path / f"{name} like").config["packed"] == packed
        main(["bank", "build", *more, *like, "--packed", "FALSE", "--out", str(tmp_path / f"{name} plain")])
        assert not MemoryBank.from_pretrained(tmp_path / f"{name} plain").config["packed"]
    assert build(out="large").config["packed"] and not build("--rows", "12", out="small").config["packed"]
    with pytest.raises(SystemExit) as done:
        build("--packed", "12", out="bad")
    assert (
        done.value.code == 2
        and "argument --packed: found '12', expected true, keys or false" in capsys.readouterr().err
    )


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
    left_out = [json.loads(line)["reason"] for line in (tmp_path / "chat/left_out.jsonl").read_text().splitlines()]
    assert [reason.partition(":")[0] for reason in left_out] == [
        "several images",
        "missing image",
        "missing image",
        "missing column",
    ]
    odd = [{"image": "0.png"}, {"image": ["0.png", "1.png"], "caption": "two"}, {"caption": "none"}]
    odd += [{"image": "1.png", "caption": "half a smile \ud83d"}, {"image": "2.png", "caption": "a smile \U0001f600"}]
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    assert build(out="odd", dataset=tmp_path / "odd.json").captions == ["a smile \U0001f600"]
    left_out = [json.loads(line)["reason"] for line in (tmp_path / "odd/left_out.jsonl").read_text().splitlines()]
    assert [reason.partition(":")[0] for reason in left_out] == [
        "no caption",
        "several images",
        "missing image",
        "no text",
    ]
    labelled = [{"image": name, "label": name} for name in names]
    (tmp_path / "labels.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in labelled))
    options = ["--caption_column", "label", "--set", "license=cc0", "--keep", "license"]
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


@pytest.fixture(scope="module")
def killed(place, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Folders of builds that were killed again and again until they had finished, and what was said."""
    if sys.platform == "win32":
        pytest.skip("needs fork and SIGKILL")
    root = tmp_path_factory.mktemp("killed")
    command = ["--model", place / "model", "--value_encoder", place / "bank", "--dataset", place / "data.parquet"]
    arguments = json.dumps([*map(str, command), "--batch_size", "2"])
    command = [sys.executable, "-c", BUILDS, arguments, root, str(SEEDS)]
    return root, subprocess.run(command, capture_output=True, text=True, timeout=1800)


def test_killed_at_any_moment_and_the_same_bank(killed):
    root, done = killed
    assert done.returncode == 0, done.stderr
    expected = content(root / "undisturbed")
    assert len(expected) == 7
    kills = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("kills")]
    assert len(kills) == SEEDS and min(kills) >= 2
    for name in [*map(str, range(SEEDS)), "two"]:
        assert content(root / name / "out") == expected
        assert sorted(os.listdir(root / name)) == [".out.lock", "out"]


def test_a_second_builder_is_told(killed):
    assert "Another process is building or changing" in killed[1].stderr


def test_two_builders_are_refused(build, tmp_path):
    with changing(tmp_path / "out"), pytest.raises(SystemExit, match="Another process is building or changing .*out"):
        build()
    assert len(build()) == ROWS - 4


def test_another_command_does_not_go_on_with_its_work(build, place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(encode.Parts, "_make", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build("--rows", "12")
    (tmp_path / ".out.build" / "000000.new").write_bytes(b"cut off")
    with pytest.raises(SystemExit, match="unfinished work of other settings .rows: 12 then, 13 now"):
        build("--rows", "13")
    assert len(build("--rows", "12")) == 12
    with pytest.raises(SystemExit, match="is there already and was not made by this command"):
        build("--rows", "13")


def test_a_file_whose_name_is_a_pattern_is_watched(tmp_path):
    (tmp_path / "pairs[1].json").write_text("[]")
    before = fingerprint_files(str(tmp_path / "pairs[1].json"))
    (tmp_path / "pairs[1].json").write_text("[ ]")
    assert None is not before != fingerprint_files(str(tmp_path / "pairs[1].json")) is not None
    assert fingerprint_files("org/pairs") is None


def test_add(build, place, rows, pictures, tmp_path, capsys):
    build("--rows", "12", "--keep", "license")
    out, model = str(tmp_path / "out"), ["--model", str(place / "model")]
    add = ["bank", "add", out, *model, "--dataset", str(place / "data.parquet")]
    first = MemoryBank.from_pretrained(out)
    main(add)
    bank = MemoryBank.from_pretrained(out)
    assert bank.captions[:12] == first.captions and len(bank) == len(set(bank.captions)) == ROWS - 4
    assert bank.config["sha256"]["key_encoder"] == first.config["sha256"]["key_encoder"]
    assert "36 rows, 24 of them new; 16 left out (14 duplicate" in capsys.readouterr().out
    before = content(tmp_path / "out")
    main(add)
    assert "36 rows, 0 of them new" in capsys.readouterr().out and content(tmp_path / "out") == before
    # a data set without the columns of the bank
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    (tmp_path / "red.json").write_text(json.dumps([{"image": "red.png", "caption": "red"}]))
    more = ["bank", "add", out, *model, "--dataset", str(tmp_path / "red.json")]
    with pytest.raises(SystemExit, match="(?s)red.json has no usable row. 1 left out .1 missing column.*'license'"):
        main(more)
    with pytest.raises(SystemExit, match="--set is 'license', expected COLUMN=VALUE"):
        main([*more, "--set", "license"])
    main([*more, "--set", "license=mine"])
    assert MemoryBank.from_pretrained(out).rows([36])[0]["license"] == "mine"


def test_banks_of_the_same_encoders_can_be_merged(build, place, tmp_path):
    first = build("--rows", "12")
    main(
        ["bank", "build", "--model", str(place / "model"), "--dataset", str(place / "data.parquet")]
        + ["--like", str(tmp_path / "out"), "--out", str(tmp_path / "like")]
    )
    like = MemoryBank.from_pretrained(tmp_path / "like")
    main(["bank", "merge", str(tmp_path / "out"), str(tmp_path / "like"), "--out", str(tmp_path / "all")])
    merged = MemoryBank.from_pretrained(tmp_path / "all")
    assert len(like) == len(merged) == ROWS - 4 and sorted(merged.captions) == sorted(like.captions)
    assert merged.captions[:12] == first.captions


def test_a_full_disk(build, small_disk, tmp_path):
    expected = build(out="elsewhere")
    filler = small_disk / "filler"
    for free in (6_000, 40_000, 90_000):
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
    assert bank.config["sha256"]["keys"] == expected.config["sha256"]["keys"]
    assert sorted(os.listdir(small_disk)) == [".out.lock", "out"]


def test_bad_inputs(build, place, tmp_path, monkeypatch):
    def fails(message: str, *options, **more):
        with pytest.raises(SystemExit, match=f"(?s)tinyalign: .*{message}"):
            build(*options, out="bad", **more)
        assert not (tmp_path / "bad").exists()

    fails("missing.json does not exist, expected a file", dataset=tmp_path / "missing.json")
    fails(
        "has no usable row. 40 left out .40 missing column.*no column 'title', the columns are",
        "--caption_column",
        "title",
    )
    fails("has no usable row. 40 left out .40 missing column", "--keep", "source")
    fails("keep_columns is .*caption", "--keep", "caption")
    fails("keep_columns is .*each once", "--keep", "license", "license")
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
    with pytest.raises(SystemExit) as done:
        build("--learning_rate", "1")
    assert done.value.code == 2
