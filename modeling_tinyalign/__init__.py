"""Config, model, connectors, key encoder, value encoder and memory bank; these files travel with every checkpoint."""

from .configuration_tinyalign import TinyAlignConfig
from .key_encoder import KeyEncoder
from .memory_bank import MemoryBank
from .modeling_tinyalign import TinyAlignForConditionalGeneration, TinyAlignModel
from .outputs import TinyAlignRetrieval
from .value_encoder import ValueEncoder, ValueEncoderConfig

__all__ = [
    "KeyEncoder",
    "MemoryBank",
    "TinyAlignConfig",
    "TinyAlignForConditionalGeneration",
    "TinyAlignModel",
    "TinyAlignRetrieval",
    "ValueEncoder",
    "ValueEncoderConfig",
]
