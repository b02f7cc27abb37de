"""Rows of data sets, good and bad ones."""

import io
import json

import datasets
import pytest
from banks import noise
from PIL import Image

from tinyalign_vlm import MemoryBank, TinyAlignProcessor
from tinyalign_vlm.modeling_tinyalign.bank_format import file_sha256
from tinyalign_vlm.modeling_tinyalign.row_encoder import image_source_id


def broken_png() -> bytes:
    buffer = io.BytesIO()
    noise(0).resize((200, 200)).save(buffer, "PNG")
    return buffer.getvalue()[:500]


BAD_ROWS = [
    ({"image": {"bytes": b"not an image", "path": None}}, "cannot be read .UnidentifiedImageError"),
    ({"image": broken_png()}, "the image cannot be read"),
    ({"image": None}, "missing image: there is no image"),
    ({"image": "no/such/file.png"}, "image: 'no/such/file.png' is no file"),
    ({"caption": None}, "the caption is None, expected text"),
    ({"caption": "  "}, "the caption is '  ', expected text"),
]


@pytest.mark.parametrize("change, message", BAD_ROWS)
def test_bad_row_is_named(change, message, dataset, model, processor, value_encoder):
    rows = [dataset[0], {**dataset[1], **change}, dataset[2]]
    with pytest.raises(ValueError, match=f"Row 1 of the dataset: .*{message}.*skip_bad_rows"):
        MemoryBank.build(rows, model, processor, value_encoder)


def test_bad_rows_and_duplicates_are_left_out_and_listed(dataset, model, processor, value_encoder, tmp_path):
    rows = [row for change, _ in BAD_ROWS for row in (dataset[0], {**dataset[1], **change})] + dataset[2:]
    bank = MemoryBank.build(rows, model, processor, value_encoder, skip_bad_rows=True)
    kinds = [row.reason.split(":")[0] for row in bank.left_out]
    assert [row.row for row in bank.left_out] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert kinds[::2] == ["broken image"] * 2 + ["missing image", "broken image"] + ["no caption"] * 2
    assert kinds[1::2] == ["duplicate"] * 5 and len(bank) == len(rows) - 11
    bank.save_pretrained(tmp_path / "bank")
    assert MemoryBank.from_pretrained(tmp_path / "bank").config.num_left_out == 11
    lines = (tmp_path / "bank" / "left_out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [vars(row) for row in bank.left_out]
    kept = MemoryBank.build(rows, model, processor, value_encoder, skip_bad_rows=True, keep_duplicates=True)
    assert len(kept) == len(rows) - 6 and len(kept.ids_of(bank.rows([0])[0]["source_id"])) == 6


def test_corrupt_image_in_a_hub_dataset_is_named(dataset, model, processor, value_encoder):
    rows = {"image": [broken_png(), broken_png()], "caption": ["a", "b"]}
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    )
    with pytest.raises(ValueError, match="Row 0 of the dataset: broken image: the image cannot be read"):
        MemoryBank.build(table, model, processor, value_encoder)


def test_decompression_bomb(dataset, model, processor, value_encoder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    buffer = io.BytesIO()
    noise(0).save(buffer, "PNG")
    rows = [{**dataset[0], "image": buffer.getvalue()}]
    with pytest.raises(ValueError, match=r"Row 0 .* too large .*3000 pixels.*, expected at most 2000"):
        MemoryBank.build(rows, model, processor, value_encoder)


def test_datasets_that_do_not_fit(dataset, model, processor, value_encoder):
    def build(rows, **options):
        return MemoryBank.build(rows, model, processor, value_encoder, **options)

    with pytest.raises(ValueError, match=r"(?s)no column 'caption'.*\['image', 'text'\].*caption_column="):
        build([{"image": noise(0), "text": "x"}], skip_bad_rows=True)
    with pytest.raises(ValueError, match="no column 'picture'"):
        build(dataset, image_column="picture")
    with pytest.raises(ValueError, match=r"DatasetDict.*\"train\""):
        build({"train": dataset})
    with pytest.raises(ValueError, match="The dataset has no usable row, .* 0 left out"):
        build([])
    with pytest.raises(ValueError, match="(?s)no usable row, .* 1 left out .1 missing image.*row 0: missing image"):
        build([{"image": None, "caption": "x"}], skip_bad_rows=True)
    with pytest.raises(ValueError, match="missing column: no column 'author'"):
        build(dataset, keep_columns=["author"])
    for columns in (["key"], ["score"], ["licence", "licence"], "licence", ["lic\nence"], [""]):
        with pytest.raises(ValueError, match="expected a list of printable names, each once, other than"):
            build(dataset, keep_columns=columns)
    with pytest.raises(ValueError, match="batch_size is -2, expected 1 or more"):
        build(dataset, batch_size=-2)
    for size in (-5, 0, 5000):
        with pytest.raises(ValueError, match=f"thumbnail_size is {size}, expected 1 to 4096"):
            build(dataset, thumbnail_size=size)
    with pytest.raises(ValueError, match="Row 0 of the dataset: .*surrogates not allowed"):
        build([{**dataset[0], "caption": "half a smile \ud83d"}])


def test_source_id_is_of_the_pixels(tmp_path):
    image = noise(0)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    forms = [image, tmp_path / "a.png", str(tmp_path / "b.bmp"), image.convert("RGBA")]
    forms += [(tmp_path / "a.png").read_bytes(), {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}]
    names = {image_source_id(TinyAlignProcessor.decode_image(form)) for form in forms}
    assert len(names.pop()) == 32
    assert image_source_id(image.rotate(90, expand=True)) != image_source_id(image) != image_source_id(noise(1))
    assert file_sha256(tmp_path / "a.png") != file_sha256(tmp_path / "b.bmp")
