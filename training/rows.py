"""From the files people have to the rows both stages train on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedModel, ProcessorMixin

from ..modeling_tinyalign.memory_bank import MemoryBank
from .arguments import RunArguments
from .data import check_messages, to_messages
from .features import cache_vision_features
from .neighbours import find_neighbours, source_ids_of

READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def read_rows(config: RunArguments) -> datasets.Dataset:
    """
    The data set of a config with its columns as `image` and `messages`, nothing else.

    Paths of images in a file are relative to that file. Raises `ValueError` when the data or a column is missing, or
    when a row has no answer (it is named).
    """
    if config.dataset is None:
        raise ValueError("No data set: set `dataset` in the YAML file, or pass --dataset FILE_OR_REPOSITORY.")
    path = Path(config.dataset)
    try:
        if path.is_file() and path.suffix in READERS:
            rows = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(config.dataset, split=config.dataset_split)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(
            f"{config.dataset} cannot be read ({error.__cause__ or error}), expected a Parquet, JSON or JSON-lines "
            "file, a folder, or a dataset repository."
        ) from error
    if config.image_column not in rows.column_names:
        raise ValueError(
            f"{config.dataset} has no column {config.image_column!r} with images, its columns are "
            f"{rows.column_names}: set image_column."
        )
    columns = {config.image_column: "image"}
    messages = None
    if config.messages_column in rows.column_names:
        columns[config.messages_column] = "messages"
        for number, chat in enumerate(rows[config.messages_column]):
            with naming_row(config.dataset, number):
                check_messages(chat)
    elif config.prompt is not None and config.answer_column in rows.column_names:
        messages = []
        for number, answer in enumerate(rows[config.answer_column]):
            with naming_row(config.dataset, number):
                messages.append(to_messages(config.prompt, answer))
    else:
        raise ValueError(
            f"{config.dataset} has the columns {rows.column_names}: name the one with chats with messages_column, or "
            f"the one with labels or captions with answer_column (found {config.answer_column!r}), and set prompt, "
            f"what is asked about every image (found {config.prompt!r})."
        )
    rows = rows.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})
    if rows.features["image"] == datasets.Value("string"):
        folder = path.parent if path.is_file() else path
        rows = rows.map(lambda row: {"image": os.path.join(folder, row["image"])}, desc="Paths of images")
    rows = rows.cast_column("image", datasets.Image())
    return rows if messages is None else rows.add_column("messages", messages)


@contextmanager
def naming_row(dataset: str, number: int) -> Iterator[None]:
    """Puts the row, counted from 0, before the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Row {number} of {dataset} (the first is 0): {error}") from error


def with_features_and_neighbours(
    config: RunArguments,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    bank: MemoryBank | None,
) -> tuple[datasets.Dataset, np.ndarray | None]:
    """
    The rows, with `memory_ids` if there is a bank, and their cached visual features if those are wanted. The features
    are kept in `config.output_dir`; a bank's neighbours need them in any case.
    """
    if bank is None and not config.cache_features:
        return rows, None
    folder = Path(config.output_dir)
    batch_size = 8 if config.device.type == "cpu" else 64
    features = cache_vision_features(model, processor, rows["image"], folder / "vision_features", batch_size)
    if bank is not None:
        queries = None
        if bank.key_space == "language":
            queries = [processor._query_text(messages) for messages in rows["messages"]]
        neighbours = find_neighbours(
            bank,
            model,
            features,
            model.config.memory_top_k,
            source_ids_of(rows["image"]),
            queries=queries,
            processor=processor,
        )
        rows = rows.add_column("memory_ids", neighbours.tolist())
    return rows, features if config.cache_features else None
