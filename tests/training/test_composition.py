"""Composing a model: of families whose logits come out changed, and of towers that are not what their configs say."""

import pytest
import torch
from conftest import TEXT_SIZES, VISION_SIZES, build_image_processor, build_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    Dinov2Config,
    DINOv3ConvNextConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    GraniteConfig,
    ResNetConfig,
)

from tinyalign_vlm import TinyAlignForConditionalGeneration, TinyAlignProcessor

OTHER_LOGITS = {
    "granite": GraniteConfig(**TEXT_SIZES, logits_scaling=8.0),
    "cohere": CohereConfig(**TEXT_SIZES, logit_scale=0.25),
    "gemma2": Gemma2Config(**TEXT_SIZES, head_dim=8, final_logit_softcapping=2.0),
}
MULTIPLIED = FalconH1Config(
    **TEXT_SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, lm_head_multiplier=0.5
)


def save_language_model(config, folder) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


def save_tower(config, folder) -> None:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    build_image_processor("siglip").save_pretrained(folder)  # 32 x 32 pixels


def compose(*parts, **config) -> TinyAlignForConditionalGeneration:
    return TinyAlignForConditionalGeneration.from_vision_text_pretrained(*map(str, parts), **config)


@pytest.mark.parametrize("name", OTHER_LOGITS)
def test_logits_are_the_language_models(name, checkpoints, tmp_path):
    expected = save_language_model(OTHER_LOGITS[name], tmp_path / "text")
    model = compose(checkpoints["siglip"], tmp_path / "text", memory_top_k=0)
    model.save_pretrained(tmp_path / "whole")
    loaded = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "whole")
    input_ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        for found in (model, loaded):
            logits = found(input_ids=input_ids).logits[..., :300]
            torch.testing.assert_close(logits, expected(input_ids).logits[..., :300])


def test_a_language_model_that_changes_its_logits_in_another_way_is_refused(checkpoints, tmp_path):
    save_language_model(MULTIPLIED, tmp_path)
    with pytest.raises(ValueError, match="A falcon_h1 changes its logits in a way that is not known"):
        compose(checkpoints["siglip"], tmp_path)


def test_a_language_model_with_a_tower_is_refused(checkpoints, tmp_path):
    config = Gemma3Config(text_config={**TEXT_SIZES, "head_dim": 8}, vision_config=VISION_SIZES, mm_tokens_per_image=4)
    save_language_model(config, tmp_path)
    with pytest.raises(
        ValueError, match="is a gemma3 with a vision tower of its own, expected a language model alone"
    ):
        compose(checkpoints["siglip"], tmp_path)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8), 17),
        (ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), 16),  # its config has no size
        (DINOv3ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, image_size=32), 2),  # tokens of a grid
    ],
    ids=["dinov2", "resnet", "dinov3-convnext"],
)
def test_a_tower_is_measured_with_what_its_processor_makes(config, tokens, checkpoints, tmp_path, images):
    save_tower(config, tmp_path)
    model = compose(tmp_path, checkpoints["llama"], memory_top_k=0)
    processor = TinyAlignProcessor.from_vision_text_pretrained(str(tmp_path), checkpoints["llama"], model.config)
    assert model.config.image_seq_length == tokens
    assert torch.isfinite(model(**processor(images=images[0], text="<image>x", return_tensors="pt")).logits).all()
