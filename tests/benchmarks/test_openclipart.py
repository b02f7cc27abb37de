"""The clip art of the evidence study: captions of made-up SVG files, near copies, and sections without it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tinyalign_vlm.training.demo.state import Result

FOLDER = Path(__file__).parents[2] / "benchmarks" / "evidence"
SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg"><metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/"
  xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work>
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>Somebody</dc:title></cc:Agent></dc:creator><dc:language>en</dc:language>
</cc:Work></rdf:RDF></metadata><path d="M0 0"/></svg>"""


@pytest.fixture(scope="module", autouse=True)
def modules():
    """Make the study's modules importable, as `python benchmarks/evidence` does."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def write_pair(folder: Path, name: str, colour: str, title: str, description: str = "", keywords: str = "") -> None:
    for kind in ("svg", "png"):
        (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords.split(","))
    text = SVG.format(title=title, description=description, keywords=items)
    (folder / "svg" / f"{name}.svg").write_text(text)
    Image.new("RGBA", (40, 20), colour).save(folder / "png" / f"{name}.png")


def test_captions_of_a_folder(tmp_path):
    from openclipart import SIDE, load_pictures

    words = "HASH(0x8a0cf54),hash,pet,united_nations_member,Pet,small animal,11,"
    write_pair(tmp_path, "animals/cat_01", "red", "Clipart by A. Person - Cat.", "A cat  that sleeps", words)
    write_pair(tmp_path, "animals/gatto", "green", "Gatto", "Il gatto nel giardino", "cat")
    write_pair(tmp_path, "unsorted/cat_02", "red", "The same cat", "A cat", "cat")
    rows = load_pictures(tmp_path)
    assert rows["label"] == ["Cat"]
    assert rows["caption"] == ["Cat. A cat that sleeps. pet, united nations member, small animal."]
    image = rows.cast_column("image", rows.features["image"].__class__())[0]["image"]
    assert image.size == (SIDE, SIDE)
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((SIDE // 2, SIDE // 2)) == (255, 0, 0)


def test_long_captions_come_first_and_the_order_is_the_files(tmp_path):
    from openclipart import load_pictures

    for number in range(6):
        colour = (10 * number, 0, 0, 255)
        write_pair(tmp_path, f"{number}", colour, f"Thing {'abcdef'[number]}", "word " * 10 * (number in (2, 5)))
    (tmp_path / "svg" / "broken.svg").write_text("<svg")
    (tmp_path / "svg" / "alone.svg").write_text((tmp_path / "svg" / "0.svg").read_text())
    (tmp_path / "png" / "3.png").write_bytes(b"no picture")
    rows = load_pictures(tmp_path, count=3)
    assert {"Thing c", "Thing f"} < set(rows["label"])
    assert list(rows["label"]) == sorted(rows["label"]) and len(rows) == 3
    assert rows["label"] == load_pictures(tmp_path, count=3)["label"]
    assert "Thing d" not in load_pictures(tmp_path)["label"]


def test_what_many_pictures_share_is_of_a_collection():
    from openclipart import MOST_SHARED, Picture, described

    collection = [Picture(Path(), "Theme", f"icon {number}", ["a"]) for number in range(MOST_SHARED + 1)]
    flags = [Picture(Path(), f"Flag {number}", "A flag of a ship", ["flag"]) for number in range(MOST_SHARED + 1)]
    twins = [Picture(Path(), "Cat", "", ["pet"]), Picture(Path(), "cat", "cat", ["Pet"])]
    found = described([*collection, *flags, None, *twins])
    assert [picture.caption for picture in found] == [f"Flag {n}. flag." for n in range(MOST_SHARED + 1)] + [
        "Cat. pet."
    ]


def test_near_copies_have_one_group():
    from openclipart import Picture

    groups = [Picture(Path(), title, "", []).group for title in ("Cone 1 (B and W)", "cone 2", "4", "Cones")]
    assert groups == ["cone", "cone", "4", "cones"]


def test_neighbours_are_no_near_copies():
    from real_captions import without_near_copies

    scores, ids = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]], np.float32), np.array([[2, 0, 1], [1, 0, -1]])
    scores, ids = without_near_copies((scores, ids), np.array([7, 5]), np.array([5, 6, 7]), 2)
    assert ids.tolist() == [[0, 1], [1, -1]]
    assert scores.tolist() == [pytest.approx([0.8, 0.7]), [pytest.approx(0.9), -np.inf]]


def test_split_keeps_near_copies_together():
    from real_captions import next_of_a_cycle, split

    groups = np.array([f"{number // 2}" for number in range(40)])
    train, asked = split(groups, 11)
    assert len(asked) == 10 and sorted([*train, *asked]) == list(range(40))
    assert not set(groups[train]) & set(groups[asked])
    following = next_of_a_cycle(40)
    assert sorted(following) == list(range(40)) and not (following == np.arange(40)).any()


def test_clip_art_is_no_right_row():
    from retrieval import recall

    group, asked = np.array([0, 1, 2]), np.array([1, 2])
    demo = SimpleNamespace(
        concepts={"bank": np.array([1, -1])},
        found={"bank": (None, np.array([[0, 1], [1, 1]]))},
        queried=asked,
        is_right=lambda concepts, found, queried: group[concepts[found[1]]] == group[queried][:, None],
    )
    assert recall(demo, "bank") == 0.5  # -1 is no concept, not the last one


def test_without_clip_art_the_report_says_how_to_get_it(tmp_path):
    import claims
    from openclipart import clip_art, note
    from study import Study

    study = Study(tmp_path, tmp_path / "demo", openclipart=tmp_path / "none")
    assert clip_art(study) is None
    assert "none has none" in note(study, None) and "apt-get install openclipart-png" in note(study, None)
    section = claims.real_captions(study, tmp_path)
    assert section.verdict.startswith("cannot be tested here") and "apt-get" in section.body


def test_section_of_real_captions(monkeypatch):
    import claims
    import real_captions

    rng = np.random.default_rng(0)
    tokens, base = rng.integers(15, 40, 100).astype(float), rng.uniform(2, 4, 100)
    results = {}
    for name in real_captions.SYSTEMS:
        less = 0.3 if name in ("tinyalign", "text_cut") else 0.0
        losses = (base - less + rng.normal(0, 0.1, 100)) * tokens
        results[name] = {"with": Result(name_losses=losses, name_tokens=tokens, tokens=23.0)}
    demo = SimpleNamespace(results=results, groups=lambda metric: np.arange(100))
    monkeypatch.setattr(real_captions, "compare", lambda study: demo)
    monkeypatch.setattr(real_captions, "describe", lambda demo: "Captions.")
    section = claims.real_captions(None, None)
    assert section.verdict.startswith("holds: a caption's loss per token is -0.3")
    assert "| **TinyAlign** | 23 |" in section.body and "memory off" in section.body


def test_description_says_what_the_bank_has():
    from real_captions import describe

    near = {"with": [["a cat, a pet"]], "random": [["a house"]]}
    demo = SimpleNamespace(
        queried=np.array([0]),
        labels=lambda rows: ["Cat. pet, animal."],
        captions=near.get,
        pairs=SimpleNamespace(train=np.arange(7)),
    )
    text = " ".join(describe(demo).split())
    assert "about 1 pictures" in text and "the 7 other" in text
    assert "have 67% of the words of the right one, those of a random bank 0%" in text
