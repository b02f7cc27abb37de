"""Parts of encoded rows: which rows are in which, and that each is there whole or not at all."""

import numpy as np
import pytest

from tinyalign_vlm.modeling_tinyalign.row_encoder import LeftOutRow, RowEncoder
from tinyalign_vlm.training.bank import encode
from tinyalign_vlm.training.bank.build import new_key_encoder
from tinyalign_vlm.training.bank.encode import EncodedParts, describe_left_out, no_usable_row
from tinyalign_vlm.training.data.images import DatasetImages


@pytest.fixture
def source(rows, monkeypatch) -> DatasetImages:
    monkeypatch.setattr(encode, "PART_ROWS", 8)
    return DatasetImages(rows, "image", "caption", [])


@pytest.fixture
def new_encoder(model, processor, value_encoder, source):
    key_encoder = new_key_encoder(model, processor)
    return lambda: RowEncoder(model, processor, value_encoder, key_encoder, source.read, skip_bad_rows=True)


def test_parts_go_on_where_they_stopped(source, new_encoder, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole, encoder = EncodedParts(tmp_path / "whole"), new_encoder()
    whole.encode(encoder, source)
    assert whole.num_rows == encoder.next_id == 36 and [row.row for row in whole.left_out] == [3, 5, 9, 20]
    assert len(list(whole.folder.iterdir())) == 5 and sum(map(len, whole.batches())) == 36
    # of another one, the first parts and the last; the duplicate of row 2 is in the third
    (tmp_path / "other").mkdir()
    other, encoder = EncodedParts(tmp_path / "other"), new_encoder()
    for number in (0, 1, 4):
        other.path(number).write_bytes(whole.path(number).read_bytes())
    made, save_file = [], encode.save_file
    monkeypatch.setattr(encode, "save_file", lambda path, content: (made.append(path.name), save_file(path, content)))
    other.encode(encoder, source)
    assert made == ["000002.arrow", "000003.arrow"] and other.left_out == whole.left_out
    for number in range(5):
        assert other.path(number).read_bytes() == whole.path(number).read_bytes()


def test_for_rows_that_are_left_out_others_are_chosen(source, new_encoder, tmp_path):
    parts = EncodedParts(tmp_path, wanted=35, seed=1, total=40)
    parts.encode(new_encoder(), source)
    assert parts.num_rows == 35
    ids = [row for batch in parts.batches() for row in batch["id"].to_pylist()]
    assert ids == list(range(35))
    with pytest.raises(StopIteration):  # that is enough
        next(parts.rounds())
    (numbers,) = EncodedParts(tmp_path).rounds()
    assert numbers is None
    first = next(EncodedParts(tmp_path, wanted=7, seed=1, total=40).rounds())
    assert len(first) == 7 and (np.diff(first) > 0).all()


def test_words():
    left_out = [LeftOutRow(3, "broken image: cut"), LeftOutRow(4, "duplicate: x"), LeftOutRow(5, "duplicate: x")]
    assert describe_left_out(left_out) == "3 left out (2 duplicate, 1 broken image)"
    assert describe_left_out([]) == "0 left out"
    text = str(no_usable_row("pairs.json", left_out))
    assert text.startswith("pairs.json has no usable row") and "row 3: broken image: cut" in text
    assert "row 4: duplicate: x" in text and "row 5" not in text  # one of each kind
