"""All that a run needs: a model, its bank, and rows with their features and neighbours."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from ...modeling_tinyalign import MemoryBank
from ...modeling_tinyalign.bank_arrays import cache_root
from ...modeling_tinyalign.composition import check_origins
from ..arguments.files import read_config
from ..arguments.stage import StageArguments
from ..disk import keeping
from ..models import attach_bank, context_length, load_model, neighbours_of_baseline, read_bank
from .check import training_data
from .rows import with_features, with_neighbours

SHUFFLE_BUFFER = 1000  # streamed rows to draw from, images and all


@dataclass
class Run:
    """A model, its processor and bank, and the rows that it trains and is evaluated on."""

    model: PreTrainedModel
    processor: ProcessorMixin
    bank: MemoryBank | None
    rows: datasets.Dataset | datasets.IterableDataset
    features: np.ndarray | None
    eval_rows: datasets.Dataset | None = None


def prepare(config: StageArguments) -> Run:
    """Return model, bank and rows of a run; features and neighbours are computed where they are missing."""
    set_seed(config.seed)
    bank = read_bank(config)
    model, processor = load_model(config, bank)
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
    with keeping(cache_root(), "what was computed"):
        bank = prepare(config).bank
    if bank is None:
        raise ValueError("The model has no memory (memory_top_k: 0): there is nothing to look up.")
