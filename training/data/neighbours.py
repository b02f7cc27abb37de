"""Neighbours of cached visual features in a memory bank; of a whole data set, see neighbour_table.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.row_encoder import image_source_id
from .features import read_image, undecoded_images


@torch.no_grad()
def find_neighbours(
    bank: MemoryBank,
    model: PreTrainedModel,
    vision_features: np.ndarray,
    top_k: int,
    source_ids: Sequence[str] | None = None,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `top_k` rows of the bank nearest to each image, best first.

    Args:
        model: checked against the bank; the search runs on its device.
        vision_features: `(n, T, C)`, as `cache_vision_features` returns.
        source_ids: of each image (`source_ids_of`); its own rows of the bank are left out. Training without it lets
            an image retrieve itself, its answer included.

    Returns:
        similarities `(n, top_k)` float32 and row ids `(n, top_k)` int64, -inf and -1 where exclusion left too few.

    Raises:
        ValueError: the bank is of another tower, `top_k` is larger than it, or the lengths differ.
    """
    n = len(vision_features)
    if source_ids is not None and len(source_ids) != n:
        raise ValueError(f"Found {len(source_ids)} source_ids for {n} vision_features, expected one for each.")
    if not bank.any_tower:
        bank.check_probes(model)
    scores, ids = np.empty((n, top_k), np.float32), np.empty((n, top_k), np.int64)
    for start in tqdm(range(0, n, batch_size), "Neighbours", unit="batch"):
        rows = slice(start, start + batch_size)
        keys = bank.encode_queries(torch.from_numpy(np.array(vision_features[rows])).to(model.device))
        exclude = None if source_ids is None else list(source_ids[rows])
        scores[rows], ids[rows] = (found.cpu().numpy() for found in bank.search(keys, top_k, exclude=exclude))
    return scores, ids


def source_ids_of(images: Sequence[Any], desc: str = "Naming images") -> list[str]:
    """Return the `source_id` of each image: a hash of its decoded pixels, as in the bank."""
    images = undecoded_images(images)
    return [image_source_id(read_image(images, index)) for index in tqdm(range(len(images)), desc, unit="image")]
