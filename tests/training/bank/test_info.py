"""`tinyalign bank info`."""

from tinyalign_vlm import MemoryBank


def test_info(kept, folder, tmp_path, capsys, tinyalign):
    tinyalign("remove", folder, "--where", "caption~blue 1", "--out", tmp_path / "smaller")
    capsys.readouterr()
    tinyalign("info", tmp_path / "smaller")
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines if not line.startswith("sha"))
    assert found["rows"] == "11 of 11 images" and found["values"] == "3 x 5 numbers of 16 bits"
    assert found["license"] == "cc0 3, (empty) 3, (none) 3, cc-by 2" and found["source"] == "b 6, a 5"
    assert found["local"] == f"copy            {MemoryBank.from_pretrained(tmp_path / 'smaller').folder}"
    assert f"sha256 rows           {MemoryBank.from_pretrained(tmp_path / 'smaller').config.sha256.rows}" in lines


def test_info_of_columns_named_like_facts(images, model, processor, value_encoder, tmp_path, capsys, tinyalign):
    rows = [{"image": image, "caption": "x", "rows": "mine", "tower": "Babel"} for image in images]
    bank = MemoryBank.build(rows, model, processor, value_encoder, keep_columns=["rows", "tower"])
    bank.save_pretrained(tmp_path / "bank")
    tinyalign("info", tmp_path / "bank")
    found = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [value for name, value in found if name == "rows"] == ["12 of 12 images", "mine 12"]
    assert [value for name, value in found if name == "tower"][1:] == ["Babel 12"]
