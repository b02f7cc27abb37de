"""Images as users have them, to upright RGB, and the settings of image processors, which may be anybody's."""

import base64
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from huggingface_hub import get_session
from PIL import Image, ImageFile, ImageOps
from transformers import BaseImageProcessor
from transformers.utils import is_torchvision_available

if is_torchvision_available():
    from transformers import LlavaImageProcessor
else:
    from transformers import LlavaImageProcessorPil as LlavaImageProcessor

MAX_SIDE = 4096
MAX_IMAGE_BYTES = 32 * 2**20
MAX_SECONDS = 20.0


def decode_image(
    image: Image.Image | BytesIO | bytes | str | Path | dict, formats: Sequence[str] | None = None
) -> Image.Image:
    """Return an image as upright RGB; transparency becomes white, 16 bits become 8.

    Args:
        image: a PIL image, the path, bytes or an open file of one, or datasets' `{"bytes": ..., "path": ...}`.
        formats: PIL's formats that a file may have. By default all of them.

    Raises:
        ValueError: there is none, or it is corrupt, truncated, or a file of more than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None:
        raise ValueError("there is no image, expected a PIL image, bytes or a path")
    if isinstance(image, bytes):
        image = BytesIO(image)
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


def load_image(image: Any, name: str = "image") -> Any:
    """Return a PIL image, path, URL, base64 string or the bytes of a file as `decode_image` reads it.

    Arrays and tensors pass as they are. Raises ValueError, naming `name`, for what cannot be found or decoded.
    """
    if not isinstance(image, (str, os.PathLike, bytes, Image.Image, NoneType)):
        return image
    try:
        return decode_image(_source(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else image)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Replace it or leave it out.") from error


def _source(image: str) -> str | BytesIO:
    """Return what `decode_image` reads; `ValueError` when there is nothing behind a URL or a name."""
    if image.startswith(("http://", "https://")):
        return BytesIO(download(image))
    if os.path.exists(image):
        return image
    is_data_url = image.startswith("data:image/")
    try:
        return BytesIO(base64.b64decode(image.partition(",")[2] if is_data_url else image, validate=not is_data_url))
    except ValueError:
        raise ValueError(f"found {image[:200]!r}, expected a file that exists, a URL or a base64 string") from None


def download(url: str) -> bytes:
    """Return what is behind a URL of the user's own: redirects and proxies are followed.

    Raises:
        ValueError: it can't be downloaded, not in `MAX_SECONDS`, or is larger than `MAX_IMAGE_BYTES`.
    """
    deadline = time.monotonic() + MAX_SECONDS
    try:
        with get_session().stream("GET", url, timeout=MAX_SECONDS) as response:
            response.raise_for_status()
            return collect(response.iter_bytes(), deadline)  # as they come: to fill a chunk may take for ever
    except Exception as error:  # of httpx or of its successor, by the version of huggingface_hub
        raise ValueError(f"{url} cannot be downloaded ({error}), expected the URL of an image") from error


def collect(chunks: Iterable[bytes], deadline: float) -> bytes:
    """Return the chunks in one; ValueError when they are too many or come too late."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > MAX_IMAGE_BYTES:
            raise ValueError(f"more than {MAX_IMAGE_BYTES} bytes")
        if time.monotonic() > deadline:
            raise ValueError(f"not complete after {MAX_SECONDS} seconds")
    if time.monotonic() > deadline:  # the end may be that of the connection
        raise ValueError(f"not complete after {MAX_SECONDS} seconds")
    return bytes(data)


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


def padding_to_square(image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """Return LLaVA's image processor with these settings: it pads to a square with the mean colour first.

    Raises ValueError when it cannot do what `image_processor` does to a square image.
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
