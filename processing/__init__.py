"""The processor: text and images to model inputs; travels with every checkpoint."""

from .processing_tinyalign import TinyAlignProcessor, read_chat

__all__ = ["TinyAlignProcessor", "read_chat"]
