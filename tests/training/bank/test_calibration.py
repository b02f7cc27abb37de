"""Choosing retrieval_threshold from training neighbours."""

import datasets
import numpy as np
import pytest

from tinyalign_vlm.training.bank.calibration import agreement, calibrate, calibrate_rows


def test_agreement_is_the_f1_of_the_words():
    assert agreement("a red square", "A red square.") == 1
    assert agreement("a red square", "a blue circle") == pytest.approx(1 / 3)
    assert agreement("red red", "red") == pytest.approx(2 / 3)
    assert agreement("red", "blue") == agreement("", "") == 0


def neighbours(n: int = 200, k: int = 3, turning_point: float = 0.5):
    """Neighbours that say the answer if they are more similar than `turning_point`, and something else otherwise."""
    rng = np.random.default_rng(0)
    scores = -np.sort(-rng.uniform(0, 1, (n, k)), axis=1)
    answers = [f"concept{row}" for row in range(n)]
    captions = [
        [answers[row] if score >= turning_point else f"other{row}" for score in scores[row]] for row in range(n)
    ]
    return scores, captions, answers


def test_the_threshold_is_where_neighbours_begin_to_agree():
    scores, captions, answers = neighbours()
    found = calibrate(scores, captions, answers)
    assert found.threshold == scores[scores >= 0.5].min()
    assert found.chance == 0 and found.target == 0.5
    assert found.curve[0]["agreement"] == 1 and found.curve[-1]["agreement"] == 0
    assert found.curve[-1]["recall"] == pytest.approx(1)
    similarities = [row["similarity"] for row in found.curve]
    assert similarities == sorted(similarities, reverse=True) and len(similarities) == 10
    assert "retrieval_threshold: 0.5" in str(found)


def test_a_higher_target_gives_a_higher_threshold():
    rng = np.random.default_rng(1)
    scores, captions, answers = neighbours(400, turning_point=2.0)
    for row in range(400):  # the more similar, the more often right
        captions[row] = [answers[row] if rng.random() < score else "other" for score in scores[row]]
    thresholds = [calibrate(scores, captions, answers, target).threshold for target in (0.2, 0.5, 0.8)]
    np.testing.assert_allclose(thresholds, (0.2, 0.5, 0.8), atol=0.12)


def test_empty_slots_are_not_read():
    scores, captions, answers = neighbours()
    expected = calibrate(scores, captions, answers)
    padded = np.concatenate([scores, np.full((200, 1), -np.inf)], axis=1)
    assert calibrate(padded, [[*row, "?"] for row in captions], answers) == expected


def test_what_cannot_be_calibrated_is_refused():
    scores, captions, answers = neighbours()
    with pytest.raises(ValueError, match="Found 30 neighbours, expected at least 50"):
        calibrate(scores[:10], captions[:10], answers[:10])
    with pytest.raises(ValueError, match="agree with the rows' answers by 0.000, chance is 0.000"):
        calibrate(scores, [["nothing"] * 3] * 200, answers)
    with pytest.raises(ValueError, match="no similarity is high enough to expect 1.100"):
        calibrate(scores, captions, answers, 1.1)


def test_rows_of_text_have_nothing_to_calibrate_on(bank):
    chat = [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]
    rows = datasets.Dataset.from_list([{"messages": chat, "memory_ids": [], "memory_scores": []}] * 3)
    with pytest.raises(ValueError, match="Found 0 neighbours, expected at least 50"):
        calibrate_rows(rows, bank, 2)
