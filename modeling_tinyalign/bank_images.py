"""Images of a memory bank: read whatever a dataset holds, name it by its pixels, keep a thumbnail."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np

try:
    from PIL import Image, ImageOps
except ImportError:
    Image = ImageOps = None


def load_image(image: Image.Image | dict | bytes | str | Path) -> Image.Image:
    """Read an image as upright RGB; transparency becomes white.

    Args:
        image: a PIL image, the bytes of a file, its path, or datasets' `{"bytes": ..., "path": ...}`.

    Raises:
        ValueError: it is missing, corrupt, truncated, or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None:
        raise ValueError("there is no image, expected a PIL image, bytes or a path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(image, bytes):
                image = io.BytesIO(image)
            if not isinstance(image, Image.Image):
                image = Image.open(image)
        pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if limit is not None and pixels > limit:
            raise ValueError(f"it has {pixels} pixels, expected at most {limit} (PIL.Image.MAX_IMAGE_PIXELS)")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    # PIL and its codecs raise OSError, SyntaxError, struct.error and others on broken files
    except Exception as error:
        raise ValueError(f"the image cannot be read ({type(error).__name__}: {error})") from error


def image_source_id(image: Image.Image | dict | bytes | str | Path) -> str:
    """Name of an image: the first 32 hex digits of the sha256 of its size and decoded RGB pixels.

    The same picture gets the same name whatever its file name or lossless format; `load_image` is applied first.
    """
    image = load_image(image)
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()[:32]


def thumbnail_bytes(image: Image.Image, size: int) -> bytes:
    """A JPEG of an RGB image that fits in `size` x `size` pixels."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((size, size))
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
