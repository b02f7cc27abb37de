"""Trained weights as files, and which checkpoint a run goes on from."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel, ProcessorMixin, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from ...modeling_tinyalign.bank_format import file_sha256
from ...modeling_tinyalign.files import apply_umask
from ...modeling_tinyalign.memory_bank import MemoryBank
from ..arguments.stage import StageArguments
from ..arguments.tuning import part_of
from ..data.training_rows import content_hash
from ..disk import save_file as write_file
from ..hub.run_facts import RUN_NAME

logger = logging.get_logger(__name__)

TRAINED_NAME = "trained.safetensors"
# What decides the trajectory: with another value, checkpoints are of another run.
TRAJECTORY = (
    "learning_rate vision_tower_lr connector_lr memory_connector_lr language_model_lr lr_scheduler_type warmup_steps "
    "tune_vision_tower tune_connector tune_memory_connector tune_language_model lora_r lora_alpha lora_dropout "
    "lora_target_modules weight_decay optim optim_args adam_beta1 adam_beta2 adam_epsilon lr_scheduler_kwargs "
    "max_grad_norm neftune_noise_alpha num_train_epochs max_steps seed data_seed train_sampling_strategy "
    "dataloader_drop_last bf16 fp16 memory_dropout max_length truncation save_only_model model vision_model "
    "language_model streaming image_folder"
).split()
# The same of a stream, whose rows are not read before.
STREAM = (
    "dataset dataset_config dataset_revision dataset_split image_column messages_column answer_column prompt "
    "dataloader_num_workers"
).split()
MODEL_TRAJECTORY = (
    "vision_feature_layer vision_feature_select_strategy vision_pool_size image_seq_length connector_size "
    "projector_hidden_act memory_top_k memory_tokens memory_input latent_dim memory_connector_size key_space "
    "query_alpha memory_scores retrieval_threshold prompt_captions"
).split()


def save_trained(
    model: PreTrainedModel, folder: str | os.PathLike, state_dict: dict | None = None, loadable: bool = True
):
    """Write the connectors, and all else that trains, to `trained.safetensors`: of a model that is divided, from its
    gathered `state_dict`. Where nothing else trains, and the other parts are known checkpoints, the folder loads with
    `from_pretrained` (`loadable`).
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    tensors, only_connectors = {}, True
    for name, parameter in model.named_parameters():
        is_connector = "connector" in part_of(name)
        if is_connector or parameter.requires_grad:
            tensors[name] = state_dict[name].detach().cpu().contiguous()
            only_connectors &= is_connector
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, TRAINED_NAME), metadata={"format": "pt"})
    apply_umask(folder)
    if loadable and only_connectors and None not in (model.config.vision_model, model.config.language_model):
        model.save_pretrained(folder, connectors_only=True, state_dict=state_dict)
    else:
        model.config.save_pretrained(folder)  # with which `from_pretrained` says what loads


def load_trained(model: PreTrainedModel, folder: str | os.PathLike):
    """Read what [`save_trained`] wrote."""
    # also into a model that FSDP has divided
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, load_file(Path(folder, TRAINED_NAME)), options=options)


def trajectory_settings(
    args: StageArguments, model: PreTrainedModel, processor: ProcessorMixin, rows: Any, bank: MemoryBank | None
) -> dict[str, Any]:
    """Return, by name, all that decides the losses of a run: its checkpoints are of no use with other values."""
    settings = {name: vars(args)[name] for name in TRAJECTORY}
    if args.model is not None and os.path.isdir(args.model):  # stage 1 may have been trained anew
        settings["model_weights"] = [file_sha256(path) for path in sorted(Path(args.model).glob("*.safetensors"))]
    settings["global_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(rows, datasets.Dataset):
        settings["rows"] = len(rows)
        settings["rows_hash"] = content_hash(rows)
    else:
        settings |= {name: vars(args)[name] for name in STREAM}
    shas = None if bank is None else {"keys": bank.config.sha256.keys, "values": bank.config.sha256.values}
    settings |= {"memory_bank": shas, "image_aspect_ratio": processor.image_aspect_ratio}
    return settings | {name: vars(model.config)[name] for name in MODEL_TRAJECTORY}


def last_checkpoint(
    output_dir: str | os.PathLike, settings: dict, chosen: str | None = None, write: bool = True
) -> str | None:
    """The last complete checkpoint of the run with these settings, or that which was `chosen`. The settings are kept
    beside the checkpoints (`write`).

    Raises `ValueError`, naming what differs, when the checkpoints are of another run, or the chosen one is not there.
    """
    settings = json.loads(json.dumps(settings, default=str))
    run = Path(output_dir, RUN_NAME)
    complete = complete_checkpoints(output_dir)
    if complete and run.is_file():
        earlier = json.loads(run.read_text())
        changed = [  # an earlier version may have kept fewer settings
            f"{name}: {earlier[name]!r} then, {settings[name]!r} now"
            for name in sorted(earlier.keys() & settings.keys())
            if earlier[name] != settings[name]
        ]
        if changed:
            raise ValueError(
                f"{output_dir} holds checkpoints of another run ({'; '.join(changed)}). Use another output_dir, or "
                "delete this one to train anew."
            )
    if chosen is not None and Path(chosen).resolve() not in [Path(path).resolve() for path in complete]:
        raise ValueError(
            f"resume_from_checkpoint is {chosen}, but the complete checkpoints in {output_dir} are "
            f"{', '.join(complete) or 'none'}: choose one of them, or leave it out to go on from the last, if any."
        )
    if write:  # one process does
        run.parent.mkdir(parents=True, exist_ok=True)
        write_file(run, f"{json.dumps(settings, indent=2)}\n".encode())
    return chosen or (complete[-1] if complete else None)


def begin_anew(args: StageArguments):
    """Remove the checkpoints of an earlier run: the newest are kept, and those of one that begins anew are older."""
    for path in sort_checkpoints(args.output_dir) if args.should_save else ():
        logger.warning(f"Removing {path}: the run begins anew.")
        shutil.rmtree(path)


def read_state(checkpoint: str) -> TrainerState:
    """Return the state of a run at a checkpoint, the best of them beside it: their folder may have been moved."""
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    if state.best_model_checkpoint is not None:
        name = Path(state.best_model_checkpoint).name
        state.best_model_checkpoint = str(Path(checkpoint).absolute().with_name(name))
    return state


def complete_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """Return the folders of the checkpoints that were written to their end, the last one last."""
    complete = []
    for path in sort_checkpoints(str(output_dir)):
        with suppress(FileNotFoundError, ValueError):  # the last file is missing or cut: the disk may have been full
            json.loads(Path(path, TRAINER_STATE_NAME).read_text())
            complete.append(path)
    return complete
