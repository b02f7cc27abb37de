"""
8-bit and 4-bit weights by transformers' quantization configs, where the platform has the library.

The extra `dev` has bitsandbytes, which does both on a CPU. torchao is tested where it is installed: transformers
imports it with every quantizer, and each process that does so starts a second later.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, TEXT_SIZES, build_tokenizer
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from tinyalign_vlm import TinyAlignForConditionalGeneration

from .conftest import prompt

# A bank's keys come from the vision tower, which has to stay what it was; and quantizers skip the head by themselves
# only when nothing else is named.
SKIPPED = ["model.vision_tower", "lm_head"]


def bitsandbytes_8bit():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED)


def bitsandbytes_4bit():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=SKIPPED)


def torchao_8bit():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (pip install torchao)")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=SKIPPED)


@pytest.fixture(scope="module")
def wide(saved, checkpoints, tmp_path_factory) -> SimpleNamespace:
    """As `saved`, with a language model wide enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {**TEXT_SIZES, "hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llama")
    build_tokenizer().save_pretrained(folder / "llama")
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        checkpoints["siglip"], folder / "llama", **SMALL
    )
    model.model.vision_tower.load_state_dict(saved.model.model.vision_tower.state_dict())  # the bank is of this one
    model.save_pretrained(folder / "model")
    model.attach_memory_bank(saved.bank)
    return SimpleNamespace(model=model, processor=saved.processor, folder=str(folder / "model"))


@pytest.mark.parametrize(
    ("make_config", "cosine"), [(torchao_8bit, 0.999), (bitsandbytes_8bit, 0.99), (bitsandbytes_4bit, 0.9)]
)
@torch.no_grad()
def test_quantized_language_model(make_config, cosine, saved, wide, images):
    config = make_config()
    plain = wide.model
    model = TinyAlignForConditionalGeneration.from_pretrained(
        wide.folder, quantization_config=config, device_map="cpu"
    ).eval()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.data
    assert type(weight) is not torch.Tensor or weight.dtype in (torch.int8, torch.uint8)
    for part in ("vision_tower", "connector", "memory_connector"):  # these are as they were
        kept, original = (getattr(m.model, part).state_dict() for m in (model, plain))
        assert kept.keys() == original.keys() and all(torch.equal(kept[name], original[name]) for name in kept)
    model.attach_memory_bank(saved.bank)
    inputs = prompt(wide, images[0])
    assert torch.equal(model.retrieve(inputs["pixel_values"]).ids, plain.retrieve(inputs["pixel_values"]).ids)
    found, expected = model(**inputs).logits.float(), plain(**inputs).logits
    assert F.cosine_similarity(found, expected, dim=-1).mean() > cosine
    assert not torch.equal(found, expected)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
