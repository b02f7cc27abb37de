"""A bank's folder: what is read of it, and what is refused."""

import json
import os
import pickle
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from banks import (
    NUM_ROWS,
    bank_of,
    clustered_keys,
    edit_config,
    unit,
)

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_folder, bank_rows
from tinyalign_vlm.modeling_tinyalign.bank_arrays import cache_root
from tinyalign_vlm.modeling_tinyalign.bank_format import list_column


def test_load_dataset(saved, tmp_path, bank):
    table = datasets.load_dataset(str(saved), split="train", cache_dir=str(tmp_path))
    assert table.features["key"] == datasets.List(datasets.Value("float32"), length=16)
    assert table.features["value"] == datasets.List(datasets.Value("float16"), length=15)
    assert isinstance(table.features["thumbnail"], datasets.Image)
    assert table["caption"][:] == bank.captions and table[0]["thumbnail"].size == bank.thumbnail(0).size
    assert next(iter(datasets.load_dataset(str(saved), split="train", streaming=True)))["id"] == 0


def test_many_shards(bank, tmp_path, monkeypatch, empty_cache):
    monkeypatch.setattr(bank_folder, "SHARD_BYTES", 1000)
    monkeypatch.setattr(bank_rows, "BATCH_ROWS", 2)
    bank.save_pretrained(tmp_path / "bank")
    shards = sorted((tmp_path / "bank" / "data").iterdir())
    assert len(shards) > 3 and sum(pq.read_metadata(shard).num_rows for shard in shards) == NUM_ROWS
    assert MemoryBank.from_pretrained(tmp_path / "bank").captions == bank.captions
    shards[2].unlink()
    with pytest.raises(ValueError, match=f"{shards[2].name} is missing"):
        MemoryBank.from_pretrained(tmp_path / "bank")


def test_second_load_reads_no_shard(saved, empty_cache, monkeypatch):
    MemoryBank.from_pretrained(saved)
    monkeypatch.setattr(bank_folder, "read_shards", None)
    monkeypatch.setattr(bank_folder, "lay_out", None)
    for shard in (saved / "data").iterdir():
        shard.write_bytes(b"")
    MemoryBank.from_pretrained(saved).search(unit(1, 16), 1)


def edit_table(folder, edit):
    """Change the rows of a saved bank; the config stays."""
    path = folder / "data" / "train-00000-of-00001.parquet"
    pq.write_table(edit(pq.read_table(path)), path)


def with_column(table, name, values, type=None):
    return table.set_column(table.column_names.index(name), name, pa.array(values, type))


def nan_key(table):
    keys = np.stack(table["key"].to_numpy(zero_copy_only=False)).astype(np.float32)
    keys[3, 2] = np.nan
    return table.set_column(table.column_names.index("key"), "key", list_column(keys))


BAD_TABLES = {
    "NaN key": (nan_key, "row 3 has key 'NaN or infinity'"),
    "double keys": (
        lambda t: with_column(t, "key", t["key"].to_pylist(), pa.list_(pa.float64(), 16)),
        "column 'key' is .*double.*, expected .*float",
    ),
    "ragged keys": (
        lambda t: with_column(t, "key", t["key"].to_pylist(), pa.list_(pa.float32())),
        "column 'key' is list<",
    ),
    "narrow values": (
        lambda t: with_column(t, "value", [v[:-1] for v in t["value"].to_pylist()], pa.list_(pa.float16(), 14)),
        "column 'value' is",
    ),
    "no captions": (lambda t: t.drop_columns(["caption"]), "column 'caption' is missing"),
    "null caption": (lambda t: with_column(t, "caption", [None] * len(t), pa.string()), "row 0 has caption null"),
    "null key": (
        lambda t: with_column(t, "key", [None, *t["key"].to_pylist()[1:]], pa.list_(pa.float32(), 16)),
        "row 0 has key null|cannot be read as Parquet",  # the latter by pyarrow 21
    ),
    "integer source": (lambda t: with_column(t, "source_id", range(len(t))), "column 'source_id' is int64"),
    "path as source": (
        lambda t: with_column(t, "source_id", ["../../etc/passwd"] * len(t)),
        "row 0 has source_id '../../etc/passwd', expected 32 hex digits",
    ),
    "text ids": (lambda t: with_column(t, "id", ["../x"] * len(t)), "column 'id' is string"),
    "reordered ids": (lambda t: with_column(t, "id", range(1, len(t) + 1)), "row 0 has id 1"),
    "fewer rows": (lambda t: t.slice(0, 4), "declares 10 rows, but the shards hold 4"),
    "other caption": (
        lambda t: with_column(t, "caption", ["lies"] * len(t)),
        "sha256 of the rows is .* but bank_config.json says",
    ),
    "other keys": (
        lambda t: t.set_column(t.column_names.index("key"), "key", list_column(unit(len(t), 16))),
        "sha256 of the keys",
    ),
    "other values": (
        lambda t: t.set_column(t.column_names.index("value"), "value", list_column(np.ones((len(t), 15), np.float16))),
        "sha256 of the values",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_rows_are_refused(name, saved, empty_cache):
    edit, message = BAD_TABLES[name]
    edit_table(saved, edit)
    with pytest.raises(ValueError, match=f"{saved}.*{message}"):
        MemoryBank.from_pretrained(saved)
    assert list(cache_root().rglob("*")) == []


@pytest.mark.parametrize("name", ["bank_config.json", "data/train-00000-of-00001.parquet", "key_encoder.safetensors"])
def test_missing_and_truncated_files(name, saved, empty_cache):
    path = saved / name
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=str(path)):
        MemoryBank.from_pretrained(saved)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path}.* missing"):
        MemoryBank.from_pretrained(saved)


def test_changed_value_encoder(saved):
    path = saved / "value_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    bank = MemoryBank.from_pretrained(saved)
    with pytest.raises(ValueError, match=f"{path}: its sha256 is"):
        bank.value_encoder.eval()


def test_planted_files_are_not_read(saved, empty_cache):
    """Pickles and an index in the bank's folder have no effect, whatever they are called."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(saved / "exploded"),)

    names = ("index.faiss", "keys.pkl", "values.pt", "pytorch_model.bin", "value_encoder/pytorch_model.bin")
    for name in (*names, "Merged_LLaVA_Dataset_Memory.pt", "data/values.npy", "key_encoder.pt"):
        (saved / name).write_bytes(pickle.dumps(Bomb()))
    bank = MemoryBank.from_pretrained(saved)
    bank.search(unit(1, 16), 3)
    assert bank.gather([0]).isfinite().all() and bank.value_encoder is not None
    assert not (saved / "exploded").exists()


def test_no_code_is_run_and_no_other_file_followed(saved, bank, empty_cache, tmp_path):
    """Whatever a config.json of transformers can name, a bank's folder cannot."""
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'exploded')!r}).touch()\n"
    code += "class ValueEncoder:\n    def __init__(self, *args, **kwargs): ...\n"
    folder = saved / "value_encoder"
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor"), "evil.ValueEncoder")
    auto_map["AutoImageProcessor"] = "evil.ValueEncoder"
    planted = {
        **json.loads((folder / "config.json").read_text()),
        "auto_map": auto_map,
        "trust_remote_code": True,
        "custom_pipelines": {"image-to-text": {"impl": "evil.ValueEncoder"}},
        "transformers_weights": "other.safetensors",
        "attn_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "num_latents": 4,
    }
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(bank.value_encoder.state_dict(), "other.safetensors")}
    for place in (folder, saved, saved / "data"):
        for name in ("evil.py", "modeling.py", "__init__.py", f"{saved.name}.py", "value_encoder.py"):
            (place / name).write_text(code)
        (place / "config.json").write_text(json.dumps(planted))
        (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in ("preprocessor_config.json", "tokenizer_config.json", "processor_config.json"):
            (place / name).write_text(json.dumps({"auto_map": auto_map}))
    loaded = MemoryBank.from_pretrained(saved)
    loaded.search(unit(1, 16), 3)
    expected = bank.value_encoder.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in loaded.value_encoder.state_dict().items())
    assert loaded.value_encoder.config.settings == bank.value_encoder.config.settings
    assert not any(parameter.requires_grad for parameter in loaded.value_encoder.parameters())
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        datasets.load_dataset(str(saved), cache_dir=str(tmp_path / "datasets"), trust_remote_code=True)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_latents": 10**12},
        {"num_self_attends_per_block": 60_000},
        {"d_model": "16"},
        {"d_model": True},
        {"num_blocks": 0},
        {"latent_dim": 6},
        {"max_words": "../.."},
        {"num_vision_tokens": None},
        {"num_vision_tokens": 17},
    ],
)
def test_value_encoders_of_other_sizes_are_refused(changes, saved):
    config = json.loads((saved / "bank_config.json").read_text())
    edit_config(saved, value_encoder={**config["value_encoder"], **changes})
    message = r"model.safetensors does not hold this bank's value encoder \(\w+: |value_encoder\.\w+ is .*, expected"
    with pytest.raises(ValueError, match=f"{saved}.*({message})"):
        MemoryBank.from_pretrained(saved).value_encoder.eval()


def test_parquet_of_a_quantized_bank(tmp_path):
    for quantized in (True, False):
        bank_of(clustered_keys(2000, 64), quantized).save_pretrained(tmp_path / str(quantized))
    sizes = [next((tmp_path / name / "data").iterdir()).stat().st_size for name in ("True", "False")]
    assert sizes[0] < 0.75 * sizes[1]
    rows = datasets.load_dataset(str(tmp_path / "True"), split="train", cache_dir=str(tmp_path / "datasets"))
    bank = MemoryBank.from_pretrained(tmp_path / "True")
    assert rows.features["key"] == datasets.List(datasets.Value("float32"), length=64)
    assert np.array_equal(np.array(rows[:5]["key"], np.float32), bank.key_array[:5])
    half = MemoryBank.from_dataset(rows.select(range(1000)), like=bank)
    assert half.config.quantized and np.array_equal(half.key_array, bank.key_array[:1000])


def test_rows_of_a_batch_may_be_in_several_shards(bank, tmp_path, monkeypatch):
    """With large thumbnails a batch is more than a shard may hold."""
    monkeypatch.setattr(bank_folder, "BATCH_BYTES", 500)
    monkeypatch.setattr(bank_folder, "SHARD_BYTES", 1000)
    bank.save_pretrained(tmp_path / "bank")
    assert len(list((tmp_path / "bank" / "data").iterdir())) > 1
    assert MemoryBank.from_pretrained(tmp_path / "bank").captions == bank.captions


def test_the_current_folder_may_change(bank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank.save_pretrained("bank")
    loaded = MemoryBank.from_pretrained("bank")
    monkeypatch.chdir("/")
    assert len(loaded.remove(0)) == len(bank) - 1
