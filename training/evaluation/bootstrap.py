"""Intervals of results and of their differences, by drawing the concepts that were asked for again and again."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000


class Interval(NamedTuple):
    """A number with its 95% interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Return `value [low, high]`, each number as the format says."""
        value, low, high = (format(number, spec) for number in self)
        return f"{value} [{low}, {high}]"


def bootstrap_interval(
    values: Sequence[float], groups: Sequence | None = None, weights: Sequence[float] | None = None
) -> Interval:
    """Return `sum(values) / sum(weights)` with its 95% interval: whole groups are drawn with replacement.

    Args:
        values: `(questions,)`, the sum of a question: its loss, say, or 1 where the answer is right.
        groups: `(questions,)`, what a question is about. Questions about one thing are drawn together, since they are
            right or wrong together. None: each is about something else.
        weights: `(questions,)`, what the values are sums over: the tokens of the answer, say. None: one each.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    sums = np.stack([values, weights], axis=1)
    return interval_of(resampled(sums, groups, lambda drawn: drawn[:, 0] / drawn[:, 1]))


def resampled(
    sums: np.ndarray,
    groups: Sequence,
    statistic: Callable[[np.ndarray], np.ndarray],
    strata: Sequence | None = None,
    draws: int = DRAWS,
) -> np.ndarray:
    """Return a statistic of all questions, and then of `draws` samples: `(1 + draws,)`.

    Whole groups are drawn with replacement; the same groups give the same samples, whatever is summed.

    Args:
        sums: `(questions, columns)`, what the statistic needs, summed over the questions of a sample.
        groups: `(questions,)`, as of [`bootstrap_interval`].
        statistic: takes the sums of n samples, `(n, columns)`, and returns `(n,)`.
        strata: `(questions,)`, the same within a group. As many groups of each stratum are drawn as there are.
    """
    names, first, group = np.unique(groups, return_index=True, return_inverse=True)
    totals = np.stack([np.bincount(group, column) for column in np.transpose(sums)], axis=1)
    stratum = np.zeros(len(names)) if strata is None else np.asarray(strata)[first]
    members = [np.flatnonzero(stratum == name) for name in np.unique(stratum)]
    generator = np.random.default_rng(0)
    drawn = [np.sum(sums, axis=0)]
    for _ in range(draws):
        counts = np.zeros(len(names))  # how often each group is drawn: sums times counts need no copies of rows
        for those in members:
            counts[those] = generator.multinomial(len(those), np.full(len(those), 1 / len(those)))
        drawn.append(counts @ totals)
    return statistic(np.stack(drawn))


def interval_of(values: np.ndarray) -> Interval:
    """Return the first of what [`resampled`] returned, with its 95% interval by the others."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))
