"""Learned keys: a linear map behind the keys of a bank, from pairs of pictures of the same thing."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from ...modeling_tinyalign.bank_format import list_column, matrix
from ...modeling_tinyalign.memory_bank import MemoryBank

MAX_KEY_DIM = 2048  # the map has its square
STEPS, BATCH_PAIRS, TEMPERATURE = 100, 512, 0.05  # chosen on validation concepts: docs/keys.md
LEARNING_RATE = 0.15  # over the width: each of Adam's steps moves a weight by about this much, and a key by their sum


def learn_keys(bank: MemoryBank, first: np.ndarray, second: np.ndarray, seed: int = 0) -> MemoryBank:
    """Return the bank with keys under which two pictures of the same thing are near each other.

    The map is trained with InfoNCE: each picture has to find its other one among those of a batch, both ways. It
    becomes part of the key encoder's projection, so rows that are added later and queries go through it as well. A
    calibration does not fit the new keys and is dropped.

    Args:
        first: `(n, tokens, width)` vision features of pictures, as `cache_vision_features` returns.
        second: of other pictures of the same `n` things: drawn in another style, or seen from another side. A thing
            that the model is trained on later finds its own row too easily: take pairs that it is not trained on.

    Raises:
        ValueError: the numbers of pictures differ or are less than 2, or the keys are wider than 2,048.
    """
    width = bank.config.key_dim
    if len(first) != len(second) or len(first) < 2 or width > MAX_KEY_DIM:
        raise ValueError(
            f"Found {len(first)} and {len(second)} pictures and keys of {width} numbers, expected as many of both, at "
            f"least 2, and at most {MAX_KEY_DIM} numbers: build the bank with whiten_dim."
        )
    mapping = train_map(keys_of(bank, first), keys_of(bank, second), seed)
    learned = bank.with_rows(mapped(bank, mapping)).with_calibration(None)
    projection = learned.key_encoder.projection
    learned.key_encoder.projection = mapping if projection is None else projection.cpu() @ mapping
    return learned


def keys_of(bank: MemoryBank, features: np.ndarray) -> torch.Tensor:
    """Return the keys `(n, key_dim)` of pictures with these features, on the CPU."""
    starts = range(0, len(features), BATCH_PAIRS)
    batches = (torch.from_numpy(np.array(features[start : start + BATCH_PAIRS])) for start in starts)
    return torch.cat([bank.encode_queries(batch) for batch in batches])


def train_map(first: torch.Tensor, second: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return the map `(key_dim, key_dim)` that brings the keys of pairs together; `learn_keys` has the details."""
    generator = torch.Generator().manual_seed(seed)
    mapping = torch.eye(first.shape[1], requires_grad=True)  # to begin with, the keys are what they were
    optimizer = torch.optim.Adam([mapping], lr=LEARNING_RATE / len(mapping))
    for _ in range(STEPS):
        chosen = torch.randperm(len(first), generator=generator)[:BATCH_PAIRS]
        keys = [F.normalize(part[chosen] @ mapping, dim=-1) for part in (first, second)]
        similarity = keys[0] @ keys[1].T / TEMPERATURE
        own = torch.arange(len(chosen))
        loss = F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mapping.detach()


def mapped(bank: MemoryBank, mapping: torch.Tensor) -> Iterator[pa.RecordBatch]:
    """Yield a bank's rows with mapped keys: as a key's length does not matter, they need no features."""
    for batch in bank.batches():
        keys = torch.from_numpy(matrix(batch, "key").astype(np.float32)) @ mapping
        column = batch.schema.get_field_index("key")
        yield batch.set_column(column, "key", list_column(F.normalize(keys, dim=-1).numpy()))
