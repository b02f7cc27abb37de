"""The demo's data: splits, keywords and options."""

import numpy as np
import pytest

from tinyalign_vlm.training.demo import pairs as pairs_module
from tinyalign_vlm.training.demo.pairs import character_pictures, keywords_of, load_pairs, options_of, share_a_word


@pytest.fixture(scope="module")
def pairs():
    return load_pairs()


def test_split_by_concept_and_drawing(pairs):
    assert list(pairs.noto["concept"]) == list(pairs.twemoji["concept"])
    assert sorted([*pairs.train, *pairs.validation, *pairs.heldout]) == list(range(len(pairs.noto)))
    validation = load_pairs(split="validation")
    assert sorted([*validation.train, *validation.heldout]) == list(range(len(validation.noto)))
    parts = [
        set(np.array(split.noto["concept"])[rows])
        for split, rows in ((pairs, pairs.train), (pairs, pairs.validation), (pairs, pairs.heldout))
    ]
    assert parts[1] == set(np.array(validation.noto["concept"])[validation.heldout])
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1911
    assert [len(part) / 1911 for part in parts] == pytest.approx([0.6, 0.15, 0.25], abs=0.01)
    for rows in ("train", "known"):
        names = [np.array(split.labels)[vars(split)[rows]].tolist() for split in (pairs, validation)]
        assert names[0] == names[1]
    assert set(pairs.known) < set(pairs.train) and len(pairs.known) / len(pairs.train) == pytest.approx(0.7, abs=0.01)
    for drawings in (pairs.noto["image"], pairs.twemoji["image"]):
        drawings = [image["bytes"] for image in drawings]
        trained = {drawings[row] for row in pairs.train}
        assert not [row for row in pairs.heldout if drawings[row] in trained]


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ("race", "person running: facing right", False),
        ("racing", "horse race", True),
        ("runs", "person Running", True),
        ("berries", "berry", True),
        ("18", "no one under eighteen", False),
        ("no", "nose", False),  # two letters are no beginning
        ("s", "letter S", True),
    ],
)
def test_words_in_common(first, second, expected):
    assert share_a_word(first, second) is share_a_word(second, first) is expected


def test_keywords_share_no_word_with_the_name(pairs):
    assert keywords_of("flag: Laos", ["LA", "flag", "Vientiane"]) == ["Vientiane"]
    assert keywords_of("keycap: #", ["keycap"]) == []
    with_keywords = [row for row in pairs.heldout if pairs.keywords[row]]
    assert len(with_keywords) > 0.75 * len(pairs.heldout)
    for row in with_keywords:
        assert not any(share_a_word(word, pairs.labels[row]) for word in pairs.keywords[row])


def test_options(pairs):
    rng = np.random.default_rng(0)
    for row in pairs.heldout[:50]:
        near = rng.permutation(pairs.known)[:32]
        options = options_of(pairs, row, near, rng)
        if options is None:
            assert not pairs.keywords[row]
            continue
        right, *wrong = options
        assert right in pairs.keywords[row] and len(set(options)) == 4
        assert not set(wrong) & set(pairs.noto["tags"][int(row)])
        assert all(any(word in pairs.keywords[other] for other in near) for word in wrong)
    assert options_of(pairs, row, [], rng) is None


def test_pictures_of_another_kind(pairs):
    characters = character_pictures(20)
    assert len(set(characters["label"])) == 20 and not set(characters["label"]) & set(pairs.labels)
    pixels = [np.asarray(image) for image in characters["image"]]
    assert all(image.shape == (64, 64, 3) and 0 < (image < 128).mean() < 0.5 for image in pixels)


def test_missing_data_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(pairs_module, "PAIRS", tmp_path / "no.parquet")
    with pytest.raises(FileNotFoundError, match="make demo"):
        load_pairs()
