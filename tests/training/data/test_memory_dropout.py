"""Which neighbours are taken away, and that it depends on nothing but seed, epoch and row."""

import pickle

import numpy as np
import pytest

from tinyalign_vlm.training.data.memory_dropout import MemoryDropout

IDS = np.arange(8)
SCORES = np.linspace(0.9, 0.2, 8)


def outcomes(dropout, n: int = 2000) -> list[tuple[int, ...]]:
    return [tuple(dropout(IDS, SCORES, f"chat {row}", 0)[0].tolist()) for row in range(n)]


def test_five_in_six_lose_the_nearest_and_one_in_six_all():
    found = outcomes(MemoryDropout(0.6, top_k=4, seed=3))
    missing = [ids for ids in found if ids[0] > 0]
    assert set(missing) == {tuple(range(skip, skip + 4)) for skip in (1, 2, 3, 4)}
    counts = [found.count((0, 1, 2, 3)), found.count((-1, -1, -1, -1)), len(missing)]
    assert sum(counts) == len(found)
    for count, share in zip(counts, (0.4, 0.1, 0.5), strict=True):
        assert abs(count / len(found) - share) < 0.04


def test_scores_belong_to_their_ids():
    dropout = MemoryDropout(1.0, top_k=4)
    for row in range(50):
        ids, scores = dropout(IDS, SCORES, f"chat {row}", 0)
        assert ids.shape == scores.shape == (4,)
        np.testing.assert_array_equal(scores, np.where(ids < 0, -np.inf, SCORES[np.maximum(ids, 0)]))


def test_without_spare_neighbours_slots_stay_empty():
    dropout = MemoryDropout(1.0, top_k=4)
    found = {tuple(dropout(IDS[:4], SCORES[:4], f"chat {row}", 0)[0].tolist()) for row in range(300)}
    assert (1, 2, 3, -1) in found and (3, -1, -1, -1) in found


def test_no_dropout_takes_the_nearest():
    dropout = MemoryDropout(0.0, top_k=3)
    assert set(outcomes(dropout, 100)) == {(0, 1, 2)}


def test_it_depends_on_seed_epoch_and_row_alone():
    first = outcomes(MemoryDropout(0.5, 4, seed=0), 200)
    assert outcomes(MemoryDropout(0.5, 4, seed=0), 200) == first
    assert outcomes(pickle.loads(pickle.dumps(MemoryDropout(0.5, 4, seed=0))), 200) == first
    assert outcomes(MemoryDropout(0.5, 4, seed=1), 200) != first
    later = MemoryDropout(0.5, 4, seed=0)
    later.epoch.fill_(1)
    assert outcomes(later, 200) != first
    dropout = MemoryDropout(0.5, 4)
    images = [{tuple(dropout(IDS, SCORES, f"chat {row}", number)[0]) for number in range(4)} for row in range(20)]
    assert any(len(found) > 1 for found in images)


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_is_a_share(rate):
    with pytest.raises(ValueError, match=f"memory_dropout is {rate}"):
        MemoryDropout(rate, 4)
