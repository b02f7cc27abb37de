"""Probabilities of neighbours, from their similarities."""

import datasets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from tinyalign_vlm.modeling_tinyalign.bank_format import CalibrationConfig
from tinyalign_vlm.modeling_tinyalign.outputs import probabilities
from tinyalign_vlm.training.bank.calibration import (
    agreement,
    auroc,
    calibrate_rows,
    calibration_error,
    describe,
    fit_calibration,
    known_and_unknown,
    plot_reliability,
    reliability,
    right_neighbours,
    share_found,
    similarity_where,
)


def test_agreement_is_the_f1_of_the_words():
    assert agreement("a red square", "A red square.") == 1
    assert agreement("a red square", "a blue circle") == pytest.approx(1 / 3)
    assert agreement("red red", "red") == pytest.approx(2 / 3)
    assert agreement("red", "blue") == agreement("", "") == agreement("🐱", "🐶") == 0
    assert agreement("🐱", "🐱") == 1 > agreement("C++", "C#")
    captions = [["red square", "Red"], ["blue", "red"]]
    assert right_neighbours(captions, ["red", "red"]).tolist() == [[False, True], [False, True]]
    assert right_neighbours(captions, ["red", "red"], 0.5).tolist() == [[True, True], [False, True]]


def neighbours(n: int = 4000, k: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Similarities, and one right neighbour at most: more similar than the wrong ones, and in a bank for 80%."""
    rng = np.random.default_rng(seed)
    scores, right = rng.normal(0.3, 0.1, (n, k)), np.zeros((n, k), dtype=bool)
    known = rng.random(n) < 0.8
    scores[known, 0], right[known, 0] = rng.normal(0.55, 0.15, known.sum()), True
    order = np.argsort(-scores, axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(right, order, 1)


def split(calibration: CalibrationConfig, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = probabilities(calibration, torch.from_numpy(scores))
    return tuple(part.numpy() for part in found)


def test_probabilities_are_the_shares_of_other_images():
    scores, right = neighbours()
    calibration = fit_calibration(scores, right, top_k=4, num_rows=100, unknown=0.0)
    assert (calibration.top_k, calibration.num_rows) == (4, 100)
    scores, right = neighbours(seed=1)
    of_neighbour, none = split(calibration, scores)
    assert of_neighbour.shape == scores.shape and none.shape == (len(scores),)
    is_none = ~right[:, :4].any(axis=1)
    assert calibration_error(of_neighbour[:, :4].ravel(), right[:, :4].ravel()) < 0.03
    assert calibration_error(none, is_none) < 0.06
    assert auroc(of_neighbour[right], of_neighbour[~right]) > 0.9 and auroc(none[is_none], none[~is_none]) > 0.8
    assert (none <= 1 - of_neighbour.max(axis=1) + 1e-6).all()


def test_an_image_counts_as_if_the_bank_did_not_know_it():
    scores, right = neighbours()
    known, unknown = known_and_unknown(scores, right, 4)
    assert known.shape == unknown.shape == (4000, 4)
    row = int(np.flatnonzero(right[:, 0])[0])
    np.testing.assert_array_equal(unknown[row], scores[row, 1:5])
    means = []
    for share in (0.0, 0.25, 0.5):
        _, none = split(fit_calibration(scores, right, 4, 100, share), known)
        means.append(none.mean())
    assert means == sorted(means) and means[0] == pytest.approx(1 - right[:, :4].any(axis=1).mean(), abs=0.03)


def test_empty_slots_are_never_right():
    scores, right = neighbours()
    calibration = fit_calibration(scores, right, 4, 100)
    scores[0, 2:] = -np.inf
    of_neighbour, none = split(calibration, scores[:2])
    assert (of_neighbour[0, 2:] == 0).all() and np.isfinite(none).all()
    scores[0] = -np.inf
    of_neighbour, none = split(calibration, scores[:1])
    assert (of_neighbour == 0).all() and none > 0.8


def test_what_is_always_right_has_finite_weights():
    scores = np.linspace(0.9, 0.1, 400).reshape(100, 4)
    right = scores > 0.5
    calibration = fit_calibration(scores, right, 2, 100)
    of_neighbour, none = split(calibration, np.array([[0.9, 0.89], [0.2, 0.19]]))
    assert of_neighbour[0].min() > 0.5 > of_neighbour[1].max() and none[0] < 0.5 < none[1]


def test_what_cannot_be_calibrated_is_refused():
    scores, right = neighbours(100)
    with pytest.raises(ValueError, match="Found 40 neighbours, of which .* are right, expected at least 50"):
        fit_calibration(scores[:10], right[:10], 4, 100)
    for none_or_all in (np.zeros_like(right), np.ones_like(right)):
        with pytest.raises(ValueError, match="some right and some not: use more rows, or another min_agreement"):
            fit_calibration(scores, none_or_all, 4, 100)


def test_measures_have_the_values_of_their_definitions():
    assert auroc(np.array([2, 3]), np.array([0, 1])) == 1 and auroc(np.array([1]), np.array([0, 1, 1, 2])) == 0.5
    probability, outcome = np.array([0.05, 0.05, 0.95, 1.0]), np.array([False, True, True, True])
    np.testing.assert_allclose(reliability(probability, outcome), [[0.05, 0.5, 2], [0.975, 1, 2]])
    assert calibration_error(probability, outcome) == pytest.approx((0.45 + 0.025) / 2)
    known, unknown = np.linspace(0, 1, 101), np.array([0.5, 0.94, 0.96, 1.0])
    assert share_found(known, unknown) == 0.5 and share_found(known, unknown, false_alarms=0.5) == 0.75


def test_the_threshold_is_where_the_probability_is_reached():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, (5000, 4))
    right = rng.random(scores.shape) < 1 / (1 + np.exp(-10 * (scores - 0.5)))
    assert similarity_where(0.5, scores, right) == pytest.approx(0.5, abs=0.03)
    assert similarity_where(0.2, scores, right) == pytest.approx(0.5 + np.log(0.25) / 10, abs=0.03)
    with pytest.raises(ValueError, match="More similar neighbours are not right more often"):
        similarity_where(0.5, scores, ~right)
    assert similarity_where(1, scores, right) == 1


def test_the_description_and_the_plot_say_how_good_it_is(tmp_path, monkeypatch):
    scores, right = neighbours()
    calibration = fit_calibration(scores, right, 4, 100)
    text = describe(calibration, scores, right)
    assert "4000 images, 4 neighbours of each: 18.9% of them are right, 75.7% of the images" in text
    assert "AUROC 0.9" in text and "found at 5% false alarms" in text
    plot_reliability(tmp_path / "plot.png", {"a neighbour is right": (np.array([0.2, 0.8]), np.array([False, True]))})
    assert (tmp_path / "plot.png").stat().st_size > 5000
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    plot_reliability("plot.png", {"a neighbour is right": (np.array([0.2, 0.8]), np.array([False, True]))})
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["as often as was said", "a neighbour is right"]


def test_rows_of_text_have_nothing_to_calibrate_on(bank):
    chat = [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]
    rows = datasets.Dataset.from_list([{"messages": chat, "memory_ids": [], "memory_scores": []}] * 3)
    with pytest.raises(ValueError, match="Found 0 neighbours, of which 0 are right, expected at least 50"):
        calibrate_rows(rows, bank, 2)
