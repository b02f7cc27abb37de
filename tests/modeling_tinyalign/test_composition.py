"""Connectors saved without their models, and loaded with one `from_pretrained`."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from tinyalign_vlm import TinyAlignForConditionalGeneration, TinyAlignModel, TinyAlignProcessor

SMALL = {"memory_tokens": 3, "latent_dim": 5, "memory_top_k": 2, "memory_input": "latents", "memory_scores": False}


def compose(checkpoints, vision="siglip", text="llama", **config):
    return TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        checkpoints[vision], checkpoints[text], **{**SMALL, **config}
    )


def same(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("vision", "text", "config"),
    [
        ("siglip", "llama", {}),
        ("clip-dual", "qwen2", {"vision_feature_select_strategy": "default"}),
        ("efficientnet", "phi", {"memory_input": "both"}),
        ("siglip", "phi", {"memory_top_k": 0}),
    ],
)
def test_one_call_loads_all(vision, text, config, checkpoints, tmp_path, capfd):
    model = compose(checkpoints, vision, text, **config)
    model.save_pretrained(tmp_path / "alone", connectors_only=True)
    with safe_open(tmp_path / "alone" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names and all("connector" in name for name in names)
    loaded = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "alone")
    assert same(loaded, model) and not loaded.training
    assert "corrupted" not in capfd.readouterr().err
    assert same(AutoModelForImageTextToText.from_pretrained(tmp_path / "alone"), model)
    assert same(TinyAlignModel.from_pretrained(tmp_path / "alone"), model.model)
    half, info = TinyAlignForConditionalGeneration.from_pretrained(
        tmp_path / "alone", dtype=torch.bfloat16, output_loading_info=True
    )
    assert half.model.vision_tower.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert half.model.connector.linear_1.weight.dtype == torch.float32 and not info["missing_keys"]

    loaded.save_pretrained(tmp_path / "whole")  # complete again, and without paths of this machine
    assert str(tmp_path.parent) not in (tmp_path / "whole" / "config.json").read_text()
    assert same(TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "whole"), model)


def test_models_that_are_not_those_of_checkpoints(checkpoints, tmp_path):
    model = compose(checkpoints)
    model.config.language_model = None  # it was trained
    with pytest.raises(ValueError, match="config.language_model: None, expected the checkpoint"):
        model.save_pretrained(tmp_path / "alone", connectors_only=True)
    model = compose(checkpoints)
    model.save_pretrained(tmp_path / "whole")
    whole = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="config.vision_model and config.language_model: None"):
        whole.save_pretrained(tmp_path / "alone", connectors_only=True)


def test_models_that_are_gone_or_others(checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama"], tmp_path / "llama")
    model = compose({**checkpoints, "llama": str(tmp_path / "llama")})
    model.save_pretrained(tmp_path / "alone", connectors_only=True)
    with pytest.raises(ValueError, match="quantization_config and a checkpoint of connectors alone"):
        TinyAlignForConditionalGeneration.from_pretrained(
            tmp_path / "alone", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )
    state = load_file(tmp_path / "llama" / "model.safetensors")
    (tmp_path / "llama" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "llama" / "pytorch_model.bin")  # no pickle is read that a config names
    with pytest.raises(OSError, match="holds connectors alone, and of .*safetensors"):
        TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "alone")
    theirs = {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (tmp_path / "llama" / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match="trust_remote_code"):  # nor is code run, nor anybody asked
        TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "alone")
    shutil.rmtree(tmp_path / "llama")
    with pytest.raises(OSError, match="holds connectors alone, and of .*llama"):
        TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "alone")
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    config["language_model"] = checkpoints["phi"]
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not what the connectors were trained with"):
        TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "alone")


def test_composing_needs_the_package(monkeypatch):
    composing = {
        "model": lambda: TinyAlignForConditionalGeneration.from_vision_text_pretrained("vision", "text"),
        "processor": lambda: TinyAlignProcessor.from_vision_text_pretrained("vision", "text", None),
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tinyalign_vlm.training.composition", None)
        for compose in composing.values():
            with pytest.raises(
                ImportError, match="import of tinyalign_vlm.training.composition halted"
            ):  # another cause
                compose()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tinyalign_vlm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [])  # nothing can be found
    for what, compose in composing.items():
        with pytest.raises(ImportError, match=f"Composing a {what} needs the package: pip install tinyalign-vlm"):
            compose()
