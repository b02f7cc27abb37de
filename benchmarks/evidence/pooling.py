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
    values, weights, groups = [], [], []
    for demo in demos:
        found, weight = pick(demo).column(metric)
        other = None if minus is None else minus(demo).column(metric)[0]
        if found is None or (minus is not None and other is None):
            return None
        values.append(found if minus is None else found - other)
        weights.append(np.ones(len(found)) if weight is None else weight)
        groups.append(demo.groups(metric))
    return bootstrap_interval(np.concatenate(values), np.concatenate(groups), np.concatenate(weights))


def is_more(difference: Interval | None) -> bool:
    """Tell whether a difference is above 0 and its interval off 0."""
    return difference is not None and difference.low > 0


def is_less(difference: Interval | None) -> bool:
    """Tell whether a difference is below 0 and its interval off 0."""
    return difference is not None and difference.high < 0
