"""The processor: text and images to model inputs; travels with every checkpoint."""

from .chat_templates import add_captions
from .processing_tinyalign import TinyAlignProcessor

__all__ = ["TinyAlignProcessor", "add_captions"]
