"""The metrics, on answers of known models, and their intervals. That they equal lmms-eval's: test_run.py."""

import numpy as np
import pandas as pd
import pytest
from vqa_rows import mme_rows, pope_rows

from tinyalign_vlm.training.evaluation.bootstrap import interval_of, resampled
from tinyalign_vlm.training.vqa_benchmarks.metrics import MmeScore, PopeF1, StrictPopeF1, VqaAccuracy, says_yes

POPE, MME = pope_rows(40), mme_rows(40)


def pope(answers: list[str]) -> dict:
    return {
        "answer": answers,
        "target": [row["answer"] for row in POPE],
        "category": [row["category"] for row in POPE],
    }


def mme(score) -> dict:
    units, categories = ([row[name] for row in MME] for name in ("question_id", "category"))
    return {"score": [float(score(row)) for row in MME], "category": categories, "unit": units}


def test_pope_of_known_models():
    truth = [row["answer"] for row in POPE]
    for metric in (PopeF1(), StrictPopeF1()):
        assert metric.compute(**named(metric, pope(truth)))["F1"] == 100
        constant = metric.compute(**named(metric, pope(["yes"] * len(POPE))))
        assert (constant["accuracy"], round(constant["F1"], 1), constant["yes answers"]) == (50, 66.7, 100)
        assert metric.compute(**named(metric, pope(["no"] * len(POPE))))["F1"] == 0
    said = pope(["Yes."] * len(POPE))
    assert StrictPopeF1().compute(**named(StrictPopeF1, said))["accuracy"] == 0
    assert PopeF1().compute(**said)["accuracy"] == 50
    random = pope(list(np.random.default_rng(0).choice(["yes", "no"], len(POPE))))
    found = PopeF1().compute(**random)
    assert abs(found["accuracy"] - 50) < 4 * 50 / len(POPE) ** 0.5 and abs(found["F1"] - 50) < 5


def named(metric, columns: dict) -> dict:
    return {name: columns[name] for name in metric.columns}


def test_mme_of_known_models():
    assert MmeScore().compute(**mme(lambda row: 1)) == pytest.approx({"perception": 2000, "cognition": 800})
    found = MmeScore().compute(**mme(lambda row: row["answer"] == "Yes"))
    assert found == pytest.approx({"perception": 500, "cognition": 200})
    generator = np.random.default_rng(1)
    found = MmeScore().compute(**mme(lambda row: generator.random() < 0.5))
    assert abs(found["perception"] - 750) < 150 and abs(found["cognition"] - 300) < 100


def test_accuracy():
    assert VqaAccuracy().compute(score=[1.0, 0.3, 0.0, 0.6]) == pytest.approx({"accuracy": 47.5})


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [
        ("Yes.", True),
        ("yes, there is", True),
        ("No", False),
        ("no, none", False),
        ("There is not. Yes", False),
        ("", True),
    ],
)
def test_reading_of_llava(answer, is_yes):
    assert says_yes(answer) is is_yes


def test_popes_interval_by_image_is_wider_than_the_naive_one():
    """The yes-questions are the same in all splits, so their answers are, too."""
    generator, said = np.random.default_rng(0), {}
    for row in POPE:
        said.setdefault((row["image_source"], row["question"]), generator.choice(["yes", "no"], p=[0.7, 0.3]))
    table = pd.DataFrame(pope([said[row["image_source"], row["question"]] for row in POPE]))
    sums, images = PopeF1.sums(table), [row["image_source"] for row in POPE]
    widths = []
    for groups in (images, range(len(POPE))):
        value, low, high = interval_of(resampled(sums, groups, PopeF1.main_value, draws=400))
        widths.append(high - low)
        assert low < value < high
    assert widths[0] > 1.2 * widths[1]


def test_mmes_images_are_drawn_within_their_category():
    generator = np.random.default_rng(1)
    table = pd.DataFrame(mme(lambda row: generator.random() < 0.5))
    drawn = resampled(MmeScore.sums(table), table["unit"], MmeScore.main_value, table["category"], draws=200)
    assert drawn[0] == pytest.approx(MmeScore().compute(**table)["perception"])
    perfect = pd.DataFrame(mme(lambda row: 1))
    assert resampled(MmeScore.sums(perfect), perfect["unit"], MmeScore.main_value, perfect["category"]) == (
        pytest.approx(2000)
    )
    assert drawn[1:].std() > 5
