"""TinyAlign: a small vision-language model that retrieves similar examples for every image."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .modeling_tinyalign import (
    KeyEncoder,
    MemoryBank,
    TinyAlignConfig,
    TinyAlignForConditionalGeneration,
    TinyAlignModel,
    TinyAlignRetrieval,
    ValueEncoder,
    ValueEncoderConfig,
)
from .processing import TinyAlignProcessor

AutoConfig.register("tinyalign", TinyAlignConfig)
AutoModel.register(TinyAlignConfig, TinyAlignModel)
AutoModelForImageTextToText.register(TinyAlignConfig, TinyAlignForConditionalGeneration)
AutoModelForMultimodalLM.register(TinyAlignConfig, TinyAlignForConditionalGeneration)
AutoProcessor.register(TinyAlignConfig, TinyAlignProcessor)

__all__ = [
    "KeyEncoder",
    "MemoryBank",
    "TinyAlignConfig",
    "TinyAlignForConditionalGeneration",
    "TinyAlignModel",
    "TinyAlignProcessor",
    "TinyAlignRetrieval",
    "ValueEncoder",
    "ValueEncoderConfig",
]
