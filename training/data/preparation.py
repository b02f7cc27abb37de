"""All that a run needs: a model, its bank, and rows with their features and neighbours."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from transformers.utils import logging

from ...modeling_tinyalign import MemoryBank
from ...modeling_tinyalign.bank_arrays import cache_root
from ...modeling_tinyalign.composition import check_origins
from ..arguments.files import read_config
from ..arguments.stage import StageArguments
from ..disk import full_disk_advice
from ..models import attach_bank, context_length, load_model, neighbours_of_baseline, read_bank
from .check import training_data
from .features import cache_vision_features
from .files import Rows
from .neighbours import NeighbourSearch, summary
from .rows import RowImages, batch_size_of

logger = logging.get_logger(__name__)

SHUFFLE_BUFFER = 1000  # streamed rows to draw from, images and all


@dataclass
class Run:
    """A model, its processor and bank, and the rows that it trains and is evaluated on."""

    model: PreTrainedModel
    processor: ProcessorMixin
    bank: MemoryBank | None
    rows: Rows
    features: np.ndarray | None
    eval_rows: datasets.Dataset | None = None


def prepare(config: StageArguments) -> Run:
    """Return model, bank and rows of a run; features and neighbours are computed where they are missing."""
    set_seed(config.seed)
    bank = read_bank(config)
    model, processor = load_model(config)
    if config.save_only is not None:
        check_origins(model.config)
    model.to(config.device)
    bank = attach_bank(config, model, processor, bank)
    if config.max_length is None:
        config.max_length = context_length(model)
    with PartialState().main_process_first():
        rows = training_data(config, processor, name_images=bank is not None)
        if config.streaming and config.train_sampling_strategy == "random":
            seed = config.seed if config.data_seed is None else config.data_seed
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        evaluation = None if config.eval_dataset is None else evaluation_settings(config)
        eval_rows = None if evaluation is None else training_data(evaluation, processor)
    rows, features = with_features(config, model, processor, rows)
    if bank is not None:
        top_k = model.config.num_neighbours or neighbours_of_baseline(config)
        rows = with_neighbours(config, model, processor, rows, bank, top_k, features)
        if eval_rows is not None:
            eval_rows = with_neighbours(evaluation, model, processor, eval_rows, bank, top_k)
    return Run(model, processor, bank, rows, features, eval_rows)


def with_features(
    config: StageArguments, model: PreTrainedModel, processor: ProcessorMixin, rows: Rows
) -> tuple[Rows, np.ndarray | None]:
    """Return the visual features, with `config.cache_features`, and the rows with `feature_index`. They are kept under
    `HF_HOME`, for other runs with the same images, tower and preprocessing.

    All processes of a run must call this at once: they share the work.
    """
    images = RowImages(rows) if config.cache_features else []
    if len(images) == 0:
        return rows, None
    path = cache_root() / "features" / "vision"
    features = cache_vision_features(model, processor, images, path, batch_size_of(config))
    return rows.add_column("feature_index", images.by_row(range(len(images)))), features


def with_neighbours(
    config: StageArguments,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Rows,
    bank: MemoryBank,
    top_k: int,
    features: np.ndarray | None = None,
) -> Rows:
    """Return the rows with `memory_ids` and `memory_scores`, lists of `2 * top_k` for each of their images: the second
    half are spare ones, for [`MemoryDropout`]. And `source_ids`, the names of the images: no row of the bank that is
    of one of a row's images is a neighbour of any of them. Streamed rows get none: the model retrieves for each batch.

    All processes of a run must call this at once: they share the work.
    """
    if config.streaming:
        return rows
    images = RowImages(rows)
    columns = {"memory_ids": [], "memory_scores": [], "source_ids": []}
    if len(images):
        queries, row_numbers = None, images.row_numbers()
        if bank.config.key_encoder.key_space == "language":
            texts = [processor.query_text_of(messages) for messages in rows["messages"]]
            queries = [texts[row] for row in row_numbers]
        settings = (row_numbers, queries, features, batch_size_of(config), config.dataloader_num_workers)
        search = NeighbourSearch(bank, model, processor, images, 2 * top_k, *settings)
        path = search.table(cache_root() / "neighbours")
        table = datasets.Dataset.from_parquet(str(path))
        if PartialState().is_main_process:
            logger.warning(f"{path}: {summary(table, top_k)}")
        columns = {name: table[name.replace("source_ids", "source_id")][:] for name in columns}
    for name, values in columns.items():
        rows = rows.add_column(name, images.by_row(values))
    return rows


def evaluation_settings(config: StageArguments) -> StageArguments:
    """Return the settings for reading the evaluation rows of a run, which are neither streamed nor cached."""
    changed = copy.copy(config)
    changed.dataset, changed.dataset_split, changed.streaming = config.eval_dataset, config.eval_split, False
    if config.eval_image_folder is not None or config.eval_dataset != config.dataset:
        changed.image_folder = config.eval_image_folder
    if config.eval_dataset != config.dataset:  # not those of another repository
        changed.dataset_config = changed.dataset_revision = None
    changed.output_dir = os.path.join(config.output_dir, "evaluation")
    return changed


def find_neighbours_from_files(paths: Sequence[str | os.PathLike], fields: list[str]):
    """Look up the neighbours that `tinyalign train` with the same arguments needs, and nothing else."""
    config = read_config(paths, [*fields, "--cache_features", "False"])
    if config.streaming:
        raise ValueError("streaming is true: neighbours of streamed rows are looked up in every step.")
    if config.eval_benchmark is not None:
        config.eval_dataset = None  # training makes a benchmark's chats, and looks up theirs
    with full_disk_advice(cache_root(), "what was computed"):
        bank = prepare(config).bank
    if bank is None:
        raise ValueError("The model has no memory (memory_top_k: 0): there is nothing to look up.")
