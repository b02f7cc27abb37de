"""Images as users have them, to upright RGB, and the settings of image processors, which may be anybody's."""

import base64
import itertools
import os
import re
import time
import warnings
import zlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from io import BytesIO
from typing import Any, BinaryIO
from urllib.parse import unquote

import fsspec
import numpy as np
from huggingface_hub import constants, get_session
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from transformers import BaseImageProcessor
from transformers.utils import is_torch_tensor, is_torchvision_available

if is_torchvision_available():
    from transformers import LlavaImageProcessor
else:
    from transformers import LlavaImageProcessorPil as LlavaImageProcessor

MAX_SIDE = 4096  # pixels; no vision tower reads more
MAX_RATIO = 100  # of the sides: a preprocessor makes the short side as long as the tower's, and the long side with it
MAX_IMAGE_BYTES = 32 * 2**20
MAX_SECONDS = 20.0

# Where dictionaries have an image: datasets', parts of chats as transformers, OpenAI and Anthropic write them.
IMAGE_FIELDS = ("bytes", "image", "image_url", "url", "base64", "data", "source", "path")
# How base64 text of JPEG, PNG, GIF, WebP, TIFF, BMP, AVIF and JPEG 2000 begins.
BASE64_START = re.compile(r"[/_]9j[/_]|iVBORw0K|R0lGOD|UklGR|SUkqA|TU0AK|Qk[\w+/-]{6}AAAA|AAAA..Z0eX|AAAADGpQ")
REMOTE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# A file of a repository, or in an archive of one or of this machine, as datasets names it in a stream.
OF_DATASETS = re.compile(r"(zip://[^:]*::)?hf://|zip://[^:]*::/")
JPEG_MARKER = re.compile(rb"\xff([^\xff])", re.DOTALL)
# What turns an image upright, by EXIF's orientations from 2 on.
TURN = Image.Transpose
TURNS = (TURN.FLIP_LEFT_RIGHT, TURN.ROTATE_180, TURN.FLIP_TOP_BOTTOM, TURN.TRANSPOSE)
UPRIGHT = dict(enumerate((*TURNS, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90), start=2))


class MissingImage(ValueError):
    """There is no image, or no file behind its name."""


def image_source(image: Any) -> Any:
    """Return the PIL image, bytes, path or base64 text behind any form in which tools store an image; None for none.

    Args:
        image: one of these, `file://`, or a dictionary that holds one, such as datasets' or a part of a chat.
    """
    while isinstance(image, dict):
        image = next((image[name] for name in IMAGE_FIELDS if image.get(name)), None)
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        image = bytes(image)
        return image.decode("latin1") if is_base64(image[:100].decode("latin1")) else image
    if not isinstance(image, str):
        return image
    if image.startswith("file://"):
        return unquote(image.removeprefix("file://"))
    return os.path.expanduser(image) or None


def is_base64(text: str) -> bool:
    """Return True for a data URL, and for long text without a point that begins as an image does in base64."""
    bare = len(text) > 40 and "." not in text and BASE64_START.match(text.lstrip())
    return bool(bare) or text[:5].lower() == "data:"


def decode_image(image: Any, formats: Sequence[str] | None = None) -> Image.Image:
    """Return an image as upright RGB of sides up to `MAX_SIDE`; transparency becomes white, 16 bits become 8.

    Metadata that cannot be read is left out.

    Args:
        image: a PIL image, an array of bytes, an open file, or any form that `image_source` reads.
        formats: PIL's formats that a file may have. By default all of them.

    Raises:
        MissingImage: there is none.
        ValueError: it is corrupt, truncated, a file of more than `PIL.Image.MAX_IMAGE_PIXELS`, or more than
            `MAX_RATIO` times as long as wide.
    """
    source = image_source(image)
    if source is None or isinstance(source, (int, float, list, tuple)):
        found = "there is no image" if source is None else f"the image is {source!r:.50}"
        raise MissingImage(f"{found}, expected a PIL image, bytes or a path")
    if isinstance(source, str):
        source = _local_file(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata; that of too many pixels is an error in _loaded
            if isinstance(source, np.ndarray):
                source = Image.fromarray(source)
            elif isinstance(source, bytes):
                source = BytesIO(source)
            rgb = _upright_rgb(_loaded(source) if isinstance(source, Image.Image) else _opened(source, formats))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"the image is too large ({error}), expected at most {Image.MAX_IMAGE_PIXELS} pixels "
            "(PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    # PIL and its codecs raise OSError, SyntaxError, struct.error and others on broken files
    except Exception as error:
        reason = re.sub(r" <_io[^>]*>", "", f"{type(error).__name__}: {error}")
        kind = "of a mode such as RGB, L or P"
        if isinstance(error, UnidentifiedImageError):
            known = f"in one of {', '.join(formats)}" if formats else "such as JPEG, PNG or WebP"
            kind = f"{known}: convert HEIC, SVG and others, and download pages or pointers of Git LFS again"
        raise ValueError(f"the image cannot be read ({reason}), expected an intact image {kind}") from error
    check_proportions(rgb.size)
    rgb.thumbnail((MAX_SIDE, MAX_SIDE))
    return rgb


def check_proportions(sides: Sequence[int]) -> None:
    """Raise `ValueError` for sides of which a preprocessor, that makes the short one as a tower's, makes gigabytes."""
    if max(sides) > MAX_RATIO * min(sides):
        raise ValueError(
            f"the image has {' x '.join(map(str, sides))} pixels, expected a long side of at most {MAX_RATIO} times "
            "the short one: cut it into pieces"
        )


def _local_file(name: str) -> str | bytes:
    """Return the path of a file, or the bytes that base64 text or a name of datasets' stands for."""
    shown = repr(name if len(name) <= 100 else f"{name[:50]}...")
    if is_base64(name):
        try:
            text = unquote(name.partition(",")[2] if name[:5].lower() == "data:" else name)
            text = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except ValueError:
            raise ValueError(f"the image cannot be read: found {shown}, expected whole base64 text") from None
    if OF_DATASETS.match(name):
        with fsspec.open(name, "rb") as file:
            return file.read()
    if REMOTE.match(name):
        raise MissingImage(f"found the URL {shown}, expected a file: download the images, no URL is fetched here")
    if not os.path.isfile(name):
        raise MissingImage(f"{shown} is no file, expected a file, a URL, base64 text, bytes or a PIL image")
    return name


def _opened(source: str | BinaryIO, formats: Sequence[str] | None) -> Image.Image:
    """Return the image of a file, loaded; if that fails, of the file without its metadata."""
    try:
        return _loaded(Image.open(source, formats=formats))
    except Image.DecompressionBombError:
        raise
    except Exception:
        with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
            file.seek(0)
            bare = without_metadata(file)
        if bare is None:
            raise
    return _loaded(Image.open(BytesIO(bare), formats=formats))


def _loaded(image: Image.Image) -> Image.Image:
    """Return the same image, loaded; raises `DecompressionBombError` for a file of too many pixels."""
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if isinstance(image, ImageFile.ImageFile) and limit is not None and pixels > limit:
        raise Image.DecompressionBombError(f"{pixels} pixels")
    if not isinstance(image.info.get("xmp", b""), bytes):
        del image.info["xmp"]  # a number in TIFF, which PIL would search for an orientation
    image.load()
    return image


def _upright_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size or image.mode in ("F", "LAB"):
        raise ValueError(f"{image.width} x {image.height} pixels of mode {image.mode}")
    try:
        turned = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # EXIF may be anything
        turned = None
    if turned is not None:
        image = image.transpose(turned)
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if image.mode != "I" or levels.max() > 255:  # mode I holds 32 bits, but is used for 8 and for 16
            levels = levels.clip(0, 65535) // 257
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")  # always a copy
    image.info = {}  # with its orientation, whoever reads it again would turn it again
    return image


def without_metadata(file: BinaryIO) -> bytes | None:
    """Return a PNG, JPEG or WebP file without what is neither pixels nor orientation; None for another file."""
    head = file.read(12)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(head + file.read())
    if head.startswith(b"\xff\xd8"):
        return _bare_jpeg(head + file.read())
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return _bare_webp(head + file.read())
    return None


def _bare_png(data: bytes) -> bytes:
    kept, place = [data[:8]], 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        name, checksum = data[place + 4 : place + 8], data[end - 4 : end]
        intact = zlib.crc32(data[place + 4 : end - 4]).to_bytes(4, "big") == checksum
        # a capital letter marks what is not metadata
        if name[:1].isupper() or (name in (b"tRNS", b"eXIf") and intact):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _bare_jpeg(data: bytes) -> bytes:
    kept, place = [data[:2]], 2
    while match := JPEG_MARKER.search(data, place):
        start, marker = match.end() - 2, match[1]
        if marker == b"\xda":  # the pixels begin
            return b"".join([*kept, data[start:]])
        place = match.end() + max(2, int.from_bytes(data[match.end() : match.end() + 2], "big"))
        segment = data[start:place]
        is_metadata = b"\xe0" <= marker <= b"\xef" or marker == b"\xfe"
        # EXIF for the orientation; Adobe's segment says how colours are stored
        if not is_metadata or segment[4:8] == b"Exif" or (segment[4:9] == b"Adobe" and len(segment) >= 16):
            kept.append(segment)
    return data[:2]


def _bare_webp(data: bytes) -> bytes:
    kept, place = [b"WEBP"], 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        end = place + 8 + size + size % 2
        name = data[place : place + 4]
        if name == b"VP8X":  # its flags name the metadata
            kept.append(data[place : place + 8] + bytes([data[place + 8] & ~0x24]) + data[place + 9 : end])
        elif name in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF") or (name == b"EXIF" and end <= len(data)):
            kept.append(data[place:end])
        place = end
    body = b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def load_image(image: Any, name: str = "image") -> Any:
    """Return what `decode_image` makes of any form of an image, a URL of the user's own among them.

    Arrays and tensors pass as they are. Raises ValueError, naming `name`, for what cannot be found or decoded.
    """
    try:
        if isinstance(image, np.ndarray) or is_torch_tensor(image):
            check_proportions(sorted(image.shape)[-2:])  # the channels are fewest
            if image.ndim != 2 or is_torch_tensor(image):
                return image
        source = image_source(image)
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            source = download(source)
        return decode_image(source)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Replace it or leave it out.") from error


def check_levels(image: Any) -> None:
    """Raise `ValueError` for an array or a tensor whose numbers are 0 to 1, or beyond 255."""
    kind = str(getattr(image, "dtype", "uint8"))
    highest = 255 if "uint8" in kind else float(image.max())
    if highest > 255 or ("float" in kind and 0 < highest <= 1):
        raise ValueError(
            f"Found an image of numbers up to {highest:g}, expected 0 to 255, or do_rescale=False with it."
        )


def download(url: str) -> bytes:
    """Return what is behind a URL of the user's own: redirects and proxies are followed. ValueError if it can't be
    downloaded, not in `MAX_SECONDS`, or is larger than `MAX_IMAGE_BYTES`.
    """
    deadline = time.monotonic() + MAX_SECONDS
    try:
        client = get_session()
        if constants.HF_HUB_OFFLINE:  # which is about the Hub, and its client refuses all
            client = type(client)(follow_redirects=True)
        with client.stream("GET", url, timeout=MAX_SECONDS) as response:
            response.raise_for_status()
            return collect(response.iter_bytes(), deadline)  # as they come: to fill a chunk may take for ever
    except Exception as error:  # of httpx or of its successor, by the version of huggingface_hub
        raise ValueError(f"{url} cannot be downloaded ({error}), expected the URL of an image") from error


def collect(chunks: Iterable[bytes], deadline: float) -> bytes:
    """Return the chunks in one; ValueError when they are too many or come too late."""
    data = bytearray()
    for chunk in itertools.chain(chunks, [b""]):  # the end, too, may be that of the connection
        data += chunk
        if len(data) > MAX_IMAGE_BYTES:
            raise ValueError(f"more than {MAX_IMAGE_BYTES} bytes")
        if time.monotonic() > deadline:
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
