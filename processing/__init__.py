"""The processor: text and images to model inputs; travels with every checkpoint."""

from .processing_tinyalign import TinyAlignProcessor, add_captions, read_chat

__all__ = ["TinyAlignProcessor", "add_captions", "read_chat"]
