"""Scores of several seeds together: questions about one concept are drawn together, whatever seed asked them."""

from collections.abc import Callable, Sequence

import numpy as np

from tinyalign_vlm.training.demo.state import Demo, Result
from tinyalign_vlm.training.evaluation.bootstrap import Interval, bootstrap_interval

# What to read of a demo: `result_of("tinyalign", "with")`, say.
Pick = Callable[[Demo], Result]


def result_of(system: str, bank: str) -> Pick:
    return lambda demo: demo.results[system][bank]


def score(demos: Sequence[Demo], pick: Pick, metric: str, minus: Pick | None = None) -> Interval | None:
    """Return a metric of several seeds with its interval, or its paired difference; None where it was not measured.

    Args:
        metric: as of `Result.column`.
        minus: what is taken away, question by question.
    """
    columns = [answers_of(demo, pick, metric, minus) for demo in demos]
    if None in columns:
        return None
    values, weights = map(np.concatenate, zip(*columns, strict=True))
    return bootstrap_interval(values, np.concatenate([demo.groups(metric) for demo in demos]), weights)


def answers_of(demo: Demo, pick: Pick, metric: str, minus: Pick | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a metric or difference of each question, and the question's weight; arguments as of `score`."""
    found, weights = pick(demo).column(metric)
    other = None if minus is None else minus(demo).column(metric)[0]
    if found is None or (minus is not None and other is None):
        return None
    return found if minus is None else found - other, np.ones(len(found)) if weights is None else weights


def mean(demo: Demo, pick: Pick, metric: str, minus: Pick | None = None) -> float:
    """Return a metric or a difference of one seed; arguments as of `score`."""
    values, weights = answers_of(demo, pick, metric, minus)
    return values.sum() / weights.sum()


def is_more(difference: Interval | None) -> bool:
    """Tell whether a difference is above 0 and its interval off 0."""
    return difference is not None and difference.low > 0


def is_less(difference: Interval | None) -> bool:
    """Tell whether a difference is below 0 and its interval off 0."""
    return difference is not None and difference.high < 0
