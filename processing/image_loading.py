"""Images as users have them, to upright RGB; what cannot be decoded gets a clear error."""

import base64
import os
import warnings
from io import BytesIO
from typing import Any

import numpy as np
from huggingface_hub import get_session
from PIL import Image, ImageOps


def load_image(image: Any, name: str = "image") -> Any:
    """
    A PIL image, path, URL or base64 string -> upright RGB; transparency becomes white. Arrays and tensors pass as
    they are.

    Raises `ValueError`, naming `name`, for what is corrupt, truncated or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        return image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not isinstance(image, Image.Image):
                image = Image.open(_source(os.fspath(image)))
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, at most {limit} expected")
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} is too large: {error}. Resize it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    except Exception as error:  # codecs raise OSError, SyntaxError, struct.error and others
        raise ValueError(
            f"{name} cannot be read: {error}. Expected an intact image file, URL or base64 string: replace or drop it."
        ) from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _source(image: str) -> str | BytesIO:
    if image.startswith(("http://", "https://")):
        response = get_session().get(image)
        response.raise_for_status()
        return BytesIO(response.content)
    if os.path.exists(image):
        return image
    if image.startswith("data:image/"):
        return BytesIO(base64.b64decode(image.partition(",")[2]))
    try:
        return BytesIO(base64.b64decode(image, validate=True))
    except ValueError:
        raise FileNotFoundError(f"no such file: {image[:200]}") from None
