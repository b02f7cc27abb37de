"""Small files of pictures and of what surrounds them, as tools, cameras and operating systems write them.

`python tests/forms/pictures.py FOLDER` writes them all, to look at; the tests make them as they need them.
"""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

NOISE = np.random.default_rng(0).integers(0, 256, 70_000, dtype=np.uint8).tobytes()
# What the pixels are, whatever stands beside them: four blocks, so that JPEG keeps them and a turned one differs.
PICTURE = Image.new("RGB", (32, 16), "red")
for place, colour in (((16, 0), "lime"), ((0, 8), "blue"), ((16, 8), "white")):
    PICTURE.paste(colour, (*place, place[0] + 16, place[1] + 8))
TURNED = PICTURE.transpose(Image.Transpose.ROTATE_270)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    if format == "WEBP":
        options["lossless"] = True
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: bytes, kind: int = 3) -> bytes:
    """Return EXIF with one entry: two bytes as a number (kind 3) or as text (kind 2)."""
    entry = struct.pack("<HHI", 0x0112, kind, {2: 2, 3: 1}[kind])
    return b"Exif\0\0II*\0\x08\0\0\0\1\0" + entry + orientation.ljust(4, b"\0") + bytes(4)


def chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    if checksum is None:
        checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png(*before: bytes, after: bytes = b"", image: Image.Image = PICTURE) -> bytes:
    """Return a PNG with chunks before and after its pixels."""
    data = encoded(image, "PNG")
    end = data.index(b"IEND") - 4
    return data[:33] + b"".join(before) + data[33:end] + after + data[end:]


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    """Return a JPEG with segments (marker, content) at its head."""
    data = encoded(PICTURE, "JPEG", quality=95)
    added = [bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content for marker, content in segments]
    return data[:2] + b"".join(added) + data[2:]


def webp(**metadata) -> bytes:
    return encoded(PICTURE, "WEBP", **metadata)


def tiff(tag: int, kind: int, value, **options) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[tag] = kind
    tags[tag] = value
    return encoded(PICTURE, "TIFF", tiffinfo=tags, **options)


def odd_pngs() -> dict[str, bytes]:
    zeros, packed = bytes(2_200_000), zlib.compress(bytes(2_200_000))
    return {
        "ICC profile of 1.2 MB": encoded(PICTURE, "PNG", icc_profile=NOISE[:1000] * 1200),
        "ICC profile that unpacks to 100 MB": png(chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(100_000_000)))),
        "ICC profile without a name": png(chunk(b"iCCP", b"profile")),
        "ICC profile, empty": png(chunk(b"iCCP", b"")),
        "ICC profile, packed in an unknown way": png(chunk(b"iCCP", b"x\0\5" + packed)),
        "zTXt of 2 MB": png(chunk(b"zTXt", b"x\0\0" + packed)),
        "zTXt of 2 MB behind the pixels": png(after=chunk(b"zTXt", b"x\0\0" + packed)),
        "iTXt of 2 MB": png(chunk(b"iTXt", b"x\0\1\0\0\0" + packed)),
        "70 texts of 1 MB": png(*[chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(zeros[: 2**20])) for i in range(70)]),
        "text with a wrong checksum": png(chunk(b"tEXt", b"x\0a", 1)),
        "text with a wrong checksum behind the pixels": png(after=chunk(b"tEXt", b"x\0a", 1)),
        "unknown chunk with a wrong checksum": png(chunk(b"teSt", b"a", 1)),
        **{f"{name} cut": png(chunk(name.encode(), b"")) for name in ("pHYs", "cHRM", "gAMA", "sRGB", "acTL", "tIME")},
        "EXIF that is none": png(chunk(b"eXIf", b"nonsense")),
        "EXIF cut": png(chunk(b"eXIf", exif(b"\1\0")[6:20])),
        "EXIF in hexadecimal that is none": png(chunk(b"tEXt", b"Raw profile type exif\0zz\nxx\nyy\nqq")),
        "no end": png()[:-12],
        "bytes behind the end": png() + NOISE[:1000],
    }


def odd_jpegs() -> dict[str, bytes]:
    photoshop = b"Photoshop 3.0\0008BIM"
    return {
        "ICC profile of 140 kB": encoded(PICTURE, "JPEG", quality=95, icc_profile=NOISE * 2),
        "ICC profile without a number": jpeg((0xE2, b"ICC_PROFILE\0")),
        "EXIF that is none": jpeg((0xE1, b"Exif\0\0nonsense")),
        "EXIF, empty": jpeg((0xE1, b"Exif\0\0")),
        "EXIF with a place beyond its end": jpeg((0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
        "EXIF in many segments": jpeg(*[(0xE1, b"Exif\0\0" + NOISE[:65_000])] * 2),
        "XMP in many segments": jpeg(*[(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<" * 60_000)] * 2),
        "JFIF cut": jpeg((0xE0, b"JFIF\0\1")),
        "APP0 cut": jpeg((0xE0, b"JF")),
        "Adobe's segment cut": jpeg((0xEE, b"Adobe")),
        "Photoshop's segment cut": jpeg((0xED, photoshop + b"\x04\x04\0\0\xff\xff\xff\xff")),
        "Photoshop's resolution cut": jpeg((0xED, photoshop + b"\x03\xed\0\0\0\0\0\2ab")),
        "several pictures, but none": jpeg((0xE2, b"MPF\0nonsense")),
        "comment of 65 kB": jpeg((0xFE, b"a" * 65_000)),
        "a segment that is shorter than its length": jpeg().replace(b"\xff\xd8", b"\xff\xd8\xff\xe5\0\0", 1),
        "bytes behind the end": jpeg() + NOISE[:1000],
    }


def odd_webps() -> dict[str, bytes]:
    bad = webp(exif=b"Exif\0\0nonsense")
    place = bad.index(b"EXIF") + 4
    return {
        "ICC profile and XMP of 20 kB": webp(icc_profile=NOISE[:20_000], xmp=b"<" * 20_000),
        "EXIF that is none": bad,
        "EXIF cut": bad[:-4],
        "EXIF longer than the file": bad[:place] + b"\xff\xff\xff\0" + bad[place + 4 :],
        "file longer than it is": bad[:4] + b"\xff\xff\xff\0" + bad[8:],
        "bytes behind the end": webp() + NOISE[:1000],
    }


def odd_tiffs() -> dict[str, bytes]:
    kinds = {"short": (3, 7), "long": (4, 4_000_000_000), "text": (2, "abc"), "fraction of 0": (5, (1, 0))}
    files = {
        f"tag {tag} is a {name}": tiff(tag, *kind)
        for tag in (270, 305, 33432, 33550, 700)
        for name, kind in kinds.items()
    }
    return {
        **files,
        "description and ICC profile of 20 kB": tiff(270, 2, "x" * 20_000, icc_profile=NOISE[:20_000]),
        "packed, XMP of 20 kB": tiff(700, 1, b"<" * 20_000, compression="tiff_lzw"),
    }


def odd_pictures() -> dict[str, bytes]:
    """Return files with the pixels of `PICTURE` (JPEG: nearly), and metadata that no tool should have written."""
    formats = {"PNG": odd_pngs(), "JPEG": odd_jpegs(), "WebP": odd_webps(), "TIFF": odd_tiffs()}
    files = {f"{format}: {name}": data for format, odd in formats.items() for name, data in odd.items()}
    for orientation, kind, value in ((b"\0\0", 3, 0), (b"\x09\0", 3, 9), (b"\xff\xff", 3, 65535), (b"6\0", 2, "6")):
        name = f"orientation {value!r}"
        files[f"TIFF: {name}"] = tiff(0x0112, kind, value)
        for format in ("PNG", "JPEG", "WEBP"):
            files[f"{format}: {name}"] = encoded(PICTURE, format, exif=exif(orientation, kind))
    return files


def turned_pictures() -> dict[str, bytes]:
    """Return files of `PICTURE` that say it is to be turned (`TURNED`), beside metadata that cannot be read."""
    sideways = exif(b"\6\0")
    body = sideways.removeprefix(b"Exif\0\0")
    return {
        "PNG": png(chunk(b"eXIf", body), chunk(b"tEXt", b"x\0a", 1)),
        "JPEG": jpeg((0xE2, b"ICC_PROFILE\0"), (0xE1, b"Exif\0\0" + body)),
        "WebP": webp(exif=sideways, xmp=b"<" * 1000)[:-8],
        "TIFF": encoded(PICTURE, "TIFF", exif=sideways),
    }


# What operating systems and tools leave beside the files of a data set: none of it is data.
LEFTOVERS = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "._{}": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "__MACOSX/._{}": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    "desktop.ini": b"[.ShellClassInfo]",
    ".ipynb_checkpoints/{}": encoded(Image.new("RGB", (2, 2)), "PNG"),
    "@eaDir/{}/SYNOPHOTO_THUMB_M.jpg": encoded(Image.new("RGB", (2, 2)), "JPEG"),
    ".directory": b"[Desktop Entry]",
    ".nfs0000000000000001": b"",
}


def leftovers(name: str) -> dict[str, bytes]:
    """Return what may lie beside a file of this name, by path."""
    return {path.format(name): content for path, content in LEFTOVERS.items()}


if __name__ == "__main__":
    for name, content in {
        **odd_pictures(),
        **{f"turned {name}": data for name, data in turned_pictures().items()},
    }.items():
        kind, _, rest = name.partition(": ")
        Path(sys.argv[1]).mkdir(exist_ok=True)
        Path(sys.argv[1], f"{rest or 'turned'}.{kind.split()[-1].lower()}".replace("/", " ")).write_bytes(content)
