"""transformers' own model tests on TinyAlign; `make test-transformers` runs them."""

import unittest
from unittest.mock import patch

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers_tests import test_modeling_common
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from tinyalign_vlm import TinyAlignConfig, TinyAlignForConditionalGeneration, TinyAlignModel
from tinyalign_vlm.modeling_tinyalign.modeling_tinyalign import TinyAlignPreTrainedModel

IMAGE_TOKEN_ID = 0
IMAGE_INPUTS = ("pixel_values", "memory_input_ids", "memory_values", "memory_scores", "memory_ids")

# The mixin looks classes up by name, to know which have no head and which take labels.
MODEL_MAPPING_NAMES["tinyalign"] = "TinyAlignModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["tinyalign"] = "TinyAlignForConditionalGeneration"


def prompt_ids(shape: list[int], vocab_size: int) -> torch.Tensor:
    """Random ids without image tokens, which TinyAlign refuses without an image."""
    return ids_tensor(shape, vocab_size - 1) + 1


test_modeling_common.ids_tensor = prompt_ids

TRANSFORMER = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
SIGLIP = {**TRANSFORMER, "model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4}
CLIP = {**SIGLIP, "model_type": "clip_vision_model", "image_size": 16}
EFFICIENTNET = {
    "model_type": "efficientnet",
    "image_size": 16,
    "hidden_dim": 1280,
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
}
LLAMA = {**TRANSFORMER, "model_type": "llama", "vocab_size": 99, "num_key_value_heads": 2, "pad_token_id": 1}
LLAMA["max_position_embeddings"] = 512
MEMORY = {"memory_top_k": 2, "memory_tokens": 4, "latent_dim": 6}


class TinyAlignModelTester:
    """A tiny config and inputs for it: one image a row, with given memory and one neighbour in five missing."""

    def __init__(self, **config):
        self.config = TinyAlignConfig(image_token_id=IMAGE_TOKEN_ID, **config)
        self.vision_config, self.text_config = config["vision_config"], config["text_config"]
        self.batch_size = 7
        self.seq_length = self.encoder_seq_length = self.key_length = self.config.num_image_tokens + 7
        self.is_training = True
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
            setattr(self, name, self.text_config[name])

    def get_config(self) -> TinyAlignConfig:
        return TinyAlignConfig.from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[TinyAlignConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        input_ids = prompt_ids([self.batch_size, self.seq_length], self.vocab_size)
        input_ids[:, : config.num_image_tokens] = config.image_token_id
        size = self.vision_config["image_size"]
        inputs = {
            "pixel_values": floats_tensor([self.batch_size, 3, size, size]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        if config.memory_top_k > 0:
            slots = [self.batch_size, config.memory_top_k]
            inputs["memory_ids"] = torch.arange(self.batch_size * config.memory_top_k).reshape(slots) % 5 - 1
            if config.memory_scores:
                inputs["memory_scores"] = floats_tensor(slots)
            if config.reads_captions:
                inputs["memory_input_ids"] = prompt_ids([self.batch_size, config.memory_tokens], self.vocab_size - 20)
                inputs["memory_input_ids"][:, -1] = -1
            if config.reads_latents:
                inputs["memory_values"] = floats_tensor([*slots, config.memory_tokens, config.latent_dim])
        return config, inputs


class SuiteMixin(ModelTesterMixin):
    all_model_classes = (TinyAlignModel, TinyAlignForConditionalGeneration)
    additional_model_inputs = IMAGE_INPUTS
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    config: dict

    def setUp(self):
        self.model_tester = TinyAlignModelTester(**self.config)
        self.config_tester = ConfigTester(self, config_class=TinyAlignConfig, has_text_modality=False)

    def _image_features_prepare_config_and_inputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        """Of a model outside its package transformers initialises no containers, such as SigLIP's attention."""
        with patch.object(TinyAlignPreTrainedModel, "is_custom_code", return_value=False):
            super().test_can_init_all_missing_weights()

    @unittest.skip("GenerationTesterMixin is not in the sdist")
    def test_generation_tester_mixin_inheritance(self):
        pass


class LatentMemoryTest(SuiteMixin, unittest.TestCase):
    """SigLIP and Llama; the paper's connector."""

    config = {
        "vision_config": SIGLIP,
        "text_config": LLAMA,
        "image_seq_length": 4,
        "memory_input": "latents",
        **MEMORY,
    }


class BothMemoryTest(SuiteMixin, unittest.TestCase):
    """CLIP without its CLS token, two of its layers, pooled; Qwen2 with tied embeddings; captions and latents."""

    config = {
        "vision_config": CLIP,
        "text_config": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
        "vision_feature_layer": [-2, -1],
        "vision_feature_select_strategy": "default",
        "vision_pool_size": 2,
        "image_seq_length": 4,
        "memory_input": "both",
        **MEMORY,
    }


class ConvolutionalTest(SuiteMixin, unittest.TestCase):
    """EfficientNet and Llama with tied embeddings, as in `make demo`."""

    config = {
        "vision_config": EFFICIENTNET,
        "text_config": {**LLAMA, "tie_word_embeddings": True},
        "vision_feature_size": 1280,
        "vision_pool_size": 2,
        "image_seq_length": 4,
        **MEMORY,
    }


class BaselineTest(SuiteMixin, unittest.TestCase):
    """No memory; SigLIP and Phi, whose head has a bias."""

    config = {
        "vision_config": SIGLIP,
        "text_config": {**LLAMA, "model_type": "phi"},
        "image_seq_length": 4,
        "lm_head_bias": True,
        "memory_top_k": 0,
    }
