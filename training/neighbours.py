"""Neighbours of a data set in a memory bank, looked up once: keys are frozen, so they never change in training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..modeling_tinyalign.bank_images import image_source_id
from ..modeling_tinyalign.memory_bank import MemoryBank
from .features import read_image, undecoded


@torch.no_grad()
def find_neighbours(
    bank: MemoryBank,
    model: PreTrainedModel,
    vision_features: np.ndarray,
    top_k: int,
    source_ids: Sequence[str] | None = None,
    batch_size: int = 256,
    queries: Sequence[str] | None = None,
    processor: ProcessorMixin | None = None,
    desc: str = "Neighbours",
) -> np.ndarray:
    """
    The `top_k` rows of the bank nearest to each image, best first.

    Args:
        model: Checked against the bank; the search runs on its device.
        vision_features: `(n, T, C)`, as [`cache_vision_features`] returns.
        source_ids: The `source_id` of each image ([`source_ids_of`]); its own rows of the bank are left out. Training
            without it lets an image retrieve itself, its answer included.
        queries, processor: The question asked about each image, and the processor that reads it; only for a bank with
            keys in the language space.

    Returns:
        `(n, top_k)` int64 row ids, -1 where exclusion left too few. Store them as the column `memory_ids`.

    Raises:
        ValueError: The bank is of another tower, `top_k` is larger than it, or the lengths differ.
    """
    n = len(vision_features)
    for name, column in (("source_ids", source_ids), ("queries", queries)):
        if column is not None and len(column) != n:
            raise ValueError(f"Found {len(column)} {name} for {n} vision_features, expected one for each.")
    if not bank.any_tower:
        bank.check_probes(model)
    neighbours = np.empty((n, top_k), np.int64)
    for start in tqdm(range(0, n, batch_size), desc, unit="batch"):
        rows = slice(start, start + batch_size)
        features = torch.from_numpy(np.array(vision_features[rows])).to(model.device)
        query = {}
        if queries is not None:
            inputs = processor.tokenizer(
                list(queries[rows]),
                padding=True,
                padding_side="right",
                add_special_tokens=False,
                return_attention_mask=True,
                return_tensors="pt",
            ).to(model.device)
            query = {f"query_{name}": inputs[name] for name in ("input_ids", "attention_mask")}
        keys = bank.encode_queries(features, **query)
        exclude = None if source_ids is None else list(source_ids[rows])
        _, ids = bank.search(keys, top_k, exclude=exclude)
        neighbours[rows] = ids.cpu().numpy()
    return neighbours


def source_ids_of(images: Sequence[Any], desc: str = "Naming images") -> list[str]:
    """The `source_id` of each image: a hash of its decoded pixels, as in the bank."""
    images = undecoded(images)
    return [image_source_id(read_image(images, index)) for index in tqdm(range(len(images)), desc, unit="image")]
