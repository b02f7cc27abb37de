"""`tinyalign bank merge`."""

import pytest
from banks import content_of, features_of, small_value_encoder

from tinyalign_vlm import MemoryBank


def test_merge(folder, kept, captions, tmp_path, capsys, problems, tinyalign):
    before = content_of(folder)
    kept.remove(list(range(8))).save_pretrained(tmp_path / "last")
    kept.remove(list(range(5, 12))).save_pretrained(tmp_path / "first")
    tinyalign("merge", tmp_path / "last", tmp_path / "first", folder, "--out", tmp_path / "all")
    bank = MemoryBank.from_pretrained(tmp_path / "all")
    assert bank.captions == captions[8:] + captions[:5] + captions[5:8]
    assert "all: 12 rows of 3 banks; 9 left out" in capsys.readouterr().out
    assert problems(tmp_path / "all") == [] and content_of(folder) == before
    tinyalign("merge", tmp_path / "last", folder, "--keep_duplicates", "--out", tmp_path / "twice")
    assert len(MemoryBank.from_pretrained(tmp_path / "twice")) == 16
    with pytest.raises(SystemExit, match="all is there already: choose another folder"):
        tinyalign("merge", tmp_path / "last", folder, "--out", tmp_path / "all")
    with pytest.raises(SystemExit, match="Found 1 bank, expected two or more"):
        tinyalign("merge", folder, "--out", tmp_path / "one")


def test_banks_that_cannot_be_merged(folder, images, make_model, make_processor, tmp_path, tinyalign):
    rows = [{"image": image, "caption": "x", "license": "", "source": ""} for image in images]
    clip = make_model("clip")
    _, tokens, width = features_of(images, clip, make_processor(clip, "clip")).shape
    encoder = small_value_encoder(width, tokens)
    other = MemoryBank.build(rows, clip, make_processor(clip, "clip"), encoder, keep_columns=["license", "source"])
    other.save_pretrained(tmp_path / "other tower")
    with pytest.raises(SystemExit, match="other tower cannot be merged with .*bank.* vision tower: .*key encoder"):
        tinyalign("merge", folder, tmp_path / "other tower", "--out", tmp_path / "out")
    wide = make_model(latent_dim=8)
    other = MemoryBank.build(rows, wide, make_processor(wide), small_value_encoder(latent_dim=8))
    other.save_pretrained(tmp_path / "other shape")
    with pytest.raises(SystemExit, match=r"size of a latent: 8 here, 5 there.*kept columns: \[\] here.*--like"):
        tinyalign("merge", folder, tmp_path / "other shape", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
