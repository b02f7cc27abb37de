"""`tinyalign bank verify` names all that is wrong."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from banks import SHARD, bank_of, unit
from isolation import set_hf_home

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_folder, bank_format, bank_rows
from tinyalign_vlm.modeling_tinyalign.bank_format import config_sha256
from tinyalign_vlm.training.bank.verify import bank_problems


def edit(folder: Path, change) -> None:
    table = pq.read_table(folder / SHARD)
    pq.write_table(change(table), folder / SHARD)


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def test_verify_a_right_bank(folder, tmp_path, model, processor, make_model, problems):
    assert problems(folder) == []
    model.save_pretrained(tmp_path / "model")
    assert problems(folder, "--model", tmp_path / "model") == []
    make_model("clip").save_pretrained(tmp_path / "clip")
    (found,) = problems(folder, "--model", tmp_path / "clip")
    assert "was built with the vision tower" in found and "expected at least 0.99" in found or "wide" in found


def test_verify_names_each_problem(folder, problems):
    def damage(table):
        keys, values = table["key"].to_pylist(), table["value"].to_pylist()
        keys[3][0], values[5][1] = float("nan"), float("inf")
        return with_column(with_column(table, "key", keys), "value", values).slice(0, 11)

    edit(folder, damage)
    (folder / "value_encoder" / "model.safetensors").write_bytes(b"")
    found = "\n".join(problems(folder))
    assert "model.safetensors: its sha256 is" in found
    assert "row 3 has key" in found and "NaN" in found
    assert "shards hold 11 rows, but bank_config.json says 12" in found
    for part in ("keys", "values", "rows"):
        assert f"The sha256 of the {part} in the shards is" in found


@pytest.mark.parametrize("part", ["caption", "license", "thumbnail"])
def test_verify_finds_changed_text(part, folder, problems):
    def change(table):
        values = table[part].to_pylist()
        values[0] = {"bytes": b"x", "path": None} if part == "thumbnail" else "other"
        return with_column(table, part, values)

    edit(folder, change)
    (found,) = problems(folder)
    assert "sha256 of the rows in the shards" in found


def test_verify_files_that_are_missing_or_cut(folder, problems):
    shard = folder / SHARD
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert any(str(shard) in line for line in problems(folder))
    shard.unlink()
    assert any(str(shard) in line for line in problems(folder))
    shard.write_bytes(content)
    assert problems(folder) == []
    config = json.loads((folder / "bank_config.json").read_text())
    (folder / "bank_config.json").write_text(json.dumps(config | {"num_rows": 13}))
    assert "sha256 of this file's content" in problems(folder)[0]
    config["num_rows"] = 13
    config["sha256"]["config"] = config_sha256(config)
    (folder / "bank_config.json").write_text(json.dumps(config))
    assert "shards hold 12 rows, but bank_config.json says 13" in problems(folder)[0]
    (folder / "bank_config.json").unlink()
    assert "bank_config.json is missing" in problems(folder)[0]


def test_verify_files_beside_the_shards(folder, problems):
    shutil.copy(folder / SHARD, folder / "data/train-00007-of-00008.parquet")
    assert "train-00007-of-00008.parquet is none of the bank's 1 shards, but `datasets` would read it" in " ".join(
        problems(folder)
    )
    (folder / "data/train-00007-of-00008.parquet").unlink()
    path = folder / "value_encoder/config.json"
    path.write_bytes(path.read_bytes().replace(b"num_", b"mum_"))
    assert any(str(path) in line for line in problems(folder))


def test_verify_blames_the_shard_that_is_damaged(kept, tmp_path, monkeypatch, problems):
    monkeypatch.setattr(bank_folder, "SHARD_BYTES", 1)
    for module in (bank_folder, bank_rows, bank_format):
        monkeypatch.setattr(module, "BATCH_ROWS", 4)
    kept.save_pretrained(tmp_path / "bank")
    first, second, _ = sorted((tmp_path / "bank" / "data").iterdir())
    content = bytearray(first.read_bytes())
    content[5] ^= 0x10  # of the first page's header: pyarrow reads no row, and says nothing
    first.write_bytes(content)
    found = problems(tmp_path / "bank")
    assert found[0] == f"{first} is damaged: 4 of its rows cannot be read." and str(second) not in " ".join(found)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("cut", [lambda content: b"", lambda content: content[:-9]])
def test_verify_names_each_cut_file_of_this_machines_copy(cut, quantized, kept, tmp_path, monkeypatch):
    batches = list(kept.batches())
    set_hf_home(monkeypatch, tmp_path / "home")
    bank = kept.with_rows(batches, quantized=quantized)
    bank.save_pretrained(tmp_path / "bank")
    for path in bank.folder.iterdir():
        content = path.read_bytes()
        path.unlink()  # it is mapped
        path.write_bytes(cut(content))
        assert str(path) in next(bank_problems(tmp_path / "bank"))
        path.write_bytes(content)
    assert list(bank_problems(tmp_path / "bank")) == []


@pytest.mark.parametrize("part", ["keys", "values", "rows"])
def test_verify_this_machines_copy(part, folder, problems):
    """The copy is searched, and not the shards."""
    copy = MemoryBank.from_pretrained(folder).folder
    path = copy / {"keys": "keys.bin", "values": "values.bin", "rows": "rows.arrow"}[part]
    content = bytearray(path.read_bytes())
    place = content.index(b"a red square 0") if part == "rows" else -100
    content[place] ^= 0x10
    path.write_bytes(content)
    found = problems(folder)
    assert found and f"The sha256 of the {part} in this machine's copy" in found[0] and str(copy) in found[0]


def test_verify_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyalign_vlm.modeling_tinyalign.bank_index.EXACT_ROWS", 500)
    bank = bank_of(unit(600, 16))
    bank.save_pretrained(tmp_path / "bank")
    bank.search(unit(1, 16), 1)
    assert list(bank_problems(tmp_path / "bank")) == []
    (index,) = bank.folder.glob("*.faiss")
    content = bytearray(index.read_bytes())
    content[-100] ^= 0x10
    index.write_bytes(content)
    assert f"The index {index} is damaged" in "".join(bank_problems(tmp_path / "bank"))
    index.with_suffix(".json").unlink()
    assert "expected that of a record beside it" in "".join(bank_problems(tmp_path / "bank"))
