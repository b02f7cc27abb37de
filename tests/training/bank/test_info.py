"""`tinyalign bank info`."""

from tinyalign_vlm import MemoryBank


def test_info(folder, capsys):
    tinyalign("remove", folder, "--where", "caption~blue 1")
    capsys.readouterr()
    tinyalign("info", folder)
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("sha"))
    assert found["rows"] == "11 of 11 images" and found["values"] == "3 x 5 numbers of 16 bits"
    assert found["license"] == "cc0 3, (empty) 3, (none) 3, cc-by 2"
    assert found["source"] == "b 6, a 5" and found["change"].split() == "1 remove of 1: 11 rows".split()


def test_info_of_columns_named_like_facts(rows, model, processor, value_encoder, tmp_path, capsys):
    named = [{**row, "rows": "mine", "tower": "Babel"} for row in rows]
    columns = ["rows", "tower", "source"]
    MemoryBank.build(named, model, processor, value_encoder, keep_columns=columns).save_pretrained(tmp_path / "bank")
    tinyalign("info", tmp_path / "bank")
    found = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [value for name, value in found if name == "rows"] == ["12 of 12 images", "mine 12"]
    assert [value for name, value in found if name == "tower"][1:] == ["Babel 12"]
