"""PEFT: a LoRA adapter is trained, saved, loaded onto the model as remote code gives it, and merged."""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.peft import MIN_PEFT_VERSION

from tinyalign_vlm import TinyAlignForConditionalGeneration

from .conftest import prompt

TARGETS = (r".*language_model.*\.(q_proj|v_proj)", "all-linear")
EMBEDDINGS = r".*language_model.*\.(q_proj|embed_tokens)"
LORA = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}


@pytest.fixture
def remote_model(saved, tmp_path, monkeypatch):
    """`remote_model()`: the checkpoint, loaded by the code that is in it (the Auto classes prefer the package)."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    reference = "modeling_tinyalign.TinyAlignForConditionalGeneration"

    def load():
        return get_class_from_dynamic_module(reference, saved.folder).from_pretrained(saved.folder)

    return load


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_is_loaded_and_merged(targets, saved, remote_model, images, tmp_path):
    model = remote_model()
    assert type(model).__module__.startswith("transformers_modules.")
    inputs = {**prompt(saved, images[0]), "memory": "off"}
    plain = model(**inputs).logits
    trained = get_peft_model(model, LoraConfig(target_modules=targets, **LORA))
    expected = trained(**inputs).logits.detach()
    assert not torch.allclose(plain, expected, atol=1e-3)
    trained.save_pretrained(tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(remote_model(), tmp_path / "adapter")
    assert torch.equal(loaded(**inputs).logits, expected)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(**inputs).logits, expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(again(**inputs).logits, merged(**inputs).logits)


def test_captions_are_read_with_an_adapter_of_the_embeddings(saved, images):
    model = TinyAlignForConditionalGeneration.from_pretrained(saved.folder, memory_input="captions")
    model.attach_memory_bank(saved.bank_folder)
    trained = get_peft_model(model, LoraConfig(target_modules=EMBEDDINGS, **LORA))
    assert trained(**prompt(saved, images[0])).logits.isfinite().all()


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"load_adapter of this transformers wants peft >= {MIN_PEFT_VERSION}, found {version('peft')}",
)
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_is_loaded_by_transformers(targets, saved, remote_model, images, tmp_path):
    model = remote_model()
    inputs = {**prompt(saved, images[0]), "memory": "off"}
    plain = model(**inputs).logits
    trained = get_peft_model(model, LoraConfig(target_modules=targets, **LORA))
    expected = trained(**inputs).logits.detach()
    trained.save_pretrained(tmp_path / "adapter")

    model = remote_model()
    model.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(model(**inputs).logits, expected)
    model.disable_adapters()
    assert torch.equal(model(**inputs).logits, plain)


def test_an_adapter_is_trained(saved, remote_model, images, tmp_path):
    """With the memory connector in `modules_to_save`; its full name, for `connector` would match both connectors."""
    model = remote_model()
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["model.memory_connector"], r=2)
    trained = get_peft_model(model, config)
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in names) and any("memory_connector" in name for name in names)
    assert not any("vision_tower" in name or ".connector." in name for name in names)
    inputs = prompt(saved, images[0])
    inputs["memory_values"] = torch.ones(1, 2, 3, 5)
    labels = torch.where(inputs["input_ids"] == model.config.image_token_id, -100, inputs["input_ids"])
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(trained(**inputs, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    expected = trained.eval()(**inputs).logits.detach()
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(remote_model(), tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    assert torch.allclose(loaded.merge_and_unload()(**inputs).logits, expected, atol=1e-4)
