"""`tinyalign bank calibrate`: from which similarity on a neighbour is worth listening to."""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from ...modeling_tinyalign.bank_arrays import cache_root
from ...modeling_tinyalign.memory_bank import MemoryBank
from ..arguments.files import read_config
from ..data.preparation import prepare
from ..disk import keeping, save_file

MIN_NEIGHBOURS = 50


def agreement(first: str, second: str) -> float:
    """Return the F1 of the words of two texts, each as often as it is there: 0 to 1."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in (first, second)]
    return 2 * (words[0] & words[1]).total() / max(1, words[0].total() + words[1].total())


@dataclass
class Calibration:
    """The agreement of neighbours' captions with the answers of the rows they were found for, by similarity.

    Attributes:
        threshold: the lowest similarity from which on a neighbour is expected to agree by `target` or more.
        target: half-way from `chance` to the agreement of the most similar tenth, unless another was asked for.
        chance: agreement of an answer with the neighbours of another row.
        curve: for each tenth of the neighbours, the most similar first: `similarity`, the lowest in it; `agreement`,
            the mean in it; `precision`, the mean of all neighbours down to it; `recall`, their share of all the
            agreement there is beyond chance.
    """

    threshold: float
    target: float
    chance: float
    curve: list[dict[str, float]]

    def __str__(self) -> str:
        row = "{similarity:15.3f} {agreement:11.3f} {precision:11.3f} {recall:8.3f}\n"
        return (
            "similarity from   agreement   precision   recall\n"
            f"{''.join(row.format(**values) for values in self.curve)}"
            f"Chance, the agreement with another row's neighbours: {self.chance:.3f}\n"
            f"retrieval_threshold: {self.threshold:.3f}, where neighbours agree by {self.target:.3f} or more"
        )


def calibrate(
    scores: np.ndarray, captions: Sequence[Sequence[str]], answers: Sequence[str], target: float | None = None
) -> Calibration:
    """Choose `retrieval_threshold` on training rows and their neighbours, their own rows of the bank left out.

    Nothing says whether a neighbour helps; that its caption says what the row's answer says is the next best thing.

    Args:
        scores: `(n, k)` similarities; not finite in empty slots.
        captions: the neighbours' captions, `n` rows of `k`; what stands in empty slots is not read.
        answers: the `n` answers in the training rows.
        target: agreement that a neighbour must be expected to have, 0 to 1.

    Raises:
        ValueError: there are fewer than 50 neighbours, or none agrees as much as it should.
    """
    slots = np.argwhere(np.isfinite(scores))
    if len(slots) < MIN_NEIGHBOURS:
        raise ValueError(
            f"Found {len(slots)} neighbours, expected at least {MIN_NEIGHBOURS} to calibrate on: use more rows."
        )
    slots = slots[np.argsort(-scores[tuple(slots.T)], kind="stable")]
    similarity = scores[tuple(slots.T)]
    agrees = np.array([agreement(captions[row][slot], answers[row]) for row, slot in slots])
    other = np.random.default_rng(0).permutation(len(answers))
    chance = float(np.mean([agreement(captions[row][slot], answers[other[row]]) for row, slot in slots]))
    expected = _falling(agrees)
    if target is None:
        target = (chance + expected[: -(-len(slots) // 10)].mean()) / 2
    if expected[0] < target or expected[0] <= chance:
        raise ValueError(
            f"The most similar neighbours agree with the rows' answers by {expected[0]:.3f}, chance is {chance:.3f}: "
            f"no similarity is high enough to expect {target:.3f}. Ask for less, or use a bank closer to the data."
        )
    bounds = np.linspace(0, len(slots), 11).round().astype(int).tolist()
    beyond, curve = np.cumsum(agrees - chance), []
    for start, stop in itertools.pairwise(bounds):
        agreements = {"agreement": float(agrees[start:stop].mean()), "precision": float(agrees[:stop].mean())}
        share = float(beyond[stop - 1] / beyond[-1])
        curve.append({"similarity": float(similarity[stop - 1]), **agreements, "recall": share})
    return Calibration(float(similarity[expected >= target][-1]), float(target), chance, curve)


def calibrate_rows(
    rows: datasets.Dataset, bank: MemoryBank, top_k: int, target: float | None = None, max_rows: int = 10_000
) -> Calibration:
    """Run `calibrate` on rows with `memory_ids` and `memory_scores` for each image; on some, if there are too many."""
    if len(rows) > max_rows:
        rows = rows.shuffle(seed=0).select(range(max_rows))
    scores, captions, answers = [], [], []
    for row in rows.select_columns(["messages", "memory_ids", "memory_scores"]):
        answer = next(message for message in row["messages"] if message["role"] == "assistant")["content"]
        for ids, similarities in zip(row["memory_ids"], row["memory_scores"], strict=True):
            scores.append(similarities[:top_k])
            captions.append(["" if found is None else found["caption"] for found in bank.rows(ids[:top_k])])
            answers.append("".join(part["text"] for part in answer if part["type"] == "text"))
    return calibrate(np.array(scores).reshape(-1, top_k), captions, answers, target)


def _falling(values: np.ndarray) -> np.ndarray:
    """Return the closest sequence, by squared error, that never rises (isotonic regression)."""
    means, counts = [], []
    for value in values:
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] < means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    return np.repeat(means, counts)


def write_threshold(folder: Path, threshold: float) -> None:
    """Set `retrieval_threshold` in the config.json of a saved model."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), "retrieval_threshold": threshold}
    save_file(path, f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode())


def calibrate_from_files(paths: Sequence[str | os.PathLike], fields: list[str], target: float | None = None):
    """Print how much neighbours agree with the rows' answers; set the threshold of `model`, if it is a folder."""
    if target is not None and not 0 <= target <= 1:
        raise ValueError(f"min_agreement is {target}, expected a share, 0 (no word shared) to 1 (the same words).")
    config = read_config(paths, [*fields, "--cache_features", "False"])
    with keeping(cache_root(), "what was computed"):
        run = prepare(config)
    if run.model.config.num_neighbours == 0 or config.streaming:
        raise ValueError(
            f"memory_top_k is {run.model.config.memory_top_k} and streaming {config.streaming}: to calibrate takes a "
            "bank, and rows that are not streamed."
        )
    found = calibrate_rows(run.rows, run.bank, run.model.config.num_neighbours, target)
    print(found)
    if config.model is not None and Path(config.model).is_dir():
        write_threshold(Path(config.model), found.threshold)
        print(f"Written to {Path(config.model, 'config.json')}.")
    else:
        print(f"Set it with --model_kwargs '{{\"retrieval_threshold\": {found.threshold:.4f}}}'.")
