"""`tinyalign bank calibrate`: how probably a neighbour is right, and that none is, by how similar they are."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from matplotlib.figure import Figure

from ...modeling_tinyalign.bank_arrays import cache_root
from ...modeling_tinyalign.bank_format import CONFIG_NAME, CalibrationConfig
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.outputs import evidence, probabilities
from ..arguments.files import read_config
from ..data.preparation import prepare
from ..disk import full_disk_advice, save_file

MIN_NEIGHBOURS = 50
MAX_ROWS = 10_000
UNKNOWN_SHARE = 0.25  # share of images that a bank does not know: about as often as life asks for what is not in it
WORDS_AND_SIGNS = re.compile("\\w+|[+#\u2190-\u2bff\U0001f000-\U0001faff]")  # emoji, and what tells C++ from C#
RIDGE = 1e-6  # of a weight's square, a row: where all is right or wrong the weights stay finite


def agreement(first: str, second: str) -> float:
    """Return the F1 of the words and signs, as of emoji, of two texts, each as often as it is there: 0 to 1."""
    words = [Counter(WORDS_AND_SIGNS.findall(text.lower())) for text in (first, second)]
    return 2 * (words[0] & words[1]).total() / max(1, words[0].total() + words[1].total())


def right_neighbours(
    captions: Sequence[Sequence[str]], answers: Sequence[str], min_agreement: float = 1.0
) -> np.ndarray:
    """Return where a neighbour's caption agrees with the answer of its image: `(n, k)` booleans."""
    pairs = zip(captions, answers, strict=True)
    return np.array([[agreement(caption, answer) >= min_agreement for caption in row] for row, answer in pairs])


def fit_calibration(
    scores: np.ndarray, right: np.ndarray, top_k: int, num_rows: int, unknown: float = UNKNOWN_SHARE
) -> CalibrationConfig:
    """Fit the two logistic regressions on images whose right rows of the bank are known.

    Each image counts twice: with its neighbours as they are, and as if the bank had no row that is right for it.

    Args:
        scores: `(n, m)` similarities of more than `top_k` neighbours, best first; not finite in empty slots.
        right: `(n, m)`, True where a neighbour is right.
        num_rows: of the bank.
        unknown: weight of the images as the bank would not know them, 0 to 1.

    Raises:
        ValueError: there are fewer than 50 neighbours, or none or all of them are right.
    """
    right = right & np.isfinite(scores)
    found = np.isfinite(scores[:, :top_k]).sum()
    if found < MIN_NEIGHBOURS or right[:, :top_k].sum() == 0 or right.sum() == np.isfinite(scores).sum():
        raise ValueError(
            f"Found {found} neighbours, of which {right[:, :top_k].sum()} are right, expected at least "
            f"{MIN_NEIGHBOURS}, some right and some not: use more rows, or another min_agreement."
        )
    cases = np.concatenate(known_and_unknown(scores, right, top_k))
    is_right = np.concatenate([right[:, :top_k], np.zeros_like(right[:, :top_k])])
    weights = np.repeat([1 - unknown, unknown], len(scores))
    slots, numbers = np.isfinite(cases), evidence(cases, top_k)
    return CalibrationConfig(
        top_k=top_k,
        num_rows=num_rows,
        right=_fit(numbers[slots], is_right[slots], np.broadcast_to(weights[:, None], slots.shape)[slots]),
        none=_fit(numbers[:, 0], ~is_right.any(axis=1), weights),
    )


def known_and_unknown(scores: np.ndarray, right: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the similarities `(n, top_k)` of the nearest neighbours, and of the nearest that are not right."""
    others = -np.sort(-np.where(right, -np.inf, scores), axis=1)  # numpy sorts in ascending order only
    return scores[:, :top_k], others[:, :top_k]


def _fit(evidence: np.ndarray, outcomes: np.ndarray, weights: np.ndarray) -> list[float]:
    """Return the weights of a logistic regression, by Newton's method."""
    found = np.zeros(evidence.shape[1])
    for _ in range(50):  # more than it needs: each step doubles the right digits
        expected = 1 / (1 + np.exp(-evidence @ found))
        slope = evidence.T @ (weights * (expected - outcomes)) / weights.sum() + RIDGE * found
        curvature = (evidence.T * (weights * expected * (1 - expected))) @ evidence / weights.sum()
        found -= np.linalg.solve(curvature + RIDGE * np.eye(len(found)), slope)
    return found.tolist()


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the probability that a positive number is the larger one of a random pair: 0.5 by chance, nan if none."""
    if not len(positive) or not len(negative):
        return float("nan")
    negative = np.sort(negative)
    smaller = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(smaller.mean() / 2 / len(negative))


def reliability(probability: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Return the mean probability, share of true outcomes and size of each tenth from 0 to 1, `(bins, 3)`."""
    tenth = np.minimum((10 * probability).astype(int), 9)
    bins = [(probability[tenth == part], outcome[tenth == part]) for part in np.unique(tenth)]
    return np.array([(expected.mean(), happened.mean(), len(happened)) for expected, happened in bins])


def calibration_error(probability: np.ndarray, outcome: np.ndarray) -> float:
    """Return the expected calibration error: the mean distance of probability and share of what is true."""
    expected, happened, size = reliability(probability, outcome).T
    return float(np.average(abs(expected - happened), weights=size))


def share_found(none_known: np.ndarray, none_unknown: np.ndarray, false_alarms: float = 0.05) -> float:
    """Return the share of unknown pictures found where `false_alarms` of the known ones are taken for unknown, by the
    `none_probability` of both.
    """
    return float((none_unknown > np.quantile(none_known, 1 - false_alarms)).mean())


def plot_reliability(path: str | os.PathLike, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Plot how often what was given a probability is true; `curves` has probabilities and outcomes by their names."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="as often as was said")
    for name, (probability, outcome) in curves.items():
        expected, happened, _ = reliability(probability, outcome).T
        axes.plot(expected, happened, marker="o", label=name)
    axes.set(xlabel="probability that was said", ylabel="share that is true", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)


def similarity_where(probability: float, scores: np.ndarray, right: np.ndarray) -> float:
    """Return the similarity from which on a neighbour is right with this probability or a higher one."""
    slots = np.isfinite(scores)
    similarity = scores[slots].astype(np.float64)
    evidence = np.stack([np.ones_like(similarity), similarity], axis=1)
    offset, slope = _fit(evidence, right[slots], np.ones_like(similarity))
    if slope <= 0:
        raise ValueError(
            "More similar neighbours are not right more often, so no similarity is a threshold: use a bank closer to "
            "the data, or leave min_probability out."
        )
    probability = min(probability, 1 - 1e-9)
    return float(np.clip((np.log(probability / (1 - probability)) - offset) / slope, -1, 1))


def calibrate_rows(
    rows: datasets.Dataset, bank: MemoryBank, top_k: int, min_agreement: float = 1.0
) -> tuple[CalibrationConfig, np.ndarray, np.ndarray]:
    """Calibrate on rows with `memory_ids` and `memory_scores` for each image; on some, if there are too many.

    Returns:
        the calibration, the similarities and which of them are right: as `fit_calibration` takes them.
    """
    if len(rows) > MAX_ROWS:
        rows = rows.shuffle(seed=0).select(range(MAX_ROWS))
    scores, captions, answers = [], [], []
    for row in rows.select_columns(["messages", "memory_ids", "memory_scores"]):
        answer = next(message for message in row["messages"] if message["role"] == "assistant")["content"]
        for ids, similarities in zip(row["memory_ids"], row["memory_scores"], strict=True):
            scores.append(similarities)
            captions.append(["" if found is None else found["caption"] for found in bank.rows(ids)])
            answers.append("".join(part["text"] for part in answer if part["type"] == "text"))
    shape = len(answers), -1 if answers else 0
    scores = np.array(scores, np.float32).reshape(shape)
    right = right_neighbours(captions, answers, min_agreement).astype(bool).reshape(shape)
    return fit_calibration(scores, right, top_k, len(bank)), scores, right


def measure(
    calibration: CalibrationConfig, scores: np.ndarray, right: np.ndarray
) -> tuple[dict[str, float], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return how good probabilities are, as numbers by their names, for images with these `scores` and `right` rows.

    And the probabilities and outcomes behind them, as `plot_reliability` takes them: three in four of the images as
    they are, one in four as the bank would not know it.
    """
    cases = [torch.from_numpy(part) for part in known_and_unknown(scores, right, calibration.top_k)]
    (of_known, none_known), (of_unknown, none_unknown) = (
        [part.numpy() for part in probabilities(calibration, case)] for case in cases
    )
    slots, right = np.isfinite(cases[0].numpy()), right[:, : calibration.top_k]
    has_right, repeats = right.any(axis=1), round((1 - UNKNOWN_SHARE) / UNKNOWN_SHARE)
    of_neighbours = (
        np.concatenate([np.tile(of_known[slots], repeats), of_unknown[slots]]),
        np.concatenate([np.tile(right[slots], repeats), np.zeros(slots.sum(), bool)]),
    )
    of_none = (
        np.concatenate([np.tile(none_known, repeats), none_unknown]),
        np.concatenate([np.tile(~has_right, repeats), np.ones_like(has_right)]),
    )
    similarity, outcome = scores[:, : calibration.top_k][slots], right[slots]
    numbers = {
        "right: AUROC": auroc(of_known[slots][outcome], of_known[slots][~outcome]),
        "right: AUROC of similarity": auroc(similarity[outcome], similarity[~outcome]),
        "right: calibration error": calibration_error(*of_neighbours),
        "none: AUROC": auroc(none_unknown, none_known[has_right]),
        "none: calibration error": calibration_error(*of_none),
        "none: found at 5% false alarms": share_found(none_known[has_right], none_unknown),
    }
    return numbers, {"a neighbour is right": of_neighbours, "none is right": of_none}


def describe(calibration: CalibrationConfig, scores: np.ndarray, right: np.ndarray) -> str:
    """Return how well the probabilities fit the rows that they were fitted on, in lines."""
    numbers, _ = measure(calibration, scores, right)
    right = right[:, : calibration.top_k]
    share = right[np.isfinite(scores[:, : calibration.top_k])].mean()
    return "\n".join(
        [
            f"{len(scores)} images, {calibration.top_k} neighbours of each: {share:.1%} of them are "
            f"right, {right.any(axis=1).mean():.1%} of the images have a right one.",
            f"Right neighbours told from wrong ones: AUROC {numbers['right: AUROC']:.3f}, calibration error "
            f"{numbers['right: calibration error']:.3f}",
            "Images told from the same ones as a bank without their rows sees them: AUROC "
            f"{numbers['none: AUROC']:.3f}, {numbers['none: found at 5% false alarms']:.1%} found at 5% false alarms",
        ]
    )


def calibrate_from_files(
    paths: Sequence[str | os.PathLike],
    fields: list[str],
    min_agreement: float = 1.0,
    min_probability: float | None = None,
) -> None:
    """Calibrate the bank of a run, a folder, and set the threshold of its model where a probability is asked for."""
    for name, value in (("min_agreement", min_agreement), ("min_probability", min_probability)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value}, expected a share above 0 and up to 1.")
    config = read_config(paths, [*fields, "--cache_features", "False"])
    config.eval_dataset = None  # calibrated on what is trained on
    folder = Path(config.memory_bank or "")
    if config.memory_bank is None or not folder.is_dir() or config.any_tower or config.streaming:
        raise ValueError(
            f"memory_bank is {config.memory_bank}, any_tower {config.any_tower} and streaming {config.streaming}: to "
            "calibrate takes the folder of a bank of this tower, as the result is written there, and rows that are "
            "not streamed. Download the bank of a repository first."
        )
    with full_disk_advice(cache_root(), "what was computed"):
        run = prepare(config)
    if run.model.config.num_neighbours == 0:
        raise ValueError(f"memory_top_k is {run.model.config.memory_top_k}: there are no neighbours to calibrate.")
    calibration, scores, right = calibrate_rows(run.rows, run.bank, run.model.config.num_neighbours, min_agreement)
    print(describe(calibration, scores, right))
    threshold = None if min_probability is None else similarity_where(min_probability, scores, right)
    fresh = folder / f"{CONFIG_NAME}.new"
    replace(run.bank.config, calibration=calibration).to_json(fresh)
    os.replace(fresh, folder / CONFIG_NAME)
    print(f"Written to {folder / CONFIG_NAME}.")
    if threshold is not None:
        write_threshold(config.model, threshold)


def write_threshold(model: str | None, threshold: float) -> None:
    """Set `retrieval_threshold` in the config.json of a saved model, or say how to set it."""
    path = Path(model or "", "config.json")
    if model is None or not path.is_file():
        print(f"Set it with --model_kwargs '{{\"retrieval_threshold\": {threshold:.4f}}}'.")
        return
    content = {**json.loads(path.read_text()), "retrieval_threshold": threshold}
    save_file(path, f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode())
    print(f"retrieval_threshold: {threshold:.3f}, written to {path}.")
