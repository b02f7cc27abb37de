"""The processor: text and images to model inputs; travels with every checkpoint."""

from .processing_tinyalign import TinyAlignProcessor

__all__ = ["TinyAlignProcessor"]
