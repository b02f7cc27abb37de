"""Rules without training, on options whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinyalign_vlm.training.demo.controls import caption_rules, choices_by

OPTIONS = [["sea", "war", "cold", "king"], None, ["hot", "tea", "old", "red"]]


def demo_of(options):
    return SimpleNamespace(options=options, asked=np.flatnonzero([row is not None for row in options]))


def test_ties_count_in_part():
    neighbours = [["x"], ["x"], ["x"]]
    found = choices_by(lambda option, near: option in ("sea", "war", "tea"), demo_of(OPTIONS), neighbours)
    assert found.tolist() == [0.5, 0.0]
    assert choices_by(lambda option, near: 0.0, demo_of(OPTIONS), neighbours).tolist() == [0.25, 0.25]


def test_rules_read_the_names_of_the_neighbours():
    words = ["sea", "war", "wave", "sword", "other"]
    table = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.9, 0.1, 0], [0.1, 0.9, 0], [0, 0, 1]])
    model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=table))

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [words.index(word) for word in text.split()]}

    shared, shared_by_all, near, near_all = caption_rules(model, tokenizer)
    assert shared("waves", ["a wave", "waves"]) == 1 and shared_by_all("waves", ["a wave", "waves"]) == 2
    assert near("sea", ["wave", "sword"]) > near("war", ["wave", "sword"])
    assert near("sea", ["sword", "wave"]) < near("war", ["sword", "wave"])
    assert near_all("sea", ["wave", "sword"]) == pytest.approx(near("sea", ["wave"]) + near("sea", ["sword"]))
