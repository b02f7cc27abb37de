"""Config, model, connectors, key encoder, value encoder and memory bank; these files travel with every checkpoint."""

from .configuration_tinyalign import TinyAlignConfig
from .modeling_tinyalign import TinyAlignForConditionalGeneration, TinyAlignModel
from .outputs import TinyAlignRetrieval

__all__ = ["TinyAlignConfig", "TinyAlignForConditionalGeneration", "TinyAlignModel", "TinyAlignRetrieval"]
