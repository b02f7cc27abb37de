"""Keys learned from pairs of pictures."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.bank.learned_keys import keys_of, learn_keys, train_map


def pairs(n: int, width: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of pairs that agree in the first eight numbers and differ in the others, which are larger."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((n, 8))
    return tuple(
        F.normalize(torch.from_numpy(np.hstack([shared, 2 * rng.standard_normal((n, width - 8))])).float(), dim=-1)
        for _ in range(2)
    )


def recall(first: torch.Tensor, second: torch.Tensor) -> float:
    nearest = (F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T).argmax(1)
    return (nearest == torch.arange(len(first))).float().mean().item()


def test_the_map_finds_other_pairs_than_it_was_trained_on():
    mapping = train_map(*pairs(2000))
    first, second = pairs(200, seed=1)
    assert recall(first @ mapping, second @ mapping) > recall(first, second) + 0.1
    assert torch.equal(mapping, train_map(*pairs(2000)))


@pytest.mark.parametrize("whiten_dim", [None, 5])
def test_a_bank_with_learned_keys(whiten_dim, images, captions, model, processor, value_encoder, features, tmp_path):
    rows = [{"image": image, "caption": caption} for image, caption in zip(images, captions, strict=True)]
    bank = MemoryBank.build(rows, model, processor, value_encoder, whiten_dim=whiten_dim)
    pair = [np.random.default_rng(seed).standard_normal((40, *features.shape[1:]), np.float32) for seed in range(2)]
    learned = learn_keys(bank, *pair)
    assert learned.config.key_dim == bank.config.key_dim and learned.captions == bank.captions
    assert (learned.config.calibration, bank.key_encoder.projection is None) == (None, whiten_dim is None)
    learned.check_probes(model)
    learned.save_pretrained(tmp_path / "bank")
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    expected = keys_of(bank, features) @ train_map(keys_of(bank, pair[0]), keys_of(bank, pair[1]))
    torch.testing.assert_close(keys_of(loaded, features), F.normalize(expected, dim=-1), atol=1e-4, rtol=1e-3)
    # rows and queries go through the same map: an image finds itself
    scores, ids = loaded.search(keys_of(loaded, features), 1)
    assert ids.flatten().tolist() == list(range(len(images)))
    torch.testing.assert_close(scores, torch.ones_like(scores), atol=1e-3, rtol=0)


def test_what_is_no_pair_is_refused(bank):
    features = np.zeros((3, 16, 16), np.float16)
    for first, second in ((features, features[:2]), (features[:1], features[:1])):
        with pytest.raises(ValueError, match="Found . and . pictures and keys of .*, expected as many of both"):
            learn_keys(bank, first, second)
