"""Images of all kinds become the same upright RGB, or are refused for a reason."""

import base64
import io
import resource
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from forms.pictures import PICTURE, TURNED, odd_pictures, png, turned_pictures
from PIL import Image, ImageOps

from tinyalign_vlm import TinyAlignProcessor
from tinyalign_vlm.processing.images import MissingImage, decode_image, load_image

MODES = [*Image.MODES, "I;16L", "I;16B", "I;16N", "La", "RGBX", "RGBa", "LAB", "HSV", "PA"]
LOADERS = (TinyAlignProcessor.decode_image, load_image)  # a memory bank uses the first, a prompt the second


def load(source) -> Image.Image:
    """Loaded both ways, which must give the same: an image, or the same complaint."""
    results = []
    for loader in LOADERS:
        try:
            results.append(loader(source))
        except ValueError as error:
            results.append(str(error).removeprefix("image: ").removesuffix(". Replace it or leave it out."))
    of_bank, of_processor = results
    assert of_bank == of_processor
    if isinstance(of_bank, str):
        raise ValueError(of_bank)
    assert of_bank.mode == "RGB" and of_bank.size == of_processor.size
    return of_bank


def picture(mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(levels)
    image = Image.fromarray(levels[:, :, :3]) if mode in ("RGB", "HSV", "LAB", "YCbCr") else image
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, np.ascontiguousarray(levels[:, :, :2]).tobytes())
    if mode == "La":
        return image.convert("LA").convert("La")
    return Image.frombytes("LAB", size, image.tobytes()) if mode == "LAB" else image.convert(mode)


def encoded(image: Image.Image, format: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decoded_twice_it_is_turned_once(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    once = decode_image(encoded(picture(size=(6, 4)), format, exif=exif))
    twice = decode_image(once)
    assert twice.size == once.size == ImageOps.exif_transpose(once).size and twice.tobytes() == once.tobytes()


@pytest.mark.parametrize("mode", sorted(set(MODES)))
def test_modes(mode):
    image = picture(mode)
    if mode in ("F", "LAB", "La"):
        with pytest.raises(ValueError, match=f"cannot be read .*{mode}.*, expected an intact image of a mode"):
            load(image)
    else:
        assert load(image).size == (9, 7) and len(set(load(image).tobytes())) > 1


def test_what_becomes_of_the_pixels(tmp_path):
    rgb = picture()
    for format, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        path = tmp_path / f"image.{format.lower()}"
        rgb.save(path, **options)
        assert load(path).tobytes() == load(str(path)).tobytes() == rgb.tobytes()
    for same in (rgb, rgb.convert("RGBA")):
        assert load(same).tobytes() == rgb.tobytes()
    cmyk = load(Image.open(encoded(rgb.convert("CMYK"), "JPEG", quality=100)))
    assert np.abs(np.asarray(cmyk, int) - np.asarray(rgb, int)).mean() < 40
    grey = rgb.convert("L")
    assert load(grey).tobytes() == grey.convert("RGB").tobytes()


@pytest.mark.parametrize("levels", [0, 128, 255])
def test_greyscale_of_many_bits(levels):
    expected = (levels,) * 3
    deep = np.full((4, 5), levels * 257, np.uint16)
    sources = [Image.fromarray(deep), Image.open(encoded(Image.fromarray(deep), "PNG"))]
    sources += [Image.open(encoded(Image.fromarray(deep), "TIFF")), Image.new("L", (5, 4), levels).convert("I")]
    for source in sources:
        assert load(source).getpixel((0, 0)) == expected, source.mode
    ramp = np.linspace(0, 65535, 20).astype(">u2").reshape(4, 5)
    pgm = Image.open(io.BytesIO(b"P5 5 4 65535\n" + ramp.tobytes()))
    assert (np.asarray(load(pgm))[:, :, 0] == ramp // 257).all()


def test_arrays_and_what_is_no_image():
    levels = np.asarray(picture())
    assert decode_image(levels).tobytes() == decode_image(levels.copy()).tobytes() == picture().tobytes()
    for wrong in (levels.astype(np.float32), levels[None]):
        with pytest.raises(ValueError, match="cannot be read .TypeError: Cannot handle this data type"):
            decode_image(wrong)
    for wrong in (5, float("nan"), [137, 80] * 500, (picture(),)):
        with pytest.raises(ValueError, match="^the image is .*, expected a PIL image, bytes or a path$") as error:
            load(wrong)
        assert len(str(error.value)) < 120
    for name, file in (("HEIC", b"\0\0\0\x18ftypheic"), ("Git LFS", b"version https://git-lfs.github.com/spec/v1")):
        with pytest.raises(ValueError, match=f"expected an intact image such as JPEG, PNG or WebP: .*{name}"):
            load(file)


def test_transparency_becomes_white():
    half = picture("RGBA").resize((20, 20))
    half.paste((10, 20, 30, 0), (0, 0, 10, 20))
    palette = half.quantize(16)
    one_colour = Image.new("P", (20, 20), 3)
    one_colour.info["transparency"] = 3
    key = Image.new("RGB", (20, 20), (1, 2, 3))
    for image in (
        half,
        half.convert("LA"),
        half.convert("RGBa"),
        palette,
        one_colour,
        Image.open(encoded(palette, "PNG")),
        Image.open(encoded(half, "GIF")),
        Image.open(encoded(half, "WEBP", lossless=True)),
        Image.open(encoded(key, "PNG", transparency=(1, 2, 3))),
    ):
        assert load(image).getpixel((2, 2)) == (255, 255, 255), (image.format, image.mode)
    grey = Image.new("RGBA", (3, 3), (0, 0, 0, 128))
    assert load(grey).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    image = picture(size=(6, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    transpose = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    ][orientation - 1]
    expected = image if transpose is None else image.transpose(transpose)
    for mode in ("RGB", "RGBA", "L"):
        found = load(Image.open(encoded(image.convert(mode), "PNG", exif=exif)))
        assert found.tobytes() == load(expected.convert(mode)).tobytes()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_and_corrupt_files(format, tmp_path):
    data = encoded(picture(size=(80, 60)), format).getvalue()
    path = tmp_path / "image"
    for length in (0, 5, 20, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"the image cannot be read \(\w+: .*, expected an intact image"):
            load(path)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load(path)
        except ValueError as error:
            assert "the image " in str(error) and "expected" in str(error)


def test_decompression_bombs(tmp_path, monkeypatch):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    path = tmp_path / "bomb.png"
    for side in (12_000, 50_000):  # PIL warns of the first and refuses the second
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))
        with pytest.raises(ValueError, match=f"the image is too large .*{side**2} pixels.*expected at most"):
            load(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    files = {side: encoded(Image.new("RGB", (40, side)), "PNG") for side in (25, 30)}
    with pytest.warns(Image.DecompressionBombWarning):
        opened = Image.open(files[30])
    with pytest.raises(ValueError, match=r"too large \(1200 pixels\), expected at most 1000 pixels"):
        load(opened)
    assert load(Image.open(files[25])).size == (40, 25)
    assert load(Image.new("RGB", (40, 30))).size == (40, 30)  # it is in memory already (vLLM profiles with such)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load(Image.open(files[30])).size == (40, 30)


def test_empty_images():
    with pytest.raises(ValueError, match="0 x 5 pixels of mode RGB"):
        load(Image.new("RGB", (0, 5)))


def test_unknown_sources():
    for source in ("https://localhost:1/image.png", "no such file.png", "data:image/png;base64,A"):
        with pytest.raises(ValueError, match=r"image 3: .*expected .*\. Replace it or leave it out"):
            load_image(source, "image 3")


def test_a_url_of_ones_own_server_where_the_hub_is_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(picture(), "PNG").getvalue())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        found = load_image(f"http://127.0.0.1:{server.server_port}/a.png")
    assert found.tobytes() == picture().tobytes()


def test_bytes_and_nothing():
    data = encoded(picture(), "PNG").getvalue()
    assert load(data).tobytes() == picture().tobytes()
    for nothing, message in ((b"", "cannot be read"), (None, "there is no image, expected a PIL image")):
        with pytest.raises(ValueError, match=message):
            load(nothing)


def spellings(data: bytes, path) -> dict:
    """Return the forms in which tools write an image."""
    text = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{text}"
    return {
        "path": str(path),
        "Path": path,
        "file URL": path.as_uri(),
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "base64": text,
        "base64 in lines": base64.encodebytes(data).decode(),
        "base64 for URLs": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "base64 as bytes": base64.b64encode(data),
        "data URL": url,
        "data URL in capitals": url.replace("data:image/png", "DATA:IMAGE/PNG"),
        "data URL, percent": url.replace("+", "%2B").replace("=", "%3D"),
        "data URL in lines": f"data:image/png;base64,{base64.encodebytes(data).decode()}",
        "data URL without a kind": f"data:;base64,{text}",
        "path and bytes": {"bytes": data, "path": "elsewhere.png"},
        "path alone": {"bytes": None, "path": str(path)},
        "bytes as base64": {"bytes": text, "path": None},
        "part of a chat": {"type": "image", "image": {"bytes": data, "path": None}},
        "transformers' part": {"type": "image", "base64": text},
        "OpenAI's part": {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        "OpenAI's part of text": {"type": "image_url", "image_url": url},
        "Anthropic's part": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": text}},
    }


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_way_to_store_an_image(format, tmp_path):
    data = encoded(PICTURE, format).getvalue()
    path = tmp_path / "with space%20and ü.img"
    path.write_bytes(data)
    expected = decode_image(Image.open(io.BytesIO(data))).tobytes()
    for name, source in spellings(data, path).items():
        assert load(source).tobytes() == expected, name


def test_names_that_no_message_prints_whole(tmp_path):
    text = base64.b64encode(png()).decode()
    for source, message in (
        (f"{text[:2000]}!", "whole base64 text"),
        (f"data:image/png;base64,{text}!", "whole base64 text"),
        (f"data:image/svg+xml;utf8,<svg>{text}", "whole base64 text"),
        ("x" * 5000, "is no file"),
        (f"https://images.example/{'x' * 5000}", "no URL is fetched here"),
        ({"url": "http://images.example/a.png"}, "no URL is fetched here"),
        ("ftp://images.example/a.png", "no URL is fetched here"),
        ({"type": "image"}, "there is no image"),
        ({"path": "", "bytes": b""}, "there is no image"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            decode_image(source)
        assert len(str(refused.value)) < 250
        assert isinstance(refused.value, MissingImage) == ("base64" not in message)


@pytest.mark.parametrize("name, data", odd_pictures().items())
def test_odd_metadata_does_not_break_a_picture(name, data, recwarn):
    found = np.asarray(load(data), int)
    difference = np.abs(found - np.asarray(PICTURE, int))
    assert difference.max() == 0 or (name.startswith("JPEG") and difference.mean() < 10)
    assert not recwarn


@pytest.mark.parametrize("name, data", turned_pictures().items())
def test_pictures_are_upright_beside_odd_metadata(name, data):
    difference = np.abs(np.asarray(load(data), int) - np.asarray(TURNED, int))
    assert difference.mean() < (10 if name == "JPEG" else 1)


def test_broken_pixels_are_broken_beside_odd_metadata():
    for name, data in {**odd_pictures(), **turned_pictures()}.items():
        pixels = {"P": b"IDAT", "J": b"\xff\xda", "W": b"VP8L", "T": b"II*\0"}[name[0]]
        with pytest.raises(ValueError, match="the image cannot be read"):
            load(data[: data.rindex(pixels) + 10])


def test_files_of_nothing_but_metadata_take_no_minutes():
    start = time.monotonic()
    for data in (b"\xff\xd8" + b"\xff" * 500_000, b"\xff\xd8" + b"\xff\xe5\0\0" * 100_000, png()[:8] + bytes(500_000)):
        with pytest.raises(ValueError, match="the image cannot be read"):
            load(data)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (10, 100_000), (1, 301), (50, 5_001)])
def test_extreme_proportions_are_named(size):
    for image in (Image.new("RGB", size), encoded(Image.new("RGB", size), "PNG").getvalue()):
        with pytest.raises(ValueError, match=f"the image has {size[0]} x {size[1]} pixels, expected a long side"):
            load(image)
    for array in (np.zeros((*size, 3), np.uint8), torch.zeros(3, *size), np.zeros(size)):
        with pytest.raises(ValueError, match="image 2: the image has .* pixels, expected a long side of at most 100"):
            load_image(array, "image 2")


@pytest.mark.parametrize("vision", ["siglip", "clip"])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_what_a_preprocessor_makes_is_bounded(vision, aspect, make_model, checkpoints):
    """The longest sides and the most extreme proportions that are read: no gigabytes on the way to 32 x 32 pixels."""
    processor = TinyAlignProcessor.from_vision_text_pretrained(
        checkpoints[vision], checkpoints["llama"], make_model(vision=vision).config, image_aspect_ratio=aspect
    )
    for size in ((1, 100), (10_000, 100), (6_000, 5_000)):
        image = load(Image.new("RGB", size, "red"))
        assert max(image.size) <= 4096
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pixels = processor(images=image, text="<image>", return_tensors="np")["pixel_values"]
        assert pixels.shape[2:] == (32, 32)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # kB


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
