"""
What vLLM's "Transformers modeling backend" asks of a multimodal model with remote code.

vLLM itself needs a GPU and is no dependency; this is its contract, read in vLLM 0.18 to 0.33, with the same calls.

1. docs/models/supported_models.md, "Custom models" and "Writing custom models": config.json has `auto_map.AutoModel`,
   and customisation is in that base model, not in `...ForConditionalGeneration`; `_supports_attention_backend = True`
   (`is_backend_compatible()`); kwargs go down from the model to the attention, which asks ALL_ATTENTION_FUNCTIONS.
2. vllm/model_executor/models/transformers/base.py: the base model is made by `AutoModel.from_config` on the meta
   device, with `config.get_text_config()._attn_implementation = "vllm"`; `get_input_embeddings`,
   `set_input_embeddings`, `get_decoder`; `forward(input_ids=None, inputs_embeds=(1, n, hidden), position_ids=(1, n),
   use_cache=False, return_dict=False, attention_instances=...)` gives the hidden states first. It runs inside CUDA
   graphs, so it must not look at the values of its tensors.
3. vllm/model_executor/models/transformers/multimodal.py: the processor has `image_processor`, `image_token` and
   `_get_num_multimodal_tokens(image_sizes=[(height, width)])` with `num_image_tokens` and `num_image_patches`; for
   memory profiling it gets images of 10,000 x 10,000 pixels. Placeholders are located with transformers >= 5.15 by
   `return_text_replacement_offsets=True` (one entry an image, from `replace_image_token`), and before by
   `return_mm_token_type_ids=True`. `get_image_features(pixel_values, **other fields)` gives a `ModelOutput` whose
   `pooler_output` has one tensor `(tokens, hidden)` an image; the model replaces the placeholders by them itself.
   `get_encoder(modality="image")` is the vision tower.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AttentionInterface, AutoConfig, AutoModel
from transformers.utils import ModelOutput

from .conftest import prompt


@pytest.fixture
def model(saved, attention_calls):
    """The base model, as vLLM makes it, with the weights of the checkpoint and its bank."""
    config = AutoConfig.from_pretrained(saved.folder)
    config.get_text_config()._attn_implementation = "vllm"
    with torch.device("meta"):
        assert type(AutoModel.from_config(config).get_decoder()) is type(saved.model.model.language_model)
    model = AutoModel.from_config(config).eval()
    assert model.config.get_text_config()._attn_implementation == "vllm"
    model.load_state_dict(saved.model.model.state_dict())
    model.attach_memory_bank(saved.bank)
    return model


@pytest.fixture
def attention_calls(monkeypatch):
    """Registers vLLM's attention, which attends over all tokens of the one row; the kwargs that reached it."""
    calls = []

    def attend(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
        calls.append((module.layer_idx, attention_instances))
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2), None

    AttentionInterface.register("vllm", attend)
    return calls


def test_config_and_class(saved):
    config = json.loads(Path(saved.folder, "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_tinyalign.TinyAlignModel"
    assert config["image_token_id"] == saved.processor.image_token_id
    assert AutoConfig.from_pretrained(saved.folder).get_text_config().vocab_size == config["text_config"]["vocab_size"]
    base = type(saved.model.model)
    assert base._supports_attention_backend and base.is_backend_compatible()
    for modality in ("image", "video"):
        assert saved.model.model.get_encoder(modality=modality) is saved.model.model.vision_tower
    assert saved.model.model.get_encoder(modality="audio") is saved.model.model  # none
    names = {name.split(".")[0] for name, _ in saved.model.named_parameters()}
    assert names <= {"model", "lm_head"}  # what vLLM's mapping of weights expects


def test_counting_tokens(saved, monkeypatch):
    counts = saved.processor._get_num_multimodal_tokens(image_sizes=[(40, 50), (10_000, 10_000), (1, 1)])
    assert counts["num_image_tokens"] == [19, 19, 19] and counts["num_image_patches"] == [1, 1, 1]
    assert saved.processor.image_token == "<image>"
    # vLLM profiles with an image of the largest size, which is in memory: nothing to refuse as a decompression bomb
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for height, width in ((40, 50), (1, 1)):
        inputs = saved.processor(text="<image>", images=[Image.new("RGB", (width, height))], return_tensors="pt")
        assert inputs["input_ids"].shape[1] == 19 and len(inputs["pixel_values"]) == 1


def test_locating_placeholders(saved, images):
    text = "<image><image> what <image>?"
    inputs = saved.processor(
        text=text,
        images=images[:3],
        return_tensors="pt",
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
        truncation=False,
        add_special_tokens=False,
    )
    is_image = inputs["input_ids"] == saved.processor.image_token_id
    assert torch.equal(inputs["mm_token_type_ids"] == 1, is_image) and is_image.sum() == 3 * 19
    (offsets,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in offsets] == ["image"] * 3
    for number, entry in enumerate(offsets):
        ids = saved.processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
        assert ids == [saved.processor.image_token_id] * 19
        assert entry["replacement"] == saved.processor.replace_image_token(inputs, number)
    # what vLLM does itself with a prompt that is tokenized already: every image token becomes its replacement
    ids = saved.processor.tokenizer.encode(text, add_special_tokens=False)
    expanded = [i for token in ids for i in [token] * (19 if token == saved.processor.image_token_id else 1)]
    assert expanded == inputs["input_ids"][0].tolist()
    # nor is there anything but images to locate
    assert not hasattr(saved.processor, "video_processor") and not hasattr(saved.processor, "feature_extractor")


@torch.no_grad()
def test_encoding_images(model, saved, images):
    pixels = saved.processor.image_processor(images=images[:3], return_tensors="pt")["pixel_values"]
    output = model.get_image_features(pixels, image_sizes=torch.ones(3, 2))  # other fields come along
    assert isinstance(output, ModelOutput) and [tuple(part.shape) for part in output.pooler_output] == [(19, 32)] * 3
    expected = saved.model.get_image_features(pixels).pooler_output
    for index, part in enumerate(output.pooler_output):  # in a batch as alone: vLLM caches them one by one
        assert torch.equal(part, expected[index])
        alone = model.get_image_features(pixels[index : index + 1], return_dict=True).pooler_output[0]
        torch.testing.assert_close(alone, part)
    assert output.memory_ids.tolist() == [row.tolist() for row in saved.model.retrieve(pixels).ids]


@torch.no_grad()
def test_running_on_embeddings(model, saved, images, attention_calls):
    inputs = prompt(saved, images[0], images[1])
    expected = saved.model.model(**inputs).last_hidden_state
    ids = inputs["input_ids"][0]
    embeddings = model.get_input_embeddings()(ids)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeddings[ids == model.config.image_token_id] = torch.cat(features)
    layers = {"layer": "instances"}
    outputs = model(
        input_ids=None,
        inputs_embeds=embeddings[None],
        position_ids=torch.arange(len(ids))[None],
        use_cache=False,
        attention_instances=layers,
        return_dict=False,
    )
    torch.testing.assert_close(outputs[0], expected, atol=1e-4, rtol=1e-4)
    assert attention_calls == [(0, layers), (1, layers)]


@torch.no_grad()
def test_no_look_at_values(model, attention_calls):
    """On the meta device there are none: asking whether any, or how many, are so and so raises."""
    model = model.to("meta")
    outputs = model(
        input_ids=None,
        inputs_embeds=torch.zeros(1, 7, 32, device="meta"),
        position_ids=torch.arange(7, device="meta")[None],
        use_cache=False,
        return_dict=False,
    )
    assert outputs[0].shape == (1, 7, 32)
