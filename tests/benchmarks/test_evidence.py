"""The evidence study's parts on made-up numbers: a difference that is there is found, one that is not is not."""

import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinyalign_vlm.training.data.chats import to_messages
from tinyalign_vlm.training.demo.state import Demo, DemoConfig, Result
from tinyalign_vlm.training.evaluation.bootstrap import Interval, interval_of, resampled

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
    assert better(demos, ours, base) == {"name: loss per token": True}
    assert better(demos, base, ours) == {}


def test_better_is_better_in_every_seed(few_draws):
    """What is worse in the mean alone is told, and one that has it holds nothing."""
    from pooling import result_of
    from sections import beats, better, versus

    ours, base = result_of("tinyalign", "with"), result_of("baseline", "with")
    demos = [made_up_demo(seed, gain) for seed, gain in enumerate((1.5, 1.5, -0.5))]
    assert better(demos[:2], ours, base) == {"name: loss per token": True} and beats(demos[:2], ours, base)
    assert better(demos, ours, base) == {"name: loss per token": False} and not beats(demos, ours, base)
    assert versus(demos, base, ours) == "better in nothing, worse in name: loss per token (not in every seed)"


def test_equals_are_rarely_told_apart(few_draws):
    """Of 60 comparisons of equals, three are expected to be off 0."""
    from pooling import result_of, score

    ours, base = result_of("tinyalign", "with"), result_of("baseline", "with")
    found = [score([made_up_demo(seed, gain=0.0)], ours, "name_loss", minus=base) for seed in range(60)]
    assert np.mean([one.low > 0 or one.high < 0 for one in found]) < 0.2


def test_no_difference_is_found_where_there_is_none():
    from pooling import result_of, score
    from sections import better

    demos = [made_up_demo(seed, gain=0.0) for seed in range(3)]
    ours, base = result_of("tinyalign", "with"), result_of("baseline", "with")
    assert better(demos, ours, base) == better(demos, base, ours) == {}
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
    both, said = show_neighbours([asked, answer], ["a dog", "a cow"], 2)
    texts = [part.get("text") or "picture" for part in both["content"]]
    assert texts == ["picture", "a dog\n", "picture", "a cow\n", "picture", "what?"]
    assert said == answer and len(asked["content"]) == 2
    nearest, _ = show_neighbours([asked, answer], ["a dog", "a cow"], 1)
    assert nearest["content"] == [*both["content"][:2], *both["content"][3:]]
    found = {"with": (np.zeros((1, 5)), np.array([[2, 0, 1, 2, 0]]))}
    demo = SimpleNamespace(concepts={"with": np.array([7, 3, 9])}, found=found)
    assert pictures_of(demo, "with", 4) == [[9, 7, 3, 9]] and pictures_of(demo, "with", 1) == [[9]]


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

    def drawn(noise: float) -> Clouds:
        pictures = centre + rng.normal(0, noise, (8, 3))
        return Clouds(pictures / np.linalg.norm(pictures, axis=1, keepdims=True), centre + [[0, 0, 1.0]], kinds)

    tight, loose = drawn(0.01), drawn(0.5)
    assert tight.gap == pytest.approx(1, abs=0.05)
    assert tight.spread < 0.1 < loose.spread


@pytest.fixture
def few_draws(monkeypatch):
    """Intervals of 100 draws, which take a twentieth of the time."""

    def interval(values, groups, weights) -> Interval:
        sums = np.stack([values, weights], axis=1)
        return interval_of(resampled(sums, groups, lambda drawn: drawn[:, 0] / drawn[:, 1], draws=100))

    monkeypatch.setattr("pooling.bootstrap_interval", interval)


# Made-up results by system, bank and gain: what the section finds out, and how its verdict must begin.
VERDICTS = [
    ("ablations", "bank", {"size_distractors": 0.0}, "holds"),
    ("ablations", "bank", {"size_distractors": 0.5}, "does not hold"),
    ("ablations", "neighbours", {"with": 0.5}, "holds"),
    ("ablations", "neighbours", {"with": 0.5, "top_3": 0.5}, "does not hold"),
    ("ablations", "sources", {"other": 0.5}, "holds"),
    ("ablations", "sources", {}, "does not hold"),
    ("ablations", "queries", {"query_question": 0.5}, "cannot be tested here"),
    ("ablations", "towers", {}, "cannot be tested here"),
    ("claims", "causes", {"with": 0.5, "both": 1.0}, "holds"),
    ("claims", "causes", {"with": 0.5, "both": 0.2}, "does not hold"),
    ("claims", "causes", {"with": 0.5, "both": 1.0, "static_rag": 0.5}, "does not hold"),
    ("claims", "stages", {"with": 0.5}, "holds"),
    ("claims", "stages", {"with": 0.5, "one_stage_baseline": 0.5}, "does not hold"),
    ("claims", "systems", {"with": 0.5}, "holds"),
    ("claims", "systems", {}, "does not hold"),
]


class AllTheSame(dict):
    """Results of made-up answers whose loss of names is less by the gain of their system or bank."""

    def __init__(self, gains: dict[str, float]):
        rng = np.random.default_rng(0)
        self.gains, self.losses = gains, rng.uniform(2, 6, 150)

    def __missing__(self, system: str):
        return AllTheSame.Banks(self, system)

    class Banks(dict):
        def __init__(self, results: "AllTheSame", system: str):
            self.results, self.system = results, system

        def __missing__(self, bank: str) -> Result:
            name = bank if self.system == "tinyalign" else self.system
            losses = self.results.losses - self.results.gains.get(name, 0.0)
            return Result(name_losses=losses, name_tokens=np.ones(150), tokens=30.0)


@pytest.mark.parametrize(("module", "section", "gains", "verdict"), VERDICTS)
def test_verdicts(module, section, gains, verdict, few_draws, monkeypatch, tmp_path):
    from importlib import import_module

    module = import_module(module)
    demos = []
    for seed in range(2):
        results = AllTheSame(gains)
        config = SimpleNamespace(seed=seed)
        demos.append(SimpleNamespace(results=results, groups=lambda metric: np.arange(150), config=config))
    recalls = {0: defaultdict(lambda: 0.5)}
    for name in ("all_changes", "language_queries"):
        monkeypatch.setattr(f"retrieval.{name}", lambda study: recalls)
    monkeypatch.setattr("mechanism.compare", lambda study: None)
    monkeypatch.setattr("openclipart.clip_art", lambda study: None)
    monkeypatch.setattr("plots.bank_sizes", lambda *parts: None)
    monkeypatch.setattr(module, "demos_of", lambda study, seeds: demos)
    study = SimpleNamespace(seeds=(0, 1), openclipart=tmp_path)
    found = getattr(module, section)(study, tmp_path)
    assert re.match(f"{verdict}[: ]", found.verdict), found.verdict
    assert "Seeds: 0, 1." in found.body


def test_controls_that_are_ahead_are_named(few_draws):
    from pooling import result_of
    from sections import ahead_of

    demos = [made_up_demo(seed, gain=0.5) for seed in range(3)]
    rivals = {"a rival": result_of("tinyalign", "with"), "an equal": result_of("baseline", "with")}
    assert ahead_of(demos, result_of("baseline", "with"), rivals) == "a rival in name: loss per token"
    assert ahead_of(demos, result_of("tinyalign", "with"), rivals) == ""


def test_probabilities_mixed_with_neighbours(monkeypatch):
    """One sure neighbour is all that is said; where most likely none is right, the baseline speaks."""
    import sceptic

    none = np.array([[0.0], [1.0]])
    for certain in (0, 1):
        right = np.array([[1.0, 0.0, 0.0, 0.0]] * 2)
        monkeypatch.setattr(
            sceptic,
            "probabilities",
            lambda *parts, at=certain, right=right: (torch.from_numpy(right), torch.full((2,), none[at, 0])),
        )
        demo = SimpleNamespace(
            banks={"with": SimpleNamespace(config=SimpleNamespace(calibration=None))},
            found={"with": (np.zeros((2, 4)), None)},
            queried=np.arange(2),
            labels=lambda rows: ["cat", "dog"],
            captions=lambda bank: [["cat", "cow", "owl", "ant"]] * 2,
        )
        baseline = Result(name_losses=np.array([3.0, 4.0]), name_tokens=np.ones(2))
        mixed = sceptic.mixed_with_neighbours(demo, baseline, "with")
        if certain == 0:
            assert mixed.name_losses[0] == pytest.approx(0) and mixed.name_losses[1] > 100
        else:
            assert mixed.name_losses == pytest.approx(baseline.name_losses)
        assert mixed.exact_match.tolist() == [1, 0]


def test_plots(few_draws, tmp_path):
    """One seed and three, and any number of plans; looked at by people."""
    import plots
    from alignment import SYSTEMS, LossCurve
    from pooling import result_of

    curve = LossCurve(np.arange(2.0, 22, 2), np.linspace(5, 3, 10), 12.0)
    curves = {seed: {system: [curve, curve] for system in SYSTEMS} for seed in range(3)}
    plots.loss_curves(curves, tmp_path / "three.png")
    plots.loss_curves({0: curves[0]}, tmp_path / "one.png")
    demos = [SimpleNamespace(results=AllTheSame({}), groups=lambda metric: np.arange(150))]
    for demo in demos:
        full = demo.results["any"]["any"]
        full = replace(full, choice=np.ones(150), exact_match=np.ones(150))
        full = replace(full, keyword_losses=full.name_losses, keyword_tokens=full.name_tokens)
        demo.results = defaultdict(lambda full=full: defaultdict(lambda: full))
    names = {("epoch", share, system): system for share in (0.4, 1.0) for system in ("baseline", "tinyalign")}
    plots.data_efficiency(demos, names, tmp_path / "shares.png")
    scores = {"size_10%": result_of("tinyalign", "size_10%"), "with": result_of("tinyalign", "with")}
    plots.bank_sizes(
        demos, {0.1: "size_10%", 1.0: "with"}, {"size_10%": 0.1, "with": 0.8}, scores, tmp_path / "bank.png"
    )
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_difference_of_clouds():
    from alignment import Clouds, difference

    rng = np.random.default_rng(0)
    kinds = np.repeat(["a", "b"], 20)
    centre = np.where(kinds[:, None] == "a", [[1.0, 0, 0]], [[0, 1.0, 0]])

    def drawn(noise: float) -> Clouds:
        pictures = centre + rng.normal(0, noise, (40, 3))
        return Clouds(pictures / np.linalg.norm(pictures, axis=1, keepdims=True), centre, kinds)

    tight, loose = drawn(0.05), drawn(0.5)
    found = {seed: {"baseline": loose, "TinyAlign, visual tokens": tight} for seed in range(2)}
    assert difference(found, "spread").high < 0
    same = {0: {"baseline": loose, "TinyAlign, visual tokens": loose}}
    assert tuple(difference(same, "spread")) == (0, 0, 0)


def test_a_picture_is_no_neighbour_of_itself():
    from alignment import Clouds

    pictures = np.random.default_rng(0).normal(3, 1, (200, 576)).astype(np.float32)
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    kinds = np.arange(200) // 2  # one other of each kind
    distance = np.linalg.norm(pictures[:, None].astype(float) - pictures[None], axis=2)
    same = kinds[:, None] == kinds
    expected = distance[same & ~np.eye(200, dtype=bool)].mean() / distance[~same].mean()
    assert Clouds(pictures, pictures, kinds).spread == pytest.approx(expected, rel=1e-4)


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
    assert none_of_these(measures(lesson(questions[:3]), [[-1, -2]] * 3)) is None  # nothing that was not taught


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
    section = Section("A larger bank", "Table 6.", "| a |", "holds: better in 1.2.", "text in names")
    text = module["rendered"]("bank", section, [0, 2])
    (tmp_path / "bank.md").write_text(text)
    module["assemble"](tmp_path, tmp_path / "evidence.md", [0], {"bank": 12.0})
    report = (tmp_path / "evidence.md").read_text()
    assert "| A larger bank | holds: better in 1.2. |" in report
    assert "- A larger bank: text in names." in report and 'EVIDENCE_ARGS="--seeds 0 2 --only bank"' in report
    assert all(f"- {name}: not run yet." in report for name in module["SECTIONS"] if name != "bank")
    assert "- bank: not run yet." not in report


def test_what_is_kept_is_named_after_the_constants_it_was_found_with():
    from study import Study, tag

    assert tag(1, "a", {"b": 2}) == tag(1, "a", {"b": 2}) != tag(1, "a", {"b": 3})
    assert Study(Path("out"), Path("demo"), seeds=(1, 2)).of((0, 1)) == [1]
    assert Study(Path("out"), Path("demo"), seeds=(1, 2)).of((0,)) == [1]  # something is run all the same


def test_a_finished_demo_is_taken_over_after_a_kill(tmp_path):
    from study import MADE, MADE_BANKS, take_over

    finished, folder = tmp_path / "demo", tmp_path / "seed0"
    (finished / "evaluation").mkdir(parents=True)
    (finished / "evaluation" / "baseline.json").write_text("{}")
    (folder / "evaluation.partial").mkdir(parents=True)
    (folder / MADE[0]).symlink_to(finished / MADE[0])
    take_over(finished, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*MADE, *MADE_BANKS, "evaluation"])
    assert (folder / "evaluation" / "baseline.json").exists()


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
