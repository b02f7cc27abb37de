"""No pickle is ever read: not out of a bank, not out of a checkpoint, whatever it is called."""

import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from security.attacks import SHARD
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration

NAMES = (
    "pytorch_model.bin",
    "model.bin",
    "model.pt",
    "model.pkl",
    "model.pth",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "tokenizer.pkl",
    "vocab.pkl",
    "index.faiss",
    "index.pkl",
    "keys.pkl",
    "values.pt",
    "values.npy",
    "rows.arrow",
    "dataset_info.pkl",
    "Merged_LLaVA_Dataset_Memory.pt",
)


def test_the_canary_sings(canary, tmp_path):
    for name, read in (("a.pkl", lambda path: pickle.loads(path.read_bytes())), ("a.pt", unsafe_load)):
        (tmp_path / name).write_bytes(canary.pickled if name == "a.pkl" else canary.torch_file)
        read(tmp_path / name)
        assert not canary.alive
        canary.path.rmdir()


def unsafe_load(path):
    torch.load(path, weights_only=False)


def test_pickles_in_a_bank(bank_folder, canary):
    for folder in (bank_folder, bank_folder / "data", bank_folder / "value_encoder"):
        for number, name in enumerate(NAMES):
            (folder / name).write_bytes(canary.torch_file if number % 2 else canary.pickled)
    bank = MemoryBank.from_pretrained(bank_folder)
    bank.search(np.ones((1, bank.config.key_dim), np.float32), 3)
    bank.gather([0]), bank.rows([0]), bank.thumbnail(0), bank.value_encoder  # noqa: B018
    assert canary.alive


@pytest.mark.parametrize(
    "name", ["bank_config.json", SHARD, "key_encoder.safetensors", "value_encoder/model.safetensors"]
)
def test_pickles_in_the_place_of_a_banks_files(name, bank_folder, canary):
    for content in (canary.pickled, canary.torch_file):
        (bank_folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=str(bank_folder / name)):
            MemoryBank.from_pretrained(bank_folder).value_encoder.eval()
    assert canary.alive


def test_pickles_in_parquet(bank_folder, canary):
    """Arrow's extension types were once unpickled out of a column's metadata (CVE-2023-47248)."""
    table = pq.read_table(bank_folder / SHARD)
    field = table.schema.field("caption")
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": canary.pickled}
    schema = table.schema.set(table.schema.get_field_index("caption"), field.with_metadata(extension))
    schema = schema.with_metadata({"pandas": canary.pickled, "huggingface": canary.pickled})
    pq.write_table(pa.table(table.columns, schema=schema), bank_folder / SHARD)
    try:
        assert MemoryBank.from_pretrained(bank_folder).captions[0] == "noise 0"
    except ValueError as error:
        assert "column 'caption'" in str(error)
    assert canary.alive


def test_pickles_in_a_checkpoint(checkpoint, canary, images):
    for number, name in enumerate(NAMES):
        (checkpoint / name).write_bytes(canary.torch_file if number % 2 else canary.pickled)
    for loader in (AutoModel, AutoModelForImageTextToText):
        loader.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor(images=images[:1], text="<image>", return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    assert canary.alive


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForImageTextToText, TinyAlignForConditionalGeneration])
def test_a_checkpoint_with_nothing_but_pickles(loader, checkpoint, canary):
    (checkpoint / "model.safetensors").unlink()
    for name, content in (("pytorch_model.bin", canary.torch_file), ("pytorch_model.bin", canary.pickled)):
        (checkpoint / name).write_bytes(content)
        with pytest.raises(OSError, match="model.safetensors"):
            loader.from_pretrained(checkpoint)
        with pytest.raises(ValueError, match="TinyAlign reads no pickles"):
            loader.from_pretrained(checkpoint, use_safetensors=False)
    (checkpoint / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"a": "a.bin"}}')
    (checkpoint / "a.bin").write_bytes(canary.pickled)
    with pytest.raises(OSError, match="safetensors"):
        loader.from_pretrained(checkpoint)
    assert canary.alive


def test_a_pickle_called_safetensors(checkpoint, canary):
    for content in (canary.pickled, canary.torch_file):
        (checkpoint / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=f"{checkpoint} holds no TinyAlign model"):
            AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert canary.alive


def test_an_adapter_of_pickles(checkpoint, canary):
    """transformers loads an adapter that lies beside a model, when peft is installed."""
    pytest.importorskip("peft")
    adapter = '{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "%s"}'
    (checkpoint / "adapter_config.json").write_text(adapter % checkpoint)
    (checkpoint / "adapter_model.bin").write_bytes(canary.torch_file)
    with pytest.raises((OSError, pickle.UnpicklingError)):
        AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert canary.alive


def test_parts_of_pickles(checkpoints, tmp_path, canary):
    """A model is composed of anybody's checkpoints: transformers reads their pickles as tensors only."""
    tower = shutil.copytree(checkpoints["siglip"], tmp_path / "tower")
    (tower / "model.safetensors").unlink()
    (tower / "pytorch_model.bin").write_bytes(canary.torch_file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        TinyAlignForConditionalGeneration.from_vision_text_pretrained(str(tower), checkpoints["llama"])
    assert canary.alive
