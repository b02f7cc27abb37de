"""`tinyalign train`: a stage from YAML files."""

import copy
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed

from ...modeling_tinyalign import MemoryBank, TinyAlignForConditionalGeneration
from ...modeling_tinyalign.bank_arrays import cache_root
from ...modeling_tinyalign.composition import check_origins
from ..arguments.files import read_config
from ..arguments.run_arguments import RunArguments
from ..bank.calibration import calibrate_rows, write_threshold
from ..data.check import training_data
from ..data.rows import with_features, with_neighbours
from ..disk import keeping
from ..evaluation.baselines import with_static_captions
from ..hub.training_card import write_training_card
from ..models import attach_bank, context_length, load_model, neighbours_of_baseline, read_bank
from .trainers import train_stage1, train_stage2

SHUFFLE_BUFFER = 1000  # streamed rows to draw from, images and all


STAGES = {1: train_stage1, 2: train_stage2}


def train_from_files(paths: Sequence[str | os.PathLike], fields: list[str]):
    """
    Trains what the YAML files at `paths` say (later ones win), with `fields` (`["--learning_rate", "5e-4"]`) put
    before them, and saves model and processor to `output_dir`.

    Raises `ValueError` or `OSError` that says what is wrong with the files, the data, the model or the bank.
    """
    config = read_config(paths, fields)
    with keeping(config.output_dir, "the checkpoints so far"):
        run = prepare(config)
        bank = run.bank
        if config.baseline == "static_rag":
            run.rows = with_static_captions(config, run.processor, run.rows, bank)
            if run.eval_rows is not None:
                run.eval_rows = with_static_captions(config, run.processor, run.eval_rows, bank)
            bank = None
        train = STAGES[config.stage]
        trainer = train(config, run.model, run.processor, run.rows, bank, run.features, run.eval_rows)
        save(trainer, run.model, run.processor)
        if trainer.is_world_process_zero():
            command = shlex.join(["tinyalign", "train", *map(str, paths), *fields])
            write_training_card(config, run.model, trainer, bank, command)


@dataclass
class Run:
    """What a stage trains, and on what."""

    model: PreTrainedModel
    processor: ProcessorMixin
    bank: MemoryBank | None
    rows: datasets.Dataset | datasets.IterableDataset
    features: np.ndarray | None
    eval_rows: datasets.Dataset | None = None


def prepare(config: RunArguments) -> Run:
    """Model, bank and rows of a run, with their features and neighbours, which are computed where they are missing."""
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
        of_evaluation = None if config.eval_dataset is None else evaluation_config(config)
        eval_rows = None if of_evaluation is None else training_data(of_evaluation, processor)
    rows, features = with_features(config, model, processor, rows)
    if bank is not None:
        top_k = model.config.num_neighbours or neighbours_of_baseline(config)
        rows = with_neighbours(config, model, processor, rows, bank, top_k, features)
        if eval_rows is not None:
            eval_rows = with_neighbours(of_evaluation, model, processor, eval_rows, bank, top_k)
    return Run(model, processor, bank, rows, features, eval_rows)


def evaluation_config(config: RunArguments) -> RunArguments:
    """The settings of a run, for reading its evaluation rows: these are neither streamed nor cached."""
    changed = copy.copy(config)
    changed.dataset, changed.dataset_split, changed.streaming = config.eval_dataset, config.eval_split, False
    changed.output_dir = os.path.join(config.output_dir, "evaluation")
    return changed


def find_neighbours_from_files(paths: Sequence[str | os.PathLike], fields: list[str]):
    """Looks up the neighbours that `tinyalign train` with the same arguments needs, and nothing else."""
    config = read_config(paths, [*fields, "--cache_features", "False"])
    if config.streaming:
        raise ValueError("streaming is true: neighbours of streamed rows are looked up in every step.")
    with keeping(cache_root(), "what was computed"):
        bank = prepare(config).bank
    if bank is None:
        raise ValueError("The model has no memory (memory_top_k: 0): there is nothing to look up.")


def calibrate_from_files(paths: Sequence[str | os.PathLike], fields: list[str], target: float | None = None):
    """
    Prints how much neighbours agree with the answers of the rows, and sets the `retrieval_threshold` of the config's
    `model`, if that is a folder.
    """
    if target is not None and not 0 <= target <= 1:
        raise ValueError(f"min_agreement is {target}, expected a share, 0 (no word shared) to 1 (the same words).")
    config = read_config(paths, [*fields, "--cache_features", "False"])
    with keeping(cache_root(), "what was computed"):
        run = prepare(config)
    if run.model.config.num_neighbours == 0 or config.streaming:
        raise ValueError(
            f"memory_top_k is {run.model.config.memory_top_k} and streaming {config.streaming}: to calibrate takes a "
            "bank, and rows that are not streamed."
        )
    found = calibrate_rows(run.rows, run.bank, run.model.config.num_neighbours, target)
    print(found)
    if config.model is not None and Path(config.model).is_dir():
        write_threshold(Path(config.model), found.threshold)
        print(f"Written to {Path(config.model, 'config.json')}.")
    else:
        print(f"Set it with --model_kwargs '{{\"retrieval_threshold\": {found.threshold:.4f}}}'.")


def save(trainer: Trainer, model: PreTrainedModel, processor: ProcessorMixin):
    """Model and processor to `output_dir`; all processes call it, because each may hold a part of the weights."""
    state_dict = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state_dict = dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))
        if model.config.tie_word_embeddings:
            state_dict.pop("lm_head.weight", None)
        generation_config = model.generation_config
        with torch.device("meta"):  # FSDP changes the class of the model, and with it the code that is saved
            model = TinyAlignForConditionalGeneration(model.config)
        model.generation_config = generation_config
    if trainer.is_world_process_zero():
        alone = trainer.args.save_only == "connectors"
        model.save_pretrained(trainer.args.output_dir, connectors_only=alone, state_dict=state_dict)
        processor.save_pretrained(trainer.args.output_dir)
