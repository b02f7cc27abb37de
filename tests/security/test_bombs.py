"""Small files that claim to be huge: refused by name, before memory and time are taken."""

import base64
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from security.attacks import SHARD, edit_json, little_memory, sign
from transformers import AutoModelForImageTextToText, AutoProcessor

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign import bank_folder as folder_of_banks
from tinyalign_vlm.training.bank.verify import bank_problems

CONFIG = "bank_config.json"


def refused(folder, message: str) -> None:
    with little_memory(), pytest.raises(ValueError, match=f"(?s){folder}.*({message})"):
        MemoryBank.from_pretrained(folder).value_encoder  # noqa: B018


HUGE = [
    ({"num_rows": 10**12}, "'num_rows'.* found 1000000000000, expected 0 to"),
    ({"num_rows": 10**10}, "declares 10000000000 rows, but the shards hold 12"),
    ({"num_shards": 10**9}, "'num_shards'.* found 1000000000,"),
    ({"key_dim": 10**9}, "'key_dim'.* found 1000000000,"),
    ({"key_dim": 65_536}, r"expected \(1, 65536\)"),
    ({"num_latents": 10**9}, "'num_latents'.* found 1000000000,"),
    ({"latent_dim": 65_536, "num_latents": 65_536}, "num_latents x latent_dim is 4294967296"),
    ({"num_rows": 10**4000}, "cannot be read as JSON|'num_rows'.* found 10"),
    ({"thumbnail_size": 10**9}, "'thumbnail_size'.* found 1000000000,"),
    ({"tower": {"image_shape": [3, 4096, 4096]}}, "'image_shape'.* found"),
    ({"tower": {"image_shape": [4096, 4096, 1]}}, "'image_shape'.* found"),
    ({"key_encoder": {"grid": 10**9}}, "'grid'.* found 1000000000,"),
    ({"key_encoder": {"grid": 64}}, "key_encoder.safetensors does not hold"),
    ({"value_encoder": {"vision_feature_size": 10**9}}, "value_encoder/model.safetensors does not hold"),
    ({"value_encoder": {"d_model": 65_536, "num_vision_tokens": 65_536}}, "value_encoder/model.safetensors does not"),
    ({"value_encoder": {"num_blocks": 65_536}}, "more than 1024 layers"),
    ({"value_encoder": {"num_self_attends_per_block": 65_536}}, "more than 1024 layers"),
    ({"value_encoder": {"max_words": 65_536}}, "value_encoder/model.safetensors does not"),
    ({"value_encoder": {"bytes_per_patch": 65_536, "d_model": 65_536}}, "value_encoder/model.safetensors does not"),
    ({"num_left_out": [0] * 1_000_000}, "'num_left_out' expected int, got list"),
    ({"columns": [f"c{i}" for i in range(100_000)]}, "column 'c0' is missing"),
]


@pytest.mark.parametrize("changes, message", HUGE, ids=[message for _, message in HUGE])
def test_bank_configs(changes, message, bank_folder):
    def edit(config: dict) -> None:
        for name, value in changes.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) else value
        for name in ("num_latents", "latent_dim"):
            config["value_encoder"][name] = config[name]

    edit_json(bank_folder / CONFIG, edit)
    sign(bank_folder)
    refused(bank_folder, message)


JSON_BOMBS = {
    "nested": "[" * 500_000,
    "nested objects": '{"a":' * 500_000,
    "long number": '{"num_rows": ' + "9" * 1_000_000 + "}",
    "a key twice": '{"num_rows": 12, "num_rows": 1000000000000}',
    "infinity": '{"num_rows": Infinity}',
    "no object": '"' + "x" * 1_000_000 + '"',
}


@pytest.mark.parametrize("name", JSON_BOMBS)
def test_json(name, bank_folder):
    (bank_folder / CONFIG).write_text(JSON_BOMBS[name])
    refused(bank_folder, "cannot be read as JSON|holds a str|the field .* is missing")


def test_a_config_of_gigabytes(bank_folder):
    os.truncate(bank_folder / CONFIG, 2**33)  # sparse
    refused(bank_folder, f"has {2**33} bytes, expected at most")


def bomb(column: str, rows: int, size: int, table: pa.Table) -> pa.Table:
    """A table of so many rows whose column holds one long text again and again; a few bytes in a file."""
    table = table.take(pa.array([0] * rows))
    text = pa.array(["x" * size]) if column != "thumbnail" else pa.array([b"x" * size])
    value = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), text)
    if column == "thumbnail":
        value = pa.StructArray.from_arrays([value, pa.nulls(rows, pa.string())], ["bytes", "path"])
    return table.set_column(table.column_names.index(column), column, value)


@pytest.mark.parametrize("column", ["caption", "licence", "thumbnail", "source_id"])
def test_text_that_unpacks_to_gigabytes(column, bank_folder):
    rows, path = 1000, bank_folder / SHARD
    table = pq.read_table(path)
    declared = base64.b64encode(table.schema.serialize())  # pyarrow itself would declare a dictionary
    table = bomb(column, rows, 2_000_000, table)
    with pq.ParquetWriter(path, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"ARROW:schema": declared})
    assert path.stat().st_size < 3_000_000
    edit_json(bank_folder / CONFIG, lambda config: config.update(num_rows=rows))
    sign(bank_folder)
    message = "1000 rows hold 2000000000 bytes of text or pictures, expected at most"
    refused(bank_folder, message)
    with little_memory():
        assert message in "".join(bank_problems(bank_folder))


def test_numbers_that_unpack_to_gigabytes(bank_folder):
    """Lists far longer than declared, and row groups that compress to nothing."""
    path = bank_folder / SHARD
    table = pq.read_table(path)
    place = table.column_names.index("key")
    zeros = pa.ListArray.from_arrays(
        pa.array(np.arange(13) * 1_000_000, pa.int32()), pa.array(np.zeros(12_000_000, "f4"))
    )
    pq.write_table(table.set_column(place, "key", zeros), path, compression="zstd")
    assert path.stat().st_size < 100_000
    refused(bank_folder, "column 'key' is list<")


def test_a_footer_that_declares_more_than_a_shard_holds(bank_folder, monkeypatch):
    monkeypatch.setattr(folder_of_banks, "MAX_SHARD_BYTES", 5000)
    refused(bank_folder, "unpacks to [0-9]+ bytes, expected at most 5000")


EMPTY = {
    "mean": lambda tensors: tensors.update(mean=torch.zeros(0)),
    "projection": lambda tensors: tensors.update(projection=torch.zeros(0, 10**12)),
    "connector": lambda tensors: tensors.update({"connector.linear_1.weight": torch.zeros(0, 10**12)}),
    "embeddings": lambda tensors: tensors.update(token_embeddings=torch.zeros(10**12, 0)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_key_encoders_of_empty_tensors(name, bank_folder):
    """Tensors without numbers can have any width, at no cost in the file."""
    path = bank_folder / "key_encoder.safetensors"
    tensors = load_file(path)
    EMPTY[name](tensors)
    save_file(tensors, path)
    sign(bank_folder)
    refused(bank_folder, "key_encoder.safetensors does not hold this bank's key encoder .*is empty")


def test_key_encoders_whose_connector_would_be_huge(bank_folder):
    """Each tensor is small, the layers made of their sides are not."""
    path = bank_folder / "key_encoder.safetensors"
    tensors = load_file(path)
    side = 2_000_000
    tensors |= {
        "connector.linear_1.weight": torch.zeros(side, 1),
        "connector.linear_1.bias": torch.zeros(side),
        "connector.linear_2.weight": torch.zeros(1, side),
        "connector.linear_2.bias": torch.zeros(side),
        "token_embeddings": torch.zeros(3, 16).half(),
    }
    save_file(tensors, path)
    edit_json(bank_folder / CONFIG, lambda config: config["key_encoder"].update(key_space="language"))
    sign(bank_folder)
    refused(bank_folder, "key_encoder.safetensors does not hold this bank's key encoder .*size mismatch")


def test_no_probes(bank_folder):
    """Without probe keys every tower would be taken for the one that the bank was built with."""
    path = bank_folder / "key_encoder.safetensors"
    tensors = load_file(path)
    for probes in (tensors["probe_keys"][:1], tensors["probe_keys"].repeat(2, 1)):
        save_file({**tensors, "probe_keys": probes.contiguous()}, path)
        sign(bank_folder)
        refused(bank_folder, r"probe keys of shape \(\d, 16\), expected \(4, 16\)")


MODELS = [
    ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers is 1000000000, expected"),
    ({"text_config": {"hidden_size": 10**9}}, "text_config.hidden_size is 1000000000, expected"),
    ({"text_config": {"vocab_size": -1}}, "text_config.vocab_size is -1, expected"),
    ({"vision_config": {"image_size": 10**12}}, "vision_config.image_size is 1000000000000, expected"),
    ({"vision_config": {"num_hidden_layers": 10**30}}, "vision_config.num_hidden_layers is 1"),
    ({"memory_tokens": 10**12}, "memory_tokens is 1000000000000, expected"),
    ({"memory_top_k": 10**9}, "memory_top_k is 1000000000, expected"),
    ({"memory_connector_size": 10**12}, "memory_connector_size is 1000000000000, expected"),
    ({"vision_feature_size": 10**12}, "vision_feature_size is 1000000000000, expected"),
    (
        {"vision_config": {"model_type": "siglip", "vision_config": {"num_hidden_layers": 10**9}}},
        "vision_config.vision_config.num_hidden_layers is 1000000000, expected",
    ),
    (
        {"text_config": {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 10**9}}},
        "text_config.text_config.hidden_size is 1000000000, expected",
    ),
    ({"vision_config": 3}, "config.json does not describe a TinyAlign model"),
    ({"image_seq_length": "many"}, "config.json does not describe a TinyAlign model"),
]


@pytest.mark.parametrize("changes, message", MODELS, ids=[message for _, message in MODELS])
def test_model_configs(changes, message, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (checkpoint / "config.json").write_text(json.dumps(config))
    with little_memory(), pytest.raises(ValueError, match=message):
        AutoModelForImageTextToText.from_pretrained(checkpoint)


@pytest.mark.parametrize("changes", [{"hidden_size": 100_000}, {"vocab_size": 10**7}, {"intermediate_size": 10**7}])
def test_models_larger_than_their_weights(changes, checkpoint):
    """transformers compares the sizes before it takes the memory."""
    edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(changes))
    with little_memory(), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageTextToText.from_pretrained(checkpoint)


PROCESSORS = [
    ({"num_image_tokens": 10**12}, "num_image_tokens is 1000000000000, expected 1 to"),
    ({"num_image_tokens": "9"}, "num_image_tokens is '9', expected 1 to"),
    ({"key_space": "audio"}, "key_space is 'audio'"),
    ({"image_processor": {"size": {"height": 10**6, "width": 10**6}}}, "size.height is 1000000, expected 1 to 4096"),
    ({"image_processor": {"image_std": [0, 0, 0]}}, "all finite"),
    ({"image_processor": {"rescale_factor": "x"}}, "processor_config.json does not describe a processor"),
    ({"image_processor": 3}, "processor_config.json does not describe a processor"),
]


@pytest.mark.parametrize("changes, message", PROCESSORS, ids=[message for _, message in PROCESSORS])
def test_processor_configs(changes, message, checkpoint):
    config = json.loads((checkpoint / "processor_config.json").read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (checkpoint / "processor_config.json").write_text(json.dumps(config))
    with little_memory(), pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(checkpoint)
