"""transformers' own processor tests on TinyAlign; `make test-transformers` runs them."""

import unittest

from conftest import build_image_processor, build_tokenizer
from transformers_tests.test_processing_common import ProcessorTesterMixin

from tinyalign_vlm import TinyAlignProcessor
from tinyalign_vlm.training.composition import chat_template_for


class SuiteMixin(ProcessorTesterMixin):
    processor_class = TinyAlignProcessor
    vision = "siglip"
    chatml = True
    key_space = "vision"

    @classmethod
    def _setup_image_processor(cls):
        return build_image_processor(cls.vision)

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = build_tokenizer(cls.chatml)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
        return tokenizer

    @classmethod
    def prepare_processor_dict(cls):
        template = chat_template_for(cls._setup_tokenizer(), "<image>")
        return {"num_image_tokens": 5, "key_space": cls.key_space, "chat_template": template}


class VisionKeysTest(SuiteMixin, unittest.TestCase):
    """SigLIP's image processor, ChatML."""


class LanguageKeysTest(SuiteMixin, unittest.TestCase):
    """CLIP's image processor, LLaVA's turns; the question goes to retrieval."""

    vision = "clip"
    chatml = False
    key_space = "language"
