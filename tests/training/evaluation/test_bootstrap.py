"""Intervals and paired differences on numbers whose intervals are known."""

import numpy as np
import pytest

from tinyalign_vlm.training.evaluation.bootstrap import bootstrap_interval


def test_intervals():
    assert bootstrap_interval(np.ones(50)) == (1.0, 1.0, 1.0)
    values = np.random.default_rng(0).normal(size=400)
    value, low, high = bootstrap_interval(values)
    assert value == pytest.approx(values.mean())
    assert [low, high] == pytest.approx([value - 1.96 / 20, value + 1.96 / 20], abs=0.015)
    assert bootstrap_interval(values) == (value, low, high)


def test_weights_are_what_values_are_sums_over():
    value, low, high = bootstrap_interval([2.0, 30.0] * 100, weights=[1.0, 10.0] * 100)
    assert value == pytest.approx(32 / 11) and 2.8 < low < value < high < 3.0


def test_questions_of_a_group_are_drawn_together():
    values = np.random.default_rng(0).integers(0, 2, 100).astype(float)
    alone = bootstrap_interval(values)
    repeated = bootstrap_interval(np.repeat(values, 4), groups=np.repeat(np.arange(100), 4))
    assert repeated == pytest.approx(alone)
    unaware = bootstrap_interval(np.repeat(values, 4))
    assert unaware.high - unaware.low < 0.7 * (repeated.high - repeated.low)


def test_pairs_show_what_two_intervals_hide():
    hard = np.random.default_rng(0).normal(size=200) * 5
    found = bootstrap_interval((hard + 0.3) - hard)
    assert found == pytest.approx((0.3, 0.3, 0.3))
    assert bootstrap_interval(hard + 0.3).low < bootstrap_interval(hard).high
