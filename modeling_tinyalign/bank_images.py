"""Images of a memory bank: read whatever a dataset holds, name it by its pixels, keep a thumbnail."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

try:
    from PIL import Image, ImageFile, ImageOps
except ImportError:
    Image = ImageFile = ImageOps = None


def load_image(image: Image.Image | dict | bytes | str | Path) -> Image.Image:
    """Read an image as `decode_image` does.

    Args:
        image: a PIL image, the bytes of a file, its path, or datasets' `{"bytes": ..., "path": ...}`.

    Raises:
        ValueError: there is none, or `decode_image` refuses it.
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None:
        raise ValueError("there is no image, expected a PIL image, bytes or a path")
    if isinstance(image, bytes):
        image = BytesIO(image)
    return decode_image(image)


def decode_image(image: Image.Image | BytesIO | str | Path, formats: Sequence[str] | None = None) -> Image.Image:
    """An image file, in one of PIL's `formats`, or a PIL image as upright RGB; transparency becomes white, 16 bits 8.

    bank_images.py and image_loading.py both hold this function, word for word: model and processor travel apart, and
    must see the same pixels.

    Raises:
        ValueError: it is corrupt, truncated, or a file of more than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not isinstance(image, Image.Image):
                image = Image.open(image, formats=formats)
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if isinstance(image, ImageFile.ImageFile) and limit is not None and pixels > limit:
                raise Image.DecompressionBombError(f"{pixels} pixels")
            image.load()
        if pixels == 0 or image.mode in ("F", "LAB"):
            raise ValueError(f"{image.width} x {image.height} pixels of mode {image.mode}")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            levels = np.asarray(image)
            if image.mode != "I" or levels.max() > 255:  # mode I holds 32 bits, but is used for 8 and for 16
                levels = levels.clip(0, 65535) // 257
            image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"the image is too large ({error}), expected at most {Image.MAX_IMAGE_PIXELS} pixels "
            "(PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    # PIL and its codecs raise OSError, SyntaxError, struct.error and others on broken files
    except Exception as error:
        raise ValueError(
            f"the image cannot be read ({type(error).__name__}: {error}), expected an intact image of a mode such as "
            "RGB, L or P"
        ) from error


def image_source_id(image: Image.Image | dict | bytes | str | Path) -> str:
    """Name of an image: the first 32 hex digits of the sha256 of its size and decoded RGB pixels.

    The same picture gets the same name whatever its file name or lossless format; `load_image` is applied first.
    """
    image = load_image(image)
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()[:32]


def thumbnail_bytes(image: Image.Image, size: int) -> bytes:
    """A JPEG of an RGB image that fits in `size` x `size` pixels."""
    small, buffer = image.copy(), BytesIO()
    small.thumbnail((size, size))
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
