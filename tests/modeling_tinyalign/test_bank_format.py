"""bank_config.json and the columns of a bank, as strangers may write them."""

import json
from dataclasses import replace

import pytest
from banks import KEY_ENCODER, edit_config
from huggingface_hub.errors import StrictDataclassFieldValidationError

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign.bank_format import BankConfig

HASHES = ("keys", "values", "rows", "key_encoder", "value_encoder", "config")
TOWER = {
    "name": "x",
    "revision": None,
    "image_shape": [3, 8, 8],
    "config": {},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "full",
}
CALIBRATION = {"top_k": 4, "num_rows": 10, "right": [0.0] * 4, "none": [0.0] * 4}
BAD_CONFIGS = [
    ({"num_rows": 10**12}, "'num_rows'.* found 1000000000000, expected 0 to"),
    ({"num_rows": 10**9}, "declares 1000000000 rows, but the shards hold 10"),
    ({"num_rows": 0}, "num_rows or num_shards is 0"),
    ({"num_rows": True}, "'num_rows'.*True"),
    ({"num_rows": "10"}, "'num_rows' expected int, got str"),
    ({"key_dim": -1}, "'key_dim'.* found -1"),
    ({"key_dim": 17}, "expected .1, 17."),
    ({"num_latents": 4}, "value_encoder.num_latents is 3, expected num_latents = 4"),
    ({"num_shards": 2}, "train-00000-of-00002.parquet is missing"),
    ({"sha256": {"config": "0" * 64}}, "field sha256.key_encoder is missing"),
    ({"sha256": None}, "sha256 is 'None', expected an object"),
    (
        {"sha256": {**dict.fromkeys(HASHES, "0" * 64), "keys": "../../../etc"}},
        "'../../../etc', expected 64 hex digits",
    ),
    ({"format_version": 2}, "'format_version'.* found 2, expected 1"),
    ({"key_encoder": {**KEY_ENCODER, "key_space": "audio"}}, "'key_space' expected one of .'vision', 'language'."),
    ({"key_encoder": {**KEY_ENCODER, "key_space": "language"}}, "key_encoder.safetensors does not hold"),
    ({"key_encoder": {**KEY_ENCODER, "alpha": float("nan")}}, "'alpha'.* found nan, expected 0 to 1"),
    ({"key_encoder": {**KEY_ENCODER, "alpha": "0.4"}}, "'alpha' expected float, got str"),
    ({"key_encoder": {"key_space": "vision"}}, "field key_encoder.alpha is missing"),
    ({"key_encoder": {**KEY_ENCODER, "grid": 10**9}}, "'grid'.* found 1000000000"),
    ({"key_encoder": {**KEY_ENCODER, "vision_pool_size": 10**9}}, "'vision_pool_size'.* found 1000000000"),
    ({"key_encoder": {**KEY_ENCODER, "trust": True}}, "field key_encoder.trust is unknown"),
    ({"tower": None}, "tower is 'None', expected an object"),
    ({"tower": {**TOWER, "image_shape": [3, 10**9, 10**9]}}, "'image_shape'.* expected .channels, height, width."),
    ({"tower": {**TOWER, "name": ""}}, "'name'.* found '', expected 1 to 1000 printable"),
    ({"columns": [1]}, "'columns'"),
    ({"columns": ["key"]}, "'columns'.* expected a list of printable names, each once, other than"),
    ({"quantized": "keys"}, "'quantized' expected bool, got str"),
    ({"value_encoder": None}, "value_encoder.num_latents is 0, expected num_latents = 3"),
    ({"thumbnail_size": -5}, "'thumbnail_size'.* found -5"),
    ({"num_left_out": []}, "'num_left_out' expected int, got list"),
    ({"calibration": {**CALIBRATION, "right": [0.0] * 3}}, "'right'.* found .0.0, 0.0, 0.0., expected 4 finite"),
    ({"calibration": {**CALIBRATION, "none": [float("nan")] * 4}}, "'none'.*, expected 4 finite numbers"),
    ({"calibration": {**CALIBRATION, "none": 0.5}}, "'none' expected a list, got float"),
    ({"calibration": {**CALIBRATION, "top_k": 0}}, "'top_k'.* found 0, expected 1 to 1000"),
    ({"calibration": {"top_k": 4}}, "field calibration.none is missing"),
    ({"calibration": []}, "calibration is '..', expected an object"),
    ({"packed": True}, "field packed is unknown: this version of tinyalign-vlm does not read it"),
]


@pytest.mark.parametrize("changes, message", BAD_CONFIGS)
def test_bad_configs_are_refused(changes, message, saved, empty_cache):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=f"{saved}.*{message}"):
        MemoryBank.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00", '{"a": 1}'])
def test_bad_json_is_refused(text, saved):
    (saved / "bank_config.json").write_text(text)
    with pytest.raises(ValueError, match="bank_config.json"):
        MemoryBank.from_pretrained(saved)


def test_a_config_is_written_as_it_is_read(bank, tmp_path):
    digests = dict.fromkeys(("key_encoder", "value_encoder"), "0" * 64)
    config = replace(bank.config, num_shards=1, sha256=replace(bank.config.sha256, **digests))
    config.to_json(tmp_path / "bank_config.json")
    found = BankConfig.from_json(tmp_path / "bank_config.json")
    assert found == replace(config, sha256=found.sha256) and found.sha256.keys == bank.config.sha256.keys
    content = json.loads((tmp_path / "bank_config.json").read_text())
    (tmp_path / "bank_config.json").write_text(json.dumps({**content, "num_left_out": 7}))
    with pytest.raises(ValueError, match="bank_config.json: the sha256 of this file's content is"):
        BankConfig.from_json(tmp_path / "bank_config.json")
    with pytest.raises(StrictDataclassFieldValidationError, match=r"'grid':\s+ValueError: found 0, expected 1 to 64"):
        replace(bank.config.key_encoder, grid=0)
    with pytest.raises(ValueError, match="not written to its end"):
        bank.config.to_json(tmp_path / "bank_config.json")
