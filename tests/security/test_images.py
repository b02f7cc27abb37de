"""Images of a bank, those it is built from and those it holds: upright, no bombs, nothing but what is in the bank."""

import io
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from security.attacks import SHARD, little_memory, sign

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_bomb(side: int = 30_000) -> bytes:
    """A few hundred bytes that declare an image of gigabytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def build(victims, bank_folder):
    """`build(images)`: a bank of them, by the checkpoint that the saved bank was built by."""
    model = TinyAlignForConditionalGeneration.from_pretrained(victims / "checkpoint")
    processor = TinyAlignProcessor.from_pretrained(victims / "checkpoint")
    encoder = MemoryBank.from_pretrained(bank_folder).value_encoder

    def build_bank(images: list) -> MemoryBank:
        rows = [{"image": image, "caption": "a drawing"} for image in images]
        return MemoryBank.build(rows, model, processor, encoder, keep_duplicates=True)

    return build_bank


def upright() -> Image.Image:
    image = Image.new("RGB", (40, 60), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 39, 20), fill="red")
    return image


def test_photographs_are_turned_upright(build):
    """As cameras write them: the pixels lie on the side, and EXIF says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = encoded(upright().transpose(Image.Transpose.ROTATE_90), exif=exif)
    bank = build([encoded(upright()), sideways, Image.open(io.BytesIO(sideways)), {"bytes": sideways, "path": None}])
    assert len({row["source_id"] for row in bank.rows(range(4))}) == 1, "the same picture has the same name"
    assert {bank.thumbnail(i).size for i in range(4)} == {(40, 60)}
    assert len({bank.thumbnail(i).tobytes() for i in range(4)}) == 1
    assert len({key.tobytes() for key in bank.key_array}) == 1, "the tower saw the same pixels"
    exif[0x0112] = 1
    assert build([encoded(upright(), exif=exif)]).rows([0])[0]["source_id"] == bank.rows([0])[0]["source_id"]


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_bombs_in_a_dataset(side, build):
    with little_memory(), pytest.raises(ValueError, match=r"Row 1 .*the image is too large .*expected at most"):
        build([upright(), png_bomb(side)])


def put_thumbnail(folder, picture: dict) -> None:
    path = folder / SHARD
    table = pq.read_table(path)
    pictures = [picture, *table["thumbnail"].to_pylist()[1:]]
    place = table.column_names.index("thumbnail")
    pq.write_table(table.set_column(place, "thumbnail", pa.array(pictures, table["thumbnail"].type)), path)


def with_thumbnail(folder, picture: dict) -> MemoryBank:
    """A bank whose author put another picture in row 0."""
    put_thumbnail(folder, picture)
    with pytest.raises(ValueError, match="sha256 of the rows is") as refused:
        MemoryBank.from_pretrained(folder)
    sign(folder, rows=str(refused.value).split("rows is ")[1][:64])
    return MemoryBank.from_pretrained(folder)


@pytest.mark.parametrize("picture", [png_bomb(), png_bomb(12_000)])
def test_bombs_in_a_bank(picture, bank_folder):
    bank = with_thumbnail(bank_folder, {"bytes": picture, "path": None})
    with (
        little_memory(),
        pytest.raises(ValueError, match="A thumbnail .*(has 12000 x 12000|Decompress).*at most 4096"),
    ):
        bank.thumbnail(0)
    assert bank.thumbnail(1).size == (24, 24)


@pytest.mark.parametrize("picture", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", None])
def test_broken_pictures_in_a_bank(picture, bank_folder):
    bank = with_thumbnail(bank_folder, {"bytes": picture, "path": None})
    with pytest.raises(ValueError, match="A thumbnail of the memory bank cannot be read .UnidentifiedImageError"):
        bank.thumbnail(0)


def test_a_bank_opens_no_file_of_this_machine(bank_folder, tmp_path):
    """Parquet's way to write an image has a path beside the bytes."""
    upright().save(tmp_path / "private.png")
    put_thumbnail(bank_folder, {"bytes": None, "path": str(tmp_path / "private.png")})
    with pytest.raises(ValueError, match="row 0 has thumbnail with a path, expected pictures inside the bank"):
        MemoryBank.from_pretrained(bank_folder)
