"""Every reader of data sets over every form of them: none has a form of its own."""

import json

import numpy as np
import pytest
from forms.data_sets import BASE64, CAPTIONS, FORMS, PICTURES
from forms.pictures import odd_pictures
from PIL import Image

from tinyalign_vlm.processing.images import decode_image
from tinyalign_vlm.training.arguments.alignment import AlignmentConfig
from tinyalign_vlm.training.data.chats import images_of
from tinyalign_vlm.training.data.check import check_rows, training_data
from tinyalign_vlm.training.data.features import read_image
from tinyalign_vlm.training.data.images import CaptionedImages
from tinyalign_vlm.training.data.rows import RowImages


def settings(dataset: str, **changes) -> AlignmentConfig:
    column = "txt" if ".tar" in dataset else "caption"
    return AlignmentConfig(
        output_dir="unused", dataset=dataset, answer_column=column, prompt="what?", disable_tqdm=True, **changes
    )


def of_rows(rows) -> list[tuple]:
    """Return the picture and the answer of each row."""
    found = []
    for row in rows:
        (image,) = images_of(row)
        answer = "".join(part["text"] for part in row["messages"][-1]["content"])
        found.append((decode_image(image), answer))
    return found


def check(dataset: str) -> list[tuple]:
    rows, found = check_rows(settings(dataset))
    assert not found.problems
    images = RowImages(rows)
    assert [read_image(images, index).size for index in range(2)] == [picture.size for picture in PICTURES]
    return of_rows(rows)


def train(dataset: str) -> list[tuple]:
    return of_rows(training_data(settings(dataset, strict=True), None))


def stream(dataset: str) -> list[tuple]:
    return of_rows(training_data(settings(dataset, strict=True, streaming=True, max_steps=1), None))


def build_bank(dataset: str) -> list[tuple]:
    source = CaptionedImages(settings(dataset), None, [], {})
    rows = [source.read(number, row) for number, row in source]
    return [(row.image, row.caption) for row in rows]


@pytest.mark.parametrize("read", [check, train, stream, build_bank])
@pytest.mark.parametrize("form", FORMS)
def test_every_reader_reads_every_form(form, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decoy = Image.new("RGB", (3, 3))  # of a name that a stored picture has
    for name in ("elsewhere.png", "train/0000ü.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        decoy.save(tmp_path / name)
    folder = tmp_path / "own data ü"
    folder.mkdir()
    found = sorted(read(FORMS[form](folder)), key=lambda row: row[1])
    expected = sorted(zip(PICTURES, CAPTIONS, strict=True), key=lambda row: row[1])
    assert [caption for _, caption in found] == [caption for _, caption in expected]
    for (image, _), (picture, _) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))


@pytest.mark.parametrize("stored", ["https://images.example/a.png", {"url": "https://images.example/a.png"}])
def test_urls_are_refused_in_a_line(stored, tmp_path):
    row = {"image": stored, "caption": "a square"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (problem,) = check_rows(settings(str(tmp_path / "rows.json")))[1].problems.values()
    assert problem.startswith("missing image: found the URL 'https://images.example/a.png'")
    assert "no URL is fetched here" in problem
    source = CaptionedImages(settings(str(tmp_path / "rows.json")), None, [], {})
    with pytest.raises(ValueError, match="no URL is fetched here"):
        [source.read(number, row) for number, row in source]


def test_a_picture_in_text_is_never_printed(tmp_path):
    """Broken in its middle, where only the whole text shows it."""
    for text in (f"{BASE64[0][:100]}!{BASE64[0][100:]}", f"data:image/png;base64,{BASE64[0][:100]}"):
        (tmp_path / "rows.json").write_text(json.dumps([{"image": text, "caption": "a square"}]))
        (problem,) = check_rows(settings(str(tmp_path / "rows.json")))[1].problems.values()
        assert problem.startswith("broken image: ") and BASE64[0][60:90] not in problem and len(problem) < 300


def test_the_forms_are_small(tmp_path):
    for form, write in FORMS.items():
        folder = tmp_path / form.replace("/", " ")
        folder.mkdir()
        write(folder)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(sizes) + sum(map(len, odd_pictures().values())) < 2**20
