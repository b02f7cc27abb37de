"""The evidence study's parts on made-up numbers: a difference that is there is found, one that is not is not."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyalign_vlm.training.data.chats import to_messages
from tinyalign_vlm.training.demo.state import Demo, DemoConfig, Result

FOLDER = Path(__file__).parents[2] / "benchmarks" / "evidence"


@pytest.fixture(scope="module", autouse=True)
def modules():
    """Make the study's modules importable, as `python benchmarks/evidence` does."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def made_up_demo(seed: int, gain: float, count: int = 150) -> SimpleNamespace:
    """Return a demo in which TinyAlign's loss of names is smaller by `gain`; all seeds ask about the same concepts."""
    rng = np.random.default_rng(seed)
    base, tokens = rng.uniform(2, 6, count), rng.integers(1, 5, count).astype(float)
    noise = rng.normal(0, 0.5, (2, count))
    results = {}
    for system, less, wiggle in (("baseline", 0.0, noise[0]), ("tinyalign", gain, noise[1])):
        losses = (base - less + wiggle) * tokens
        right = (rng.random(count) < 0.3).astype(float)
        results[system] = {"with": Result(name_losses=losses, name_tokens=tokens, exact_match=right)}
    return SimpleNamespace(results=results, groups=lambda metric: np.arange(count), config=SimpleNamespace(seed=seed))


def test_a_difference_is_found():
    from pooling import is_less, is_more, result_of, score
    from sections import better

    demos = [made_up_demo(seed, gain=0.5) for seed in range(3)]
    ours, base = result_of("tinyalign", "with"), result_of("baseline", "with")
    difference = score(demos, ours, "name_loss", minus=base)
    assert difference.value == pytest.approx(-0.5, abs=0.1)
    assert is_less(difference) and not is_more(difference)
    assert better(demos, ours, base) == ["name: loss per token"]
    assert better(demos, base, ours) == []


def test_no_difference_is_found_where_there_is_none():
    from pooling import result_of, score
    from sections import better

    demos = [made_up_demo(seed, gain=0.0) for seed in range(3)]
    ours, base = result_of("tinyalign", "with"), result_of("baseline", "with")
    assert better(demos, ours, base) == better(demos, base, ours) == []
    same = score(demos, base, "name_loss", minus=base)
    assert tuple(same) == (0, 0, 0)
    assert score(demos, base, "choice") is None  # not measured


def test_more_seeds_of_the_same_concepts_are_no_more_concepts():
    """The same answers three times over have the interval of one seed: concepts are drawn, not rows."""
    from pooling import result_of, score

    demo, base = made_up_demo(0, gain=0.5), result_of("baseline", "with")
    assert score([demo] * 3, base, "name_loss") == pytest.approx(score([demo], base, "name_loss"))


def test_neighbours_stand_in_the_prompt_with_their_captions():
    from pictures_in_prompt import pictures_of, show_neighbours

    asked, answer = to_messages("what?", "a cat")
    shown, said = show_neighbours([asked, answer], ["a dog", "a cow"])
    texts = [part.get("text") or "picture" for part in shown["content"]]
    assert texts == ["picture", "a dog\n", "picture", "a cow\n", "picture", "what?"]
    assert said == answer and len(asked["content"]) == 2
    found = {"with": (np.zeros((1, 5)), np.array([[2, 0, 1, 2, 0]]))}
    demo = SimpleNamespace(concepts={"with": np.array([7, 3, 9])}, found=found)
    assert pictures_of(demo, "with") == [[9, 7, 3, 9]]  # as many as are read


def test_losses_at_equal_steps_and_seconds():
    from alignment import LossCurve

    curve = LossCurve(steps=np.arange(1.0, 11), losses=np.arange(10.0, 0, -1), seconds=20.0)
    assert curve.end() == pytest.approx(np.mean([3, 2, 1]))  # the last 30% of ten steps
    assert curve.end(seconds=10.0) == pytest.approx(np.mean([7, 6]))  # of five
    assert curve.end(seconds=99.0) == curve.end()
    slow = LossCurve(steps=np.array([5.0, 10]), losses=np.array([3.0, 2]), seconds=20.0)
    assert slow.end(seconds=1.0) == 3  # nothing was recorded so early: the first record


def test_clouds():
    from alignment import Clouds

    kinds = np.repeat(["a", "b"], 4)
    rng = np.random.default_rng(0)
    centre = np.where(kinds[:, None] == "a", [[1.0, 0, 0]], [[0, 1.0, 0]])
    tight = Clouds(centre + rng.normal(0, 0.01, (8, 3)), centre + [[0, 0, 1.0]], kinds)
    loose = Clouds(centre + rng.normal(0, 0.5, (8, 3)), centre + [[0, 0, 1.0]], kinds)
    assert tight.gap == pytest.approx(1, abs=0.05)
    assert tight.spread < 0.1 < loose.spread


def lesson(questions: list[dict]):
    from teaching import Lesson

    return Lesson({"bavu": "a.webp", "dogi": "b.webp"}, questions, {}, Path("."))


def test_measures_of_a_lesson():
    from teaching import PROMPT, YES_NO, measures, none_of_these

    about = {"picture": "1.webp", "concept": "bavu"}
    questions = [
        {**about, "question": "Is this bavu?", "options": YES_NO, "answer": "yes"},
        {**about, "question": "Is this dogi?", "options": YES_NO, "answer": "no"},
        {**about, "question": PROMPT, "options": ["bavu", "dogi"], "answer": "bavu"},
        {"picture": "2.webp", "concept": None, "question": PROMPT, "options": ["bavu", "dogi"], "answer": None},
    ]
    found = measures(lesson(questions), [[-1, -2], [-1, -2], [-1, -2], [-5, -6]])
    assert {kind: values.tolist() for kind, values in found.items()} == {
        "positive": [1],
        "negative": [0],  # it says yes to a look-alike
        "2": [1],
        "known": [1],
        "unknown": [5],
    }
    assert none_of_these(found) == (1, 1)
    found = measures(lesson(questions), [[-1, -2]] * 4, none={"1.webp": 0.9, "2.webp": 0.1})
    assert none_of_these(found) == (0, 0)


def test_copying_needs_no_language_model():
    from teaching import PROMPT, YES_NO, copied

    about = {"picture": "1.webp", "concept": "bavu"}
    questions = [
        {**about, "question": "Is this bavu?", "options": YES_NO, "answer": "yes"},
        {**about, "question": "Is this dogi?", "options": YES_NO, "answer": "no"},
        {**about, "question": PROMPT, "options": ["dogi", "bavu"], "answer": "bavu"},
    ]
    scores = copied(lesson(questions), np.array([[0.9, 0.2]]), ["1.webp"])
    assert [int(np.argmax(row)) for row in scores] == [0, 1, 1]


def test_made_up_names():
    from teaching import made_up_names

    names = made_up_names(100, np.random.default_rng(0))
    assert len(set(names)) == 100 and all(name.isalpha() for name in names)


def test_the_report_lists_what_was_not_run(tmp_path):
    from runpy import run_path

    from sections import Section

    module = run_path(str(FOLDER / "__main__.py"), run_name="evidence")
    text = module["rendered"]("bank", Section("A larger bank", "Table 6.", "| a |", "holds: better in 1.2."))
    (tmp_path / "bank.md").write_text(text)
    module["assemble"](tmp_path, tmp_path / "evidence.md", [0], {"bank": 12.0})
    report = (tmp_path / "evidence.md").read_text()
    assert "| A larger bank | holds: better in 1.2. |" in report
    assert all(f"- {name}: not run yet." in report for name in module["SECTIONS"] if name != "bank")
    assert "- bank: not run yet." not in report


def test_what_is_kept_is_named_after_the_constants_it_was_found_with():
    from study import Study, tag

    assert tag(1, "a", {"b": 2}) == tag(1, "a", {"b": 2}) != tag(1, "a", {"b": 3})
    assert Study(Path("out"), Path("demo"), seeds=(1, 2)).of((0, 1)) == [1]


@pytest.mark.parametrize("last", [False, True])
def test_captions_of_so_many_words(last):
    from costs import in_words

    for name in ("jar", "flag: Uruguay"):
        words = in_words(15, last)(name).split()
        assert len(words) == 15 and " ".join(words).startswith("a picture of")
        assert (words[-len(name.split()) :] == name.split()) == last
    assert in_words(3, last)("a very long name indeed") == "a picture of a very long name indeed"


def test_systems_lose_neighbours_however_they_read_them(tmp_path):
    """Those that do not read them as memory tokens, too."""
    ids = np.tile(np.arange(8), (200, 1))
    found = {"train": (np.linspace(0.9, 0.1, 8)[None].repeat(200, 0), ids)}
    pairs, concepts = SimpleNamespace(labels=[f"name {row}" for row in range(20)]), {"without": np.arange(10, 18)}
    config = DemoConfig(memory_dropout=0.5)
    demo = Demo(tmp_path, False, config, pairs, {}, None, found=found, concepts=concepts)
    left = demo.training_neighbours()
    whole = [row.tolist() == [0, 1, 2, 3] for row in left]
    assert 0.4 < np.mean(whole) < 0.6 and {len(row) for row in left} == {0, 4}  # the next ones take the places
    assert demo.training_captions()[whole.index(True)] == ["name 10", "name 11", "name 12", "name 13"]
