"""Whether an image processor can be used: its settings come with a checkpoint, which may be anybody's."""

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

MAX_SIDE = 4096


def check_sizes(image_processor: BaseImageProcessor) -> None:
    """Refuse to make images larger than any vision tower reads (`ValueError` naming the setting)."""
    settings = image_processor.to_dict()
    for name in ("size", "crop_size", "pad_size"):
        for side, pixels in (settings.get(name) or {}).items():
            if pixels is not None and not (type(pixels) is int and 1 <= pixels <= MAX_SIDE):
                raise ValueError(f"{name}.{side} is {pixels!r}, expected 1 to {MAX_SIDE} pixels.")


def check_output(image_processor: BaseImageProcessor) -> None:
    """Refuse settings that make no numbers of an image, or none that are finite (`ValueError`)."""
    pixels = image_processor(images=[Image.new("RGB", (32, 24), "red")], return_tensors="np")["pixel_values"]
    if pixels.ndim != 4 or pixels.shape[:2] != (1, 3) or not np.isfinite(pixels).all():
        raise ValueError(
            f"The image processor of processor_config.json makes {pixels.shape} numbers of an image, expected "
            "(1, 3, height, width), all finite."
        )
