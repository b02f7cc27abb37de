"""Nothing that a bank or a checkpoint says can have code run, unless the user asked for that repository's code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from security.attacks import edit_json, sign
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor

AUTO_MAP = dict.fromkeys(
    ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoProcessor"), "evil.Evil"
) | {"AutoImageProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
EVIL = {
    "trust_remote_code": True,
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel",
}


def plant(folder: Path, module: str) -> None:
    for name in ("evil.py", "modeling_siglip.py", "configuration_siglip.py", "__init__.py"):
        (folder / name).write_text(module)


def poison_parts(checkpoint: Path) -> None:
    """Everything but the checkpoint's own auto_map names code."""

    def edit(config: dict) -> None:
        for part in (config["vision_config"], config["text_config"]):
            part |= {**EVIL, "auto_map": AUTO_MAP, "_name_or_path": str(checkpoint)}
        config |= {**EVIL, "_name_or_path": str(checkpoint)}

    edit_json(checkpoint / "config.json", edit)


def load_everything(checkpoint: Path, **kwargs) -> None:
    for loader in (AutoConfig, AutoModel, AutoModelForImageTextToText):
        loader.from_pretrained(checkpoint, **kwargs)
    AutoProcessor.from_pretrained(checkpoint, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_parts_of_a_model(kwargs, checkpoint, canary):
    """Also of a repository whose code the user trusts: its parts are transformers' own."""
    plant(checkpoint, canary.module)
    poison_parts(checkpoint)
    load_everything(checkpoint, **kwargs)
    pipe = pipeline("image-text-to-text", model=str(checkpoint), **kwargs)
    assert type(pipe.model) is TinyAlignForConditionalGeneration
    assert canary.alive


def test_pipelines(checkpoint, canary):
    plant(checkpoint, canary.module)
    pipelines = {"image-text-to-text": {"impl": "evil.Evil", "pt": ["AutoModel"]}}
    edit_json(checkpoint / "config.json", lambda config: config.update(EVIL, custom_pipelines=pipelines))
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline("image-text-to-text", model=str(checkpoint))
    assert canary.alive


def test_parts_of_a_model_without_the_package(checkpoint, canary):
    """The checkpoint's own code was asked for; that which its parts name was not."""
    (checkpoint / "evil.py").write_text(canary.module)
    poison_parts(checkpoint)
    code = "import sys; sys.modules['tinyalign_vlm'] = None\n"
    code += "from transformers import AutoModelForImageTextToText as Auto\n"
    code += f"model = Auto.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)\n"
    code += "assert 'transformers_modules' in type(model).__module__\n"
    code += "assert 'transformers.models' in type(model.model.vision_tower).__module__\n"
    environment = {**os.environ, "HF_HOME": str(checkpoint.parent / "home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert canary.alive


def test_a_model_that_maps_to_other_code(checkpoint, canary):
    """With the package, its own classes are used, whatever the checkpoint's auto_map names and the user trusts."""
    plant(checkpoint, canary.module)
    edit_json(checkpoint / "config.json", lambda config: config.update(auto_map=AUTO_MAP))
    for kwargs in ({}, {"trust_remote_code": True}):
        assert type(AutoModelForImageTextToText.from_pretrained(checkpoint, **kwargs)) is (
            TinyAlignForConditionalGeneration
        )
    assert canary.alive


def test_a_part_that_transformers_does_not_know(checkpoint, canary):
    plant(checkpoint, canary.module)
    poison_parts(checkpoint)
    edit_json(checkpoint / "config.json", lambda config: config["vision_config"].update(model_type="evil"))
    with pytest.raises(ValueError, match="vision_config.model_type is 'evil', expected one that transformers knows"):
        AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    assert canary.alive


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json"])
def test_processors(name, checkpoint, canary, monkeypatch):
    """No question is answered with yes, either: there is nobody to ask."""
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked: {question}"))
    plant(checkpoint, canary.module)

    def edit(config: dict) -> None:
        config |= {**EVIL, "auto_map": AUTO_MAP, "tokenizer_class": "Evil"}
        if "image_processor" in config:
            config["image_processor"] |= {**EVIL, "auto_map": AUTO_MAP}

    edit_json(checkpoint / name, edit)
    for loader in (AutoProcessor, TinyAlignProcessor):
        try:
            loader.from_pretrained(checkpoint, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error)
    assert canary.alive


def test_image_processors_and_tokenizers_of_no_known_class(checkpoint, canary):
    plant(checkpoint, canary.module)

    def edit(config: dict) -> None:
        config["image_processor"] |= {"image_processor_type": "Evil", "auto_map": AUTO_MAP}

    edit_json(checkpoint / "processor_config.json", edit)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    assert canary.alive


def test_banks(bank_folder, canary):
    """A bank is data: no field of its config is a way to code, whatever the user trusts elsewhere."""
    for folder in (bank_folder, bank_folder / "value_encoder", bank_folder / "data"):
        plant(folder, canary.module)

    def edit(config: dict) -> None:
        for part in (config["preprocessing"], config["tower"]["config"], config["value_encoder"]):
            part |= {**EVIL, "auto_map": AUTO_MAP, "_name_or_path": str(bank_folder), "_target_": "evil.Evil"}

    edit_json(bank_folder / "bank_config.json", edit)
    edit_json(bank_folder / "value_encoder" / "config.json", lambda config: config.update(EVIL, auto_map=AUTO_MAP))
    sign(bank_folder)
    bank = MemoryBank.from_pretrained(bank_folder)
    assert "transformers.models" in type(bank.value_encoder.perceiver).__module__ and len(bank.captions) == 12
    assert canary.alive
