"""The negative control's parts on made-up questions and numbers: nothing is trained."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "benchmarks" / "evidence"
RED_CIRCLE = [
    ("what color is the shape?", "red"),
    ("is there not a circle?", "no"),
    ("is there a blue shape?", "no"),
    ("does the image not contain a triangle?", "yes"),
]


@pytest.fixture(scope="module", autouse=True)
def modules():
    """Make the study's modules importable, as `python benchmarks/evidence` does."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Put a package like easy-vqa in its place: 20 pictures to train on and 6 to test, two questions about each."""

    def read(part: str, count: int):
        paths = {number: str(tmp_path / f"{part}{number}.png") for number in range(count)}
        for number, path in paths.items():
            Image.new("RGB", (64, 64), ("red", "blue")[number % 2]).save(path)
        asked = [
            (question, answer, number)
            for number in range(count)
            for question, answer in (
                ("what color is the circle?", ("red", "blue")[number % 2]),
                ("is no red shape present?", ("no", "yes")[number % 2]),
            )
        ]
        return (lambda: paths), (lambda: tuple(map(list, zip(*asked, strict=True))))

    train, test = read("train", 20), read("test", 6)
    made_up = SimpleNamespace(
        get_train_image_paths=train[0],
        get_train_questions=train[1],
        get_test_image_paths=test[0],
        get_test_questions=test[1],
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", made_up)


def test_captions_say_what_the_questions_tell():
    from negative_control import caption_of

    assert caption_of(RED_CIRCLE) == "a red circle"
    assert caption_of(RED_CIRCLE[1:]) is None  # not which colour
    assert caption_of([("what is the teal shape?", "rectangle")]) == "a teal rectangle"
    assert caption_of([("is a gray shape present?", "yes"), ("is no triangle present?", "no")]) == "a gray triangle"


def test_kinds_of_questions():
    from negative_control import kind_of

    assert [kind_of(answer) for answer in ("circle", "teal", "yes", "no")] == ["shape", "color", "yes/no", "yes/no"]


def test_blind_answers_are_the_most_frequent():
    from negative_control import Drawings, blind_answers

    asked = [[("is it?", "no"), ("what?", "red")], [("is it?", "no")], [("is it?", "yes")]]
    known = Drawings(["1.png", "2.png", "3.png"], asked)
    assert blind_answers(known, ["what?", "is it?", "is it?"]) == ["red", "no", "no"]


def test_a_lesson_asks_yes_or_no_first():
    from negative_control import lesson_about

    lesson = lesson_about([*RED_CIRCLE, ("is a teal shape present?", "no")], np.random.default_rng(0))
    assert lesson[-1] == RED_CIRCLE[0]
    assert len(lesson) == 4  # three of four, and the colour
    assert {answer for _, answer in lesson[:3]} <= {"yes", "no"}
    assert lesson_about([("what shape is present?", "circle")], np.random.default_rng(0))[0][1] == "circle"


def test_a_chat_shows_its_picture_once():
    from negative_control import to_chat

    chat = to_chat(RED_CIRCLE)
    assert [message["role"] for message in chat] == ["user", "assistant"] * 4
    parts = [part for message in chat for part in message["content"]]
    assert [part["type"] for part in parts] == ["image"] + ["text"] * 8
    assert tuple(part["text"] for part in parts[1:3]) == RED_CIRCLE[0]


def test_parts_of_the_data_are_apart(package, monkeypatch):
    import negative_control
    from negative_control import CONFIG, load_data, replace

    for name, count in (("NUM_TRAIN", 8), ("NUM_BANK", 5), ("NUM_ASKED", 4)):
        monkeypatch.setattr(negative_control, name, count)
    data, again = load_data(CONFIG), load_data(CONFIG)
    assert data == again
    assert [len(part.paths) for part in (data.train, data.bank, data.asked)] == [8, 5, 4]
    assert len({*data.train.paths, *data.bank.paths}) == 13
    assert all("test" in path for path in data.asked.paths)
    assert len(data.questions) == len(data.blind) == 8
    assert all(tuple(pair) in data.asked.questions[number] for number, *pair in data.questions)
    validation = load_data(replace(CONFIG, split="validation"))
    assert validation.train == data.train
    assert not {*validation.asked.paths} & {*data.train.paths, *data.bank.paths}
    assert all("train" in path for path in validation.asked.paths)


def answers(ours: float, baseline: float = 0.9, count: int = 300):
    """Return made-up answers: blind is right in 0.6, TinyAlign with its bank in `ours`."""
    from negative_control import Answers

    rng = np.random.default_rng(0)
    shares = {"blind": 0.6, "baseline": baseline, "own": ours, "foreign": 0.88, "off": 0.87}
    right = {system: (rng.random(count) < share).astype(float) for system, share in shares.items()}
    kinds = np.resize(["shape", "color", "yes/no", "yes/no"], count)
    return Answers(right, kinds, np.arange(count) // 3, 0.75)


def test_scores_are_of_one_kind_or_all():
    found = answers(0.9)
    chosen = found.kinds == "color"
    assert found.score("own", "color").value == pytest.approx(found.right["own"][chosen].mean())
    difference = found.score("own", minus="blind")
    assert difference.value == pytest.approx((found.right["own"] - found.right["blind"]).mean())
    assert difference.low < difference.value < difference.high


@pytest.mark.parametrize(
    ("ours", "baseline", "verdict"),
    [
        (0.9, 0.9, "holds"),
        (0.7, 0.9, "does not hold"),
        (0.9, 0.55, "cannot be tested here for what a baseline that sees would lose"),
        (0.5, 0.62, "does not hold"),
    ],
)
def test_the_verdict_is_about_what_memory_costs(monkeypatch, ours, baseline, verdict):
    import negative_control
    import rivals

    monkeypatch.setattr(negative_control, "is_installed", lambda: True)
    monkeypatch.setattr(negative_control, "compare", lambda study: answers(ours, baseline))
    section = rivals.easy_vqa(SimpleNamespace(), Path("."))
    assert section.verdict.startswith(f"{verdict}: beside the baseline")
    assert "100 pictures" in section.body and "shows the same for 75%" in section.body


def test_without_the_package_the_section_says_how_to_get_it(monkeypatch):
    import negative_control
    import rivals

    monkeypatch.setattr(negative_control, "is_installed", lambda: False)
    section = rivals.easy_vqa(SimpleNamespace(), Path("."))
    assert section.verdict == "cannot be tested here: easy-vqa is not installed (`pip install easy-vqa==1.0`)."
