"""Intervals of results and of their differences, by drawing the concepts that were asked for again and again."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000


class Interval(NamedTuple):
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


def interval(
    values: Sequence[float],
    groups: Sequence | None = None,
    weights: Sequence[float] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """
    Return `sum(values) / sum(weights)` with its 95% interval: whole groups are drawn with replacement.

    Args:
        values: `(questions,)`, the sum of a question: its loss, say, or 1 where the answer is right.
        groups: `(questions,)`, what a question is about. Questions about one thing are drawn together, since they are
            right or wrong together. None: each is about something else.
        weights: `(questions,)`, what the values are sums over: the tokens of the answer, say. None: one each.

    Raises:
        ValueError: there is no question, or the lengths differ.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    if len(values) == 0 or not len(values) == len(weights) == len(groups):
        raise ValueError(
            f"Found {len(values)} values, {len(weights)} weights and {len(groups)} groups, expected as many of each, "
            "at least one."
        )
    names, group = np.unique(groups, return_inverse=True)
    sums, totals = np.bincount(group, values), np.bincount(group, weights)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    low, high = np.percentile((drawn @ sums) / (drawn @ totals), [2.5, 97.5])
    return Interval(float(sums.sum() / totals.sum()), float(low), float(high))


def paired_difference(first: Sequence[float], second: Sequence[float], *args, **kwargs) -> Interval:
    """
    Return the mean of `first - second`, of two systems that answered the same questions, with its 95% interval. It is
    narrower than what two intervals side by side show, because hard questions are hard for both.

    Other arguments are those of [`interval`].
    """
    return interval(np.asarray(first, np.float64) - np.asarray(second, np.float64), *args, **kwargs)
