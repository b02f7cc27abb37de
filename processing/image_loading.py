"""Images as users have them, to upright RGB; what cannot be decoded gets a clear error."""

import base64
import os
import warnings
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from .image_fetching import download, fetch

# What a stranger may send: PIL hands some formats, EPS say, to other programs.
REQUEST_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def load_image(image: Any, name: str = "image") -> Any:
    """
    A PIL image, path, URL, base64 string or the bytes of a file, as `decode_image` reads it. Arrays and tensors pass
    as they are.

    Raises `ValueError`, naming `name`, for what cannot be found or decoded.
    """
    if not isinstance(image, (str, os.PathLike, bytes, Image.Image, NoneType)):
        return image
    try:
        if image is None:
            raise ValueError("there is no image, expected a PIL image, bytes or a path")
        if isinstance(image, bytes):
            image = BytesIO(image)
        elif not isinstance(image, Image.Image):
            image = _source(os.fspath(image))
        return decode_image(image)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Replace it or leave it out.") from error


def load_request_image(url: str, allowed_hosts: Collection[str] = ()) -> Image.Image:
    """
    An image that a stranger names in a request to a server: no file of this machine is read, and nothing is fetched
    but from a host that was allowed.

    Args:
        url: A `data:image/...;base64,` URL, or one with http or https.
        allowed_hosts: See [`fetch`].

    Raises:
        ValueError: it is neither, the host is not allowed, or `decode_image` refuses what is there.
    """
    if isinstance(url, str) and url.startswith(("http://", "https://")):
        data = fetch(url, allowed_hosts)
    elif isinstance(url, str) and url.startswith("data:image/"):
        try:
            data = base64.b64decode(url.partition(";base64,")[2], validate=True)
        except ValueError as error:
            raise ValueError(f"found {url[:100]!r}, expected base64 after `;base64,` ({error})") from error
    else:
        raise ValueError(f"found {str(url)[:100]!r}, expected a data:image/...;base64, URL")
    return decode_image(BytesIO(data), REQUEST_FORMATS)


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


def _source(image: str) -> str | BytesIO:
    """What `decode_image` reads; raises `ValueError` when there is nothing behind a URL or a name."""
    if image.startswith(("http://", "https://")):
        return BytesIO(download(image))
    if os.path.exists(image):
        return image
    is_data_url = image.startswith("data:image/")
    try:
        return BytesIO(base64.b64decode(image.partition(",")[2] if is_data_url else image, validate=not is_data_url))
    except ValueError:
        raise ValueError(f"found {image[:200]!r}, expected a file that exists, a URL or a base64 string") from None
