"""Rows of images with captions, as they are stored."""

import numpy as np
import pytest
from banks import noise
from forms.pictures import leftovers

from tinyalign_vlm.modeling_tinyalign.row_encoder import BadRow
from tinyalign_vlm.training.data.images import DatasetImages, fingerprint_files


def test_rows_of_an_object_in_python():
    rows = [{"picture": noise(number), "title": f"number {number}", "license": None} for number in range(5)]
    source = DatasetImages(rows, "picture", "title", ["license"])
    assert source.total == 5 and [number for number, _ in source.rows()] == [0, 1, 2, 3, 4]
    chosen = list(source.rows(np.array([1, 4])))
    assert [number for number, _ in chosen] == [1, 4] and list(source.rows(np.array([], int))) == []
    row = source.read(*chosen[1])
    assert (row.number, row.caption, row.kept) == (4, "number 4", [None])
    for title in (None, "  ", 3):
        with pytest.raises(BadRow, match="no caption: the caption is .*, expected text"):
            source.read(0, {**rows[0], "title": title})
    assert source.read(0, {**rows[0], "title": ["", "the first of several"]}).caption == "the first of several"
    with pytest.raises(ValueError, match="an iterator, which can be read only once"):
        DatasetImages(iter(rows), "picture", "title", []).check_can_be_read_twice()


def test_a_file_whose_name_is_a_pattern_is_watched(tmp_path):
    (tmp_path / "pairs[1].json").write_text("[]")
    before = fingerprint_files(str(tmp_path / "pairs[1].json"))
    (tmp_path / "pairs[1].json").write_text("[ ]")
    assert None is not before != fingerprint_files(str(tmp_path / "pairs[1].json")) is not None
    assert fingerprint_files("org/pairs") is None


def test_what_systems_leave_behind_is_not_watched(tmp_path):
    """A look at the folder in a file manager is no change of the data: the build goes on."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    before = fingerprint_files(str(tmp_path))
    for name, content in leftovers("a.png").items():
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(content)
    assert fingerprint_files(str(tmp_path)) == before
    (tmp_path / "pictures" / "b.png").write_bytes(b"")
    assert fingerprint_files(str(tmp_path)) != before
