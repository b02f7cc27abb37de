"""Images padded to a square before the vision tower's own preprocessing, as LLaVA does."""

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor
from transformers.utils import is_torchvision_available

if is_torchvision_available():
    from transformers import LlavaImageProcessor
else:
    from transformers import LlavaImageProcessorPil as LlavaImageProcessor


def padding_to_square(image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """
    LLaVA's image processor with the settings of `image_processor`: it pads with the mean colour, then does the same.

    Raises `ValueError` when it cannot do what `image_processor` does to a square image.
    """
    if image_processor.to_dict().get("do_pad"):
        return image_processor
    settings = {"do_center_crop": False, **image_processor.to_dict(), "do_pad": True}
    name = settings.pop("image_processor_type")
    padding = LlavaImageProcessor(**settings)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    expected, found = (
        processor(images=[image], return_tensors="np")["pixel_values"] for processor in (image_processor, padding)
    )
    if expected.shape != found.shape or np.abs(expected - found).max() > 1e-3:
        raise ValueError(
            f'image_aspect_ratio="pad" is for towers that are preprocessed as CLIP or SigLIP, but this one has a '
            f'{name}: use "square".'
        )
    return padding
