"""Images padded to a square, as LLaVA pads them."""

import numpy as np
import pytest
import torch
from PIL import Image

from tinyalign_vlm import TinyAlignProcessor


def expand2square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """LLaVA's own (llava/mm_utils.py)."""
    size = max(image.size)
    result = Image.new(image.mode, (size, size), colour)
    result.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return result


@pytest.mark.parametrize("size", [(60, 21), (20, 47), (30, 30)])
@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_padding_is_that_of_llava(vision, size, make_model, checkpoints, tmp_path):
    names = checkpoints[vision], checkpoints["llama"]
    config = make_model(vision=vision).config
    square = TinyAlignProcessor.from_vision_text_pretrained(*names, config)
    padding = TinyAlignProcessor.from_vision_text_pretrained(*names, config, image_aspect_ratio="pad")
    padding.save_pretrained(tmp_path)
    loaded = TinyAlignProcessor.from_pretrained(tmp_path)
    assert (square.image_aspect_ratio, loaded.image_aspect_ratio) == ("square", "pad")
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    colour = tuple(int(mean * 255) for mean in square.image_processor.image_mean)
    expected = square(images=expand2square(image, colour), text="<image>", return_tensors="pt")["pixel_values"]
    for processor in (padding, loaded):
        found = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    later = TinyAlignProcessor.from_pretrained(tmp_path, image_aspect_ratio="pad")
    assert later.image_processor.to_dict() == loaded.image_processor.to_dict()


def test_what_cannot_be_padded_is_refused(make_model, checkpoints):
    names, config = (checkpoints["efficientnet"], checkpoints["llama"]), make_model(vision="efficientnet").config
    with pytest.raises(ValueError, match="preprocessed as CLIP or SigLIP, but this one has a EfficientNet"):
        TinyAlignProcessor.from_vision_text_pretrained(*names, config, image_aspect_ratio="pad")
    with pytest.raises(ValueError, match="image_aspect_ratio is 'anyres', expected 'square' or 'pad'"):
        TinyAlignProcessor.from_vision_text_pretrained(*names, config, image_aspect_ratio="anyres")
