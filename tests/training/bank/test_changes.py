"""`tinyalign bank remove`, `merge`, `compact`, `verify` and `info`; readers are not disturbed and share one copy."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from isolation import set_hf_home

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_shards
from tinyalign_vlm.modeling_tinyalign.bank_config import config_sha256
from tinyalign_vlm.modeling_tinyalign.bank_storage import cache_root
from tinyalign_vlm.training.cli.main import main

SHARD = "data/train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def rows(images, captions) -> list[dict]:
    licences = ["cc0", "cc-by", "", None]
    return [
        {"image": image, "caption": caption, "license": licences[number % 4], "source": "a" if number < 6 else "b"}
        for number, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]


@pytest.fixture(scope="module")
def kept(rows, model, processor, value_encoder) -> MemoryBank:
    return MemoryBank.build(rows, model, processor, value_encoder, keep_columns=["license", "source"])


@pytest.fixture
def folder(kept, tmp_path, monkeypatch) -> Path:
    """A saved bank; nothing was loaded before."""
    kept.save_pretrained(tmp_path / "bank")
    set_hf_home(monkeypatch, tmp_path / "home")
    return tmp_path / "bank"


def tinyalign(*arguments) -> None:
    main(["bank", *map(str, arguments)])


def problems(folder: Path, capsys, *options) -> list[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        tinyalign("verify", folder, *options)
    lines = capsys.readouterr().out.splitlines()
    assert done.value.code == (0 if lines == [f"{folder} is right."] else 1)
    return [] if done.value.code == 0 else lines


# ---------------------------------------------------------------------- remove


def test_remove_by_picture_name_and_columns(folder, kept, images, captions, tmp_path, capsys):
    names = [row["source_id"] for row in kept.rows(range(12))]
    images[2].save(tmp_path / "two.bmp")
    tinyalign("remove", folder, "--source-id", names[0], names[1], "--image", tmp_path / "two.bmp")
    bank = MemoryBank.from_pretrained(folder)
    assert bank.captions == captions[3:] and [row["id"] for row in bank.rows(range(9))] == list(range(9))
    torch.testing.assert_close(bank.gather(np.arange(9)), kept.gather(np.arange(3, 12)))
    assert "9 rows, 3 removed" in capsys.readouterr().out
    tinyalign("remove", folder, "--where", "license=", "--where", "source=b")
    assert MemoryBank.from_pretrained(folder).captions == [captions[i] for i in (3, 4, 5, 8, 9)]
    tinyalign("remove", folder, "--where", "caption~red", "source=b")
    assert MemoryBank.from_pretrained(folder).captions == [captions[i] for i in (3, 4, 5, 9)]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(change["change"], change["removed"], change["rows"]) for change in log] == [
        ("remove", 3, 9),
        ("remove", 4, 5),
        ("remove", 1, 4),
    ]
    assert problems(folder, capsys) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --source-id, --image or --where"),
        (["--source-id", "0" * 32], "has no row of the image 00000000.*32 hex digits.*Nothing is removed"),
        (["--where", "license=gpl"], "No row of .* has license=gpl: nothing is removed"),
        (["--where", "licence=cc0"], "no column 'licence', expected column=value.*id, source_id, caption, license"),
        (["--where", "__import__('os')"], "no condition, expected column=value"),
        (["--where", "license>cc0"], "no condition"),
        (["--where", "source~"], "All 12 rows of .* would be removed, but a memory bank needs at least one"),
        (["--image", "missing.png"], "the image cannot be read .FileNotFoundError"),
    ],
)
def test_nothing_is_removed_by_a_mistake(options, message, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=message):
        tinyalign("remove", folder, *options)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["remove", "verify", "info", "compact", "view", "merge", "add"])
def test_folders_that_are_no_banks(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    options = {
        "remove": ["--where", "a=b"],
        "merge": [tmp_path / "empty", "--out", tmp_path / "out"],
        "add": ["--model", "m", "--dataset", "d"],
        "view": ["-o", tmp_path / "page.html"],
    }
    for name in ("missing", "empty"):
        with pytest.raises(SystemExit) as done:
            tinyalign(command, tmp_path / name, *options.get(command, []))
        found = f"{done.value.code}{capsys.readouterr().out}"
        assert str(tmp_path / name) in found and "is no memory bank" in found or "bank_config.json is missing" in found


# ---------------------------------------------------------------------- merge, compact


def test_merge(folder, kept, captions, tmp_path, capsys):
    kept.remove(list(range(8))).save_pretrained(tmp_path / "last")
    kept.remove(list(range(5, 12))).save_pretrained(tmp_path / "first")
    tinyalign("merge", tmp_path / "last", tmp_path / "first", folder, "--out", tmp_path / "all")
    bank = MemoryBank.from_pretrained(tmp_path / "all")
    assert bank.captions == captions[8:] + captions[:5] + captions[5:8]
    assert "12 rows of 3 banks; 9 left out" in capsys.readouterr().out
    assert problems(tmp_path / "all", capsys) == []
    tinyalign("merge", tmp_path / "last", folder, "--keep_duplicates", "--out", tmp_path / "twice")
    assert len(MemoryBank.from_pretrained(tmp_path / "twice")) == 16
    with pytest.raises(SystemExit, match="all is there already: choose another --out"):
        tinyalign("merge", tmp_path / "last", folder, "--out", tmp_path / "all")
    with pytest.raises(SystemExit, match="Found 1 bank, expected two or more"):
        tinyalign("merge", folder, "--out", tmp_path / "one")


def test_banks_that_cannot_be_merged(folder, rows, make_model, make_processor, value_encoder, tmp_path):
    clip = make_model("clip")
    columns = {"keep_columns": ["license", "source"]}
    other = MemoryBank.build(rows, clip, make_processor(clip, "clip"), value_encoder_for(clip, rows), **columns)
    other.save_pretrained(tmp_path / "other tower")
    with pytest.raises(SystemExit, match="other tower cannot be merged with .*bank.* vision tower: .*key encoder"):
        tinyalign("merge", folder, tmp_path / "other tower", "--out", tmp_path / "out")
    wide = make_model(latent_dim=8)
    other = MemoryBank.build(rows, wide, make_processor(wide), value_encoder_for(wide, rows))
    other.save_pretrained(tmp_path / "other shape")
    with pytest.raises(SystemExit, match=r"size of a latent: 8 here, 5 there.*kept columns: \[\] here.*--like"):
        tinyalign("merge", folder, tmp_path / "other shape", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def value_encoder_for(model, rows):
    from tinyalign_vlm import ValueEncoder, ValueEncoderConfig

    features = model.get_vision_features(torch.zeros(1, 3, 32, 32))
    sizes = {"num_latents": model.config.num_latents, "latent_dim": model.config.latent_dim, "d_model": 16}
    heads = {"num_self_attention_heads": 1, "num_cross_attention_heads": 1, "num_self_attends_per_block": 1}
    of_features = {"num_vision_tokens": features.shape[1], "vision_feature_size": features.shape[2]}
    return ValueEncoder(ValueEncoderConfig(**sizes, **heads, **of_features))


def test_compact_deletes_what_earlier_versions_left(folder, kept, tmp_path, capsys):
    reader = MemoryBank.from_pretrained(folder)
    before = reader.gather(np.arange(12))
    tinyalign("remove", folder, "--where", "source=a")
    secret = kept.captions[0].encode()

    def still_there() -> bool:
        return any(secret in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    assert still_there()
    tinyalign("compact", folder)
    assert not still_there() and "bytes of earlier versions deleted" in capsys.readouterr().out
    torch.testing.assert_close(reader.gather(np.arange(12)), before)
    assert len(MemoryBank.from_pretrained(folder)) == 6 and problems(folder, capsys) == []
    assert len(list(cache_root().iterdir())) == 3


# ---------------------------------------------------------------------- verify, info


def edit(folder: Path, change) -> None:
    table = pq.read_table(folder / SHARD)
    pq.write_table(change(table), folder / SHARD)


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def test_verify_a_right_bank(folder, tmp_path, model, processor, make_model, capsys):
    assert problems(folder, capsys) == []
    model.save_pretrained(tmp_path / "model")
    assert problems(folder, capsys, "--model", tmp_path / "model") == []
    make_model("clip").save_pretrained(tmp_path / "clip")
    (found,) = problems(folder, capsys, "--model", tmp_path / "clip")
    assert "was built with the vision tower" in found and "expected at least 0.99" in found or "wide" in found


def test_verify_names_each_problem(folder, capsys):
    def damage(table):
        keys, values = table["key"].to_pylist(), table["value"].to_pylist()
        keys[3][0], values[5][1] = float("nan"), float("inf")
        return with_column(with_column(table, "key", keys), "value", values).slice(0, 11)

    edit(folder, damage)
    (folder / "value_encoder" / "model.safetensors").write_bytes(b"")
    found = "\n".join(problems(folder, capsys))
    assert "model.safetensors: its sha256 is" in found
    assert "row 3 has key" in found and "NaN" in found
    assert "shards hold 11 rows, but bank_config.json says 12" in found
    for part in ("keys", "values", "rows"):
        assert f"The sha256 of the {part} in the shards is" in found


@pytest.mark.parametrize("part", ["caption", "license", "thumbnail"])
def test_verify_finds_changed_text(part, folder, capsys):
    def change(table):
        values = table[part].to_pylist()
        values[0] = {"bytes": b"x", "path": None} if part == "thumbnail" else "other"
        return with_column(table, part, values)

    edit(folder, change)
    (found,) = problems(folder, capsys)
    assert "sha256 of the rows in the shards" in found


def test_verify_files_that_are_missing_or_cut(folder, capsys):
    shard = folder / SHARD
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert any(str(shard) in line for line in problems(folder, capsys))
    shard.unlink()
    assert any(str(shard) in line for line in problems(folder, capsys))
    shard.write_bytes(content)
    assert problems(folder, capsys) == []
    config = json.loads((folder / "bank_config.json").read_text())
    (folder / "bank_config.json").write_text(json.dumps(config | {"num_rows": 13}))
    assert "sha256 of this file's content" in problems(folder, capsys)[0]
    config["num_rows"] = 13
    config["sha256"]["config"] = config_sha256(config)
    (folder / "bank_config.json").write_text(json.dumps(config))
    assert "shards hold 12 rows, but bank_config.json says 13" in problems(folder, capsys)[0]
    (folder / "bank_config.json").unlink()
    assert "bank_config.json is missing" in problems(folder, capsys)[0]


def test_verify_files_beside_the_shards(folder, capsys):
    shutil.copy(folder / SHARD, folder / "data/train-00007-of-00008.parquet")
    assert "train-00007-of-00008.parquet is none of the bank's 1 shards, but `datasets` would read it" in " ".join(
        problems(folder, capsys)
    )
    (folder / "data/train-00007-of-00008.parquet").unlink()
    for name in ("value_encoder/config.json", "log.jsonl"):
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        path.write_bytes(content.replace(b"num_", b"mum_") or b"{")
        assert any(str(path) in line for line in problems(folder, capsys))
        path.write_bytes(content)
    assert problems(folder, capsys) == []


def test_verify_blames_the_shard_that_is_damaged(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bank_shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(bank_shards, "BATCH_ROWS", 4)
    kept.save_pretrained(tmp_path / "bank")
    first, second, _ = sorted((tmp_path / "bank" / "data").iterdir())
    content = bytearray(first.read_bytes())
    content[5] ^= 0x10  # of the first page's header: pyarrow reads no row, and says nothing
    first.write_bytes(content)
    found = problems(tmp_path / "bank", capsys)
    assert found[0] == f"{first} is damaged: 4 of its rows cannot be read." and str(second) not in " ".join(found)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cut", [lambda content: b"", lambda content: content[:-9]])
def test_verify_names_each_cut_file_of_this_machines_copy(cut, packed, kept, tmp_path, capsys, monkeypatch):
    set_hf_home(monkeypatch, tmp_path / "home")
    bank = kept._with_rows(kept._batches(), [], packed)
    bank.save_pretrained(tmp_path / "bank")
    for path in bank._files.paths:
        content = path.read_bytes()
        path.unlink()  # it is mapped
        path.write_bytes(cut(content))
        assert str(path) in problems(tmp_path / "bank", capsys)[0]
        path.write_bytes(content)
    assert problems(tmp_path / "bank", capsys) == []


@pytest.mark.parametrize("part", ["keys", "values", "rows"])
def test_verify_this_machines_copy(part, folder, capsys):
    """What is searched is not the shards, but a copy of them."""
    MemoryBank.from_pretrained(folder)
    digest = json.loads((folder / "bank_config.json").read_text())["sha256"][part]
    (copy,) = cache_root().glob(f"{digest}-*/*")
    content = bytearray(copy.read_bytes())
    if part == "rows":
        place = content.index(b"a red square 0")
        content[place] ^= 1
    else:
        content[-100] ^= 0x10
    copy.write_bytes(content)
    found = problems(folder, capsys)
    assert found and f"copy of the {part}" in found[0] and str(copy.parent) in found[0]


def test_info(folder, capsys):
    tinyalign("remove", folder, "--where", "caption~blue 1")
    capsys.readouterr()
    tinyalign("info", folder)
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("sha"))
    assert found["rows"] == "11 of 11 images" and found["values"] == "3 x 5 numbers of 16 bits"
    assert found["license"] == "cc0 3, (empty) 3, (none) 3, cc-by 2"
    assert found["source"] == "b 6, a 5" and found["change"].split() == "1 remove of 1: 11 rows".split()


def test_info_of_columns_named_like_facts(rows, model, processor, value_encoder, tmp_path, capsys):
    named = [{**row, "rows": "mine", "tower": "Babel"} for row in rows]
    columns = ["rows", "tower", "source"]
    MemoryBank.build(named, model, processor, value_encoder, keep_columns=columns).save_pretrained(tmp_path / "bank")
    tinyalign("info", tmp_path / "bank")
    found = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [value for name, value in found if name == "rows"] == ["12 of 12 images", "mine 12"]
    assert [value for name, value in found if name == "tower"][1:] == ["Babel 12"]


# ---------------------------------------------------------------------- readers


def read_on(folder: str, home: str, ready, changed, answers):
    """In a process of its own: opens a bank, and reads it again after it has been changed."""
    bank = MemoryBank.from_pretrained(folder)
    keys = bank.keys(np.arange(len(bank)))
    before = (bank.search(keys, 2)[1].tolist(), bank.gather(np.arange(len(bank))).sum().item())
    assert bank.rows([0])
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = sorted({line.split()[4] for line in maps if home in line})
    ready.put(mapped)
    changed.wait()
    again = (bank.search(keys, 2)[1].tolist(), bank.gather(np.arange(len(bank))).sum().item())
    answers.put((len(bank), again == before, len(MemoryBank.from_pretrained(folder))))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_readers_share_a_copy_and_are_not_disturbed(folder, tmp_path):
    context = multiprocessing.get_context("spawn")
    MemoryBank.from_pretrained(folder)  # the first one lays it out
    ready, answers, changed = context.Queue(), context.Queue(), context.Event()
    home = str(tmp_path / "home")
    arguments = (str(folder), home, ready, changed, answers)
    readers = [context.Process(target=read_on, args=arguments, daemon=True) for _ in range(8)]
    for reader in readers:
        reader.start()
    mapped = [ready.get(timeout=1200) for _ in readers]
    # the same inodes: keys, values and rows, mapped and not read
    assert len(mapped[0]) >= 3 and mapped.count(mapped[0]) == 8
    tinyalign("remove", folder, "--where", "source=a")
    tinyalign("compact", folder)
    changed.set()
    assert [answers.get(timeout=1200) for _ in readers] == [(12, True, 6)] * 8
    for reader in readers:
        reader.join(600)
        assert reader.exitcode == 0


def test_a_reader_that_has_read_nothing_yet_is_not_disturbed(folder, kept):
    reader = MemoryBank.from_pretrained(folder)
    tinyalign("remove", folder, "--where", "source=a")
    tinyalign("compact", folder)
    ids = np.arange(12)
    assert (reader.search(reader.keys(ids), 1)[1][:, 0] == ids).all() and reader.rows(ids) == kept.rows(ids)
    assert torch.equal(reader.gather(ids), kept.gather(ids))


KILLED = """
import os, signal, sys
import pyarrow.parquet
from tinyalign_vlm.training.cli.main import main

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

for folder, (module, name) in zip(
    sys.argv[1:], ((pyarrow.parquet.ParquetWriter, "write_table"), (os, "fsync"), (os, "rename"))
):
    pid = os.fork()
    if pid == 0:
        setattr(module, name, die)
        main(["bank", "remove", folder, "--where", "source=a"])
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, name
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_killed_change_leaves_a_whole_version(folder, tmp_path, capsys):
    folders = [shutil.copytree(folder, tmp_path / str(number) / "bank") for number in range(3)]
    done = subprocess.run([sys.executable, "-c", KILLED, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [len(MemoryBank.from_pretrained(bank)) for bank in folders] == [12, 12, 12]
    for bank in folders:
        tinyalign("remove", bank, "--where", "source=a")
        assert len(MemoryBank.from_pretrained(bank)) == 6 and problems(bank, capsys) == []


def test_help_of_all_commands(capsys):
    for command in ("build", "add", "remove", "merge", "compact", "verify", "info", "view"):
        with pytest.raises(SystemExit) as done:
            main(["bank", command, "--help"])
        assert done.value.code == 0 and f"\n  tinyalign bank {command} " in capsys.readouterr().out
