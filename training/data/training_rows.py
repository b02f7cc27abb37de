"""The rows and columns of a data set that are trained and evaluated on."""

import hashlib
import json

import datasets
import numpy as np
from transformers import PreTrainedModel

from ...modeling_tinyalign.memory_bank import MemoryBank
from .features import refuse_transforms
from .files import Rows, undecoded


def training_rows(
    model: PreTrainedModel, dataset: Rows, bank: MemoryBank | None, vision_features: np.ndarray | None
) -> Rows:
    """The columns the collator reads, with `feature_index` added where the features are those of the rows, in order.
    Images stay as they are stored: the collator decodes them, and names the one that it cannot.

    Raises `ValueError` when rows, a column or the bank are missing, or the features or neighbours do not fit.
    """
    if vision_features is not None and model.base_model.trains_vision_tower:
        raise ValueError(
            "The vision tower trains, but vision_features were given, which it made before: leave them out, or freeze "
            "it (tune_vision_tower: frozen)."
        )
    top_k = model.config.num_neighbours
    if (top_k > 0) != (bank is not None):
        raise ValueError(
            f"The model has memory_top_k = {top_k}, but {'no bank' if bank is None else 'a bank'} was given: a model "
            "with memory trains with one, a model without (memory_top_k = 0) does not."
        )
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"The data set is a {type(dataset).__name__}, expected a datasets.Dataset: of several splits pass one, "
            'dataset["train"] say; a list becomes one with datasets.Dataset.from_list.'
        )
    if len(dataset) == 0:
        raise ValueError("The data set has no rows, expected at least one.")
    if vision_features is not None:
        refuse_transforms(dataset)
        if "feature_index" not in dataset.column_names:
            if len(vision_features) != len(dataset):
                raise ValueError(
                    f"There are {len(vision_features)} vision_features for {len(dataset)} rows: give the data set a "
                    "column feature_index that says which features are whose."
                )
            dataset = dataset.add_column("feature_index", list(range(len(dataset))))
    columns = _columns_to_read(model, dataset, bank, vision_features)
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The data set has no {', '.join(missing)}, its columns are {dataset.column_names}. `messages` are chats, "
            "`memory_ids` and `memory_scores` are what find_neighbours returns, `image` or `images` are not needed "
            "with vision_features and a column feature_index that says which are whose."
        )
    rows = dataset.select_columns(columns + [name for name in ("row", "id") if name in dataset.column_names])
    if "row" not in rows.column_names:
        rows = rows.add_column("row", list(range(len(rows))))
    if rows.format["type"] != "custom":  # a transform wants decoded images
        rows = undecoded(rows)
    ids = None if bank is None else rows[0]["memory_ids"]  # one list, or a list for each image; none for text
    if ids and (found := len(ids[0] if isinstance(ids[0], list) else ids)) < top_k:
        raise ValueError(
            f"A row has {found} memory_ids an image, expected memory_top_k = {top_k} or more: look them up with "
            "find_neighbours(..., top_k=model.config.memory_top_k)."
        )
    return rows


def _columns_to_read(
    model: PreTrainedModel, dataset: datasets.Dataset, bank: MemoryBank | None, vision_features: np.ndarray | None
) -> list[str]:
    columns = ["messages"]
    if vision_features is not None:
        columns.append("feature_index")
    else:
        columns += [name for name in ("image", "images") if name in dataset.column_names] or ["image"]
    if bank is None:
        return columns
    columns += ["memory_ids", *({"source_ids"} & set(dataset.column_names))]
    scores_wanted = model.config.memory_scores or model.config.retrieval_threshold is not None
    if scores_wanted or "memory_scores" in dataset.column_names:
        columns.append("memory_scores")
    return columns


def evaluation_rows(
    model: PreTrainedModel,
    dataset: Rows | dict[str, Rows] | None,
    bank: MemoryBank | None,
    vision_features: np.ndarray | None,
) -> Rows | dict[str, Rows] | None:
    """[`training_rows`] of an `eval_dataset`, or of each by name, with images or a `feature_index` into the training
    rows' features.
    """
    if isinstance(dataset, dict):
        return {name: evaluation_rows(model, rows, bank, vision_features) for name, rows in dataset.items()}
    if dataset is None or isinstance(dataset, datasets.IterableDataset):
        return dataset
    if vision_features is not None and "feature_index" not in dataset.column_names:
        vision_features = None
    return training_rows(model, dataset, bank, vision_features)


def content_hash(rows: datasets.Dataset) -> str:
    """Hash chats and neighbours; the same in every run, where `Dataset._fingerprint` may be random."""
    digest = hashlib.sha256()
    columns = [column for column in rows.column_names if column not in ("image", "images", "row", "id")]
    for batch in rows.select_columns(columns).with_format(None).iter(1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]
